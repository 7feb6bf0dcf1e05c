"""Attention within segments: stock's numbers in every form, nothing read from a device, a reason where stock runs."""

from __future__ import annotations

import copy
import inspect
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vae_accel
from tests.interpreter import kernels
from tests.recorder import Recorder
from tests.towers import HOLDER, PACKED, RELATIVES, TABLE, packed
from vae_accel.edits import Ledger, ledger_of
from vae_accel.families import packed_attention as family
from vae_accel.families import segments
from vae_accel.families.segments import Segments
from vae_accel.graphs.call import Signature
from vae_accel.graphs.steering import Beneath, constants
from vae_accel.platforms import Cpu, base
from vae_accel.rewrites import packed_attention as module
from vae_accel.rewrites.bilinear_pos_embed import BilinearPosEmbed
from vae_accel.rewrites.cuda_graph import CudaGraph
from vae_accel.rewrites.packed_attention import SHORT, Form, PackedAttention, by_runs, form_of
from vae_accel.rewrites.vision_metadata import VisionMetadata

TOWERS = {t.id: t for t in (*TABLE, HOLDER, *RELATIVES, *PACKED)}
QWEN2, QWEN25, QWEN3 = QWENS = tuple(TOWERS[id] for id in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl"))
SHARING = (
    "qwen3-vl-moe",
    "qwen3.5",
    "qwen3.5-moe",
    "qwen4-exp",
    "cohere-compass",
    "qwen3-omni-moe",
    "glm4v",
    "glm4v-moe",
    "ernie4.5-vl",
    "qwen3-vl-prompt",
)
# One merged patch; windows (of 2 x 2 merged patches) with ragged edges; a clip; images of one size; all at once.
BATCHES = (
    ((1, 2, 2),),
    ((1, 10, 14),),
    ((3, 6, 4),),
    ((1, 4, 6), (1, 4, 6)),
    ((1, 2, 2), (2, 6, 10), (1, 4, 4), (4, 2, 6)),
)
each_qwen = pytest.mark.parametrize("tower", QWENS, ids=lambda t: t.id)


def optimized(model: nn.Module, *before: Any, after: tuple[Any, ...] = ()) -> nn.Module:
    steps = [base.Step(rewrite, "on", "test") for rewrite in (*before, PackedAttention(), *after)]
    base.run(model, Cpu(), steps, "encoder", {"strict": True})
    return model


def counts(model: nn.Module) -> dict[str, int]:
    ledger = ledger_of(model)
    assert ledger is not None
    return next(o for o in ledger.outcomes if o.name == PackedAttention.name).counts


def feed_of(grids: tuple[tuple[int, int, int], ...]) -> dict[str, Tensor]:
    return packed(4, grids=grids)("noise", 0)


def assert_near(ours: list[Tensor], stock: list[Tensor]) -> None:
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [Form.BATCHED, Form.KERNEL], ids=lambda f: f.name)
@pytest.mark.parametrize("grids", BATCHES, ids=str)
@each_qwen
def test_stock_on_every_batch_of_grids(tower, grids, form, monkeypatch):
    monkeypatch.setattr(module, "form_of", lambda *args: form)
    stock, feed = tower.build(), feed_of(grids)
    ours = optimized(copy.deepcopy(stock))
    assert_near(tower.outputs(ours, feed), tower.outputs(stock, feed))
    assert counts(ours) == {form.value: 2}


@pytest.mark.parametrize("id", SHARING)
def test_classes_that_share_the_forward(id: str) -> None:
    tower = TOWERS[id]
    stock, feed = tower.build(), tower.inputs()
    ours = optimized(copy.deepcopy(stock))
    assert_near(tower.outputs(ours, feed), tower.outputs(stock, feed))
    assert counts(ours) == {Form.BATCHED.value: 2}
    assert len(ledger_of(ours).outcomes[0].taken) == 2 and not ledger_of(ours).outcomes[0].refused


def test_the_kernel_itself(monkeypatch):
    """fp16, since the interpreter multiplies bf16 as integers."""
    model, feed = QWEN25.build(dtype=torch.float16), QWEN25.inputs(dtype=torch.float16)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in feed.items()}
    golden = QWEN25.outputs(copy.deepcopy(model).double(), wide)
    stock = QWEN25.outputs(model, feed)
    optimized(model, VisionMetadata())
    with kernels(monkeypatch):
        ours = QWEN25.outputs(model, feed)
    assert counts(model) == {Form.KERNEL.value: 2}
    errors = [
        sum((a.double() - b).square().mean().sqrt().item() for a, b in zip(x, golden, strict=True))
        for x in (ours, stock)
    ]
    assert errors[0] <= 1.2 * errors[1]  # of one draw


