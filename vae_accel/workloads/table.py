"""The named workloads: each a real checkpoint's configuration at the size it is used at.

Only what differs from the constructor's defaults is written down: the defaults already are the popular checkpoint for
Wan 2.1, Qwen-Image, HunyuanVideo, CogVideoX, Mochi, Cosmos, EasyAnimate, Allegro and FLUX.2.
"""

from __future__ import annotations

from typing import Any

from .workload import Workload

_LTX_COMPRESSION = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
_LTX_DOWNSAMPLE = ("spatial", "temporal", "spatiotemporal", "spatiotemporal")

WAN22_5B: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
    # The pipeline applies the hub's own statistics; decode and encode do not read them.
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
LTX_090: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "decoder_block_out_channels": (128, 256, 512, 512),
    "layers_per_block": (4, 3, 3, 3, 4),
    "decoder_layers_per_block": (4, 3, 3, 3, 4),
    "decoder_causal": False,
}
LTX_095: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 1024, 2048),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "downsample_type": _LTX_DOWNSAMPLE,
    "decoder_block_out_channels": (256, 512, 1024),
    "layers_per_block": (4, 6, 6, 2, 2),
    "decoder_layers_per_block": (5, 5, 5, 5),
    "spatio_temporal_scaling": (True,) * 4,
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (False,) * 4,
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
    "decoder_causal": False,
    **_LTX_COMPRESSION,
}
LTX2_20: dict[str, Any] = {"decoder_causal": False, "decoder_spatial_padding_mode": "reflect", **_LTX_COMPRESSION}
LTX2_23: dict[str, Any] = {
    "block_out_channels": (256, 512, 1024, 1024),
    "decoder_block_out_channels": (256, 512, 512, 1024),
    "layers_per_block": (4, 6, 4, 2, 2),
    "decoder_layers_per_block": (4, 6, 4, 2, 2),
    "spatio_temporal_scaling": (True,) * 4,
    "decoder_spatio_temporal_scaling": (True,) * 4,
    "decoder_inject_noise": (False,) * 5,
    "downsample_type": _LTX_DOWNSAMPLE,
    "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
    "upsample_residual": (False,) * 4,
    "upsample_factor": (2, 2, 1, 2),
    "decoder_causal": False,
    "decoder_spatial_padding_mode": "zeros",
    **_LTX_COMPRESSION,
}
SVD: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
SD: dict[str, Any] = {**SVD, "up_block_types": ("UpDecoderBlock2D",) * 4}
FLUX1: dict[str, Any] = {**SD, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
HUNYUAN_IMAGE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 64,
    "block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "layers_per_block": 2,
    "spatial_compression_ratio": 32,
    "sample_size": 384,
}
_DC_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_DC_CHANNELS = (128, 256, 512, 512, 1024, 1024)
_DC_SCALES = ((), (), (), (5,), (5,), (5,))
SANA_DC: dict[str, Any] = {
    "latent_channels": 32,
    "encoder_block_types": _DC_BLOCKS,
    "decoder_block_types": _DC_BLOCKS,
    "encoder_block_out_channels": _DC_CHANNELS,
    "decoder_block_out_channels": _DC_CHANNELS,
    "encoder_qkv_multiscales": _DC_SCALES,
    "decoder_qkv_multiscales": _DC_SCALES,
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3,) * 6,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
}


def _video(name: str, vae_class: str, z: int, compression: tuple[int, int], size: str, **more: Any) -> Workload:
    spatial, temporal = compression
    return Workload(name, vae_class, size, latent_channels=z, spatial=spatial, temporal=temporal, **more)


def _image(name: str, vae_class: str, z: int, spatial: int, size: str, **more: Any) -> Workload:
    return Workload(name, vae_class, size, latent_channels=z, spatial=spatial, layout="image", **more)


_TABLE = (
    _video("wan2.1", "AutoencoderKLWan", 16, (8, 4), "480x832x81"),
    _video("wan2.2-5b", "AutoencoderKLWan", 48, (16, 4), "704x1280x121", config=WAN22_5B),
    _video("qwen-image", "AutoencoderKLQwenImage", 16, (8, 4), "1328x1328"),
    # Its convolutions are Conv2d: it takes the clip layout with one frame and no more.
    _video("qwen-image-2.1", "AutoencoderKLQwenImage21", 64, (16, 1), "1328x1328", pixel_channels=4, max_frames=1),
    _video("hunyuan-video", "AutoencoderKLHunyuanVideo", 16, (8, 4), "480x832x61", dtype="float16"),
    _video("hunyuan-video-1.5", "AutoencoderKLHunyuanVideo15", 32, (16, 4), "480x832x61", dtype="float16"),
    _image("hunyuan-image", "AutoencoderKLHunyuanImage", 64, 32, "2048x2048", config=HUNYUAN_IMAGE),
    _video("hunyuan-image-refiner", "AutoencoderKLHunyuanImageRefiner", 32, (16, 4), "2048x2048", dtype="float16"),
    # It decodes two latents at a time and an even number of them gives no lone first frame, hence steps of 8 frames.
    _video("cogvideox", "AutoencoderKLCogVideoX", 16, (8, 4), "480x720x49", frame_step=8),
    _video("mochi", "AutoencoderKLMochi", 12, (8, 6), "480x848x79"),
    _video("cosmos", "AutoencoderKLCosmos", 16, (8, 8), "704x1280x121"),
    _video("ltx-0.9.0", "AutoencoderKLLTXVideo", 128, (32, 8), "512x768x121", config=LTX_090),
    _video("ltx-0.9.5", "AutoencoderKLLTXVideo", 128, (32, 8), "512x768x121", config=LTX_095),
    _video("ltx-2.0", "AutoencoderKLLTX2Video", 128, (32, 8), "512x768x121", config=LTX2_20),
    _video("ltx-2.3", "AutoencoderKLLTX2Video", 128, (32, 8), "512x768x121", config=LTX2_23),
    _video("easyanimate", "AutoencoderKLMagvit", 16, (8, 4), "576x1008x49"),
    # It decodes only in tiles of 24 frames of 320x320, so that is the smallest size too.
    _video(
        "allegro", "AutoencoderKLAllegro", 4, (8, 4), "720x1280x88", frames="k*n", smallest="320x320x24", tiling=True
    ),
    _video(
        "svd", "AutoencoderKLTemporalDecoder", 4, (8, 1), "576x1024x25", config=SVD, layout="frames", dtype="float16"
    ),
    _image("sd1.5", "AutoencoderKL", 4, 8, "512x512", config=SD, dtype="float16"),
    _image("sdxl", "AutoencoderKL", 4, 8, "1024x1024", config=SD),
    _image("flux.1", "AutoencoderKL", 16, 8, "1024x1024", config=FLUX1),
    _image("flux.2", "AutoencoderKLFlux2", 32, 8, "1024x1024"),
    _image("dc-ae", "AutoencoderDC", 32, 32, "1024x1024", config=SANA_DC),
    _image("kvae", "AutoencoderKLKVAE", 16, 8, "1024x1024"),
    _video("kvae-video", "AutoencoderKLKVAEVideo", 16, (8, 4), "480x768x49"),
    _video("kandinsky6-sr", "Kandinsky6SRVAE", 64, (16, 4), "704x1280x49"),
    _video("vidtok", "AutoencoderVidTok", 4, (8, 4), "256x256x17"),
)
WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in _TABLE}
