"""GroupNorm modulated by a small latent, then SiLU: `norm(x) * scale + shift`, the spatial norm of CogVideoX.

Stock enlarges the latent to the size of `x` and runs both 1x1 convolutions there. A 1x1 convolution commutes with
nearest upsampling, so scale and shift come at the latent's own size and are indexed while normalising.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, bordered, group_norm_act
from ._dispatch import (
    LazyKernel,
    Signature,
    differentiates,
    empty_in_layout_of,
    flattenable,
    in_layout_of,
    signature,
    triton_available,
)
from .bordered import is_picture
from .group_statistics import WARPS, bordered_statistics, group_statistics, layout, walk

tl: Any = None  # triton.language, bound at the first launch


def _nearest(size: int, source: int) -> list[int]:
    """The source index of each of `size` positions, as `F.interpolate(mode="nearest")` picks them."""
    return F.interpolate(torch.arange(source, dtype=torch.float32).view(1, 1, -1), size=size).long().flatten().tolist()


def reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    frames: Sequence[int],
    *,
    act: bool,
) -> Tensor:
    """The law: in fp32 (fp64 for fp64), rounded once to x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values = group_norm_act.reference(x.to(wide), num_groups, weight, bias, eps, act=False)
    rows, columns = _nearest(x.shape[3], scale.shape[3]), _nearest(x.shape[4], scale.shape[4])
    scale, shift = (p.to(wide)[:, :, list(frames)][:, :, :, rows][..., columns] for p in (scale, shift))
    values = values * scale + shift
    return (F.silu(values) if act else values).to(x.dtype)


