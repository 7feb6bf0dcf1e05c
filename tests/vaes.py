"""A tiny configuration of every autoencoder of diffusers that holds a Conv2d or Conv3d, for the batteries to run over.

Widths are the smallest that every part of the class still occurs at: up- and downsampling in space and time, caches,
attention, shortcuts. Weights are seeded and random (`vae_accel.workloads.weights`); each decodes in under 0.3 s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vae_accel.workloads import inputs

from .tiny import Tiny, image, video

__all__ = ["TABLE", "Tiny"]

Z4: dict[str, Any] = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
Z6: dict[str, Any] = {"latents_mean": [0.0] * 6, "latents_std": [1.0] * 6}
C8, C32 = (8,) * 4, (32,) * 4
DOWN2D, UP2D = "DownEncoderBlock2D", "UpDecoderBlock2D"
KL: dict[str, Any] = {
    "down_block_types": (DOWN2D,) * 2,
    "up_block_types": (UP2D,) * 2,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
}
HUNYUAN15: dict[str, Any] = {"latent_channels": 8, "block_out_channels": (16, 32, 32, 32, 32), "layers_per_block": 1}
LTX: dict[str, Any] = {
    "latent_channels": 8,
    "block_out_channels": C8,
    "decoder_block_out_channels": C8,
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
    "patch_size": 1,
}
LTX_TIMESTEP: dict[str, Any] = {
    **LTX,
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (1,) * 4,
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
}
LTX2_RATIO: dict[str, Any] = {"spatial_compression_ratio": 8, "temporal_compression_ratio": 8}


def _small_allegro_tiles(vae: Any) -> None:
    """Allegro decodes in tiles alone, of 24 frames of 320x320 unless told."""
    vae.kernel, vae.stride = (8, 32, 32), (8, 24, 24)
    vae.enable_tiling()


def _masked_image() -> dict[str, Tensor]:
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., 4:12, 6:18] = 1
    return {"image": inputs.pixels("picture", (1, 3, 16, 24)), "mask": mask}


# fmt: off
WAN: dict[str, Any] = {"base_dim": 24, "z_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
ASYMMETRIC: dict[str, Any] = {
    "down_block_types": (DOWN2D,) * 2, "down_block_out_channels": (32, 64),
    "up_block_types": (UP2D,) * 2, "up_block_out_channels": (32, 64),
}
TABLE = (
    video("wan2.1", "AutoencoderKLWan", 4, (3, 2, 3), (4, 8), config={**WAN, **Z4}, causal=True),
    video(
        "wan2.2-5b", "AutoencoderKLWan", 6, (3, 2, 3), (4, 16),
        config={"base_dim": 16, "decoder_base_dim": 16, "z_dim": 6, "is_residual": True, "in_channels": 12,
                "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "num_res_blocks": 1, **Z6},
        causal=True,
    ),
    video("qwen-image", "AutoencoderKLQwenImage", 4, (3, 2, 3), (4, 8), config={**WAN, **Z4}, causal=True),
    video(
        "qwen-image-2.1", "AutoencoderKLQwenImage21", 4, (1, 2, 3), (8, 16),
        config={"base_dim": 8, "decoder_base_dim": 8, "z_dim": 4, "num_res_blocks": 1, **Z4}, pixel_channels=4,
    ),
    video(
        "hunyuan-video", "AutoencoderKLHunyuanVideo", 4, (3, 2, 3), (4, 8),
        config={"latent_channels": 4, "block_out_channels": C32, "layers_per_block": 1},
    ),
    video("hunyuan-video-1.5", "AutoencoderKLHunyuanVideo15", 8, (3, 2, 3), (4, 16), config=HUNYUAN15, causal=True,
           batch=False),  # its attention mask has the batch where the heads go
    # Its tiled_decode crops pixels by a number of latents.
    video("hunyuan-image-refiner", "AutoencoderKLHunyuanImageRefiner", 8, (1, 2, 3), (4, 16), config=HUNYUAN15,
           tiling=False),
    image(
        "hunyuan-image", "AutoencoderKLHunyuanImage", 8, (4, 6), 4,
        config={"in_channels": 3, "out_channels": 3, "latent_channels": 8, "block_out_channels": (32, 32, 64),
                "layers_per_block": 1, "spatial_compression_ratio": 4, "sample_size": 32},
    ),
    video(
        "cogvideox", "AutoencoderKLCogVideoX", 4, (3, 2, 3), (4, 8),
        config={"latent_channels": 4, "block_out_channels": C32, "layers_per_block": 1},
    ),
    video(
        "mochi", "AutoencoderKLMochi", 4, (2, 2, 3), (6, 8),
        config={"latent_channels": 4, "encoder_block_out_channels": C32, "decoder_block_out_channels": C32,
                "layers_per_block": (1,) * 5},
        causal=True,
    ),
    video(
        "cosmos", "AutoencoderKLCosmos", 4, (2, 4, 6), (8, 8),
        config={"latent_channels": 4, "encoder_block_out_channels": C8, "decode_block_out_channels": C8,
                "num_layers": 1, "latents_mean": None, "latents_std": None},
        causal=True, tiling=False,
    ),
    video("ltx-0.9.0", "AutoencoderKLLTXVideo", 8, (3, 2, 3), (8, 8), config=LTX),
    video(
        "ltx-0.9.1", "AutoencoderKLLTXVideo", 8, (3, 2, 3), (8, 8),
        config={**LTX_TIMESTEP, "decoder_inject_noise": (True, True, True, False)}, stochastic=True, slicing=False,
    ),
    video(
        "ltx-0.9.5", "AutoencoderKLLTXVideo", 8, (2, 2, 3), (8, 16),
        config={**LTX_TIMESTEP, "block_out_channels": (8, 8, 16, 16, 16), "spatio_temporal_scaling": (True,) * 4,
                "down_block_types": ("LTXVideo095DownBlock3D",) * 4, "decoder_inject_noise": (False,) * 4,
                "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"), "patch_size": 2,
                "spatial_compression_ratio": 16, "temporal_compression_ratio": 8},
        slicing=False,
    ),
    video(
        # Reflection needs two latents, hence tiles that come out even.
        "ltx-2.0", "AutoencoderKLLTX2Video", 8, (2, 2, 4), (8, 8), tile_stride=2,
        config={**LTX, "decoder_block_out_channels": (8, 16, 32), "decoder_layers_per_block": (1,) * 4,
                "decoder_causal": False, **LTX2_RATIO},
    ),
    video(
        "ltx-2.3", "AutoencoderKLLTX2Video", 8, (2, 2, 3), (8, 8),
        config={**LTX, "decoder_block_out_channels": (8, 16, 16, 32), "decoder_causal": False,
                "decoder_spatio_temporal_scaling": (True,) * 4, "decoder_inject_noise": (False,) * 5,
                "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
                "upsample_residual": (False,) * 4, "upsample_factor": (2, 2, 1, 2),
                "decoder_spatial_padding_mode": "zeros", **LTX2_RATIO},
    ),
    Tiny(
        "ltx-2-audio", "AutoencoderKLLTX2Audio", (1, 8, 4, 16), (1, 2, 13, 64),
        config={"base_channels": 16, "num_res_blocks": 1}, tiling=False,
    ),
    video(
        "easyanimate", "AutoencoderKLMagvit", 16, (3, 2, 3), (4, 8),
        config={"block_out_channels": [32] * 4, "layers_per_block": 1},
        # GroupNorm refuses a tile of one latent, one value per channel; slicing keeps the caches between clips.
        causal=True, tile_stride=2, slicing=False,
    ),
    video(
        "allegro", "AutoencoderKLAllegro", 4, (2, 4, 7), (4, 8), frames=8,
        config={"block_out_channels": C32, "layers_per_block": 1, "sample_size": 32},
        prepare=_small_allegro_tiles, single_frame=False, batch=False,
    ),
    Tiny(
        "svd", "AutoencoderKLTemporalDecoder", (3, 4, 4, 6), (3, 3, 8, 12),
        config={"down_block_types": (DOWN2D,) * 2, "block_out_channels": (32, 64), "layers_per_block": 1},
        tiling=False, slicing=False,
    ),
    video(
        "kvae-video", "AutoencoderKLKVAEVideo", 4, (3, 2, 3), (4, 8),
        config={"ch": 32, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1, "z_channels": 4}, tiling=False,
    ),
    image(
        "kvae", "AutoencoderKLKVAE", 4, (4, 6), 4,
        config={"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 1, 2)},
    ),
    video(
        "kandinsky6-sr", "Kandinsky6SRVAE", 4, (3, 2, 3), (4, 8),
        config={"latent_channels": 4, "encoder_block_out_channels": (8, 16, 32, 64),
                "decoder_block_out_channels": (8, 16, 32, 64), "layers_per_block": 1},
        causal=True, tiling=False, slicing=False,
    ),
    video(
        "minimax-h3", "AutoencoderKLMiniMaxH3", 4, (7, 2, 3), (4, 16), frames=22, single_frame=False,
        config={"latent_channels": 4, "block_out_channels": (32,) * 6, "layers_per_block": 1, "decoder_num_layers": 1,
                "decoder_num_attention_heads": 2, "decoder_attention_head_dim": 16},
    ),
    video(
        "vidtok", "AutoencoderVidTok", 4, (3, 2, 3), (4, 8),
        config={"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    ),
    image("sd", "AutoencoderKL", 4, (4, 6), 2, config=KL),
    image(
        "flux.1", "AutoencoderKL", 16, (4, 6), 2,
        config={**KL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    ),
    image("flux.2", "AutoencoderKLFlux2", 8, (4, 6), 2, config={**KL, "latent_channels": 8}),
    image(
        "dc-ae", "AutoencoderDC", 4, (4, 6), 4,
        config={"latent_channels": 4, "attention_head_dim": 8,
                "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
                "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
                "encoder_block_out_channels": (8, 16, 16), "decoder_block_out_channels": (8, 16, 16),
                "encoder_qkv_multiscales": ((), (), (5,)), "decoder_qkv_multiscales": ((), (), (5,)),
                "encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1),
                "downsample_block_type": "conv", "upsample_block_type": "interpolate"},
    ),
    image(
        "dc-ae-shuffle", "AutoencoderDC", 4, (4, 6), 4,
        config={"latent_channels": 4, "attention_head_dim": 8, "encoder_block_out_channels": (8, 16, 16),
                "decoder_block_out_channels": (8, 16, 16), "encoder_qkv_multiscales": ((), (), ()),
                "decoder_qkv_multiscales": ((), (), ()), "encoder_layers_per_block": (1, 1, 1),
                "decoder_layers_per_block": (1, 1, 1), "decoder_norm_types": "batch_norm", "decoder_act_fns": "relu"},
    ),
    image("asymmetric", "AsymmetricAutoencoderKL", 4, (8, 12), 2, config=ASYMMETRIC, tiling=False, slicing=False),
    image(
        "asymmetric-masked", "AsymmetricAutoencoderKL", 4, (8, 12), 2, config=ASYMMETRIC, tiling=False, slicing=False,
        decode_kwargs=_masked_image, batch=False,
    ),
    image(
        "vq", "VQModel", 3, (4, 6), 2,
        config={"down_block_types": (DOWN2D,) * 2, "up_block_types": (UP2D,) * 2, "block_out_channels": (32, 64),
                "num_vq_embeddings": 32},
        tiling=False, slicing=False,
    ),
    image(
        "tiny", "AutoencoderTiny", 4, (4, 6), 8,
        config={"encoder_block_out_channels": C8, "decoder_block_out_channels": C8, "num_encoder_blocks": (1,) * 4,
                "num_decoder_blocks": (1,) * 4},
    ),
    image(
        "rae", "AutoencoderRAE", 64, (4, 4), 4,
        config={"encoder_hidden_size": 64, "encoder_patch_size": 14, "encoder_num_hidden_layers": 1,
                "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
                "decoder_intermediate_size": 64, "patch_size": 4, "encoder_input_size": 56},
        tiling=False,
    ),
    image(
        "consistency", "ConsistencyDecoderVAE", 4, (4, 6), 2,
        config={"encoder_block_out_channels": (32, 64), "encoder_down_block_types": (DOWN2D,) * 2,
                "encoder_layers_per_block": 1, "decoder_block_out_channels": (32, 64), "decoder_layers_per_block": 1,
                "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
                "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2},
        tiling=False,
    ),
    image(
        "paella", "PaellaVQModel", 4, (4, 6), 4, tiling=False, slicing=False,
        config={"bottleneck_blocks": 1, "embed_dim": 16, "num_vq_embeddings": 32},
        home="diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model",
    ),
)
# fmt: on
