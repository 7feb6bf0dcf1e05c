"""A sum and the norm that reads it: stock's numbers, the launches themselves, and stock wherever somebody looks in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vae_accel
from tests.interpreter import kernels, poison
from tests.offloads import grouped, sequential
from tests.recorder import Recorder
from tests.towers import PACKED, RELATIVES, TABLE
from vae_accel.edits import Ledger, ledger_of
from vae_accel.kernels import _dispatch
from vae_accel.platforms import Cpu, base
from vae_accel.rewrites.cuda_graph import CudaGraph
from vae_accel.rewrites.fused_elementwise import FusedElementwise
from vae_accel.rewrites.joint_projections import JointProjections
from vae_accel.rewrites.packed_attention import PackedAttention
from vae_accel.rewrites.padded_mlp import PaddedMlp
from vae_accel.rewrites.residual_norm import APART, JOINED, ResidualNorm
from vae_accel.rewrites.vision_metadata import VisionMetadata

TOWERS = {t.id: t for t in (*TABLE, *RELATIVES, *PACKED)}
IMAGES = ("clip", "clip-projection", "siglip", "siglip2")
QWENS = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
OTHERS = ("qwen3-vl-moe", "qwen3.5", "qwen3.5-moe", "qwen3-omni-moe", "qwen4-exp", "cohere-compass", "qwen2.5-omni")
TAKEN = (*IMAGES, *QWENS, *OTHERS, "ernie4.5-vl", "glm4v", "glm4v-moe", "exaone4.5")
BOTH = pytest.mark.parametrize("id", ["clip", "qwen2.5-vl"])
BENEATH = (PackedAttention(), PaddedMlp(), FusedElementwise())
CLIP, QWEN3 = TOWERS["clip"], TOWERS["qwen3-vl"]
SEEN = f"{APART}: a hook or a patch on the norm"


def optimized(model: nn.Module, before: tuple[Any, ...] = (), after: tuple[Any, ...] = ()) -> nn.Module:
    steps = [base.Step(rewrite, "on", "test") for rewrite in (*before, ResidualNorm(), *after)]
    base.run(model, Cpu(), steps, "encoder", {"strict": True})
    return model


def outcome(model: nn.Module) -> Any:
    return next(o for o in ledger_of(model).outcomes if o.name == ResidualNorm.name)


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
    return model.blocks if hasattr(model, "blocks") else model.get_submodule("encoder").layers


def norms(layer: nn.Module) -> list[nn.Module]:
    return [m for name, m in layer.named_children() if "norm" in name]


def called(model: nn.Module) -> list[nn.Module]:
    """The norms of the layers that are called as modules from now on: by their class, as a hook would be minded."""
    seen: list[nn.Module] = []

    def telling(norm: Any) -> None:
        forward = norm.forward
        norm.__class__ = type(
            type(norm).__name__, (type(norm),), {"__call__": lambda m, x: seen.append(m) or forward(x)}
        )

    for layer in layers(model):
        for norm in norms(layer):
            telling(norm)
    return seen


@pytest.mark.parametrize("id", TAKEN)
def test_stock_in_every_tower(id):
    tower = TOWERS[id]
    stock, feed = tower.build(), tower.inputs()
    ours = optimized(copy.deepcopy(stock))
    assert_near(tower.outputs(ours, feed), tower.outputs(stock, feed))
    assert counts(ours) == {JOINED: 3} and len(outcome(ours).taken) == 2 and not outcome(ours).refused


@pytest.mark.parametrize("id", (*IMAGES, *QWENS))
def test_bf16_is_as_near_to_fp64_as_stock(id):
    tower, error = TOWERS[id], {"stock": 0.0, "ours": 0.0}
    for seed in range(4):
        stock, feed = tower.build(seed, torch.bfloat16), tower.inputs("picture", seed=seed, dtype=torch.bfloat16)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in feed.items()}
        golden = tower.outputs(copy.deepcopy(stock).double(), wide)
        for name, model in (("stock", stock), ("ours", optimized(copy.deepcopy(stock), BENEATH))):
            error[name] += sum(float((a - b).norm()) for a, b in zip(tower.outputs(model, feed), golden, strict=True))
    assert error["ours"] <= 1.05 * error["stock"]


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("id", ["clip", "siglip", *QWENS])
def test_the_kernel_itself(id, inference, monkeypatch):
    """Of two layers the first norm is called; three sums have a norm with them, and the last sum none."""
    tower, launched = TOWERS[id], []
    stock, feed = tower.build(0, torch.float16), tower.inputs(dtype=torch.float16)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in feed.items()}
    golden, theirs = tower.outputs(copy.deepcopy(stock).double(), wide), tower.outputs(stock, feed)
    ours = optimized(copy.deepcopy(stock), (FusedElementwise(),))
    for layer in layers(ours):
        layer.register_forward_pre_hook(lambda *_: setattr(_dispatch, "tally", lambda name, *_: launched.append(name)))
        layer.register_forward_hook(lambda *_: setattr(_dispatch, "tally", None))
    with kernels(monkeypatch), torch.inference_mode(inference), torch.no_grad():
        poison(monkeypatch)
        got = tower.run(ours, feed)
    assert launched.count("_residual_norm") == 4 and counts(ours) == {JOINED: 3}
    errors = [sum(float((a - b).norm()) for a, b in zip(outs, golden, strict=True)) for outs in (got, theirs)]
    assert errors[0] <= 1.05 * errors[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("id", (*IMAGES, *QWENS))
def test_on_a_card(id, dtype):
    tower = TOWERS[id]
    stock = tower.build(0, dtype).cuda()
    ours, feed = optimized(copy.deepcopy(stock), BENEATH), {k: v.cuda() for k, v in tower.inputs(dtype=dtype).items()}
    with torch.inference_mode():
        wide = {k: v.double() if v.is_floating_point() else v for k, v in feed.items()}
        golden = tower.run(copy.deepcopy(stock).double(), wide)
        outs = [tower.run(model, feed) for model in (ours, stock)]
    assert counts(ours) == {JOINED: 3}
    errors = [sum(float((a - b).norm()) for a, b in zip(out, golden, strict=True)) for out in outs]
    assert errors[0] <= 1.1 * errors[1]


def test_a_norm_is_taken_from_the_layer_before_and_once():
    model, feed = optimized(CLIP.build()).requires_grad_(False), CLIP.inputs()
    kept, seen = [], called(model)
    layers(model)[0].register_forward_hook(lambda m, args, out: kept.append(out))
    CLIP.outputs(model, feed)
    first, second = layers(model)
    assert seen == [first.layer_norm1]
    second(kept[0], None)
    assert seen == [first.layer_norm1, second.layer_norm1]  # what was kept holds no norm any more


@pytest.mark.parametrize("change", ["other", "in place", "hook", "exchanged"])
def test_a_noted_norm_is_taken_for_what_it_is_of_alone(change):
    stock, feed = CLIP.build().requires_grad_(False), CLIP.inputs()
    ours = optimized(copy.deepcopy(stock))
    for model in (stock, ours):
        first, second = layers(model)
        if change == "other":
            first.register_forward_hook(lambda m, args, out: out * 2)
        elif change == "in place":
            first.register_forward_hook(lambda m, args, out: (out.mul_(2), None)[1])
        elif change == "hook":
            first.register_forward_hook(
                lambda m, args, out, norm=second.layer_norm1: (
                    norm.register_forward_hook(lambda m, args, out: out * 2) and None
                )
            )
        else:
            torch.manual_seed(0)
            second.layer_norm1 = nn.LayerNorm(32)
            nn.init.normal_(second.layer_norm1.weight)
    assert_near(CLIP.outputs(ours, feed), CLIP.outputs(stock, feed))


@pytest.mark.parametrize("number", [0, 1])
@BOTH
def test_who_looks_at_a_norm_sees_what_stock_shows(id, number):
    tower = TOWERS[id]
    stock, feed = tower.build().requires_grad_(False), tower.inputs()
    for disturb in (
        lambda norm: norm.register_forward_hook(lambda m, args, out: out * 0.5),
        lambda norm: norm.register_forward_pre_hook(lambda m, args: (args[0] * args[0],)),
        lambda norm: setattr(norm, "forward", lambda x: x * 0.5),
    ):
        theirs, ours = copy.deepcopy(stock), optimized(copy.deepcopy(stock))
        for model in (theirs, ours):
            disturb(norms(layers(model)[1])[number])
        assert_near(tower.outputs(ours, feed), tower.outputs(theirs, feed))
        assert counts(ours) == {JOINED: 2, SEEN: 1}


@BOTH
def test_hooks_and_patches_elsewhere_are_called(id):
    """Attention, MLP and layers are called as modules, with what stock gives them."""
    tower = TOWERS[id]
    stock, feed = tower.build().requires_grad_(False), tower.inputs()
    ours, seen = optimized(copy.deepcopy(stock), BENEATH), {}
    for name, model in (("stock", stock), ("ours", ours)):
        seen[name] = []
        for module in (*layers(model), *(child for layer in layers(model) for child in layer.children())):
            if module not in [norm for layer in layers(model) for norm in norms(layer)]:
                module.register_forward_hook(
                    lambda m, args, out, to=seen[name]: to.append(out[0] if isinstance(out, tuple) else out)
                )
        mlp = layers(model)[1].mlp
        mlp.forward = lambda x, before=mlp.forward: before(x) * 0.5
    assert_near(tower.outputs(ours, feed), tower.outputs(stock, feed))
    assert len(seen["ours"]) == 6
    assert_near(seen["ours"], seen["stock"])


@torch.no_grad()
@BOTH
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
        assert counts(ours) == {JOINED: 3}


@BOTH
def test_gradients_and_autocast_are_stocks(id):
    tower = TOWERS[id]
    ours, feed = optimized(tower.build()), tower.inputs()
    tower.run(ours, feed)
    with torch.autocast("cpu", torch.bfloat16):
        tower.outputs(ours, feed)
    assert counts(ours) == {"layers as they were: a gradient or autocast": 4}


def test_norms_of_another_dtype_are_stocks():
    stock, feed = TOWERS["qwen2.5-vl"].build().requires_grad_(False), TOWERS["qwen2.5-vl"].inputs()
    for norm in (m for layer in stock.blocks for m in norms(layer)):
        norm.double()
    ours = optimized(copy.deepcopy(stock).double())
    wide = {k: v.double() if v.is_floating_point() else v for k, v in feed.items()}
    assert_near(TOWERS["qwen2.5-vl"].outputs(ours, wide), TOWERS["qwen2.5-vl"].outputs(stock.double(), wide))
    assert counts(ours) == {f"{APART}: stock takes statistics of fp64 in fp32": 3}


@pytest.mark.parametrize("id", ["clip", "siglip", "qwen3-vl"])
def test_what_transformers_captures(id):
    """Hidden states, and what Qwen3-VL's deepstack makes of them between the layers."""
    tower = TOWERS[id]
    stock, feed = tower.build().requires_grad_(False), tower.inputs()
    ours = optimized(copy.deepcopy(stock), BENEATH)
    asked = {**feed, "output_hidden_states": True}
    for _ in range(2):
        assert_near(tower.outputs(ours, asked), tower.outputs(stock, asked))
    assert counts(ours) == {JOINED: 6}
    if id in IMAGES:
        for model in (stock, ours):
            model.set_attn_implementation("eager")
        asked = {**feed, "output_attentions": True}
        assert len(tower.outputs(ours, asked)) > 2
        assert_near(tower.outputs(ours, asked), tower.outputs(stock, asked))


