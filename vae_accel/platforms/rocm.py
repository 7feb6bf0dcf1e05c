"""AMD: proved on a CPU and compiled ahead of time, not measured on hardware (platforms/rocm/README.md)."""

from vae_accel.platforms.base import Platform, Step
from vae_accel.rewrites.bilinear_pos_embed import BilinearPosEmbed
from vae_accel.rewrites.causal_padding import CausalPadding
from vae_accel.rewrites.channels_last import ChannelsLast
from vae_accel.rewrites.conv3d_as_conv2d import Conv3dAsConv2d
from vae_accel.rewrites.cuda_graph import CudaGraph
from vae_accel.rewrites.folded_upsample import FoldedUpsample
from vae_accel.rewrites.fused_elementwise import FusedElementwise
from vae_accel.rewrites.fused_norm_act import FusedNormAct
from vae_accel.rewrites.half_decode import OPT_IN, HalfDecode
from vae_accel.rewrites.joint_projections import JointProjections
from vae_accel.rewrites.math_attention import MathAttention
from vae_accel.rewrites.native_reshape import NativeReshape
from vae_accel.rewrites.packed_attention import PackedAttention
from vae_accel.rewrites.padded_mlp import PaddedMlp
from vae_accel.rewrites.patch_embed_as_linear import PatchEmbedAsLinear
from vae_accel.rewrites.residual_norm import ResidualNorm
from vae_accel.rewrites.single_frame_conv import SingleFrameConv
from vae_accel.rewrites.vision_metadata import VisionMetadata

UNMEASURED = "not measured on hardware"


class Rocm(Platform):
    name = "rocm"
    note = UNMEASURED
    vae = (
        Step(MathAttention(), "on", "heads wider than 256 are wrong on gfx11xx otherwise (pytorch#189849)"),
        Step(NativeReshape(), "off", UNMEASURED),
        Step(FusedNormAct(), "off", UNMEASURED),
        Step(FoldedUpsample(form="phases"), "off", f"{UNMEASURED}; phases, as MIOpen's transposed form is 20x slower"),
        Step(CausalPadding(), "off", UNMEASURED),
        Step(Conv3dAsConv2d(form="stack"), "off", f"{UNMEASURED}; 1.66x in another project on an RX 7900 XTX"),
        Step(PatchEmbedAsLinear(), "off", UNMEASURED),
        Step(SingleFrameConv(), "off", UNMEASURED),
        Step(ChannelsLast(), "off", UNMEASURED),
        Step(HalfDecode(), "off", OPT_IN),
    )
    encoder = (
        Step(NativeReshape(), "off", UNMEASURED),
        Step(PatchEmbedAsLinear(), "off", UNMEASURED),
        Step(VisionMetadata(), "off", UNMEASURED),
        Step(BilinearPosEmbed(), "off", UNMEASURED),
        Step(PackedAttention(), "off", UNMEASURED),
        Step(PaddedMlp(), "off", UNMEASURED),
        Step(FusedElementwise(), "off", UNMEASURED),
        Step(JointProjections(), "off", UNMEASURED),
        Step(ResidualNorm(), "off", UNMEASURED),
        Step(CudaGraph(), "off", f"{UNMEASURED}: graphs of HIP"),
    )
