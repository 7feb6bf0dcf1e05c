"""Layers of towers in few launches: stock's numbers, the launches themselves, and stock wherever somebody looks in."""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

import vae_accel
from tests.interpreter import kernels, poison
from tests.recorder import Recorder
from tests.towers import PACKED, RELATIVES, TABLE
from vae_accel.edits import Ledger, ledger_of
from vae_accel.families import linears as family
from vae_accel.kernels import _dispatch
from vae_accel.platforms import Cpu, base
from vae_accel.rewrites.cuda_graph import CudaGraph
from vae_accel.rewrites.fused_elementwise import FusedElementwise
from vae_accel.rewrites.fused_linears import FUSED, FusedLinears
from vae_accel.rewrites.packed_attention import PackedAttention
from vae_accel.rewrites.padded_mlp import PaddedMlp
from vae_accel.rewrites.vision_metadata import VisionMetadata

TOWERS = {t.id: t for t in (*TABLE, *RELATIVES, *PACKED)}
IMAGES = ("clip", "clip-projection", "siglip", "siglip2")
QWENS = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
OTHERS = ("qwen3-vl-moe", "qwen3.5", "qwen3.5-moe", "qwen3-omni-moe", "qwen4-exp", "cohere-compass")
TAKEN = (*IMAGES, *QWENS, *OTHERS, "ernie4.5-vl", "glm4v", "glm4v-moe")
BENEATH = (PackedAttention(), PaddedMlp(), FusedElementwise())
CLIP, QWEN25 = TOWERS["clip"], TOWERS["qwen2.5-vl"]


def optimized(model: nn.Module, before: tuple[Any, ...] = BENEATH, after: tuple[Any, ...] = ()) -> nn.Module:
    steps = [base.Step(rewrite, "on", "test") for rewrite in (*before, FusedLinears(), *after)]
    base.run(model, Cpu(), steps, "encoder", {"strict": True})
    return model


def outcome(model: nn.Module) -> Any:
    return next(o for o in ledger_of(model).outcomes if o.name == FusedLinears.name)


def counts(model: nn.Module) -> dict[str, int]:
    """Since it was asked last."""
    seen = dict(outcome(model).counts)
    outcome(model).counts.clear()
    return seen


def assert_near(ours: list[Tensor], stock: list[Tensor]) -> None:
    for a, b in zip(ours, stock, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def layers(model: nn.Module) -> Any:
    return model.blocks if hasattr(model, "blocks") else model.encoder.layers


@pytest.mark.parametrize("id", TAKEN)
def test_stock_in_every_tower(id):
    tower = TOWERS[id]
    stock, feed = tower.build(), tower.inputs()
    ours = optimized(copy.deepcopy(stock))
    assert_near(tower.outputs(ours, feed), tower.outputs(stock, feed))
    assert counts(ours) == {FUSED: 2} and not outcome(ours).refused


@pytest.mark.parametrize("id", (*IMAGES, *QWENS))
def test_bf16_is_as_near_to_fp64_as_stock(id):
    tower, error = TOWERS[id], {"stock": 0.0, "ours": 0.0}
    for seed in range(4):
        stock, feed = tower.build(seed, torch.bfloat16), tower.inputs("picture", seed=seed, dtype=torch.bfloat16)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in feed.items()}
        golden = tower.outputs(copy.deepcopy(stock).double(), wide)
        for name, model in (("stock", stock), ("ours", optimized(copy.deepcopy(stock)))):
            error[name] += sum(float((a - b).norm()) for a, b in zip(tower.outputs(model, feed), golden, strict=True))
    assert error["ours"] <= 1.05 * error["stock"]


# Launches of our kernel in a layer, and products that are torch's: the one projection of a packed tower.
LAUNCHES = {"clip": (4, 0), "siglip": (4, 0), "qwen2-vl": (3, 1), "qwen2.5-vl": (3, 1), "qwen3-vl": (3, 1)}


