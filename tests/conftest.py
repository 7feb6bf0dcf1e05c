"""What every test starts from: one thread, one seed, no network, and none of the caller's settings."""

from __future__ import annotations

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: a test that needs the network is a wrong test

import torch

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings, and pytest-xdist has both cores


@pytest.fixture(autouse=True)
def _clean_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("VAE_ACCEL_")]:
        monkeypatch.delenv(name)
    torch.manual_seed(0)
