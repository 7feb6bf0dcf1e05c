"""How a parameter lies in memory: the order of its dimensions, and the room that larger zeros around it leave.

Written by the pen and its ledger (edits.py) alone, and by `padded`, which keeps what the pen wrote.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def padded(module: nn.Module, name: str, shape: tuple[int, ...]) -> Tensor | None:
    """All of a parameter that `Pen.pad` stored, [shape] with zeros beyond it: to be asked for inside its module's call.

    One that was copied since, as `.to()`, deepcopy and offloading do, is stored so again. None where it cannot be: it
    is on meta, quantized or computed by a parametrization, or a graph is being captured, whose memory is not to keep.
    """
    parameter = module._parameters.get(name)
    if parameter is None or parameter.is_meta or type(parameter.data) is not Tensor:
        return None
    if not is_padded(parameter, shape):
        if parameter.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        with torch.inference_mode(parameter.is_inference()), torch.no_grad():
            pad(parameter, shape)
    return parameter.detach().as_strided(shape, contiguous(shape))


def strides_in(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Of a dense tensor of `shape` whose dimensions lie in `order`, outermost first."""
    strides, step = [0] * len(order), 1
    for dim in reversed(order):
        strides[dim], step = step, step * max(shape[dim], 1)
    return tuple(strides)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return strides_in(shape, range(len(shape)))


def is_laid_out(parameter: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether a parameter still has `strides`; those of sizes of 1 say nothing, and do not survive `.to(dtype)`."""
    same = [
        own == given for size, own, given in zip(parameter.shape, parameter.stride(), strides, strict=False) if size > 1
    ]
    return parameter.dim() == len(strides) and all(same)


def restride(parameter: Tensor, strides: tuple[int, ...]) -> None:
    """Moves a parameter to memory of `strides`."""
    if parameter.stride() == strides:
        return
    data = parameter.data
    parameter.data = torch.empty_strided(data.shape, strides, dtype=data.dtype, device=data.device).copy_(data)


def is_padded(parameter: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is the corner of a storage of exactly `shape`: of another's it could be any part."""
    whole = parameter.untyped_storage().nbytes() == math.prod(shape) * parameter.element_size()
    return whole and parameter.storage_offset() == 0 and is_laid_out(parameter, contiguous(shape))


def pad(parameter: Tensor, shape: tuple[int, ...]) -> None:
    """Moves a parameter to the corner of zeros of a larger `shape`."""
    if is_padded(parameter, shape):
        return
    data = parameter.data
    corner = torch.zeros(shape, dtype=data.dtype, device=data.device)[tuple(slice(size) for size in data.shape)]
    parameter.data = corner.copy_(data)


def shrink(parameter: Tensor) -> None:
    """Takes `pad` back."""
    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
