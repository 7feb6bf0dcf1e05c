"""Which convolutions are ours and which the vendor's, and in what dtype a norm in front of ours had better write."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ._dispatch import DTYPES, triton_available
from .half_operands import HALVED, refusal, stock_is_tf32


@functools.cache
def measured_on(device: torch.device) -> bool:
    """Whether ours was measured on such a card; the CPU, where Triton is interpreted, and meta stand for one."""
    if device.type != "cuda":
        return device.type in ("cpu", "meta")
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] == 9


def runs(x: Tensor) -> bool:
    """Whether to convolve `x` here and not by the rewrites for the vendor's; on the CPU the reference stands in."""
    return not x.is_cuda or _unable(x) is None


def wants_fp16(x: Tensor) -> bool:
    """Whether what normalises `x` had better write fp16: not for the vendor's, which would convert it."""
    if x.dtype not in HALVED or torch.compiler.is_compiling():
        return False
    if x.dtype == torch.float32 and not stock_is_tf32(x):
        return False
    return measured_on(x.device) and (not x.is_cuda or triton_available(x))


def _unable(x: Tensor) -> str | None:
    if torch.compiler.is_compiling():  # first: it cannot trace what Triton is asked
        return "a compiler sees through the vendor's"
    if x.dtype not in DTYPES:
        return f"{x.dtype} has no form here"
    if not triton_available(x):
        return "there is no Triton"
    if not x.is_cuda and x.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bf16 as integers"
    if x.dtype == torch.float32 and (reason := refusal(x)) is not None:
        return reason
    return None if measured_on(x.device) else "it is measured on compute capability 9.0 alone"


def unsupported(x: Tensor, weight: Tensor, padding: tuple[int, int], *, multiple: int = 8) -> str | None:
    """Why the vendor's convolution runs instead of ours, or None. `multiple`: what input channels have to be of."""
    if weight.dtype not in DTYPES:
        return f"{weight.dtype} has no form here"
    if (reason := _unable(x)) is not None:
        return reason
    if x.shape[1] % multiple or weight.shape[0] % 8:
        return "the copy engine moves multiples of 16 bytes"
    if (tuple(weight.shape[-2:]), tuple(padding)) not in (((3, 3), (1, 1)), ((1, 1), (0, 0))):
        return f"a kernel of {tuple(weight.shape[2:])} with a padding of {tuple(padding)} has no form here"
    return None
