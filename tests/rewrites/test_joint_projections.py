"""Queries, keys and values by one product: stock's numbers on parameters of their own, whatever becomes of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vae_accel
from tests.offloads import grouped, sequential
from tests.recorder import Recorder
from tests.towers import PACKED, TABLE
from vae_accel import storage
from vae_accel.edits import Ledger, ledger_of
from vae_accel.platforms import Cpu, base
from vae_accel.rewrites.cuda_graph import CudaGraph
from vae_accel.rewrites.joint_projections import APART, JOINED, JointProjections

TOWERS = {t.id: t for t in (*TABLE, *PACKED)}
TAKEN = ("clip", "clip-projection", "siglip", "siglip2", "dinov2", "qwen2.5-omni")
CLIP = TOWERS["clip"]
SEEN = f"{APART}: a hook, a patch or an adapter on a projection"


def optimized(model: nn.Module, after: tuple[Any, ...] = ()) -> nn.Module:
    steps = [base.Step(rewrite, "on", "test") for rewrite in (JointProjections(), *after)]
    base.run(model, Cpu(), steps, "encoder", {"strict": True})
    return model


def counts(model: nn.Module) -> dict[str, int]:
    """Since it was asked last."""
    found = next(o for o in ledger_of(model).outcomes if o.name == JointProjections.name).counts
    seen = dict(found)
    found.clear()
    return seen


def assert_near(ours: list[Tensor], stock: list[Tensor]) -> None:
    for a, b in zip(ours, stock, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def attentions(model: nn.Module) -> list[Any]:
    return [layer.self_attn for layer in model.encoder.layers]


def joined(attention: Any) -> bool:
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    return all(storage.are_joined([getattr(m, name) for m in linears]) for name in ("weight", "bias"))


@pytest.mark.parametrize("id", TAKEN)
def test_stock_in_every_tower_by_one_product(id, monkeypatch):
    tower, widths, product = TOWERS[id], [], F.linear
    stock, feed = tower.build(), tower.inputs()
    ours, want = optimized(copy.deepcopy(stock)), tower.outputs(stock, feed)
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: widths.append(tuple(w.shape)) or product(x, w, b))
    assert_near(tower.outputs(ours, feed), want)
    assert widths.count((96, 32)) == 2 and counts(ours) == {JOINED: 2}
    for name, value in ours.state_dict().items():
        assert torch.equal(value, stock.state_dict()[name]) and value.is_contiguous()


@pytest.mark.parametrize("id", TAKEN)
def test_bf16_is_as_near_to_fp64_as_stock(id):
    tower, error = TOWERS[id], {"stock": 0.0, "ours": 0.0}
    for seed in range(4):
        stock, feed = tower.build(seed, torch.bfloat16), tower.inputs("picture", seed=seed, dtype=torch.bfloat16)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in feed.items()}
        golden = tower.outputs(copy.deepcopy(stock).double(), wide)
        for name, model in (("stock", stock), ("ours", optimized(copy.deepcopy(stock)))):
            error[name] += sum(float((a - b).norm()) for a, b in zip(tower.outputs(model, feed), golden, strict=True))
    assert error["ours"] <= 1.05 * error["stock"]


def test_memory_is_stocks_and_taken_back():
    model, feed = CLIP.build(), CLIP.inputs()
    want, before = CLIP.outputs(model, feed), _bytes(model)
    optimized(optimized(model))
    assert _bytes(model) == before and all(map(joined, attentions(model)))
    with vae_accel.paused(model):
        assert not any(map(joined, attentions(model)))
    assert all(map(joined, attentions(model)))
    vae_accel.restore(model)
    assert not any(storage.is_part(p) for p in model.parameters()) and _bytes(model) == before
    assert all(torch.equal(a, b) for a, b in zip(CLIP.outputs(model, feed), want, strict=True))


def _bytes(model: nn.Module) -> int:
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


def test_saved_and_loaded(tmp_path):
    ours, feed = optimized(CLIP.build()).requires_grad_(False), CLIP.inputs()
    want = CLIP.outputs(ours, feed)
    ours.save_pretrained(tmp_path / "model")
    safetensors.torch.save_file(ours.state_dict(), tmp_path / "state.safetensors")
    torch.save(ours.state_dict(), tmp_path / "state.pt")
    for state in (
        safetensors.torch.load_file(tmp_path / "model" / "model.safetensors"),
        safetensors.torch.load_file(tmp_path / "state.safetensors"),
        torch.load(tmp_path / "state.pt"),
    ):
        other = optimized(CLIP.build(seed=1)).requires_grad_(False)
        other.load_state_dict({name.removeprefix("vision_model."): value for name, value in state.items()})
        assert all(map(joined, attentions(other)))  # written in place
        assert all(torch.equal(a, b) for a, b in zip(CLIP.outputs(other, feed), want, strict=True))


def test_copies_lie_apart_until_they_are_called():
    ours, feed = optimized(CLIP.build()).requires_grad_(False), CLIP.inputs()
    other, want = copy.deepcopy(ours), CLIP.outputs(ours, feed)
    assert not any(map(joined, attentions(other)))
    assert all(torch.equal(a, b) for a, b in zip(CLIP.outputs(other, feed), want, strict=True))
    assert all(map(joined, attentions(other))) and counts(other) == {JOINED: 2}
    vae_accel.restore(other)
    assert not any(storage.is_part(p) for p in other.parameters()) and all(map(joined, attentions(ours)))


@torch.no_grad()
def test_weights_that_change_move_or_are_exchanged():
    stock, feed = CLIP.build().requires_grad_(False), CLIP.inputs()
    ours = optimized(copy.deepcopy(stock))
    for change in (
        lambda m: m.q_proj.weight.data.add_(0.1),
        lambda m: m.k_proj.bias.mul_(2),
        lambda m: m.v_proj.load_state_dict({k: v * 0.5 for k, v in m.v_proj.state_dict().items()}),
        lambda m: setattr(m.k_proj.weight, "data", m.k_proj.weight.data * 0.5),
        lambda m: m.double().float(),
        lambda m: setattr(m.q_proj, "weight", nn.Parameter(m.q_proj.weight.clone() * 2, requires_grad=False)),
        lambda m: m.to("meta") and m.to_empty(device="cpu") and [p.fill_(0.01) for p in m.parameters()],
    ):
        for model in (stock, ours):
            for attention in attentions(model):
                change(attention)
        assert_near(CLIP.outputs(ours, feed), CLIP.outputs(stock, feed))
        assert counts(ours) == {JOINED: 2} and all(map(joined, attentions(ours)))


def test_hooks_patches_and_fresh_modules():
    stock, feed = CLIP.build().requires_grad_(False), CLIP.inputs()

    def patched(linear: Any) -> None:
        before = linear.forward
        linear.forward = lambda x: before(x) * 0.5

    for disturb, apart in (
        (lambda a: a.q_proj.register_forward_hook(lambda m, args, out: out * 0.5), True),
        (lambda a: a.v_proj.register_forward_pre_hook(lambda m, args: (args[0].mul_(0.5),)), True),
        (lambda a: patched(a.k_proj), True),
        (lambda a: setattr(a, "k_proj", nn.Linear(32, 32, bias=False)), True),
        (lambda a: a.register_forward_pre_hook(lambda m, args, k: (args, k), with_kwargs=True), False),
    ):
        theirs, ours = copy.deepcopy(stock), optimized(copy.deepcopy(stock))
        for model in (theirs, ours):
            torch.manual_seed(0)
            disturb(attentions(model)[1])
        assert_near(CLIP.outputs(ours, feed), CLIP.outputs(theirs, feed))
        seen = counts(ours)
        assert seen.pop(JOINED) == (1 if apart else 2) and len(seen) == apart


def test_lora():
    """Attached after: the adapted projections run by themselves. Merged: written in place, and joint again."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        return inject_adapter_in_model(config, model).requires_grad_(False)

    stock, feed = CLIP.build().requires_grad_(False), CLIP.inputs()
    ours = adapted(optimized(copy.deepcopy(stock)))
    adapted(stock)
    want = CLIP.outputs(stock, feed)
    assert_near(CLIP.outputs(ours, feed), want)
    assert counts(ours) == {SEEN: 2}
    for layer in [m for m in ours.modules() if isinstance(m, LoraLayer)]:
        layer.merge()
    assert_near(CLIP.outputs(ours, feed), want)
    for attention in attentions(ours):
        attention.q_proj = attention.q_proj.base_layer
    assert_near(CLIP.outputs(ours, feed), want)
    assert counts(ours) == {SEEN: 2, JOINED: 2}
    assert all("optimize before adapters" in s.refused for s in JointProjections().sites(stock, Ledger()))