@pytest.mark.parametrize("id", LAUNCHES)
def test_the_kernel_itself(id, monkeypatch):
    """In fp16: the interpreter multiplies bf16 as integers."""
    tower, launched, products = TOWERS[id], [], []
    stock, feed = tower.build(0, torch.float16), tower.inputs(dtype=torch.float16)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in feed.items()}
    golden, theirs = tower.outputs(copy.deepcopy(stock).double(), wide), tower.outputs(stock, feed)
    ours = optimized(copy.deepcopy(stock))
    for layer in layers(ours):  # a layer's own products only
        layer.register_forward_pre_hook(lambda *_: setattr(_dispatch, "tally", lambda name, *_: launched.append(name)))
        layer.register_forward_hook(lambda *_: setattr(_dispatch, "tally", None))
    product = F.linear
    inside = lambda *args: (products.append(1) if _dispatch.tally else None) or product(*args)  # noqa: E731
    monkeypatch.setattr(F, "linear", inside)
    with kernels(monkeypatch):
        poison(monkeypatch)
        got = tower.outputs(ours, feed)
    assert (launched.count("_linear") / 2, len(products) / 2) == LAUNCHES[id]
    errors = [sum(float((a - b).norm()) for a, b in zip(outs, golden, strict=True)) for outs in (got, theirs)]
    assert errors[0] <= 1.05 * errors[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("id", LAUNCHES)
def test_on_a_card(id):
    """In bf16, and in fp32, whose layers stay as they were."""
    tower = TOWERS[id]
    stock = tower.build().cuda()
    ours, feed = optimized(copy.deepcopy(stock)), {k: v.cuda() for k, v in tower.inputs().items()}
    with torch.no_grad():
        wide = {k: v.double() if v.is_floating_point() else v for k, v in feed.items()}
        golden = tower.run(copy.deepcopy(stock).double(), wide)
        tower.run(ours, feed)
        (left,) = counts(ours)
        assert "more than 16 bits" in left
        narrow = {k: v.bfloat16() if v.is_floating_point() else v for k, v in feed.items()}
        outs = [tower.run(model.bfloat16(), narrow) for model in (ours, stock)]
    assert counts(ours) == {FUSED: 2}
    errors = [sum(float((a - b).norm()) for a, b in zip(out, golden, strict=True)) for out in outs]
    assert errors[0] <= 1.1 * errors[1]


def test_a_padded_width_stays_padded(monkeypatch):
    """44 channels are stored as 64, in which the product that makes them and the one that reads them run."""
    widths, product = [], family.product
    monkeypatch.setattr(family, "product", lambda x, w, b, **how: widths.append(w[0].shape) or product(x, w, b, **how))
    QWEN25.outputs(optimized(QWEN25.build()), QWEN25.inputs())
    assert widths == [(32, 32), (64, 32), (32, 64)] * 2


@torch.no_grad()
@pytest.mark.parametrize("id", ["clip", "qwen2.5-vl"])
def test_weights_that_change_move_or_are_exchanged(id):
    tower = TOWERS[id]
    stock, feed = tower.build().requires_grad_(False), tower.inputs()
    ours = optimized(copy.deepcopy(stock))
    for change in (
        lambda m: [p.data.add_(0.01) for p in m.parameters()],
        lambda m: m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}),
        lambda m: [setattr(p, "data", p.data * 0.5) for p in m.parameters()],
        lambda m: m.double().float(),
        lambda m: m.to("meta") and m.to_empty(device="cpu") and [p.fill_(0.01) for p in m.parameters()],
    ):
        for model in (stock, ours):
            for layer in layers(model):
                change(layer)
        assert_near(tower.outputs(ours, feed), tower.outputs(stock, feed))
        assert counts(ours) == {FUSED: 2}


