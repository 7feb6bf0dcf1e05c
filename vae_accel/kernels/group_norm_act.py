"""GroupNorm, then SiLU where asked, over `[N, C, *spatial]` in two passes over the data, in either dense layout.

aten's `RowwiseMoments` runs one block a group: 32 blocks on a card of 132 SMs, 46 of the 86 ms of a FLUX.1 decode
at 1024². Here the statistics are split over positions (`kernels/group_statistics.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, bordered
from ._dispatch import (
    E4M3_MAX,
    FP16_MAX,
    LARGEST,
    LazyKernel,
    Signature,
    differentiates,
    empty_in_layout_of,
    flattenable,
    in_layout_of,
    rounded,
    signature,
    triton_available,
)
from .bordered import is_picture, repeated
from .group_statistics import TILE, WARPS, bordered_statistics, group_statistics, layout, walk

tl: Any = None  # triton.language, bound at the first launch

NORMALIZE_STEPS = 4  # tiles a program normalises


def reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    act: bool,
    per_frame: bool = False,
    dtype: torch.dtype | None = None,
    gain: float | None = None,
) -> Tensor:
    """The law: GroupNorm and SiLU in fp32 (fp64 for fp64), times `gain`, rounded once to `dtype`, by default x's."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values = x.to(wide)
    if per_frame:
        values = values.transpose(1, 2).flatten(0, 1)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    values = F.group_norm(values, num_groups, weight, bias, eps)
    if act:
        values = F.silu(values)
    if per_frame:
        values = values.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    if gain is not None:
        values = values * gain
    return values.to(x.dtype) if dtype is None else rounded(values, dtype)


