"""Convolution as an implicit GEMM: `[N, C, H, W]` or `[N, C, T, H, W]`, stride 1, one group.

What stock does around the vendor's convolution happens inside this one: frames in front of the clip come from a cache
tensor or are zeros (no cat, no pad), zeros around a frame are reads outside of it, bias and residual are added in fp32
before the only rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

tl: Any = None  # triton.language, bound at the first launch


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    padding: tuple[int, int] = (0, 0),
    before: int = 0,
    history: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The law: the vendor's convolution of the padded clip, and the residual added in fp32."""
    dtype = weight.dtype
    if x.dim() == 5:
        if history is not None:
            x, before = torch.cat([history, x], 2), before - history.shape[2]
        x = F.pad(x, (0, 0, 0, 0, before, 0))
    convolve = F.conv3d if x.dim() == 5 else F.conv2d
    y = convolve(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), 1, (0,) * (x.dim() - 4) + padding)
    if residual is not None:
        wide = torch.promote_types(dtype, torch.float32)
        y = y.to(wide) + residual.to(wide)
    return y.to(dtype)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    padding: tuple[int, int] = (0, 0),
    before: int = 0,
    history: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`[N, I, (T,) H, W]` convolved by `weight` `[O, I, (kt,) kh, kw]`: `[N, O, (T',) H', W']` in the weight's dtype.

    Args:
        x: activations, channels-last; fp16 beside a bf16 weight is allowed, and is computed in fp16 operands.
        padding: zeros around each frame, (height, width).
        before: frames in front of a clip, T' = T + before - (kt - 1).
        history: `[N, I, K, H, W]`, K <= before, the frames directly in front of `x`; the others are zeros.
        residual: like the result; added in fp32 before the one rounding.
        out: where to write it, e.g. every other frame of a longer clip; returned.
    """
    y = reference(x, weight, bias, padding=padding, before=before, history=history, residual=residual)
    return y if out is None else out.copy_(y)