def test_the_choice(monkeypatch):
    card, host = torch.device("cuda"), torch.device("cpu")
    windows, one = Segments(64, (64, 16, 64)), Segments(4096, (4096,))
    equal, unequal, unknown = Segments(576, (576,) * 20), Segments(900, (900, 400)), Segments(4096, None)

    def choice(found: Segments, fused: bool = True, varlen: bool = True, bits: Any = torch.bfloat16, **how: Any) -> Any:
        monkeypatch.setattr(module.kernel, "takes", lambda x, head: fused)
        monkeypatch.setattr(module, "_has_varlen", lambda: varlen)
        device = how.get("device", card)
        x: Any = SimpleNamespace(dtype=bits, device=device, is_cuda=device == card)
        return form_of(found, x, how.get("head", 80), how.get("beside", True))

    assert [choice(s) for s in (windows, unknown, one, equal, unequal)] == [
        Form.KERNEL, Form.KERNEL, Form.BATCHED, Form.BATCHED, Form.VARLEN,
    ]  # fmt: skip
    assert (
        choice(Segments(SHORT, (SHORT,))) is Form.KERNEL and choice(Segments(SHORT + 1, (SHORT + 1,))) is Form.BATCHED
    )
    assert choice(unequal, varlen=False) is choice(unequal, head=12) is Form.KERNEL
    plain = {"fused": False, "bits": torch.float32}
    assert [choice(s, **plain) for s in (windows, one, equal, unequal)] == [Form.BATCHED] * 4
    assert choice(unknown, **plain) is None and choice(unknown, device=host, **plain) is Form.KERNEL
    assert choice(windows, beside=False) is choice(unequal, beside=False) is Form.BATCHED


def test_varlen_attn_takes_what_it_is_called_with():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    inspect.signature(varlen.varlen_attn).bind(*[None] * 5, 1, 1, scale=1.0)


def test_varlen_is_called_with_segments_as_they_are(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def attend(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, _: Tensor, most: int, __: int, scale: float) -> Tensor:
        assert ends.dtype == torch.int32 and most == int(ends.diff().max())
        return by_runs(q, k, v, [(1, n) for n in ends.diff().tolist()], scale)

    monkeypatch.setattr(varlen, "varlen_attn", attend)
    monkeypatch.setattr(module, "form_of", lambda *args: Form.VARLEN)
    stock, feed = QWEN25.build(), feed_of(BATCHES[-1])
    ours = optimized(copy.deepcopy(stock))
    assert_near(QWEN25.outputs(ours, feed), QWEN25.outputs(stock, feed))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """By which method a tensor was read back, as the host would wait for a device to do."""
    seen: list[str] = []
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__index__", "__float__"):
        method = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *a, m=method, n=name, **k: seen.append(n) or m(self, *a, **k))
    return seen


@pytest.mark.parametrize("form", [Form.BATCHED, Form.KERNEL], ids=lambda f: f.name)
@each_qwen
def test_a_forward_reads_nothing(tower, form, reads, monkeypatch):
    monkeypatch.setattr(module, "form_of", lambda *args: form)
    monkeypatch.setattr(sys.modules["vae_accel.families.towers"], "_READ_FREELY", ())
    table = [] if tower.table is None else [BilinearPosEmbed()]
    model, feed = optimized(tower.build(), VisionMetadata(), *table), tower.inputs()
    tower.outputs(model, feed)
    reads.clear()
    tower.outputs(model, feed)
    assert not reads
    tower.outputs(vae_accel.restore(model), feed)
    assert reads.count("tolist") >= 6  # stock's, three in each of two layers


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_segments_without_a_note_are_read_and_never_stale(mode, reads):
    model, stock, feed = optimized(QWEN25.build()), QWEN25.build(), feed_of(((1, 8, 4),))
    with mode():
        given = torch.tensor([0, 16, 32], dtype=torch.int32)
        for middle in (16, 8, 24):
            given[1] = middle
            reads.clear()
            ours = QWEN25.run(model, {**feed, "cu_seqlens": given})
            assert_near(ours, QWEN25.run(stock, {**feed, "cu_seqlens": given}))


