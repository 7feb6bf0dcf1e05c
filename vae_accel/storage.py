"""How a parameter lies in memory: the order of its dimensions, the room that larger zeros around it leave, and others
beside it.

Written by the pen and its ledger (edits.py) alone, and by `padded` and `joint`, which keep what the pen wrote.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn


def padded(module: nn.Module, name: str, shape: tuple[int, ...]) -> Tensor | None:
    """All of a parameter that `Pen.pad` stored, [shape] with zeros beyond it: to be asked for inside its module's call.

    One that was copied since, as `.to()`, deepcopy and offloading do, is stored so again. None where it cannot be: it
    is on meta, quantized or computed by a parametrization, or a graph is being captured, whose memory is not to keep.
    """
    parameter = module._parameters.get(name)
    if not _is_plain(parameter):
        return None
    if not is_padded(parameter, shape):
        if _is_capturing(parameter):
            return None
        with torch.inference_mode(parameter.is_inference()), torch.no_grad():
            pad(parameter, shape)
    return parameter.detach().as_strided(shape, contiguous(shape))


def joint(modules: Sequence[nn.Module], name: str) -> Tensor | None:
    """Parameters `name` of several modules that `Pen.join` stored side by side, as one: [sum of their rows, ...].

    To be asked for where a call of each module would find its own as it is. Copied since, they are joined again, and
    None is where `padded` gives it.
    """
    stored = [module._parameters.get(name) for module in modules]
    parameters = [parameter for parameter in stored if _is_plain(parameter)]
    first = parameters[0] if len(parameters) == len(modules) else None
    if first is None or any((p.device, p.dtype) != (first.device, first.dtype) for p in parameters):
        return None
    if not are_joined(parameters):
        if _is_capturing(first):
            return None
        with torch.inference_mode(first.is_inference()), torch.no_grad():
            join(parameters)
    whole = (sum(map(len, parameters)), *first.shape[1:])
    return first.detach().as_strided(whole, contiguous(whole))


def _is_plain(parameter: Tensor | None) -> TypeGuard[Tensor]:
    return parameter is not None and not parameter.is_meta and type(parameter.data) is Tensor


def _is_capturing(parameter: Tensor) -> bool:
    return parameter.is_cuda and torch.cuda.is_current_stream_capturing()


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


def stored(module: nn.Module | None, name: str) -> Tensor | None:
    """A parameter, or while it is on meta what accelerate's sequential offload keeps of it; None if nothing."""
    parameter = None if module is None else module._parameters.get(name)
    if module is None or parameter is None or parameter.device.type != "meta":
        return parameter
    kept = getattr(module.__dict__.get("_hf_hook"), "weights_map", None)
    return None if kept is None else kept[name]


def join_stored(modules: Sequence[nn.Module | None], name: str) -> bool:
    """Moves what is stored of parameters `name` side by side; False where some are gone or differ in kind by now."""
    found = [stored(module, name) for module in modules]
    parameters = [parameter for parameter in found if parameter is not None]
    if len(parameters) < len(found) or len({(p.dtype, p.device, p.shape[1:]) for p in parameters}) > 1:
        return False
    join(parameters)
    return True


def are_joined(parameters: Sequence[Tensor]) -> bool:
    """Whether parameters are all of a storage, one after the other along their first dimension."""
    begin, storage = 0, parameters[0].untyped_storage()
    for parameter in parameters:
        here = parameter.untyped_storage().data_ptr() == storage.data_ptr() and parameter.storage_offset() == begin
        if not here or not is_laid_out(parameter, contiguous(parameter.shape)):
            return False
        begin += parameter.numel()
    return storage.nbytes() == begin * parameters[0].element_size()


def join(parameters: Sequence[Tensor]) -> None:
    """Moves parameters of one dtype and device side by side."""
    if are_joined(parameters):
        return
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, data in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        parameter.data = data


def is_part(parameter: Tensor) -> bool:
    """Whether a parameter's storage holds more than it."""
    return parameter.untyped_storage().nbytes() > parameter.numel() * parameter.element_size()


def shrink(parameter: Tensor) -> None:
    """Takes `pad`, or `join` of one parameter, back."""
    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
