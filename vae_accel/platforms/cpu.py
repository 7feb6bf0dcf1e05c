"""Any CPU, by oneDNN: what is on was measured on two cores with AVX-512 and bf16 (platforms/cpu/results)."""

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
from vae_accel.rewrites.latent_chunks import LatentChunks
from vae_accel.rewrites.native_reshape import NativeReshape
from vae_accel.rewrites.packed_attention import PackedAttention
from vae_accel.rewrites.padded_mlp import PaddedMlp
from vae_accel.rewrites.patch_embed_as_linear import PatchEmbedAsLinear
from vae_accel.rewrites.residual_norm import ResidualNorm
from vae_accel.rewrites.single_frame_conv import SingleFrameConv
from vae_accel.rewrites.vision_metadata import VisionMetadata


class Cpu(Platform):
    name = "cpu"
    vae = (
        Step(NativeReshape(), "on", "results"),
        Step(FusedNormAct(), "on", "results; by itself 1.0x, it is what lets channels_last be"),
        Step(FoldedUpsample(form="phases"), "on", "results"),
        Step(CausalPadding(), "on", "results; by itself 1.0x, it is what lets channels_last be"),
        Step(Conv3dAsConv2d(channels_last=False), "off", "oneDNN's Conv3d is faster (0.5x to 0.96x on six shapes)"),
        Step(PatchEmbedAsLinear(conv2d="16bit"), "on", "results of the encoders"),
        Step(SingleFrameConv(), "on", "results"),
        Step(ChannelsLast(fp32=False), "on", "results"),
        Step(LatentChunks(most=1), "off", "1.0x; with four latents a step 0.5x to 0.9x, whose frames leave its caches"),
        Step(HalfDecode(), "off", OPT_IN),
    )
    encoder = (
        Step(NativeReshape(), "on", "results"),
        Step(PatchEmbedAsLinear(conv2d="16bit"), "on", "results"),
        Step(VisionMetadata(), "on", "results"),
        Step(BilinearPosEmbed(), "off", "slower below about 3000 patches in torch"),
        Step(PackedAttention(), "off", "1.0x on four layers of Qwen2.5-VL's tower"),
        Step(PaddedMlp(), "off", "1.0x in fp32 and slower in bf16 on four layers of Qwen2.5-VL's tower"),
        Step(FusedElementwise(), "off", "its kernels are for accelerators"),
        Step(JointProjections(), "off", "1.0x in bf16, 1.1x in fp32 on four layers of CLIP-H"),
        Step(ResidualNorm(), "off", "its kernels are for accelerators"),
        Step(CudaGraph(), "off", "CUDA graphs are for NVIDIA cards"),
    )