def test_a_projection_by_itself_is_stocks():
    stock = CLIP.build().requires_grad_(False)
    ours, x = optimized(copy.deepcopy(stock)), torch.randn(2, 5, 32)
    assert torch.equal(attentions(ours)[0].k_proj(x), attentions(stock)[0].k_proj(x))
    attentions(ours)[0](x)
    assert not vars(x)


def test_gradients_and_autocast_are_stocks():
    ours, feed = optimized(CLIP.build()), CLIP.inputs()
    CLIP.run(ours, feed)
    with torch.autocast("cpu", torch.bfloat16):
        CLIP.outputs(ours, feed)
    assert counts(ours) == {f"{APART}: a gradient or autocast": 4}


@pytest.mark.parametrize("before", [False, True], ids=["optimize then offload", "offload then optimize"])
@pytest.mark.parametrize("offload", [sequential, grouped])
def test_offloaded_projections_run_by_themselves(offload, before):
    stock, feed = CLIP.build().requires_grad_(False), CLIP.inputs()
    want = CLIP.outputs(stock, feed)
    model = stock if before else optimized(stock)
    offload(model)
    model = optimized(model) if before else model
    for _ in range(2):
        assert_near(CLIP.outputs(model, feed), want)
    assert counts(model) == {SEEN: 4}
    vae_accel.restore(model)
    assert all(torch.equal(a, b) for a, b in zip(CLIP.outputs(model, feed), want, strict=True))


