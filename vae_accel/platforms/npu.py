"""Ascend: the torch forms only, no channels_last_3d, no Triton; not measured on hardware (platforms/npu/README.md)."""

from vae_accel.platforms.base import Platform, Step
from vae_accel.rewrites.channels_last import ChannelsLast
from vae_accel.rewrites.conv3d_as_conv2d import Conv3dAsConv2d
from vae_accel.rewrites.cuda_graph import CudaGraph
from vae_accel.rewrites.folded_upsample import FoldedUpsample
from vae_accel.rewrites.fused_norm_act import FusedNormAct
from vae_accel.rewrites.half_decode import OPT_IN, HalfDecode
from vae_accel.rewrites.joint_projections import JointProjections
from vae_accel.rewrites.native_reshape import NativeReshape
from vae_accel.rewrites.packed_attention import PackedAttention
from vae_accel.rewrites.padded_mlp import PaddedMlp
from vae_accel.rewrites.patch_embed_as_linear import PatchEmbedAsLinear
from vae_accel.rewrites.single_frame_conv import SingleFrameConv
from vae_accel.rewrites.vision_metadata import VisionMetadata

UNMEASURED = "not measured on hardware"


class Npu(Platform):
    name = "npu"
    note = UNMEASURED
    vae = (
        Step(NativeReshape(), "off", UNMEASURED),
        Step(FusedNormAct(), "off", UNMEASURED),
        Step(FoldedUpsample(form="phases"), "off", UNMEASURED),
        Step(Conv3dAsConv2d(form="stack", channels_last=False), "off", UNMEASURED),
        Step(PatchEmbedAsLinear(), "off", f"{UNMEASURED}; reports contradict each other"),
        Step(SingleFrameConv(), "off", UNMEASURED),
        Step(ChannelsLast(clips=False), "off", UNMEASURED),
        Step(HalfDecode(), "off", OPT_IN),
    )
    encoder = (
        Step(NativeReshape(), "off", UNMEASURED),
        Step(PatchEmbedAsLinear(), "off", f"{UNMEASURED}; reports contradict each other"),
        Step(VisionMetadata(), "off", UNMEASURED),
        Step(PackedAttention(), "off", UNMEASURED),
        Step(PaddedMlp(), "off", UNMEASURED),
        Step(JointProjections(), "off", UNMEASURED),
        Step(CudaGraph(), "off", "CUDA graphs are for NVIDIA cards"),
    )
