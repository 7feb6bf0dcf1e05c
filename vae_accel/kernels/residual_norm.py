"""A sum and the norm of it in one pass over rows: what follows attention and MLP in a layer of a transformer.

Stock reads the sum back: 10 bytes a value of 16 bits in two launches where 8 in one are needed. torch 2.11's LayerNorm
of 256 rows of 1280 takes 4.4 us on an H200.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch
from ._dispatch import LazyKernel, Signature, differentiates, next_power_of_2, signature, triton_available

tl: Any = None  # triton.language, bound at the first launch

MODES = ("layer", "rms")
WIDEST = 8192  # channels that a program holds in registers: 32 a thread of 8 warps
VALUES = 1024  # that a warp holds, at most


def reference(x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, mode: str) -> list[Tensor]:
    """The law: [norm, sum], or [norm] without `y`. Of the sum as stored, in fp32 (fp64 for fp64), rounded once."""
    total = x if y is None else x + y
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    factor, shift = weight.to(wide.dtype), None if bias is None else bias.to(wide.dtype)
    if mode == "layer":
        normed = F.layer_norm(wide, weight.shape, factor, shift, eps)
    else:
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * factor
        normed = normed if shift is None else normed + shift
    normed = normed.to(x.dtype)
    return [normed] if y is None else [normed, total]


@LazyKernel
def _residual_norm(
    x, y, total, normed, weight, bias, C, x_row, y_row, eps, RMS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program has one row, and reads it once: mean and squared deviations are taken of what it holds."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < C
    value = tl.load(x + row * x_row + col, mask=inside, other=0).to(tl.float32)
    if y is not None:
        value += tl.load(y + row * y_row + col, mask=inside, other=0).to(tl.float32)
        stored = value.to(total.dtype.element_ty)
        tl.store(total + row * C + col, stored, mask=inside)
        value = stored.to(tl.float32)
    if not RMS:
        mean = tl.sum(value, axis=0) / C
        value = tl.where(inside, value - mean, 0.0)
    value *= 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / C + eps)
    value *= tl.load(weight + col, mask=inside, other=0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + col, mask=inside, other=0).to(tl.float32)
    tl.store(normed + row * C + col, value.to(normed.dtype.element_ty), mask=inside)


def _run(x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, mode: str) -> list[Tensor]:
    C = x.shape[-1]
    plain = weight.is_contiguous() and (bias is None or bias.is_contiguous())
    if not triton_available(x) or not plain or C > WIDEST or x.numel() == 0:
        return [out.contiguous() for out in reference(x, y, weight, bias, eps, mode)]
    rows, others = _rows(x), None if y is None else _rows(y)
    normed, total = torch.empty(x.shape, dtype=x.dtype, device=x.device), None
    if y is not None:
        with torch.inference_mode(False):  # it counts its versions, so that who notes something on it sees a write
            total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if _dispatch.tally is not None:
        _dispatch.tally("_residual_norm", 0, (2 if y is None else 4) * x.numel() * x.element_size())
    BLOCK = next_power_of_2(C)
    with torch.cuda.device_of(x):
        _residual_norm[len(rows),](
            rows, others, total, normed, weight, bias, C, rows.stride(0), 0 if others is None else others.stride(0),
            eps, RMS=mode == "rms", BLOCK=BLOCK, num_warps=min(max(BLOCK // VALUES, 1), 8),
        )  # fmt: skip
    return [normed] if total is None else [normed, total]


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


_op = torch.library.custom_op("vae_accel::residual_norm", _run, mutates_args=())
_op.register_fake(
    lambda x, y, weight, bias, eps, mode: [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(1 if y is None else 2)
    ]
)


def residual_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, eps: float, mode: str = "layer"
) -> tuple[Tensor, Tensor]:
    """`x + y` as torch stores it, and the norm of that over the last dimension: `[..., C]`, contiguous, of x's dtype.

    `mode="layer"` is `(s - mean(s)) / sqrt(var(s) + eps) * weight + bias`, `"rms"` `s / sqrt(mean(s²) + eps) * weight
    + bias`. `weight` and `bias` are `[C]` of any floating dtype. Arithmetic is fp32 with one rounding. Where there is
    no Triton, for fp64, more than WIDEST channels, and where autograd records, the reference runs.

    Raises:
        ValueError: an unknown `mode`, or `y`, `weight` or `bias` of a shape or dtype that does not fit.
    """
    if y.shape != x.shape or y.dtype != x.dtype:
        given = f"{tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype}"
        raise ValueError(f"x and y must be of one shape and dtype, got {given}")
    normed, total = _called(x, y, weight, bias, eps, mode)
    return total, normed


def row_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, mode: str = "layer") -> Tensor:
    """The norm of `x` by itself, otherwise as in `residual_norm`."""
    return _called(x, None, weight, bias, eps, mode)[0]


def _called(x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, mode: str) -> list[Tensor]:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be [{x.shape[-1]}], one a channel, got {tuple(parameter.shape)}")
    if differentiates(x, y, weight, bias):
        return reference(x, y, weight, bias, eps, mode)
    run = _op if torch.compiler.is_compiling() else _run
    return run(x, y, weight, bias, eps, mode)


def signatures() -> list[Signature]:
    """The kernel as it is compiled ahead of time in the tests."""
    norm, both = dict.fromkeys(("x", "normed", "weight"), "bf16"), dict.fromkeys(("y", "total"), "bf16")
    return [
        signature(_residual_norm, {**norm, **both, "bias": "bf16"}, {"RMS": False, "BLOCK": 2048}),
        signature(_residual_norm, {**norm, **both}, {"RMS": True, "BLOCK": WIDEST, "bias": None}, warps=8),
        signature(_residual_norm, {**norm, "bias": "bf16"}, {"RMS": False, "BLOCK": 2048, "y": None, "total": None}),
    ]