class Adapted(nn.Module):
    """As PEFT puts a LoRA layer in the place of a linear one."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.1 * x.mean(-1, keepdim=True)


def _exchange(layer: nn.Module, path: str, made: Any) -> None:
    parent, _, name = path.rpartition(".")
    holder = layer.get_submodule(parent)
    setattr(holder, name, made(getattr(holder, name)))


def _patch(module: Any) -> None:
    before = module.forward
    module.forward = lambda *args, **kwargs: before(*args, **kwargs) * 0.5


PATHS = {
    "clip": ["mlp", "mlp.fc1", "mlp.activation_fn", "self_attn.k_proj", "self_attn.out_proj"],
    "qwen2.5-vl": ["attn", "mlp", "mlp.up_proj", "mlp.act_fn", "mlp.down_proj", "attn.proj"],
}
EVERY_PATH = [(id, path) for id, paths in PATHS.items() for path in paths]
DISTURBANCES = {
    "a hook on": lambda layer, path: layer.get_submodule(path).register_forward_hook(lambda m, a, out: out * 0.5),
    "exchanged or patched": lambda layer, path: _patch(layer.get_submodule(path)),
}


@pytest.mark.parametrize("id, path", EVERY_PATH)
@pytest.mark.parametrize("reason", DISTURBANCES)
def test_who_looks_in_sees_what_stock_shows(reason, id, path):
    tower = TOWERS[id]
    stock, feed = tower.build().requires_grad_(False), tower.inputs()
    ours = optimized(copy.deepcopy(stock))
    for model in (stock, ours):
        DISTURBANCES[reason](layers(model)[1], path)
    assert_near(tower.outputs(ours, feed), tower.outputs(stock, feed))
    seen = counts(ours)
    assert seen.pop(FUSED) == 1
    assert len(seen) == 1 and all(reason in what and path in what for what in seen)


@pytest.mark.parametrize("made", [Adapted, lambda linear: nn.Linear(linear.in_features, linear.out_features)])
@pytest.mark.parametrize("id, path", [("clip", "self_attn.v_proj"), ("qwen2.5-vl", "mlp.down_proj")])
def test_adapters_and_fresh_modules(id, path, made):
    tower = TOWERS[id]
    stock, feed = tower.build().requires_grad_(False), tower.inputs()
    ours = optimized(copy.deepcopy(stock))
    for model in (stock, ours):
        torch.manual_seed(0)
        _exchange(layers(model)[0], path, made)
    assert_near(tower.outputs(ours, feed), tower.outputs(stock, feed))
    assert counts(ours) == {FUSED: 1, f"layers as they were: {path} was exchanged or patched": 1}


@pytest.mark.parametrize("id", ["clip", "qwen2.5-vl"])
def test_gradients_and_autocast_are_stocks(id):
    tower = TOWERS[id]
    ours, feed = optimized(tower.build()), tower.inputs()
    tower.run(ours, feed)
    with torch.autocast("cpu", torch.bfloat16):
        tower.outputs(ours, feed)
    assert counts(ours) == {"layers as they were: a gradient or autocast": 4}


@pytest.mark.parametrize("id", ["clip", "siglip", "qwen3-vl"])
def test_what_transformers_captures(id):
    """The hooks stay. Those on an image tower's attention read its weights, which are stock's."""
    tower = TOWERS[id]
    stock, feed = tower.build().requires_grad_(False), tower.inputs()
    ours = optimized(copy.deepcopy(stock))
    asked = {**feed, "output_hidden_states": True}
    for _ in range(2):
        assert_near(tower.outputs(ours, asked), tower.outputs(stock, asked))
    if id in IMAGES:
        assert counts(ours) == {FUSED: 4}
        for model in (stock, ours):
            model.set_attn_implementation("eager")
        asked = {**feed, "output_attentions": True}
        assert len(tower.outputs(ours, asked)) > 2
        assert_near(tower.outputs(ours, asked), tower.outputs(stock, asked))


def sequential(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def grouped(model: nn.Module) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


@pytest.mark.parametrize("before", [False, True], ids=["optimize then offload", "offload then optimize"])
@pytest.mark.parametrize("offload", [sequential, grouped])
@pytest.mark.parametrize("id", ["clip", "qwen2.5-vl"])
def test_offloaded_weights_are_read_in_their_own_calls(id, offload, before):
    tower = TOWERS[id]
    stock, feed = tower.build().requires_grad_(False), tower.inputs()
    want = tower.outputs(stock, feed)
    model = stock if before else optimized(stock)
    offload(model)
    model = optimized(model) if before else model
    for _ in range(2):
        assert_near(tower.outputs(model, feed), want)
    assert counts(model) == {FUSED: 4}
    vae_accel.restore(model)
    assert all(torch.equal(a, b) for a, b in zip(tower.outputs(model, feed), want, strict=True))


@pytest.mark.parametrize("id", ["clip", "qwen2.5-vl"])
def test_under_graphs(id):
    tower = TOWERS[id]
    stock, feed = tower.build().requires_grad_(False), tower.inputs()
    ours = optimized(copy.deepcopy(stock), (VisionMetadata(), *BENEATH), (CudaGraph(capture=Recorder()),))
    for _ in range(4):
        assert_near(tower.outputs(ours, feed), tower.outputs(stock, feed))
    replayed = next(o for o in ledger_of(ours).outcomes if o.name == "cuda_graph").counts
    assert replayed["replayed"] >= 2 and set(counts(ours)) == {FUSED}


def test_refusals():
    def refused(id: str, change: Any, rewrites: tuple[Any, ...] = BENEATH) -> str:
        model = TOWERS[id].build()
        change(layers(model)[0])
        return next(iter(outcome(optimized(model, rewrites)).refused.values()))

    assert "mlp.fc1 is a Adapted" in refused("clip", lambda layer: _exchange(layer, "mlp.fc1", Adapted))
    assert "q_proj is a Parametrized" in refused(
        "clip", lambda layer: torch.nn.utils.parametrizations.weight_norm(layer.self_attn.q_proj)
    )
    assert "activation_fn is a ReLU" in refused("clip", lambda layer: setattr(layer.mlp, "activation_fn", nn.ReLU()))
    assert "mlp.fc2: forward was replaced" in refused("clip", lambda layer: _patch(layer.mlp.fc2))
    assert "activation_fn: forward was replaced" in refused("clip", lambda layer: _patch(layer.mlp.activation_fn))
    assert "its MLP is a Sequential" in refused("clip", lambda layer: setattr(layer, "mlp", nn.Sequential()))
    assert "to several widths" in refused("clip", lambda layer: setattr(layer.self_attn, "k_proj", nn.Linear(32, 16)))
    assert "not taken by packed_attention" in refused("qwen3-vl", lambda layer: None, ())
    assert "has no attribute `attn`" in refused("qwen3-vl", lambda layer: delattr(layer, "attn"))


def test_a_stranger_is_left_alone():
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    class Mine(CLIPEncoderLayer):
        def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
            return hidden_states

    (site,) = FusedLinears().sites(Mine(CLIP.build().config), Ledger())
    assert "Mine has a forward of its own" in site.refused