def test_notes():
    ends = torch.tensor([0, 4, 8, 8, 10])
    assert segments.of(ends) == Segments(4, (4, 4, 0, 2)) and segments.of(ends).runs() == [(2, 4), (1, 2)]
    assert segments.of(ends) is segments.of(ends)
    ends[1] = 3
    assert segments.of(ends).lengths == (3, 5, 0, 2) and segments.of(copy.deepcopy(ends)).lengths == (3, 5, 0, 2)
    with pytest.raises(ValueError, match="not known"):
        segments.of(segments.mark(ends, None, 5)).runs()


LEFT = {
    "eager": (lambda m: setattr(m.config, "_attn_implementation", "eager"), {}, "its attention is eager"),
    "weights": (lambda m: None, {"output_attentions": True}, "its weights are asked for"),
    "gradient": (lambda m: m.blocks[1].attn.qkv.requires_grad_(True), {}, "a gradient or autocast"),
}


@pytest.mark.parametrize("change, options, why", LEFT.values(), ids=LEFT)
def test_what_is_left_to_stock_says_why(change, options, why):
    stock, feed = QWEN2.build().requires_grad_(False), QWEN2.inputs()
    change(stock)
    ours = optimized(copy.deepcopy(stock))
    for a, b in zip(QWEN2.run(ours, {**feed, **options}), QWEN2.run(stock, {**feed, **options}), strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad
    left = {name: n for name, n in counts(ours).items() if name.startswith("layers left to stock")}
    assert left == {f"layers left to stock: {why}": 1 if why.startswith("a gradient") else 2}


def test_autocast_and_dropout_and_other_calls_are_left_to_stock():
    ours, feed = optimized(QWEN2.build().requires_grad_(False)), QWEN2.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        QWEN2.outputs(ours, feed)
    attention = ours.blocks[0].attn.train()
    attention.attention_dropout = 0.5
    QWEN2.outputs(ours, feed)
    attention.eval()
    x, ends = torch.randn(8, 32), torch.tensor([0, 8], dtype=torch.int32)
    angles = torch.randn(8, 16), torch.randn(8, 16)
    attention(x, ends, angles)
    with pytest.raises(RuntimeError):
        attention(x, ends * 2, position_embeddings=angles)
    assert counts(ours) == {
        "layers left to stock: a gradient or autocast": 2,
        "layers left to stock: dropout": 1,
        "layers left to stock: an unusual call": 1,
        "layers left to stock: segments or positions of another length": 1,
        Form.BATCHED.value: 1,
    }


def test_stock_is_handed_segments_on_the_host_and_flash_those_of_the_device():
    model = optimized(QWEN2.build().requires_grad_(False))
    attention = model.blocks[0].attn
    handed: list[Tensor] = []
    partial = vars(attention)["forward"]
    below = lambda x, ends, *args, **kwargs: handed.append(ends) or x  # noqa: E731
    ends = segments.mark(torch.empty(3, dtype=torch.int32, device="meta"), (5, 3))
    attention.config._attn_implementation = "eager"
    partial.func(partial.args[0], below, *partial.args[2:], torch.zeros(8, 32), ends)
    attention.config._attn_implementation = "flash_attention_2"
    partial.func(partial.args[0], below, *partial.args[2:], torch.zeros(8, 32), ends)
    assert handed[0].tolist() == [0, 5, 8] and handed[0].dtype == torch.int32 and handed[1] is ends
    assert set(counts(model)) == {
        "layers left to stock: its attention is eager",
        "layers left to stock: its attention is flash_attention_2",
    }


class Adapter(nn.Module):
    """LoRA as PEFT wraps a layer."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.delta = layer, nn.Linear(layer.in_features, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.delta(x)


def test_projections_are_called_as_modules():
    stock, feed = QWEN3.build(), QWEN3.inputs()
    ours, seen = optimized(copy.deepcopy(stock)), []
    for model in (stock, ours):
        attention = model.blocks[0].attn
        attention.qkv, attention.proj = Adapter(attention.qkv), Adapter(attention.proj)
        attention.qkv.register_forward_hook(lambda m, args, out: seen.append(out.shape) or out * 1.5)
    assert_near(QWEN3.outputs(ours, feed), QWEN3.outputs(stock, feed))
    assert len(seen) == 2 and seen[0] == seen[1] and counts(ours) == {Form.BATCHED.value: 2}


@each_qwen
def test_under_graphs_exact_and_in_buckets(tower):
    stock = tower.build().requires_grad_(False)
    graphs = CudaGraph(capture=Recorder())
    ours = optimized(copy.deepcopy(stock), VisionMetadata(), after=(graphs,))
    feed, other = feed_of(BATCHES[1]), feed_of(((1, 8, 6), (1, 4, 4)))
    for _ in range(3):
        assert_near(tower.outputs(ours, feed), tower.outputs(stock, feed))
    assert Form.BATCHED.value in counts(ours) and Form.KERNEL.value not in counts(ours)
    vae_accel.warmup(ours, budgets=[64])
    for given in (other, feed):
        assert_near(tower.outputs(ours, given), tower.outputs(stock, given))
    assert Form.KERNEL.value in counts(ours)


def test_graphs_note_the_segments_that_a_caller_gives(reads):
    module, feed = QWEN2.build(), feed_of(((1, 4, 4),))
    given = torch.tensor([0, 12, 16], dtype=torch.int32)
    call = Signature(module).read(module, (), {**feed, "cu_seqlens": given})
    found = constants(module, call, Beneath()).arguments["cu_seqlens"]
    reads.clear()
    assert segments.of(found).lengths == (12, 4) and not reads
    given[1] = 8
    assert found[1] == 12 and segments.of(given).lengths == (8, 8)


WIDE = {"hidden_size": 160, "num_heads": 2}  # heads of 80, as all of Qwen's but Qwen3-VL's


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "grids, full",
    [
        (((1, 12, 20), (1, 6, 4)), Form.VARLEN),
        (((1, 16, 16), (1, 16, 16)), Form.BATCHED),
        (((1, 12, 20),), Form.BATCHED),
        (((1, 4, 6), (1, 2, 4)), Form.KERNEL),
    ],
    ids=str,
)
def test_on_a_card_eager_and_captured(grids, full, monkeypatch):
    monkeypatch.setattr(module, "SHORT", 128)
    tower = replace(QWEN25, config={**QWEN25.config, **WIDE})
    stock = tower.build(dtype=torch.bfloat16).cuda().requires_grad_(False)
    feed = {k: v.cuda().bfloat16() if v.is_floating_point() else v.cuda() for k, v in feed_of(grids).items()}
    wide = {k: v.double() if v.is_floating_point() else v for k, v in feed.items()}
    golden = tower.outputs(copy.deepcopy(stock).double(), wide)

    def error(outputs: list[Tensor]) -> float:
        return sum(float((a.double() - b).square().mean().sqrt()) for a, b in zip(outputs, golden, strict=True))

    bound = 1.2 * error(tower.outputs(stock, feed))  # of one draw
    ours = optimized(copy.deepcopy(stock), VisionMetadata())
    eager = tower.outputs(ours, feed)
    assert error(eager) <= bound
    assert counts(ours) == ({Form.KERNEL.value: 2} if full is Form.KERNEL else {Form.KERNEL.value: 1, full.value: 1})
    ours = optimized(ours, VisionMetadata(), after=(CudaGraph(),))
    for _ in range(3):
        assert all(map(torch.equal, tower.outputs(ours, feed), eager))
    assert next(o for o in ledger_of(ours).outcomes if o.name == CudaGraph.name).counts.get("replayed")
    assert error(tower.outputs(vae_accel.warmup(ours, budgets=[256]), feed)) <= bound


def test_refusals():
    class VisionAttention(nn.Module):
        """Of the remote code of an earlier Qwen2-VL: another forward under the same name."""

        def forward(self, x: Tensor, cu_seqlens: Tensor, rotary_pos_emb: Tensor) -> Tensor:
            return x

    class Derived(type(QWEN2.build().blocks[0].attn)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    (site,) = PackedAttention().sites(VisionAttention(), Ledger())
    assert "is not transformers' class of that name: it has no qkv" in site.refused
    derived = QWEN2.build().blocks[0].attn
    derived.__class__ = Derived
    assert "forward of its own" in family.refusal(derived)
    assert family.refusal(nn.Linear(1, 1)) is None
