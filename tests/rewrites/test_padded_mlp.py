"""A gated MLP at a padded width: stock's numbers on parameters of their own shapes, whatever becomes of them."""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

import vae_accel
from tests.recorder import Recorder
from tests.towers import PACKED, TABLE
from vae_accel.edits import Ledger, ledger_of
from vae_accel.platforms import Cpu, base
from vae_accel.rewrites.cuda_graph import CudaGraph
from vae_accel.rewrites.padded_mlp import PADDED, PLAIN, PaddedMlp
from vae_accel.rewrites.vision_metadata import VisionMetadata

TOWERS = {t.id: t for t in (*TABLE, *PACKED)}
QWEN25 = TOWERS["qwen2.5-vl"]


def optimized(model: nn.Module, *before: Any, after: tuple[Any, ...] = ()) -> nn.Module:
    steps = [base.Step(rewrite, "on", "test") for rewrite in (*before, PaddedMlp(), *after)]
    base.run(model, Cpu(), steps, "encoder", {"strict": True})
    return model


def counts(model: nn.Module) -> dict[str, int]:
    """Since it was asked last."""
    found = next(o for o in ledger_of(model).outcomes if o.name == PaddedMlp.name).counts
    seen = dict(found)
    found.clear()
    return seen


def assert_near(ours: list[Tensor], stock: list[Tensor]) -> None:
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("id", ["qwen2.5-vl", "qwen2.5-omni", "exaone4.5"])
def test_products_have_aligned_widths_and_parameters_their_own_shapes(id, monkeypatch):
    tower = TOWERS[id]
    stock, feed = tower.build(), tower.inputs()
    ours, want, widths = optimized(copy.deepcopy(stock)), tower.outputs(stock, feed), []
    product = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, b=None: widths.append((x.shape[-1], len(w))) or product(x, w, b)
    )
    assert_near(tower.outputs(ours, feed), want)
    assert widths.count((64, 32)) == 2 and widths.count((32, 64)) >= 4 and not any(44 in pair for pair in widths)
    assert counts(ours) == {PADDED: 2}
    for name, value in ours.state_dict().items():
        assert torch.equal(value, stock.state_dict()[name]) and value.shape == stock.state_dict()[name].shape


def test_stock_runs_on_its_own_storage_when_taken_back():
    model, feed = QWEN25.build(), QWEN25.inputs()
    want, bytes_before = QWEN25.outputs(model, feed), _bytes(model)
    optimized(model)
    assert _bytes(model) > bytes_before
    vae_accel.restore(model)
    assert _bytes(model) == bytes_before
    assert all(torch.equal(a, b) for a, b in zip(QWEN25.outputs(model, feed), want, strict=True))


def _bytes(model: nn.Module) -> int:
    return sum(p.untyped_storage().nbytes() for p in model.parameters())


@torch.no_grad()
def test_weights_that_change_move_or_are_exchanged():
    stock, feed = QWEN25.build().requires_grad_(False), QWEN25.inputs()
    ours = optimized(copy.deepcopy(stock))
    for change in (
        lambda m: m.down_proj.weight.data.add_(0.1),
        lambda m: m.gate_proj.bias.mul_(2),
        lambda m: m.up_proj.load_state_dict({k: v * 0.5 for k, v in m.up_proj.state_dict().items()}),
        lambda m: setattr(m.gate_proj.weight, "data", m.gate_proj.weight.data * 0.5),
        lambda m: m.double().float(),
        lambda m: setattr(m.down_proj, "weight", nn.Parameter(m.down_proj.weight.clone() * 2, requires_grad=False)),
        lambda m: m.to("meta") and m.to_empty(device="cpu") and [p.fill_(0.01) for p in m.parameters()],
    ):
        for model in (stock, ours):
            for block in model.blocks:
                change(block.mlp)
        assert_near(QWEN25.outputs(ours, feed), QWEN25.outputs(stock, feed))
        assert counts(ours) == {PADDED: 2}


def test_hooks_and_adapters_keep_working():
    """What a hook puts in the place of a result has no note: what follows runs at its own width."""
    stock, feed = QWEN25.build().requires_grad_(False), QWEN25.inputs()
    ours, shapes = optimized(copy.deepcopy(stock)), []
    assert_near(QWEN25.outputs(ours, feed), QWEN25.outputs(stock, feed))
    for model in (stock, ours):
        first, second = model.blocks[0].mlp, model.blocks[1].mlp
        first.gate_proj.register_forward_hook(lambda m, args, out: shapes.append(out.shape) or out + 1)
        second.up_proj.register_forward_hook(lambda m, args, out: (out.mul_(0.5), None)[1])  # in place
        second.down_proj.register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape))
    counts(ours)
    assert_near(QWEN25.outputs(ours, feed), QWEN25.outputs(stock, feed))
    assert shapes[:2] == shapes[2:] and counts(ours) == {PADDED: 1, PLAIN: 1}


def test_gradients_and_autocast_are_stocks():
    ours, feed = optimized(QWEN25.build()), QWEN25.inputs()
    QWEN25.run(ours, feed)
    with torch.autocast("cpu", torch.bfloat16):
        QWEN25.outputs(ours, feed)
    assert counts(ours) == {PLAIN: 4}


@pytest.mark.parametrize("before", [False, True], ids=["optimize then offload", "offload then optimize"])
def test_sequential_offload(before):
    stock, feed = QWEN25.build().requires_grad_(False), QWEN25.inputs()
    want = QWEN25.outputs(stock, feed)
    model = stock if before else optimized(stock)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    model = optimized(model) if before else model
    for _ in range(2):
        assert_near(QWEN25.outputs(model, feed), want)
    assert counts(model) == {PADDED: 4}
    vae_accel.restore(model)
    assert all(torch.equal(a, b) for a, b in zip(QWEN25.outputs(model, feed), want, strict=True))


def test_under_graphs():
    stock, feed = QWEN25.build().requires_grad_(False), QWEN25.inputs()
    ours = optimized(copy.deepcopy(stock), VisionMetadata(), after=(CudaGraph(capture=Recorder()),))
    for _ in range(4):
        assert_near(QWEN25.outputs(ours, feed), QWEN25.outputs(stock, feed))
    replayed = next(o for o in ledger_of(ours).outcomes if o.name == "cuda_graph").counts
    assert replayed["replayed"] >= 2 and set(counts(ours)) == {PADDED}
    for model in (stock, ours):
        model.double().float()  # dense copies at other addresses: captured anew, and padded before that
    for _ in range(4):
        assert_near(QWEN25.outputs(ours, feed), QWEN25.outputs(stock, feed))
    assert set(counts(ours)) == {PADDED}


def test_refusals():
    def refused(change: Any) -> str:
        mlp = QWEN25.build().blocks[0].mlp
        change(mlp)
        (site,) = PaddedMlp().sites(mlp, Ledger())
        return site.refused

    assert "its up_proj is a Sequential" in refused(lambda m: setattr(m, "up_proj", nn.Sequential(m.up_proj)))
    assert "width of 48 is aligned" in refused(lambda m: setattr(m, "down_proj", nn.Linear(48, 32)))
    transposed = nn.Parameter(torch.randn(44, 32).t())
    assert "in another order" in refused(lambda m: setattr(m.down_proj, "weight", transposed))
    assert "its gate_proj is a Parametrized" in refused(
        lambda m: torch.nn.utils.parametrizations.weight_norm(m.gate_proj)
    )
