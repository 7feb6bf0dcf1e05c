"""Frames and latents to prove on: photographs in motion, ramps, and noise, all seeded.

White noise hides errors in statistics: a GroupNorm that forgets the variance between two bands of the picture passes on
noise and is off by 1.2 on a ramp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["picture", "ramp", "noise"]
# Colour photographs inside the scikit-image wheel: nothing is downloaded.
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle", "hubble_deep_field", "retina")
PAN = 0.25  # how far the crop travels over a clip, as a share of the frame


def photograph(name: str) -> Tensor:
    """A photograph of `PHOTOGRAPHS` as `[3, H, W]` fp32 in [-1, 1]."""
    if name not in PHOTOGRAPHS:
        raise ValueError(f"no photograph named {name!r}: choose one of {', '.join(PHOTOGRAPHS)}")
    from skimage import data

    image = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float().div_(127.5).sub_(1)


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0].clamp_(-1, 1)


def moving_crop(image: Tensor, frames: int, height: int, width: int) -> Tensor:
    """A clip `[3, T, H, W]`: a window that pans diagonally over `image`, enlarged or reduced to cover the way."""
    way_y, way_x = math.ceil(height * PAN), math.ceil(width * PAN)
    scale = max((height + way_y) / image.shape[1], (width + way_x) / image.shape[2])
    canvas = _resized(
        image, max(height + way_y, round(image.shape[1] * scale)), max(width + way_x, round(image.shape[2] * scale))
    )
    clip = canvas.new_empty(3, frames, height, width)
    for t in range(frames):
        y, x = (round(way * t / max(frames - 1, 1)) for way in (way_y, way_x))
        clip[:, t] = canvas[:, y : y + height, x : x + width]
    return clip


def _pictures(channels: int, frames: int, height: int, width: int, batch: int, seed: int) -> Tensor:
    clips = [
        moving_crop(photograph(PHOTOGRAPHS[(seed + i) % len(PHOTOGRAPHS)]), frames, height, width) for i in range(batch)
    ]
    clip = torch.stack(clips)
    if channels <= 3:
        return clip[:, :channels]
    opaque = clip.new_ones(batch, channels - 3, frames, height, width)
    return torch.cat([clip, opaque], 1)


def _ramps(channels: int, sizes: Sequence[int], batch: int, generator: torch.Generator) -> Tensor:
    """Per channel a plane over (t, h, w) and an offset, each with a coefficient of its own in [-1, 1]."""
    coefficients = torch.rand(batch, channels, len(sizes) + 1, generator=generator) * 2 - 1
    ramp = coefficients[..., -1].reshape(batch, channels, *[1] * len(sizes))
    for axis, size in enumerate(sizes):
        line = torch.linspace(-1, 1, size) if size > 1 else torch.zeros(1)
        line = line.reshape([size if i == axis else 1 for i in range(len(sizes))])
        ramp = ramp + coefficients[..., axis].reshape(batch, channels, *[1] * len(sizes)) * line
    return ramp


def _check(kind: str, shape: Sequence[int]) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"no input of kind {kind!r}: choose one of {', '.join(get_args(Kind))}")
    if len(shape) not in (4, 5):
        raise ValueError(f"a shape is (N, C, H, W) or (N, C, T, H, W), not {tuple(shape)}")


def pixels(kind: Kind, shape: Sequence[int], *, seed: int = 0) -> Tensor:
    """Frames in [-1, 1], fp32 on the CPU, shaped `(N, C, H, W)` or `(N, C, T, H, W)`.

    A picture's fourth channel is alpha, opaque.
    """
    _check(kind, shape)
    batch, channels, *sizes = shape
    generator = torch.Generator().manual_seed(seed)
    if kind == "noise":
        return torch.rand(*shape, generator=generator) * 2 - 1
    if kind == "ramp":
        return _ramps(channels, sizes, batch, generator) / (len(sizes) + 1)
    frames, height, width = sizes if len(sizes) == 3 else (1, *sizes)
    return _pictures(channels, frames, height, width, batch, seed).reshape(shape)


def latents(kind: Kind, shape: Sequence[int], *, seed: int = 0) -> Tensor:
    """Latents of about unit variance, fp32 on the CPU, shaped `(N, z, h, w)` or `(N, z, t, h, w)`.

    A picture is a photograph reduced to the latent's size, its colours mixed into the channels and each channel brought
    to zero mean and unit deviation: structure like a real latent's, without an encoder.
    """
    _check(kind, shape)
    batch, channels, *sizes = shape
    generator = torch.Generator().manual_seed(seed)
    if kind == "noise":
        return torch.randn(*shape, generator=generator)
    if kind == "ramp":
        return _ramps(channels, sizes, batch, generator)
    frames, height, width = sizes if len(sizes) == 3 else (1, *sizes)
    clip = _pictures(3, frames, height, width, batch, seed)
    mixed = torch.einsum("zc,ncthw->nzthw", torch.randn(channels, 3, generator=generator), clip)
    centred = mixed - mixed.mean((2, 3, 4), keepdim=True)
    deviation = centred.square().mean((2, 3, 4), keepdim=True).sqrt()
    return (centred / deviation.clamp(min=1e-3)).reshape(shape)