def test_under_graphs():
    stock, feed = CLIP.build().requires_grad_(False), CLIP.inputs()
    ours = optimized(copy.deepcopy(stock), (CudaGraph(capture=Recorder()),))
    for _ in range(4):
        assert_near(CLIP.outputs(ours, feed), CLIP.outputs(stock, feed))
    replayed = next(o for o in ledger_of(ours).outcomes if o.name == "cuda_graph").counts
    assert replayed["replayed"] >= 2 and set(counts(ours)) == {JOINED}
    for model in (stock, ours):
        model.double().float()  # dense copies at other addresses: captured anew, and joined before that
    for _ in range(4):
        assert_near(CLIP.outputs(ours, feed), CLIP.outputs(stock, feed))
    assert set(counts(ours)) == {JOINED}


def test_refusals():
    def refused(change: Any) -> str:
        model = CLIP.build()
        change(attentions(model)[0])
        return next(s.refused for s in JointProjections().sites(model, Ledger()) if s.refused)

    shared = lambda a: setattr(a.k_proj, "weight", a.q_proj.weight)  # noqa: E731
    assert "share a parameter" in refused(shared)
    assert "differ in input" in refused(lambda a: setattr(a, "v_proj", nn.Linear(32, 32, bias=False)))
    assert "q_proj is a Parametrized" in refused(lambda a: torch.nn.utils.parametrizations.weight_norm(a.q_proj))
    assert "in another order" in refused(lambda a: setattr(a.q_proj, "weight", nn.Parameter(torch.randn(32, 32).t())))
    assert "k_proj: forward was replaced" in refused(lambda a: setattr(a.k_proj, "forward", lambda x: x))