@pytest.mark.parametrize("before", [False, True], ids=["optimize then offload", "offload then optimize"])
@pytest.mark.parametrize("offload", [sequential, grouped])
@BOTH
def test_offloaded_norms_are_called(id, offload, before):
    tower = TOWERS[id]
    stock, feed = tower.build().requires_grad_(False), tower.inputs()
    want = tower.outputs(stock, feed)
    model = stock if before else optimized(stock)
    offload(model)
    model = optimized(model) if before else model
    for _ in range(2):
        assert_near(tower.outputs(model, feed), want)
    assert counts(model) == {SEEN: 6}
    vae_accel.restore(model)
    assert all(torch.equal(a, b) for a, b in zip(tower.outputs(model, feed), want, strict=True))


@BOTH
def test_under_graphs(id):
    tower = TOWERS[id]
    stock, feed = tower.build().requires_grad_(False), tower.inputs()
    ours = optimized(copy.deepcopy(stock), (VisionMetadata(), *BENEATH), (CudaGraph(capture=Recorder()),))
    for _ in range(4):
        assert_near(tower.outputs(ours, feed), tower.outputs(stock, feed))
    replayed = next(o for o in ledger_of(ours).outcomes if o.name == "cuda_graph").counts
    assert replayed["replayed"] >= 2 and set(counts(ours)) == {JOINED}


