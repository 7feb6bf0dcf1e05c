"""A clip plus a smaller one, repeated in blocks: the shortcut around an upsampling block of Wan 2.2.

Value `c` of a small clip's pixel and the values of its block of `times x sides x sides` pixels are one list, frames
outermost and columns innermost, cut into runs of `repeats` equal ones. Stock writes the repeated list and shuffles it,
up to 8 times the small clip each; a broadcast of views reads channels in steps (900 GB/s) and leaves the border behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _dispatch, bordered
from ._dispatch import Signature, lazy_kernel, next_power_of_2, signature, triton_available
from .group_statistics import is_picture

tl: Any = None  # triton.language, bound at the first launch

TILE = 4096  # elements a program holds


def reference(y: Tensor, x: Tensor, times: int, sides: int, repeats: int, drop: int = 0) -> Tensor:
    """The law: stock's list, cut and laid out, without its first `drop` frames."""
    n, _, t, h, w = x.shape
    block = x.repeat_interleave(repeats, 1).view(n, -1, times, sides, sides, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return y + block.flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, drop:]


@lazy_kernel(alike="total T ROW FRAME W drop stride_n stride_t stride_h stride_w")
def _add_duplicates(
    y, x, out, total, T, ROW, FRAME, W, C, drop, stride_n, stride_t, stride_h, stride_w, stride_c,
    TIMES: tl.constexpr, SIDES: tl.constexpr, REPEATS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """`y`, `out`: [total, C] pixels of bordered clips, `x` by its strides."""
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    inside = (pixel < total) & (col < C)
    place = pixel.to(tl.int64) * C + col
    value = tl.load(y + place, mask=inside, other=0).to(tl.float32)
    picture = inside & is_picture(pixel, ROW, FRAME, W)
    frame = pixel // FRAME
    t = frame % T + drop
    h = pixel % FRAME // ROW - 1
    w = pixel % ROW - 1
    within = (t % TIMES * SIDES + h % SIDES) * SIDES + w % SIDES
    source = x + (frame // T).to(tl.int64) * stride_n + (t // TIMES).to(tl.int64) * stride_t
    source += (h // SIDES).to(tl.int64) * stride_h + w // SIDES * stride_w
    source += (col * (TIMES * SIDES * SIDES) + within) // REPEATS * stride_c
    value += tl.load(source, mask=picture, other=0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def add_duplicates(y: Tensor, x: Tensor, times: int, sides: int, repeats: int, drop: int = 0) -> Tensor:
    """`y` `[N, C', T times - drop, H sides, W sides]` plus `x` `[N, C, T, H, W]` repeated, C' times sides² = C repeats.

    One rounding to y's dtype, as stock's addition. Where `y` is a bordered clip, so is the result.
    """
    if not (bordered.is_bordered(y) and triton_available(y) and x.dtype == y.dtype):
        return reference(y, x, times, sides, repeats, drop)
    place, channels = bordered.geometry(y), y.shape[1]
    out = bordered.empty(y.shape, y.dtype, y.device)
    pixels = bordered.pixels_of(out)
    cols = min(next_power_of_2(channels), 256)
    rows = TILE // cols
    if _dispatch.tally is not None:
        _dispatch.tally("_add_duplicates", 0, (2 * y.numel() + x.numel()) * y.element_size())
    n, c, t, h, w = x.stride()
    with torch.cuda.device_of(y):
        _add_duplicates[-(-len(pixels) // rows), -(-channels // cols)](
            bordered.pixels_of(y), x, pixels, len(pixels), y.shape[2], place.row, place.frame, place.width, channels,
            drop, n, t, h, w, c, TIMES=times, SIDES=sides, REPEATS=repeats, ROWS=rows, COLS=cols, num_warps=8,
        )  # fmt: skip
    return out


def signatures() -> list[Signature]:
    """The kernel as it is compiled ahead of time in the tests."""
    form = {"TIMES": 2, "SIDES": 2, "REPEATS": 4, "ROWS": 16, "COLS": 256}
    return [signature(_add_duplicates, dict.fromkeys(("y", "x", "out"), "bf16"), form, warps=8)]
