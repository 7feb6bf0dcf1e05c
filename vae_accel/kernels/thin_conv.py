"""A 3x3 or 3x3x3 convolution to a few channels: 96 -> 3 at the end of a decoder.

As a product over shifted pixels it reads its input 27 times for 3 columns of a tile that is 16 wide at least (24
TFLOP/s in cuDNN, 1.03 ms on four frames of 480 x 832). Here one product makes, at each pixel, what it gives to each of
its 9 neighbours (27 columns, the taps in time summed), and a second pass gathers them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bordered
from ._dispatch import LazyKernel, differentiates
from .conv import _launch as _convolve
from .conv import reference, unsupported

tl: Any = None  # triton.language, bound at the first launch

MOST = 7  # output channels, 9 of each fit 64 columns
COLUMNS = (32, 64)


@LazyKernel
def _gather(y, bias, out, total, frames, H, W, ROW, FRAME, COLUMNS: tl.constexpr, O: tl.constexpr, BLOCK: tl.constexpr):
    """`y` [pixels, COLUMNS] fp32 from the first picture pixel on, `out` [N, O, T, H, W] with T * H * W = total."""
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1)
    inside = item < total
    w = item % W
    h = item // W % H
    t = item // (W * H)
    pixel = (n * frames + t).to(tl.int64) * FRAME + h * ROW + w
    for o in tl.static_range(O):
        value = tl.full([BLOCK], 0, tl.float32)
        if bias is not None:
            value += tl.load(bias + o).to(tl.float32)
        for tap in tl.static_range(9):
            source = pixel + (tap // 3 - 1) * ROW + tap % 3 - 1
            value += tl.load(y + source * COLUMNS + tap * O + o, mask=inside, other=0)
        target = out + (n * O + o).to(tl.int64) * total + item
        tl.store(target, value.to(out.dtype.element_ty), mask=inside)


def thin_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, before: int = 0, history: Tensor | None = None
) -> Tensor:
    """`conv` of `[N, I, (T,) H, W]` by `[O, I, (kt,) 3, 3]`, O <= 7, with one pixel of zeros around each frame.

    `before` and `history` as in `conv`. The result is contiguous `[N, O, (T',) H, W]` in the weight's dtype.
    """
    columns = next(c for c in COLUMNS if c >= 9 * weight.shape[0])
    products = weight.new_empty((columns, weight.shape[1], 1, 1))
    if differentiates(x, weight, bias) or unsupported(x, products, (0, 0)) is not None:
        return reference(x, weight, bias, padding=(1, 1), before=before, history=history)
    o, i, *time = weight.shape[:-2]
    taps = weight.movedim((-2, -1), (0, 1)).flatten(0, 2)  # (kh, kw, o), i, (kt)
    taps = F.pad(taps.flatten(1), (0, 0, 0, columns - taps.shape[0])).view(columns, i, *time, 1, 1)
    y = _convolve(x, taps, None, before, history, None, 1, out_dtype=torch.float32)
    n, _, *spatial = y.shape
    out = torch.empty((n, o, *spatial), dtype=weight.dtype, device=x.device)
    place, total = bordered.geometry(y), out[0, 0].numel()
    with torch.cuda.device_of(x):
        _gather[-(-total // 512), n](
            bordered.pixels_of(y)[place.first :], bias, out, total, place.frames // n, place.height, place.width,
            place.row, place.frame, COLUMNS=columns, O=o, BLOCK=512, num_warps=4,
        )  # fmt: skip
    return out
