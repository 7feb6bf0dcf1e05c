"""RMS norm over the channels of `[N, C, *spatial]`, then SiLU where asked, in one pass, in either dense layout.

Stock is a chain of 5 to 7 elementwise passes: Wan's `F.normalize` in fp32 and back, `* scale * gamma + bias`, SiLU;
LTX's also moves the channels to the end and back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, bordered
from ._dispatch import (
    LazyKernel,
    Signature,
    differentiates,
    empty_in_layout_of,
    flat_stride,
    flattenable,
    in_layout_of,
    is_channels_last,
    next_power_of_2,
    rounded,
    signature,
    triton_available,
)
from .bordered import repeated
from .group_statistics import layout

tl: Any = None  # triton.language, bound at the first launch

MODES = ("l2", "mean")
TILE = 4096  # elements a program holds at a time
WARPS = 4
PIXELS_PER_LINE = 32  # positions of a contiguous tile: 64 bytes of bf16, two DRAM sectors


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    act: bool,
    mode: str = "l2",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The law: in fp32 (fp64 for fp64), rounded once to `dtype`, by default x's."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values = x.to(wide)
    if mode == "l2":
        values = F.normalize(values, dim=1, eps=eps) * math.sqrt(x.shape[1])
    else:
        values = values * torch.rsqrt(values.square().mean(1, keepdim=True) + eps)
    per_channel = (-1, *[1] * (x.dim() - 2))
    if weight is not None:
        values = values * weight.to(wide).reshape(per_channel)
    if bias is not None:
        values = values + bias.to(wide).reshape(per_channel)
    values = F.silu(values) if act else values
    return values.to(x.dtype) if dtype is None else rounded(values, dtype)


@LazyKernel
def _rms_norm(
    x, out, weight, bias, eps, C, S, stride_n, stride_c, stride_s, out_n, out_c, out_s, ROW, FRAME, H, W,
    BORDER: tl.constexpr, L2: tl.constexpr, ACT: tl.constexpr, SATURATE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """`BORDER`: what is repeated around the pictures of a bordered clip, an index of `BORDERS`, or None."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    inside = (row < S) & (col < C)
    place = row
    if BORDER is not None:
        place = repeated(row.to(tl.int32), ROW, FRAME, H, W, BORDER).to(tl.int64)
    source = x + batch * stride_n + place * stride_s + col.to(tl.int64) * stride_c
    value = tl.load(source, mask=inside, other=0).to(tl.float32)
    square = tl.sum(value * value, axis=1, keep_dims=True)
    if L2:
        value *= tl.sqrt(1.0 * C) / tl.maximum(tl.sqrt(square), eps)
    else:
        value *= 1.0 / tl.sqrt(square / C + eps)
    if weight is not None:
        value *= tl.load(weight + col, mask=col < C, other=0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + col, mask=col < C, other=0).to(tl.float32)
    if ACT:
        value = value / (1 + tl.exp(-value))
    if SATURATE:
        value = tl.clamp(value, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    target = out + batch * out_n + row * out_s + col.to(tl.int64) * out_c
    tl.store(target, value.to(out.dtype.element_ty), mask=inside)


def _launch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: bool,
    mode: str,
    dtype: torch.dtype | None,
    out: Tensor | None = None,
    border: bordered.Geometry | None = None,
) -> Tensor:
    out = empty_in_layout_of(x, dtype=dtype) if out is None else out
    if x.numel() == 0:
        return out
    x = flattenable(x)
    batch, C, *spatial = x.shape
    S = math.prod(spatial)
    COLS = next_power_of_2(C)
    # All channels of a position meet in one program. Contiguous, the positions are the fast axis and need a line.
    ROWS = max(TILE // COLS, 1 if is_channels_last(x) else PIXELS_PER_LINE)
    if _dispatch.tally is not None:
        _dispatch.tally("_rms_norm", 0, x.numel() * (x.element_size() + out.element_size()))
    with torch.cuda.device_of(x):
        _rms_norm[-(-S // ROWS), batch](
            x, out, weight, bias, eps, C, S, x.stride(0), x.stride(1), flat_stride(x.shape[2:], x.stride()[2:]),
            out.stride(0), out.stride(1), flat_stride(out.shape[2:], out.stride()[2:]), *layout(border),
            BORDER=None if border is None else bordered.BORDERS.index(border.border), L2=mode == "l2", ACT=act,
            SATURATE=dtype == torch.float16, ROWS=ROWS, COLS=COLS,
            num_warps=WARPS if ROWS * COLS <= 2 * TILE else 2 * WARPS,
        )  # fmt: skip
    return out


def _launch_bordered(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: bool, mode: str, dtype: torch.dtype | None
) -> Tensor:
    """A bordered clip to a bordered clip: all pixels are one axis, of which zeros stay zeros and others repeat."""
    place = bordered.geometry(x)
    out = bordered.empty(x.shape, dtype or x.dtype, x.device, place.border)
    repeats = place if place.border != "zeros" else None
    end = place.pixels if repeats is None else place.frames * place.frame
    source, target = (bordered.pixels_of(t)[:end].T.unsqueeze(0) for t in (x, out))
    _launch(source, weight, bias, eps, act, mode, dtype, target, repeats)
    return bordered.view(bordered.pixels_of(out), x.shape, place.border, filled=True)


def _run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: bool,
    mode: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if triton_available(x):
        return _launch(x, weight, bias, eps, act, mode, dtype)
    return in_layout_of(x, reference(x, weight, bias, eps, act=act, mode=mode, dtype=dtype))


_op = torch.library.custom_op("vae_accel::rms_norm_act", _run, mutates_args=())
_op.register_fake(lambda x, weight, bias, eps, act, mode, dtype=None: empty_in_layout_of(x, dtype=dtype))


def rms_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    act: bool,
    mode: str = "l2",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """RMS norm over dimension 1, then SiLU if `act`: `[N, C, *spatial]` in and out, same dtype and layout.

    `mode="l2"` is Wan's: `x / max(|x|_2, eps) * sqrt(C) * weight + bias` (stock eps is 1e-12). `mode="mean"` is
    LTX's: `x / sqrt(mean(x²) + eps) * weight + bias`. `weight` and `bias` have C elements in any shape and floating
    dtype, or are None. Arithmetic is fp32 with one rounding, to `dtype` where one is given (fp16 saturates at its
    largest value). Where autograd records, the reference runs.

    Raises:
        ValueError: an unknown `mode`, or a weight or bias without C elements.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.numel() != x.shape[1]:
            raise ValueError(f"{name} must have {x.shape[1]} elements, one a channel, got {tuple(parameter.shape)}")
    if differentiates(x, weight, bias):
        return reference(x, weight, bias, eps, act=act, mode=mode, dtype=dtype)
    if bordered.is_bordered(x) and triton_available(x) and (bias is None or bordered.geometry(x).border != "zeros"):
        return _launch_bordered(x, weight, bias, eps, act, mode, dtype)
    run = _op if torch.compiler.is_compiling() else _run
    return run(x, weight, bias, eps, act, mode, dtype)


def signatures() -> list[Signature]:
    """The kernel as it is compiled ahead of time in the tests."""
    pointers = {"x": "bf16", "out": "bf16", "weight": "bf16"}
    shape = {"bias": None, "ACT": True, "SATURATE": True, "ROWS": 32, "COLS": 128}
    forms = [(True, None), (False, None), (True, 1)]
    return [signature(_rms_norm, pointers, {**shape, "L2": L2, "BORDER": border}) for L2, border in forms]
