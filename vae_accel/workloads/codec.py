"""One way to call every autoencoder of diffusers: tensors in, one tensor out."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

# What LTX's pipelines pass as `decode_timestep`; the decoder is conditioned on it.
LTX_DECODE_TIMESTEP = 0.05


def _tensor(output: Any) -> Tensor:
    """The tensor inside what `encode` or `decode` returned; of a posterior, its mode."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        return _tensor(output[0])
    for name in ("sample", "latent_dist", "latent", "latents"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
        if value is not None and not callable(value):
            return value.mode()
    raise TypeError(f"no tensor in what the autoencoder returned, a {type(output).__name__}")


def decode(vae: nn.Module, latent: Tensor, **kwargs: Any) -> Tensor:
    """The frames that `vae` decodes `latent` to, `[N, C, H, W]` or `[N, C, T, H, W]`.

    Fills in what some classes want besides the latent: LTX's timestep, the number of frames (SVD, which takes the
    frames of one clip as its batch), a fixed generator where decoding draws noise. `kwargs` win over these.
    """
    call: Any = vae.decode
    config: Any = vae.config
    accepted = inspect.signature(call).parameters
    if "num_frames" in accepted:
        kwargs.setdefault("num_frames", latent.shape[0])
    if "temb" in accepted and config.timestep_conditioning:
        kwargs.setdefault("temb", latent.new_full((latent.shape[0],), LTX_DECODE_TIMESTEP))
    if "generator" in accepted and "num_inference_steps" in accepted:
        kwargs.setdefault("generator", torch.Generator(latent.device).manual_seed(0))
    frames = _tensor(call(latent, **kwargs))
    # Allegro alone decodes to [N, T, C, H, W].
    return frames.transpose(1, 2) if type(vae).__name__ == "AutoencoderKLAllegro" else frames


def encode(vae: nn.Module, pixels: Tensor) -> Tensor:
    """The latent that `vae` encodes `pixels` to: the mode of the posterior where there is one."""
    call: Any = vae.encode
    model: Any = vae
    if type(vae).__name__ == "AutoencoderVidTok" and model.is_causal:
        # VidTok repeats the first frame in `forward`, before it calls `encode`; every other class does so inside.
        first = pixels[:, :, :1].repeat(1, 1, model.temporal_compression_ratio - 1, 1, 1)
        pixels = torch.cat([first, pixels], 2)
    return _tensor(call(pixels))
