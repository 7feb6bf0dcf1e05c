"""Kernels run in Triton's interpreter on the CPU, and on a GPU where there is one, over poisoned memory."""

import pytest
import torch

from tests import interpreter


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the kernels of a test run: 'cpu' with Triton interpreted, or 'cuda' with Triton compiled."""
    interpreted = request.param == "interpreter"
    if not interpreted and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with interpreter.kernels(monkeypatch, interpreted):
        yield "cpu" if interpreted else "cuda"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    interpreter.poison(monkeypatch)
