"""What a call is, as far as a captured graph of it is concerned: its data, and the key of everything else."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.graphs.capture import CannotCapture

_PLAIN = (bool, int, float, str, torch.dtype, torch.device)
_FLAGS = ("output_hidden_states", "output_attentions", "return_dict")  # whose defaults transformers keeps in the config


@dataclass(frozen=True)
class Call:
    """One call of a forward: its arguments by name, sorted by what a graph makes of them.

    data: floating-point tensors, whose values change from replay to replay. steering: integer and boolean tensors, on
    the CPU. options: plain values that are not the default. kind: what a bucket is captured for: dtypes, devices and
    options; key: what an exact graph is, with all sizes and the values of `steering`.
    """

    data: Mapping[str, Tensor]
    steering: Mapping[str, Tensor]
    options: Mapping[str, Any]
    kind: tuple[Any, ...]
    key: tuple[Any, ...]

    @property
    def device(self) -> torch.device:
        return next(iter(self.data.values())).device


class Signature:
    """The names and defaults of a forward's arguments, so that one call has one key however it is spelled."""

    def __init__(self, module: nn.Module):
        parameters = inspect.signature(type(module).forward).parameters
        self._names = tuple(parameters)[1:]
        self._defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Reads integer tensors from the device: one wait each, of the few numbers that say what is asked for.

        Raises:
            CannotCapture: an argument is neither a tensor nor a plain value, or no data is among them.
        """
        data, steering, options = {}, {}, {}
        kind: list[Any] = [arithmetic()]
        sizes: list[Any] = []
        for name, value in sorted({**dict(zip(self._names, args, strict=False)), **kwargs}.items()):
            if value is None or value is self._default(module, name):
                continue
            if isinstance(value, Tensor):
                _plain_tensor(name, value)
                kind.append((name, value.dtype, value.device))
                if value.is_floating_point():
                    data[name] = value
                    sizes.append((value.shape, value.stride()))
                else:
                    steering[name] = value.cpu()
                    sizes.append((value.shape, steering[name].numpy().tobytes()))
            else:
                options[name] = value
                kind.append((name, _frozen(name, value)))
        if not data:
            raise CannotCapture("no pixels among its arguments")
        return Call(data, steering, options, tuple(kind), (*kind, *sizes))

    def _default(self, module: nn.Module, name: str) -> Any:
        if name in _FLAGS:
            return getattr(getattr(module, "config", None), name, None)
        return self._defaults.get(name)


def arithmetic() -> tuple[Any, ...]:
    """Switches of torch that choose kernels: a graph keeps those it was captured with."""
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )


def _plain_tensor(name: str, tensor: Tensor) -> None:
    if type(tensor) not in (Tensor, nn.Parameter):
        raise CannotCapture(f"{name} is a {type(tensor).__name__}")
    if tensor.is_sparse or tensor.is_complex():
        raise CannotCapture(f"{name} is {tensor.layout if tensor.is_sparse else tensor.dtype}")


def _frozen(name: str, value: Any) -> Any:
    """A plain value with its type, as True selects all hidden states and 1 the second; lists and tuples of such."""
    if isinstance(value, (list, tuple)):
        return (type(value), *(_frozen(name, each) for each in value))
    if not isinstance(value, _PLAIN):
        raise CannotCapture(f"{name} is a {type(value).__name__}")
    return type(value), value