def test_copies_share_no_norm():
    ours, feed = optimized(CLIP.build()).requires_grad_(False), CLIP.inputs()
    other = copy.deepcopy(ours)
    want = CLIP.outputs(ours, feed)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(CLIP.outputs(other, feed), want, strict=True))
    assert counts(other) == {JOINED: 3}


def test_refusals():
    def refused(change: Any, id: str = "clip") -> str:
        model = TOWERS[id].build()
        change(layers(model)[0])
        return next(iter(outcome(optimized(model)).refused.values()))

    assert "layer_norm2 is a Identity" in refused(lambda layer: setattr(layer, "layer_norm2", nn.Identity()))
    bare = nn.LayerNorm(32, elementwise_affine=False)
    assert "has no weight" in refused(lambda layer: setattr(layer, "layer_norm1", bare))
    assert "has no attn" in refused(lambda layer: delattr(layer, "attn"), "qwen3-vl")
    assert "forward was replaced" in refused(lambda layer: setattr(layer, "forward", lambda *a, **k: a[0]))


def test_text_layers_and_strangers_are_left_alone():
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 16}, vision_config={**small, "image_size": 8, "patch_size": 4}
    )
    ours = optimized(CLIPModel(config), (JointProjections(), FusedElementwise()))
    assert all(path.startswith("vision_model.") for o in ledger_of(ours).outcomes for path in (*o.taken, *o.refused))

    class Mine(CLIPEncoderLayer):
        def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
            return hidden_states

    model = CLIP.build()
    layers(model)[1] = Mine(model.config)
    (_, site) = ResidualNorm().sites(model, Ledger())
    assert "Mine has a forward of its own" in site.refused
    assert_near(CLIP.outputs(optimized(copy.deepcopy(model)), CLIP.inputs()), CLIP.outputs(model, CLIP.inputs()))
