"""Winograd's F(2, 3) along height: two lines of a 3x3 convolution for four rows of three taps instead of six.

The transforms are those along time (`kernels/winograd.py`); of lines d0 to d3 the two in the middle are the pair.
GroupNorm or RMS norm and SiLU before the convolution write the first, as four pictures of half the height: one of the
d0 - d2 of every pair, and so on. A pair and its neighbour share two lines, so a program walks down a strip and keeps
them.

6 bytes an element where a norm by itself moves 4, and 2/3 of the products: a FLUX.1 decode at 1024x1024 has 7.0 TFLOP
behind its norms, and 1.7 G values in them. Its form is `conv3x3`'s: on other cards there is none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, bordered, conv3x3, winograd
from ._dispatch import LazyFunction, Signature, lazy_kernel, next_power_of_2, signature, triton_available
from .group_statistics import bordered_statistics

tl: Any = None  # triton.language, bound at the first launch

TILE = 1024  # elements of a line a program holds, as along time
WARPS = 4
STRIP = 8  # pairs a program walks down: it reads two lines more
PROGRAMS = 4096  # of which there should be so many, before strips are long
FULL = 0.85  # of the pixels of a line's tiles: what is beyond its end is multiplied in vain


def reference(x: Tensor) -> Tensor:
    """The first transform of pictures `[N, C, H, W]` with H even: `[N, C, 4, H / 2, W]`."""
    return winograd.reference(F.pad(x, (0, 0, 1, 1)).unsqueeze(3)).unflatten(2, (-1, 4)).squeeze(4).transpose(2, 3)


@LazyFunction
def _normed(value, scale, shift, there, eps, C, BY_GROUP: tl.constexpr, ACT: tl.constexpr):
    """A tile of pixels by a norm, and SiLU; zeros where there are none."""
    if not BY_GROUP:
        square = tl.sum(value * value, axis=1, keep_dims=True)
        value = value * (tl.sqrt(1.0 * C) / tl.maximum(tl.sqrt(square), eps))
    value = value * scale + shift
    if ACT:
        value = value / (1 + tl.exp(-value))
    return tl.where(there, tl.clamp(value, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL), 0.0)


@lazy_kernel(alike="groups H W ROW FRAME HALF strip")
def _norm_lines(
    x, out, statistics, weight, bias, eps, groups, C, H, W, ROW, FRAME, HALF, strip,
    BY_GROUP: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """`ROWS` pixels of the lines of `strip` pairs. FRAME and HALF: pixels of a picture of x and of one of `out`."""
    f = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * strip
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    stored = (pixel < W + 2) & (col < C)  # a line and its border, which may be the first pixel of the next
    inside = stored & (pixel > 0) & (pixel <= W)
    scale = tl.full([1, COLS], 1, tl.float32)
    if weight is not None:
        scale *= tl.load(weight + col, mask=col < C, other=0).to(tl.float32)
    shift = tl.full([1, COLS], 0, tl.float32)
    if bias is not None:
        shift += tl.load(bias + col, mask=col < C, other=0).to(tl.float32)
    if BY_GROUP:
        statistic = statistics + f * groups + col // (C // groups)
        scale *= tl.load(statistic + tl.num_programs(2) * groups, mask=col < C, other=0)
        shift -= tl.load(statistic, mask=col < C, other=0) * scale
    line = ROW * C
    source = x + (f * FRAME + (2 * first + 1) * ROW + pixel) * C + col  # of line 2 * first
    target = out + (f * 4 * HALF + (first + 1) * ROW + pixel) * C + col
    picture = HALF.to(tl.int64) * C
    above = inside & (first > 0)
    value = tl.load(source - line, mask=above, other=0).to(tl.float32)
    d0 = _normed(value, scale, shift, above, eps, C, BY_GROUP, ACT)
    d1 = _normed(tl.load(source, mask=inside, other=0).to(tl.float32), scale, shift, inside, eps, C, BY_GROUP, ACT)
    next2 = tl.load(source + line, mask=inside, other=0)
    next3 = tl.load(source + 2 * line, mask=inside & (2 * first + 2 < H), other=0)
    for p in range(first, tl.minimum(first + strip, H // 2)):
        last = 2 * p + 2 < H
        d2 = _normed(next2.to(tl.float32), scale, shift, inside, eps, C, BY_GROUP, ACT)
        d3 = _normed(next3.to(tl.float32), scale, shift, inside & last, eps, C, BY_GROUP, ACT)
        source += 2 * line
        next2 = tl.load(source + line, mask=inside & last, other=0)  # on their way while this pair is written
        next3 = tl.load(source + 2 * line, mask=inside & (2 * p + 4 < H), other=0)
        tl.store(target, (d0 - d2).to(tl.float16), mask=stored)
        tl.store(target + picture, (d1 + d2).to(tl.float16), mask=stored)
        tl.store(target + 2 * picture, (d2 - d1).to(tl.float16), mask=stored)
        tl.store(target + 3 * picture, (d1 - d3).to(tl.float16), mask=stored)
        target += line
        d0 = d2
        d1 = d3


def suits(x: Tensor, channels_out: int) -> bool:
    """Whether a 3x3 convolution of a normed bf16 `[N, C, H, W]` is worth transforming, and has the form for it.

    Tiles of 96 columns gain as much as their norm loses: 0.711 and 0.721 ms for 96 channels at 1328x1328 on an H200.
    """
    if x.dim() != 4 or x.dtype != torch.bfloat16 or x.shape[2] % 2 or torch.compiler.is_compiling():
        return False
    columns, width = conv3x3.columns_of(x.shape[1], channels_out), x.shape[3]
    if columns in (None, 96) or x.shape[1] > TILE or not triton_available(x):
        return False
    if not conv3x3.has_form(x.shape[1], channels_out, x.device):
        return False
    rows = conv3x3.Form(columns, "lines", 2).rows  # type: ignore[arg-type]
    return width >= FULL * (-(-width // rows) * rows)


def norm_lines(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, groups: int | None = None, act: bool = True
) -> Tensor:
    """GroupNorm of so many `groups`, or without them Wan's RMS norm, of `[N, C, H, W]` (H even), SiLU if `act`, and the
    first transform, in fp16: bordered `[N, C, 4, H / 2, W]`. `weight` and `bias` hold C elements."""
    n, c, h, w = x.shape
    x = bordered.bordered(x)
    out, place = bordered.empty((n, c, 4, h // 2, w), torch.float16, x.device), bordered.geometry(x)
    cols = next_power_of_2(c)
    rows = max(TILE // cols, 1)
    across = -(-(w + 2) // rows)
    strip = min(max(across * n * (h // 2) // PROGRAMS, 1), STRIP)
    if _dispatch.tally is not None:
        _dispatch.tally("_norm_lines", 0, 3 * x.numel() * x.element_size())
    with torch.cuda.device_of(x):
        statistics = None if groups is None else bordered_statistics(x, groups, eps, samples=n)
        _norm_lines[across, -(-h // 2 // strip), n](
            bordered.pixels_of(x), bordered.pixels_of(out), statistics, weight, bias, eps, groups or 1, c, h, w,
            place.row, place.frame, bordered.geometry(out).frame, strip,
            BY_GROUP=groups is not None, ACT=act, ROWS=rows, COLS=cols, num_warps=WARPS,
        )  # fmt: skip
    return out


def conv_lines(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: Tensor | None = None, statistics: bool = False
) -> Tensor:
    """The convolution, by `weight` `[O, I, 3, 3]`, of what `norm_lines` made: `[N, O, H, W]`, bordered.

    One pixel of zeros stands around; `residual` is added in fp32 before the one rounding. `statistics` as in `conv`.
    """
    residual = None if residual is None else bordered.bordered(residual)
    taps = winograd.transformed_taps(weight.unsqueeze(3), 1)
    return conv3x3.conv_lines(x, taps, bias, residual, weight.dtype, statistics=statistics)


def signatures() -> list[Signature]:
    """The kernel as it is compiled ahead of time in the tests."""
    group = {"x": "bf16", "out": "fp16", "statistics": "fp32", "weight": "bf16", "bias": "bf16"}
    rms = {"x": "bf16", "out": "fp16", "weight": "bf16"}
    return [
        signature(_norm_lines, group, {"BY_GROUP": True, "ACT": True, "ROWS": 8, "COLS": 128}),
        signature(
            _norm_lines, rms, {"BY_GROUP": False, "ACT": True, "ROWS": 4, "COLS": 256, "statistics": None, "bias": None}
        ),
    ]
