"""Stock's fp32 convolutions as a card runs them, on the CPU, whose own are exact: TF32 operands, sums in fp64.

Rounded to nearest, which is the best a card can do: dropping bits is 2.6 times as far from the truth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def tf32(x: Tensor) -> Tensor:
    """fp32 rounded to 10 bits of mantissa, to nearest even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


class Simulated(TorchDispatchMode):
    """Inside, convolutions of fp32 multiply in TF32, while torch allows cuDNN to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rounds = func is torch.ops.aten.convolution.default and args[0].dtype == torch.float32
        if not rounds or not torch.backends.cudnn.allow_tf32:
            return func(*args, **(kwargs or {}))
        x, weight, bias, *rest = args
        bias = None if bias is None else bias.double()
        return func(tf32(x).double(), tf32(weight).double(), bias, *rest).float()
