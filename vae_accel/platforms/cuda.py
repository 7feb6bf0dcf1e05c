"""NVIDIA: what is on was measured on an H200 or an H100 (platforms/cuda/results)."""

from vae_accel.platforms.base import Platform, Step
from vae_accel.rewrites.bilinear_pos_embed import BilinearPosEmbed
from vae_accel.rewrites.causal_padding import CausalPadding
from vae_accel.rewrites.channels_last import ChannelsLast
from vae_accel.rewrites.conv3d_as_conv2d import Conv3dAsConv2d
from vae_accel.rewrites.cuda_graph import HALVES, CudaGraph
from vae_accel.rewrites.folded_upsample import FoldedUpsample
from vae_accel.rewrites.fp8_operands import OPT_IN as FP8_OPT_IN
from vae_accel.rewrites.fp8_operands import Fp8Operands
from vae_accel.rewrites.fused_blocks import FusedBlocks
from vae_accel.rewrites.fused_elementwise import FusedElementwise
from vae_accel.rewrites.fused_norm_act import FusedNormAct
from vae_accel.rewrites.half_decode import OPT_IN, HalfDecode
from vae_accel.rewrites.joint_projections import JointProjections
from vae_accel.rewrites.latent_chunks import LatentChunks
from vae_accel.rewrites.native_reshape import NativeReshape
from vae_accel.rewrites.packed_attention import PackedAttention
from vae_accel.rewrites.padded_mlp import PaddedMlp
from vae_accel.rewrites.patch_embed_as_linear import PatchEmbedAsLinear
from vae_accel.rewrites.residual_norm import ResidualNorm
from vae_accel.rewrites.single_frame_conv import SingleFrameConv
from vae_accel.rewrites.vision_metadata import VisionMetadata


class Cuda(Platform):
    name = "cuda"
    vae = (
        Step(NativeReshape(), "on", "results"),
        Step(FusedNormAct(), "on", "results"),
        Step(FoldedUpsample(form="phases"), "on", "results"),
        Step(CausalPadding(), "on", "results"),
        Step(Conv3dAsConv2d(form="stack"), "off", "cuDNN 9.19 is faster on all seven shapes measured (0.55x to 1.01x)"),
        Step(PatchEmbedAsLinear(), "on", "results"),
        Step(SingleFrameConv(), "on", "results"),
        Step(ChannelsLast(), "on", "results"),
        Step(LatentChunks(), "on", "results"),
        Step(HalfDecode(), "off", OPT_IN),
        Step(FusedBlocks(proved=True), "on", "results"),
        Step(Fp8Operands(), "off", FP8_OPT_IN),
        Step(CudaGraph(names=HALVES), "on", "results"),
    )
    encoder = (
        Step(NativeReshape(), "on", "results"),
        Step(PatchEmbedAsLinear(), "on", "results"),
        Step(VisionMetadata(), "on", "results"),
        Step(BilinearPosEmbed(), "on", "results"),
        Step(PackedAttention(), "on", "results"),
        Step(PaddedMlp(), "on", "results"),
        Step(FusedElementwise(), "on", "results"),
        Step(JointProjections(), "on", "results"),
        Step(ResidualNorm(), "on", "results"),
        Step(CudaGraph(), "on", "results"),
    )
