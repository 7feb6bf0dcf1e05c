"""fp16 operands of an fp32 model, where stock's own are TF32: as many bits of activations, twice as many of weights.

cuDNN rounds the operands of fp32 convolutions to TF32 unless the user forbids it. fp16 rounds to nearest in as many
bits, and is multiplied at twice the rate: a 3x3x3 convolution of 384 channels, summed in fp64, is 2.96e-4 off (relative
RMS) in either, and 7.7e-4 where TF32 is made by dropping bits, which is what the tensor cores do with fp32 in memory.
So there is no TF32 form of our kernels: it would read twice the bytes and be further from fp32. (Winograd's transformed
operands are 4.3e-4 off, 3.7e-4 without the rounding before the transform: not for fp32 models.)

With operands rounded alike the error would be stock's times what chance makes of it: 0.96, 0.99 and 1.07 on three
inputs of Wan 2.1 on an H100. So a weight is multiplied in two terms: itself in fp16, and what that left of it in fp16,
both products into one sum. It is then off by 2^-22 of itself or 2^-36 of the largest; what remains is the rounding of
activations, 2.09e-4 in the example, at the work of TF32. An upsampling's sums of taps are split likewise.

What fp16 lacks is range: it ends at 65504, and below 2^-14 it is off by up to 2^-25 whatever the value. Where a norm
bounds the activations, `families/half.py` checks both ends when a model is optimized. Others, and the weights, are
divided by the power of two that brings the largest value to 2^11 to 2^12 (`scaled`), so that all within 2^25 of it keep
their 11 bits, and the sum is multiplied by it: exact, found on the card in each call, and two passes over the operand.

Bias and residual are added to the finished sum there, as stock does. A tensor core cuts its sums off at fp32's last bit
(Fasi et al., 2021): begun from a residual of 10 times the sum, 216 steps of 16 channels would cost about 1e-4 of it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vae_accel.settings import tf32_forbidden

from . import bordered
from ._dispatch import triton_available

HALVED = (torch.bfloat16, torch.float32)  # dtypes of models whose norms may write fp16
TERMS = 2  # of an fp32 weight; with one the error is that of TF32
HIGHEST = 2.0**11  # the folded upsampling adds up to eight taps
SMALLEST = 2.0**-100  # a largest value below is not enlarged further: its inverse must be finite

_forbidden = functools.cache(tf32_forbidden)  # once a process, as NVIDIA's libraries read it

_wanted = True


def use(wanted: bool) -> None:
    """Whether fp32 models go here at all: the user's choice at the last `optimize`, for the process."""
    global _wanted
    _wanted = wanted


def stock_is_tf32(x: Tensor) -> bool:
    """Whether the vendor's convolution of fp32 `x` multiplies in TF32, by what torch is set to now, and ours may."""
    return refusal(x) is None


def refusal(x: Tensor) -> str | None:
    """Why fp32 `x` is not for ours, or None.

    The CPU counts as a card where Triton is interpreted, in tests; its own convolutions are exact.
    """
    if x.is_cuda and not _wanted:
        return "fp32 models are the vendor's by VAE_ACCEL_HALF_OPERANDS=0"
    if not triton_available(x):
        return "there is no Triton"
    cudnn: Any = torch.backends.cudnn
    conv = getattr(cudnn, "conv", None)  # since torch 2.9, where the older switch raises once this was set
    allowed = cudnn.enabled and not _forbidden()
    if allowed and (cudnn.allow_tf32 if conv is None else conv.fp32_precision == "tf32"):
        return None
    return "stock multiplies fp32 in full: TF32 is off"


def terms_of(dtype: torch.dtype) -> int:
    """In how many terms our kernels multiply weights of `dtype`."""
    return TERMS if dtype == torch.float32 else 1


def in_terms(matrix: Tensor, dtype: torch.dtype, terms: int) -> Tensor:
    """`[O, K]` as `[O, terms K]` of `dtype`: rounded, and of two terms the second is what that left, rounded."""
    first = matrix.to(dtype)
    return first if terms == 1 else torch.cat((first, (matrix - first).to(dtype)), 1)


def scaled(x: Tensor, history: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Operands beside an fp32 `weight` so that fp16 holds them: `x` and `history` bordered in fp16, or as they are
    where a norm wrote `x` in fp16; `weight` still to be rounded.

    The fourth is what the sum of products is to be multiplied by, one number in fp32.
    """
    taps = _unit(weight)
    weight = weight * taps.reciprocal()
    if x.dtype == torch.float16:
        return x, history, weight, taps
    clip = _unit(x) if history is None else torch.maximum(_unit(x), _unit(history))
    shrink = clip.reciprocal()
    kept = None if history is None else _halved(history, shrink)
    return _halved(x, shrink), kept, weight, clip * taps


def _unit(x: Tensor) -> Tensor:
    """A power of two: the largest magnitude divided by it is in [2^12, 2^13), or below. inf where `x` is not finite."""
    zeros = bordered.is_bordered(x) and bordered.geometry(x).border == "zeros"  # other borders may be open
    largest = torch.linalg.vector_norm(bordered.pixels_of(x) if zeros else x, float("inf"))
    power = (largest.float().view(torch.int32) & 0x7F800000).view(torch.float32)  # its exponent alone
    return power.clamp_min(SMALLEST) / HIGHEST


def _halved(x: Tensor, factor: Tensor) -> Tensor:
    """`x` by a power of two as a bordered clip of fp16."""
    out = bordered.empty(x.shape, torch.float16, x.device, bordered.geometry(x).border)
    if bordered.is_bordered(x):
        torch.mul(bordered.pixels_of(x), factor, out=bordered.pixels_of(out))
    else:
        bordered.clear_border(bordered.pixels_of(out), bordered.geometry(out))
        torch.mul(x, factor, out=out)
    return out
