"""Kernels run in Triton's interpreter on the CPU, and on a GPU where there is one, over poisoned memory."""

import functools

import pytest
import torch

from vae_accel.kernels._dispatch import LazyKernel


def reduced(tl, combine, x, axis, keep_dims=False):
    return tl.reduce(x, axis, combine, keep_dims)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the kernels of a test run: 'cpu' with Triton interpreted, or 'cuda' with Triton compiled.

    The knob is turned for the test alone, and not by TRITON_INTERPRET, so that the same process can compile.
    """
    triton = pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    interpreted = request.param == "interpreter"
    if not interpreted and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpreted)
    tl = triton.language
    if interpreted and isinstance(tl.sum, JITFunction):
        # The functions written in Triton itself that the kernels call: jitted when Triton was imported.
        for name, combine in (("sum", tl.standard._sum_combine), ("max", tl.standard._elementwise_max)):
            monkeypatch.setattr(tl, name, functools.partial(reduced, tl, combine))
    LazyKernel.unbind_all()
    yield "cpu" if interpreted else "cuda"
    LazyKernel.unbind_all()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Uninitialised memory holds NaN: what a kernel forgets to write, or reads before it is written, shows."""
    empty = torch.empty

    def poisoned_empty(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned_empty)