@LazyKernel
def _normalize_modulate(
    x, out, statistics, weight, bias, scale, shift, index, frames, groups, C, S, ROW, FRAME, H, W, rows,
    stride_n, stride_t, stride_c, stride_s, out_n, out_t, out_c, out_s,
    scale_n, scale_c, scale_t, scale_h, scale_w,
    BORDER: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """`rows` positions of one frame by `COLS` channels. `index` int32: the latent's frame, row and column for each.

    With a `BORDER` of zeros its pixels are positions too; else ROW is W, and FRAME unread.
    """
    batch, frame = tl.program_id(2) // frames, tl.program_id(2) % frames
    start = tl.program_id(0) * rows
    limit = tl.minimum(rows, S - start)
    row = tl.arange(0, ROWS)[:, None]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    n, t, c = batch.to(tl.int64), frame.to(tl.int64), col.to(tl.int64)
    source = x + n * stride_n + t * stride_t + start.to(tl.int64) * stride_s + c * stride_c + row * stride_s
    target = out + n * out_n + t * out_t + start.to(tl.int64) * out_s + c * out_c + row * out_s
    latent = n * scale_n + tl.load(index + frame).to(tl.int64) * scale_t + c * scale_c

    statistic = statistics + batch * groups + col // (C // groups)
    mean = tl.load(statistic, mask=col < C, other=0)
    gain = tl.load(statistic + tl.num_programs(2) // frames * groups, mask=col < C, other=0)
    if weight is not None:
        gain *= tl.load(weight + col, mask=col < C, other=0).to(tl.float32)
    offset = tl.full([1, COLS], 0, tl.float32)
    if bias is not None:
        offset += tl.load(bias + col, mask=col < C, other=0).to(tl.float32)
    for first in range(0, limit, ROWS):
        position = start + first + row
        inside = (first + row < limit) & (col < C)
        h = position // ROW - BORDER
        w = position % ROW - BORDER
        picture = position < S
        if BORDER:
            picture = is_picture(position, ROW, FRAME, H, W)
        h = tl.load(index + frames + h, mask=picture, other=0)
        w = tl.load(index + frames + H + w, mask=picture, other=0)
        place = latent + (h * scale_h + w * scale_w)
        value = (tl.load(source, mask=inside, other=0).to(tl.float32) - mean) * gain + offset
        value = value * tl.load(scale + place, mask=inside, other=0).to(tl.float32)
        value += tl.load(shift + place, mask=inside, other=0).to(tl.float32)
        if ACT:
            value = value / (1 + tl.exp(-value))
        if BORDER:
            value = tl.where(picture, value, 0.0)
        tl.store(target, value.to(out.dtype.element_ty), mask=inside)
        source += ROWS * stride_s
        target += ROWS * out_s


@functools.lru_cache(maxsize=256)
def _index(frames: tuple[int, ...], height: int, h: int, width: int, w: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([*frames, *_nearest(height, h), *_nearest(width, w)], dtype=torch.int32).to(device)


def _launch(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    frames: tuple[int, ...],
    act: bool,
) -> Tensor:
    if x.numel() == 0:
        return empty_in_layout_of(x)
    scale, shift = in_layout_of(x, scale), in_layout_of(x, shift)
    height, width = x.shape[3:]
    index = _index(frames, height, scale.shape[3], width, scale.shape[4], x.device)
    place = bordered.geometry(x) if bordered.is_bordered(x) else None
    with torch.cuda.device_of(x):
        if place is None or place.border != "zeros":
            place, x = None, flattenable(x)
            statistics, out = group_statistics(x, num_groups, eps), empty_in_layout_of(x)
            source, target, around = x, out, (width, 1, height, width)
        else:
            statistics = bordered_statistics(x, num_groups, eps, samples=x.shape[0])
            out = bordered.empty(x.shape, x.dtype, x.device)
            # Behind each frame the zeros that are the next one's too: both write them.
            whole = (*x.shape[:3], place.frame + place.first), (*x.stride()[:3], x.shape[1])
            source, target = (bordered.pixels_of(t).as_strided(*whole) for t in (x, out))
            around = layout(place)
        batches, T, C, S, strides, ROWS, COLS, columns = walk(source, per_frame=True)
        rows = ROWS * group_norm_act.NORMALIZE_STEPS
        if _dispatch.tally is not None:
            _dispatch.tally("_normalize_modulate", 0, 2 * out.numel() * out.element_size())
        _normalize_modulate[-(-S // rows), columns, batches](
            source, target, statistics, weight, bias, scale, shift, index, T, num_groups, C, S, *around, rows,
            *strides, *walk(target, per_frame=True).strides, *scale.stride(),
            BORDER=0 if place is None else 1, ACT=act, ROWS=ROWS, COLS=COLS, num_warps=WARPS,
        )  # fmt: skip
    return out


def _run(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    frames: Sequence[int],
    act: bool,
) -> Tensor:
    if triton_available(x):
        return _launch(x, num_groups, weight, bias, eps, scale, shift, tuple(frames), act)
    return in_layout_of(x, reference(x, num_groups, weight, bias, eps, scale, shift, frames, act=act))


_op = torch.library.custom_op("vae_accel::group_norm_modulate_act", _run, mutates_args=())
_op.register_fake(lambda x, *_: empty_in_layout_of(x))


def group_norm_modulate_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    frames: Sequence[int],
    *,
    act: bool,
) -> Tensor:
    """`group_norm(x) * scale + shift`, then SiLU if `act`, over `[N, C, T, H, W]`; statistics over all of T, H, W.

    `scale` and `shift` are `[N, C, t, h, w]` at the latent's size. Frame `i` of `x` takes their frame `frames[i]`
    (`frames` has T entries below t: how a family enlarges time is its own), rows and columns follow
    `F.interpolate(mode="nearest")`. Arithmetic is fp32 with one rounding to x's dtype; the result has x's layout, with
    a border of zeros where x has one. Where autograd records, the reference runs.

    Raises:
        ValueError: shapes that do not fit, or a frame outside the latent.
    """
    if x.dim() != 5 or scale.shape != shift.shape or scale.shape[:2] != x.shape[:2] or x.shape[1] % num_groups:
        raise ValueError(
            f"x must be [N, C, T, H, W] with C a multiple of {num_groups} groups, scale and shift [N, C, t, h, w], "
            f"got {tuple(x.shape)}, {tuple(scale.shape)} and {tuple(shift.shape)}"
        )
    if len(frames) != x.shape[2] or not all(0 <= frame < scale.shape[2] for frame in frames):
        raise ValueError(f"frames must hold {x.shape[2]} indices below {scale.shape[2]}, got {list(frames)}")
    if differentiates(x, weight, bias, scale, shift):
        return reference(x, num_groups, weight, bias, eps, scale, shift, frames, act=act)
    run = _op if torch.compiler.is_compiling() else _run
    return run(x, num_groups, weight, bias, eps, scale, shift, list(frames), act)


def signatures() -> list[Signature]:
    """The kernel as it is compiled ahead of time in the tests."""
    pointers = dict.fromkeys(("x", "out", "weight", "bias", "scale", "shift"), "bf16")
    pointers |= {"statistics": "fp32", "index": "i32"}
    constants = {"ACT": True, "ROWS": 16, "COLS": 128}
    return [signature(_normalize_modulate, pointers, {"BORDER": border, **constants}) for border in (0, 1)]
