"""The general passes, one file each. A rewrite never imports another; platforms put them in order."""

NAMES = (
    "native_reshape",
    "patch_embed_as_linear",
    "vision_metadata",
    "bilinear_pos_embed",
    "packed_attention",
    "padded_mlp",
    "fused_elementwise",
    "joint_projections",
    "residual_norm",
    "fused_norm_act",
    "folded_upsample",
    "causal_padding",
    "conv3d_as_conv2d",
    "single_frame_conv",
    "channels_last",
    "latent_chunks",
    "fused_blocks",
    "math_attention",
    "half_decode",
    "cuda_graph",
)
