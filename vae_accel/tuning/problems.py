"""A convolution of a key on fresh random numbers: ours with a tile, what runs instead of it, and the law in fp32.

Ours has all it can have, since a tile that fits without may not fit with: bias, a residual, and frames in front from a
cache. It goes through the public operation, as a model does; `tile_choice.answering` says with which tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vae_accel.kernels import bordered, conv, downsample_conv, thin_conv, tile_choice, upsample_conv, winograd
from vae_accel.kernels.tiles import Key, Tile
from vae_accel.verify import full_precision

FRAMES = 4  # of a clip: what a causal decoder makes at a time, behind two frames of the last
# How many times the vendor's error ours may have by design. The sums of taps of an upsampling are rounded once more, to
# the operands' type: as much again as the rounding of a result of that type. Winograd's operands are rounded after the
# transform: that is held to what bf16 operands cost the vendor's, 2.2e-3 where the rounding of the result is 1.67e-3.
SLACK = {"upsample_conv": 2**0.5, "winograd": 2.2 / 1.67}


@dataclass(frozen=True)
class Problem:
    """One convolution with its operands; `flop` is the work of the direct form, `slack` see `SLACK`."""

    ours: Callable[[Tile], Tensor]
    vendor: Callable[[], Tensor]
    golden: Callable[[], Tensor]
    flop: int
    slack: float = 1.0


def problem(key: Key, seed: int, device: torch.device) -> Problem:
    """The convolution of `key` on numbers drawn from `seed`, in the middle of its class of sizes, wider than high."""
    kt, side = (key.taps // 9, 3) if key.taps % 9 == 0 else (key.taps, 1)
    frames = FRAMES if kt > 1 else 1
    height, width = _sides(key, frames)
    operands, result = getattr(torch, key.operands), getattr(torch, key.result)
    generator = torch.Generator(device).manual_seed(seed)

    def clip(channels: int, frames: int, dtype: torch.dtype) -> Tensor:
        time = (frames,) if kt > 1 else ()
        shape = (1, *time, height, width, channels)
        return torch.randn(shape, generator=generator, device=device).movedim(-1, 1).to(dtype)

    taps = torch.randn(
        (key.channels_out, *((kt,) if kt > 1 else ()), side, side, key.channels_in), generator=generator, device=device
    )
    given = {
        "x": clip(key.channels_in, frames, operands),
        "weight": (taps.movedim(-1, 1) * (key.channels_in * key.taps) ** -0.5).to(result),
        "bias": torch.randn(key.channels_out, generator=generator, device=device).to(result),
    }
    if kt > 1 and key.kernel != "upsample_conv":
        given["history"] = clip(key.channels_in, kt - 1, operands)
    if key.kernel not in ("upsample_conv", "downsample_conv", "thin_conv"):
        given["residual"] = clip(key.channels_out, frames, result)
    return _problem(key, given, {"padding": (side // 2, side // 2), "before": kt - 1}, frames * height * width)


def _sides(key: Key, frames: int) -> tuple[int, int]:
    """Height and width of 1.4 * 2^size pixels, or as few as a clip has; odd where 96 channels would be pairs."""
    clip = frames * 2 if key.kernel == "winograd" else frames  # its pairs of frames are four once transformed
    pixels = 1.4 * 2**key.size / clip
    height = max(math.isqrt(int(pixels)) * 5 // 6, 1)
    width = max(round(pixels / height / 2), 1) * 2
    return height, width + int(key.kernel == "conv" and key.channels_out == 96)


def _problem(key: Key, given: dict[str, Tensor], place: dict[str, Any], pixels: int) -> Problem:
    operation: Any = conv.conv
    law: Any = partial(conv.reference, **place)
    if key.kernel == "thin_conv":
        operation, place = thin_conv.thin_conv, {"before": place["before"]}
    elif key.kernel == "upsample_conv":
        place = {"double": True, "space": "replicate"} if given["weight"].dim() == 5 else {}
        operation, law = upsample_conv.upsample_conv, partial(upsample_conv.reference, **place)
        pixels = (8 if place else 4) * pixels
    elif key.kernel == "downsample_conv":
        place, operation, law = {}, downsample_conv.downsample_conv, downsample_conv.reference
        pixels = given["x"].shape[-2] // 2 * (given["x"].shape[-1] // 2)
    ready: dict[str, Any] = dict(given)
    if key.kernel == "winograd":
        frames = torch.cat((ready.pop("history"), given["x"]), 2).float()
        ready["x"] = winograd.reference(frames).to(torch.float16)
    ready |= {name: bordered.bordered(ready[name]) for name in ("x", "history", "residual") if name in ready}

    def ours(tile: Tile) -> Tensor:
        asked: list[Key] = []
        with tile_choice.answering(lambda key, _: asked.append(key) or tile):  # type: ignore[func-returns-value]
            y = winograd.conv_pairs(**ready) if key.kernel == "winograd" else operation(**ready, **place)
        if [found._replace(size=key.size) for found in asked] != [key]:
            raise ValueError(f"{key} is not what ran: {asked or 'nothing of ours'}")
        return y

    def vendor() -> Tensor:
        with tile_choice.answering(lambda key, tile: None):
            return operation(**given, **place)

    def golden() -> Tensor:
        with full_precision():
            return law(**{name: value.float() for name, value in given.items()})

    flop = 2 * pixels * key.channels_out * key.channels_in * key.taps
    return Problem(ours, vendor, golden, flop, SLACK.get(key.kernel, 1.0))
