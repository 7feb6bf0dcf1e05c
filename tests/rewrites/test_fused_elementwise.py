"""Norms and activations of towers in one kernel: stock's numbers, in towers only, and stock where it must be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.interpreter import kernels
from tests.subjects import optimized
from tests.test_targets import qwen_vl
from tests.towers import PACKED, TABLE
from vae_accel.edits import Ledger, ledger_of
from vae_accel.families import row_norms
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.rewrites.fused_elementwise import FusedElementwise, quick_gelu

TOWERS = {t.id: t for t in (*TABLE, *PACKED)}
NORMS = ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "merger.ln_q"]
CLIP = [f"encoder.layers.{i}.{name}" for i in (0, 1) for name in ("layer_norm1", "mlp.activation_fn", "layer_norm2")]
TAKEN = {
    "qwen2-vl": [*(f"blocks.{i}.{name}" for i in (0, 1) for name in ("norm1", "norm2", "mlp.act")), "merger.ln_q"],
    "qwen2.5-vl": NORMS,
    "qwen2.5-omni": NORMS,
    "exaone4.5": NORMS,
    "qwen3-vl": [*NORMS[:4], "merger.norm", "deepstack_merger_list.0.norm"],
    "clip": ["pre_layrnorm", *CLIP, "post_layernorm"],
    "dinov2": [*(f"encoder.layer.{i}.{name}" for i in (0, 1) for name in ("norm1", "norm2")), "layernorm"],
}


@pytest.mark.parametrize("id", TAKEN)
def test_stock_in_every_tower(id):
    tower = TOWERS[id]
    stock, feed = tower.build(), tower.inputs()
    ours = optimized(copy.deepcopy(stock), FusedElementwise(), "encoder")
    assert [s.path for s in FusedElementwise().sites(stock, Ledger()) if s.refused is None] == TAKEN[id]
    for a, b in zip(tower.outputs(ours, feed), tower.outputs(stock, feed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("id", ["clip", "qwen2-vl", "qwen2.5-vl"])
def test_the_kernels_themselves(id, monkeypatch):
    tower = TOWERS[id]
    stock, feed = tower.build(), tower.inputs()
    ours = optimized(copy.deepcopy(stock), FusedElementwise(), "encoder")
    with kernels(monkeypatch):
        got = tower.outputs(ours, feed)
        assert LazyKernel.bound
    for a, b in zip(got, tower.outputs(stock, feed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 32), (2, 3, 32), (32,)], ids=str)
@pytest.mark.parametrize(
    "id, path", [("qwen2.5-vl", "blocks.0.norm1"), ("qwen2-vl", "blocks.0.mlp.act"), ("qwen2-vl", "blocks.0.norm1")]
)
def test_any_shape(id, path, shape):
    stock = TOWERS[id].build().requires_grad_(False)
    ours, x = optimized(copy.deepcopy(stock), FusedElementwise(), "encoder"), torch.randn(shape) * 3
    got, want = (model.get_submodule(path)(x) for model in (ours, stock))
    torch.testing.assert_close(got, want)
    assert got.shape == want.shape and got.is_contiguous()


def test_the_language_model_around_a_tower_is_left_alone():
    model = optimized(qwen_vl("Qwen2_5_VLForConditionalGeneration", "qwen2.5-vl"), FusedElementwise(), "encoder")
    (outcome,) = ledger_of(model).outcomes
    assert outcome.taken == [f"model.visual.{path}" for path in NORMS] and not outcome.refused


def test_what_is_stocks():
    calls: list[torch.Tensor] = []
    below = lambda x: calls.append(x) or x  # noqa: E731
    norm = TOWERS["qwen2.5-vl"].build().blocks[0].norm1
    with torch.no_grad():
        row_norms.forward(norm, below, torch.randn(2, 32, dtype=torch.bfloat16))  # stock promotes
        row_norms.forward(norm.double(), below, torch.randn(2, 32, dtype=torch.float64))
        row_norms.forward(norm.float(), below, torch.randn(0, 32))
        with torch.autocast("cpu", torch.bfloat16):
            row_norms.forward(norm, below, torch.randn(2, 32))
            quick_gelu(nn.Identity(), below, torch.randn(2))
    row_norms.forward(norm, below, torch.randn(2, 32))  # its weight wants a gradient
    assert len(calls) == 6
