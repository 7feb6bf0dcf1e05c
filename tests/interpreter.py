"""Triton's kernels on the CPU: its interpreter turned on for one test, over poisoned memory."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from vae_accel.kernels._dispatch import LazyKernel


def reduced(tl: Any, combine: Any, x: Any, axis: Any, keep_dims: bool = False) -> Any:
    return tl.reduce(x, axis, combine, keep_dims)


def rounding_to_e4m3(convert: Any) -> Any:
    """The interpreter's conversion of floats but for e4m3, where it loses carries into the exponent, and NaN (Triton
    3.6); a card rounds as torch does."""

    def converted(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if target.name != "fp8e4nv":
            return convert(data, source, target, mode)
        assert source.name == "fp32"
        return torch.from_numpy(data.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    return converted


@contextmanager
def kernels(monkeypatch: pytest.MonkeyPatch, interpreted: bool = True) -> Iterator[None]:
    """Inside, kernels are interpreted, or compiled.

    The knob is turned for the test alone, and not by TRITON_INTERPRET, so that the same process can compile.
    """
    triton = pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpreted)
    tl = triton.language
    if interpreted and isinstance(tl.sum, JITFunction):
        # The functions written in Triton itself that the kernels call: jitted when Triton was imported.
        for name, combine in (("sum", tl.standard._sum_combine), ("max", tl.standard._elementwise_max)):
            monkeypatch.setattr(tl, name, functools.partial(reduced, tl, combine))
    if interpreted:
        interpreter = importlib.import_module("triton.runtime.interpreter")
        monkeypatch.setattr(interpreter, "_convert_float", rounding_to_e4m3(interpreter._convert_float))
    LazyKernel.unbind_all()
    yield
    LazyKernel.unbind_all()


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN: what a kernel forgets to write, or reads before it is written, shows."""

    def poisoning(empty: Any) -> Any:
        def poisoned_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = empty(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return poisoned_empty

    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