@LazyKernel
def _normalize(
    x, out, statistics, weight, bias, frames, groups, C, S, rows,
    stride_n, stride_t, stride_c, stride_s, out_n, out_t, out_c, out_s, ROW, FRAME, H, W, gain,
    BORDER: tl.constexpr, ACT: tl.constexpr, SATURATE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """`BORDER`: what lies around the pictures, an index of `BORDERS`; None where nothing does. `SATURATE`: the largest
    number of the result's dtype, where a larger one is to become it."""
    batch = tl.program_id(2)
    start = tl.program_id(0) * rows
    limit = tl.minimum(rows, S - start)
    row = tl.arange(0, ROWS)[:, None]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    n, t = (batch // frames).to(tl.int64), (batch % frames).to(tl.int64)
    source = x + n * stride_n + t * stride_t + start.to(tl.int64) * stride_s
    source += col.to(tl.int64) * stride_c + row.to(tl.int64) * stride_s
    target = out + n * out_n + t * out_t + start.to(tl.int64) * out_s
    target += col.to(tl.int64) * out_c + row.to(tl.int64) * out_s

    statistic = statistics + batch * groups + col // (C // groups)
    mean = tl.load(statistic, mask=col < C, other=0)
    scale = tl.load(statistic + tl.num_programs(2) * groups, mask=col < C, other=0)
    if weight is not None:
        scale *= tl.load(weight + col, mask=col < C, other=0).to(tl.float32)
    shift = tl.full([1, COLS], 0, tl.float32)
    if bias is not None:
        shift += tl.load(bias + col, mask=col < C, other=0).to(tl.float32)
    for first in range(0, limit, ROWS):
        inside = (first + row < limit) & (col < C)
        place = source
        if BORDER is not None and BORDER > 0:
            pixel = start + first + row
            place += (repeated(pixel, ROW, FRAME, H, W, BORDER) - pixel) * stride_s
        value = (tl.load(place, mask=inside, other=0).to(tl.float32) - mean) * scale + shift
        if ACT:
            value = value / (1 + tl.exp(-value))
        if gain is not None:
            value *= gain
        if SATURATE is not None:
            value = tl.clamp(value, -SATURATE, SATURATE, propagate_nan=tl.PropagateNan.ALL)
        if BORDER == 0:
            value = tl.where(is_picture(start + first + row, ROW, FRAME, H, W), value, 0.0)
        tl.store(target, value.to(out.dtype.element_ty), mask=inside)
        source += ROWS * stride_s
        target += ROWS * out_s


def _launch(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: bool,
    per_frame: bool,
    dtype: torch.dtype | None,
    gain: float | None,
) -> Tensor:
    if bordered.is_bordered(x) and x.numel():
        return _launch_bordered(x, num_groups, weight, bias, eps, act, per_frame or x.dim() == 4, dtype, gain)
    out = empty_in_layout_of(x, dtype=dtype)
    if x.numel() == 0:
        return out
    x = flattenable(x, 3 if per_frame else 2)
    with torch.cuda.device_of(x):
        statistics = group_statistics(x, num_groups, eps, per_frame=per_frame)
        batches, frames, C, S, strides, ROWS, COLS, columns = walk(x, per_frame)
        rows = ROWS * NORMALIZE_STEPS
        if _dispatch.tally is not None:
            _dispatch.tally("_normalize", 0, out.numel() * (x.element_size() + out.element_size()))
        _normalize[-(-S // rows), columns, batches](
            x, out, statistics, weight, bias, frames, num_groups, C, S, rows, *strides, *walk(out, per_frame).strides,
            *layout(None), gain, BORDER=None, ACT=act, SATURATE=LARGEST.get(dtype),
            ROWS=ROWS, COLS=COLS, num_warps=WARPS,
        )  # fmt: skip
    return out


def _launch_bordered(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: bool,
    each_frame: bool,
    dtype: torch.dtype | None,
    gain: float | None,
) -> Tensor:
    """A bordered clip to a bordered clip: all pixels, border and all, are one axis.

    The zeros behind a sample are those before the next one; both write them. Others are a sample's own.
    """
    place, C = bordered.geometry(x), x.shape[1]
    samples = place.frames if each_frame else x.shape[0]
    out = bordered.empty(x.shape, dtype or x.dtype, x.device, place.border)
    step = place.frames // samples * place.frame
    shared = place.first if place.border == "zeros" else 0
    whole = (samples, C, step + shared), (step * C, 1, C)
    source, target = (bordered.pixels_of(t).as_strided(*whole) for t in (x, out))
    with torch.cuda.device_of(x):
        statistics = bordered_statistics(x, num_groups, eps, samples=samples)
        batches, frames, C, S, strides, ROWS, COLS, columns = walk(source, False)
        rows = ROWS * NORMALIZE_STEPS
        if _dispatch.tally is not None:
            _dispatch.tally("_normalize", 0, out.numel() * (x.element_size() + out.element_size()))
        _normalize[-(-S // rows), columns, batches](
            source, target, statistics, weight, bias, frames, num_groups, C, S, rows, *strides,
            *walk(target, False).strides, *layout(place), gain,
            BORDER=bordered.BORDERS.index(place.border), ACT=act, SATURATE=LARGEST.get(dtype),
            ROWS=ROWS, COLS=COLS, num_warps=WARPS,
        )  # fmt: skip
    return bordered.view(bordered.pixels_of(out), x.shape, place.border, filled=True)


def _run(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: bool,
    per_frame: bool,
    dtype: torch.dtype | None = None,
    gain: float | None = None,
) -> Tensor:
    if triton_available(x):
        return _launch(x, num_groups, weight, bias, eps, act, per_frame, dtype, gain)
    exact = reference(x, num_groups, weight, bias, eps, act=act, per_frame=per_frame, dtype=dtype, gain=gain)
    return in_layout_of(x, exact)


_op = torch.library.custom_op("vae_accel::group_norm_act", _run, mutates_args=())
_op.register_fake(
    lambda x, num_groups, weight, bias, eps, act, per_frame, dtype=None, gain=None: empty_in_layout_of(x, dtype=dtype)
)


def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    act: bool,
    per_frame: bool = False,
    dtype: torch.dtype | None = None,
    gain: float | None = None,
) -> Tensor:
    """GroupNorm over `num_groups` groups of channels, then SiLU if `act`. `x` and the result are `[N, C, *spatial]`.

    Statistics run over all of `spatial`, or over each frame of `[N, C, T, H, W]` with `per_frame` (Mochi, Cosmos,
    Magvit). `weight` and `bias` are `[C]` in any floating dtype, or None. Arithmetic is fp32 with one rounding, to
    `dtype` where one is given (fp16 and e4m3 saturate at their largest value), else to x's own; before it the result is
    multiplied by `gain`, a power of two, if any. It has x's layout, channels-last or contiguous; anything else becomes
    the nearer of the two. Where autograd records,
    the reference runs.

    Raises:
        ValueError: `num_groups` does not divide the channels, or `per_frame` without frames.
    """
    if x.dim() < 3 or x.shape[1] % num_groups:
        raise ValueError(f"x must be [N, C, *spatial] with C a multiple of {num_groups} groups, got {tuple(x.shape)}")
    if per_frame and x.dim() != 5:
        raise ValueError(f"per_frame needs x as [N, C, T, H, W], got {tuple(x.shape)}")
    if differentiates(x, weight, bias):
        return reference(x, num_groups, weight, bias, eps, act=act, per_frame=per_frame, dtype=dtype, gain=gain)
    run = _op if torch.compiler.is_compiling() else _run
    return run(x, num_groups, weight, bias, eps, act, per_frame, dtype, gain)


def signatures() -> list[Signature]:
    """The kernels as they are compiled ahead of time in the tests."""
    affine = {"x": "bf16", "out": "bf16", "statistics": "fp32", "weight": "fp32"}
    tile = {"bias": None, "ACT": True, "ROWS": TILE, "COLS": 1}
    plain = {**tile, "SATURATE": FP16_MAX, "gain": None}
    quantized = {**tile, "SATURATE": E4M3_MAX, "BORDER": 0}
    return [
        *(signature(_normalize, affine, {**plain, "BORDER": border}) for border in range(len(bordered.BORDERS))),
        signature(_normalize, {**affine, "out": "fp8e4nv"}, quantized, only=("sm_90",)),
    ]
