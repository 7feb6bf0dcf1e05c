"""A 3x3 convolution of e4m3 operands, fp32 sums and a result of 16 bits, behind a norm whose range is known.

e4m3 has 3 bits of mantissa, so that a number is off by up to 1/16 of itself (2.6 % in RMS), and 15 binades of normal
numbers that end at 448. Weights are quantized in each call, every output channel by a scale of its own that brings its
largest weight to 448; activations by the norm that writes them, times a power of two (`gain_of`), saturated. What one
operand is divided by, each sum is multiplied by, before the bias and the residual, which stay in 16 bits, are added.

Hopper's tensor cores have twice fp16's rate for it and read half the bytes. They keep about 14 bits of the sums they
add products to (DeepSeek-V3's report, 2024, section 3.3), by which these sums shrink by 4e-4 at most.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bordered, conv3x3
from ._dispatch import (
    E4M3,
    E4M3_MAX,
    LazyKernel,
    Signature,
    empty_in_layout_of,
    next_power_of_2,
    rounded,
    signature,
    triton_available,
)

tl: Any = None  # triton.language, bound at the first launch

DEVIATIONS = 16  # standard deviations of a normalised value that fit at least; the power of two makes it up to 32
SMALLEST = 2.0**-100  # a largest weight below is not enlarged further: its inverse must be finite
WARPS = 8


def refusal(x: Tensor, channels: tuple[int, ...]) -> str | None:
    """Why no convolution of `x` through so many channels, from the first to the last, runs here; or None.

    The CPU stands in for a card, by the law or with Triton interpreted.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"its pictures are {x.dtype}, and the result has 16 bits"
    if (reason := unfit(channels)) is not None:
        return reason
    return None if not x.is_cuda or conv3x3.is_ready(x.device) else "its e4m3 form is for Hopper cards with NVRTC alone"


def unfit(channels: tuple[int, ...]) -> str | None:
    """Why there is no form for convolutions from each of these numbers of channels to the next, or None."""
    for wide in channels[:-1]:
        if wide % 128:
            return f"{wide} input channels are no multiple of 128"
    narrow = (n for i, n in pairwise(channels) if conv3x3.columns_of(i, n, E4M3) is None)
    return next((f"{n} output channels are no multiple of 128 or 192" for n in narrow), None)


def gain_of(weight: Tensor | None, bias: Tensor | None) -> float:
    """The power of two by which what a norm with this affine `[C]` writes is multiplied: the largest with which 16
    standard deviations of every channel are within e4m3."""
    scale = 1.0 if weight is None else weight.detach().float().abs()
    shift = 0.0 if bias is None else bias.detach().float().abs()
    peak = float(torch.as_tensor(DEVIATIONS * scale + shift).max())
    return 2.0 ** math.floor(math.log2(E4M3_MAX / peak)) if SMALLEST < peak < math.inf else 1.0


def quantized_reference(weight: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """The law of `quantized`."""
    rows = weight.movedim(1, -1).flatten(1).float()
    largest = rows.abs().amax(1, keepdim=True).clamp_min(SMALLEST)
    return rounded(rows * E4M3_MAX / largest, E4M3), (largest / (E4M3_MAX * gain)).squeeze(1)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, gain: float, *, residual: Tensor | None = None) -> Tensor:
    """The law: the convolution, in fp32, of e4m3 `x` and the quantized weight, and the rest added, rounded once."""
    taps, scales = quantized_reference(weight, gain)
    o, i, *kernel = weight.shape
    y = F.conv2d(x.float(), taps.float().view(o, *kernel, i).movedim(-1, 1), padding=1) * scales[:, None, None]
    for more in (None if bias is None else bias[:, None, None], residual):
        y = y if more is None else y + more.float()
    return y.to(weight.dtype)


@LazyKernel
def _quantize(weight, out, scales, length, stride, gain, BLOCK: tl.constexpr):
    """A row of e4m3's range, and what a sum with it is to be multiplied by, from a row of weights."""
    row = tl.program_id(0)
    item = tl.arange(0, BLOCK)
    inside = item < length
    value = tl.load(weight + row * stride + item, mask=inside, other=0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(value), axis=0), 2.0**-100)
    value = tl.div_rn(value * 448.0, largest)  # of 16 bits 0.2 % are ties of e4m3
    value = tl.clamp(value, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + row * length + item, value.to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, tl.div_rn(largest, 448.0 * gain))


def quantized(weight: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """`[O, I, 3, 3]` as e4m3 `[O, 9 I]`, the channels of a tap beside each other, and fp32 `[O]`, by which a channel of
    the sum with activations that were multiplied by `gain` is to be multiplied."""
    if not triton_available(weight):
        return quantized_reference(weight, gain)
    rows = weight.movedim(1, -1).flatten(1)  # a view where the weight lies channels-last
    out = torch.empty(rows.shape, dtype=E4M3, device=weight.device)
    scales = torch.empty(rows.shape[0], dtype=torch.float32, device=weight.device)
    with torch.cuda.device_of(weight):
        _quantize[(rows.shape[0],)](
            rows, out, scales, rows.shape[1], rows.stride(0), gain,
            BLOCK=next_power_of_2(rows.shape[1]), num_warps=WARPS,
        )  # fmt: skip
    return out, scales


def fp8_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: float,
    *,
    residual: Tensor | None = None,
    statistics: bool = False,
) -> Tensor:
    """`[N, I, H, W]` of e4m3 convolved by `weight` `[O, I, 3, 3]`, zeros around it: `[N, O, H, W]` in the weight's
    dtype, bf16 or fp16.

    Args:
        x: activations times `gain`, as `group_norm_act` writes them for `dtype=torch.float8_e4m3fn`.
        bias: `[O]`, like the weight.
        residual: like the result; added in fp32 before the one rounding.
        statistics: a GroupNorm comes next: the kernel notes its statistics beside the result.

    The result of the kernel is a bordered picture; of the law, which runs on a CPU, in the layout of `x`.
    """
    if not conv3x3.is_ready(x.device):
        y = reference(x, weight, bias, gain, residual=residual)
        return empty_in_layout_of(x, y.shape, y.dtype).copy_(y)
    x = bordered.bordered(x)
    out = bordered.empty((x.shape[0], weight.shape[0], *x.shape[2:]), weight.dtype, x.device, versions=statistics)
    residual = None if residual is None else bordered.laid_out(residual)
    return conv3x3.conv_quantized(x, *quantized(weight, gain), bias, residual, out, statistics=statistics)


def signatures() -> list[Signature]:
    """The kernel as it is compiled ahead of time in the tests."""
    given = {"weight": "bf16", "out": "fp8e4nv", "scales": "fp32"}
    return [signature(_quantize, given, {"BLOCK": 8192}, warps=WARPS, only=("sm_90",))]
