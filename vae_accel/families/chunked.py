"""VAEs that walk through a clip in steps, carrying the last two inputs of every causal convolution: Wan and Qwen-Image.

Stock decodes one latent a step and encodes four frames a step; the first latent, one frame, stands alone. Attention is
per frame, norms are per position and a strided convolution in time sees whole pairs, so that a step may hold any number
of latents: the same function (0 apart in fp64, 2e-15 with the residual blocks of Wan 2.2). Not so for CogVideoX (0.04
apart on a deviation of 0.58), KVAE and HunyuanVideo, whose norms, attention or tiles reach over the frames of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.families.match import known_as

# Whether the decoder is told that a step is the first (Wan 2.2 drops the frames its shortcuts make too many of).
ROWS = {"AutoencoderKLWan": True, "AutoencoderKLQwenImage": False}
GROUP = 4  # frames that stock encodes at once, whatever the configuration
LIVE = 5  # tensors of the widest stage alive at once: a block's input, norm, padded copy and output, and the shortcut


def is_chunked(module: nn.Module) -> bool:
    return known_as(module, ROWS) is not None


def ratio(vae: Any) -> int:
    """Frames per latent after the first."""
    return 2 ** sum(vae.temperal_downsample)


def spans(latents: int, step: int) -> Iterator[tuple[int, int]]:
    """The latents of every step, [start, stop): the first alone, then `step` at a time."""
    yield 0, 1
    for start in range(1, latents, step):
        yield start, min(start + step, latents)


def decoded(vae: Any, z: Tensor, step: int) -> Iterator[Tensor]:
    """The frames `[N, C, t, H, W]` of latents `z` `[N, Z, T, h, w]`, finished, one step after the other.

    With slicing on, the samples of a batch go through each step one by one. A single latent leaves no frames for a next
    step: they would be kept till its end, 3.2 of the 4.8 GiB of a Qwen-Image decode at 1328x1328.
    """
    samples = z.split(1) if vae.use_slicing else (z,)
    alone = z.shape[2] == 1
    states = [(vae.post_quant_conv(sample), None if alone else _fresh(vae, "_feat_map")) for sample in samples]
    patch = getattr(vae.config, "patch_size", None)
    tells = ROWS[known_as(vae, ROWS) or ""]
    for start, stop in spans(z.shape[2], step):
        told = {"first_chunk": True} if tells and start == 0 else {}
        parts = [vae.decoder(x[:, :, start:stop], feat_cache=cache, feat_idx=[0], **told) for x, cache in states]
        frames = torch.cat(parts)
        yield (frames if patch is None else unpatchify(frames, patch)).clamp(-1.0, 1.0)


def encoded(vae: Any, x: Tensor, step: int) -> Iterator[Tensor]:
    """What the encoder makes of frames `x` `[N, C, T, H, W]`, before `quant_conv`; frames past a whole group are not
    looked at, as in stock."""
    groups = 1 + (x.shape[2] - 1) // GROUP
    cache = _fresh(vae, "_enc_feat_map") if groups > 1 else None
    patch = getattr(vae.config, "patch_size", None)
    for start, stop in spans(groups, step):
        frames = x[:, :, max(0, 1 + GROUP * (start - 1)) : 1 + GROUP * (stop - 1)]
        frames = frames if patch is None else patchify(frames, patch)
        yield vae.encoder(frames, feat_cache=cache, feat_idx=[0])


def _fresh(vae: Any, name: str) -> list[Any]:
    """Empty caches that the VAE itself does not hold: whoever else decodes with it, or abandons this clip half-way,
    finds and leaves nothing there. Stock's call makes them, since it alone knows how many there are."""
    vae.clear_cache()
    cache = getattr(vae, name)
    vae.clear_cache()
    return cache


def decode_bytes(vae: Any, z: Tensor) -> int:
    """About how much memory one latent of a step takes in the decoder's widest stage, the last."""
    config = vae.config
    width = (getattr(config, "decoder_base_dim", None) or config.base_dim) * config.dim_mult[0]
    pixels = z.shape[3] * z.shape[4] * 4 ** (len(config.dim_mult) - 1)
    return LIVE * (1 if vae.use_slicing else z.shape[0]) * width * ratio(vae) * pixels * z.element_size()


def encode_bytes(vae: Any, x: Tensor) -> int:
    """About how much memory one group of frames takes in the encoder's widest stage, the first."""
    width, patch = vae.config.base_dim * vae.config.dim_mult[0], getattr(vae.config, "patch_size", None) or 1
    return LIVE * x.shape[0] * width * GROUP * (x.shape[3] // patch) * (x.shape[4] // patch) * x.element_size()


def patchify(x: Tensor, size: int) -> Tensor:
    """[N, C, T, H, W] -> [N, C * size**2, T, H / size, W / size]; in the channels, columns before rows."""
    x = x.unflatten(4, (-1, size)).unflatten(3, (-1, size))
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(x: Tensor, size: int) -> Tensor:
    """The inverse of `patchify`."""
    x = x.unflatten(1, (-1, size, size))
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
