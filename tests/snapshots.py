"""Everything about a model that a rewrite may touch, taken down so that it can be compared bit for bit afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.edits import LEDGER


@dataclass(frozen=True)
class Snapshot:
    """Values and strides of every parameter and buffer, and what each module holds besides (methods, options)."""

    tensors: dict[str, Tensor]
    strides: dict[str, tuple[int, ...]]
    instances: dict[str, dict[str, Any]]
    classes: dict[str, type]


_TORCH_OWN = ("_parameters", "_buffers", "_modules")


def snapshot(model: nn.Module) -> Snapshot:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return Snapshot(
        {name: t.detach().clone() for name, t in tensors.items()},
        {name: t.stride() for name, t in tensors.items()},
        {path: _instance(module) for path, module in model.named_modules()},
        {path: type(module) for path, module in model.named_modules()},
    )


def assert_equal_values(after: Snapshot, before: Snapshot) -> None:
    assert list(after.tensors) == list(before.tensors)
    for name, tensor in before.tensors.items():
        assert after.tensors[name].dtype == tensor.dtype, name
        if tensor.device.type != "meta":
            assert torch.equal(after.tensors[name], tensor), name


def assert_identical(model: nn.Module, before: Snapshot) -> None:
    """The model is what it was: values, strides, instance attributes (methods above all), classes."""
    after = snapshot(model)
    assert_equal_values(after, before)
    assert after.strides == before.strides
    assert after.classes == before.classes
    assert after.instances.keys() == before.instances.keys()
    for path, attributes in before.instances.items():
        assert after.instances[path] == attributes, path
    assert LEDGER not in vars(model)


def _instance(module: nn.Module) -> dict[str, Any]:
    """Methods on the instance and public options, without the state that a forward leaves (caches, shapes)."""
    return {
        name: value
        for name, value in vars(module).items()
        if (callable(value) and name not in _TORCH_OWN)
        or (isinstance(value, (bool, int, float, str)) and not name.startswith("_"))
    }
