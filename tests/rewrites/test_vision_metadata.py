"""What follows from the grids: equal to what stock derives, derived once, bounded, and never a stale one."""

from __future__ import annotations

import copy
import pickle
import sys
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

import vae_accel
from tests.towers import HOLDER, PACKED, RELATIVES, TABLE, Tower, packed
from vae_accel.edits import Ledger, ledger_of
from vae_accel.families import segments, towers
from vae_accel.platforms import Cpu, base
from vae_accel.rewrites.bilinear_pos_embed import BilinearPosEmbed
from vae_accel.rewrites.vision_metadata import DERIVED, KEPT, MET, Kept, VisionMetadata

TOWERS = {t.id: t for t in (*TABLE, HOLDER, *RELATIVES, *PACKED) if t.metadata is not None}
QWEN2, QWEN25, QWEN3 = (TOWERS[id] for id in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl"))
# One merged patch; windows (of 2 x 2 merged patches) with ragged edges; a clip; one row; all at once.
BATCHES = (
    ((1, 2, 2),),
    ((1, 10, 14),),
    ((3, 6, 4),),
    ((1, 2, 18), (1, 18, 2)),
    ((1, 2, 2), (2, 6, 10), (1, 4, 4), (4, 2, 6)),
)
HELPERS = {
    "get_vision_position_ids": ("position_ids",),
    "get_vision_attention_seqlens": ("cu_seqlens", None),
    "get_vision_window_index": ("window_index", "cu_window_seqlens"),
    "get_vision_interpolation_indices_and_weights": ("interp_indices", "interp_weights"),
}


def optimized(model: nn.Module, *rewrites: Any) -> nn.Module:
    steps = [base.Step(rewrite, "on", "test") for rewrite in (VisionMetadata(), *rewrites)]
    base.run(model, Cpu(), steps, "encoder", {"strict": True})
    return model


def counts(model: nn.Module) -> tuple[int, int]:
    found = ledger_of(model).outcomes[0].counts
    return found.get(DERIVED, 0), found.get(MET, 0)


def kept(model: nn.Module) -> Kept:
    (found,) = [a for e in ledger_of(model).edits if e.kind == "method" for a in e.new.args if isinstance(a, Kept)]
    return found


def same(ours: list[Tensor], stock: list[Tensor]) -> bool:
    return len(ours) == len(stock) and all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


def feed_of(grids: tuple[tuple[int, int, int], ...]) -> dict[str, Tensor]:
    return packed(4, grids=grids)("noise", 0)


def derived_by_stock(tower: nn.Module, feed: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What the stock forward derives from its grid, by the name of the keyword argument it would take it as."""
    seen: dict[str, Tensor] = {}
    home = sys.modules[type(tower).__module__]

    def spied(helper: Any, names: tuple[str | None, ...]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = helper(*args, **kwargs)
            seen.update(zip(names, result if isinstance(result, tuple) else (result,), strict=True))
            return result

        return call

    with monkeypatch.context() as patch, torch.no_grad():
        for name, results in HELPERS.items():
            if hasattr(home, name):
                patch.setattr(home, name, spied(getattr(home, name), results))
        tower(**feed)
    seen.pop(None)
    return seen


@pytest.mark.parametrize("grids", BATCHES, ids=str)
@pytest.mark.parametrize("tower", (QWEN2, QWEN25, QWEN3, TOWERS["exaone4.5"], TOWERS["glm-ocr"]), ids=lambda t: t.id)
def test_metadata_is_what_stock_derives(tower, grids, monkeypatch):
    model = tower.build()
    want = derived_by_stock(model, feed_of(grids), monkeypatch)
    got = towers.metadata(model, grids, torch.device("cpu"))
    longest = {name: got.pop(name) for name in ("max_seqlen", "max_window_seqlen") if name in got}
    assert got.keys() == want.keys() >= {"position_ids", "cu_seqlens"}
    for name, value in want.items():
        assert torch.equal(got[name], value) and got[name].dtype == value.dtype, name
    for name, ends in (("max_seqlen", "cu_seqlens"), ("max_window_seqlen", "cu_window_seqlens")):
        if ends in got:
            lengths = got[ends].diff()
            assert segments.of(got[ends]).lengths == tuple(lengths.tolist())
            assert segments.of(got[ends]).longest == longest[name] == int(lengths.max())


@pytest.mark.parametrize("grids", BATCHES, ids=str)
@pytest.mark.parametrize("tower", (QWEN2, QWEN25, QWEN3), ids=lambda t: t.id)
def test_bit_for_bit_on_every_batch_of_grids(tower, grids):
    stock, feed = tower.build(), feed_of(grids)
    ours = optimized(copy.deepcopy(stock))
    want = tower.outputs(stock, feed)
    assert all(same(tower.outputs(ours, feed), want) for _ in range(2))
    assert counts(ours) == (1, 1)


@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)
def test_every_class(tower: Tower) -> None:
    stock = tower.build()
    ours = optimized(copy.deepcopy(stock))
    assert ledger_of(ours).outcomes[0].taken == [tower.metadata] and not ledger_of(ours).outcomes[0].refused
    assert list(ours.state_dict()) == list(stock.state_dict())
    for kind in ("picture", "ramp"):
        feed = tower.inputs(kind)
        assert same(tower.outputs(ours, feed), tower.outputs(stock, feed))
    assert counts(ours) == ((0, 0) if tower.id == "siglip2" else (1, 1))


def test_as_many_as_are_kept_and_the_oldest_goes():
    model = optimized(QWEN2.build())
    batches = [((1, 2, 2 * n),) for n in range(1, KEPT + 2)]
    for grids in (*batches, *batches[2:], batches[0]):
        QWEN2.outputs(model, feed_of(grids))
    assert counts(model) == (KEPT + 2, KEPT - 1) and len(kept(model)) == KEPT


def test_a_model_that_moved_leaves_nothing_behind():
    found = Kept()
    for device in ("cuda:0", "cuda:0", "cuda:1"):
        found.get((((1, 2, 2),), len(found), torch.device(device)), dict)
    assert len(found) == 1


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Tensors on the CPU are treated as an accelerator's; which of them were read back."""
    seen: list[Tensor] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(towers, "_READ_FREELY", ())
    monkeypatch.setattr(Tensor, "tolist", lambda self: seen.append(self) or tolist(self))
    return seen


def test_a_grid_on_a_device_is_read_once_until_it_is_written_to(reads):
    grid = torch.tensor([[1, 4, 6]])
    assert towers.rows_of(grid) == towers.rows_of(grid) == ((1, 4, 6),) and len(reads) == 1
    grid[0, 1] = 8
    other = copy.deepcopy(grid)  # with the note that its original, unwritten, had
    assert towers.rows_of(other) == towers.rows_of(grid) == ((1, 8, 6),) and len(reads) == 3
    with torch.inference_mode():
        unversioned = torch.tensor([[1, 2, 2]])
        assert towers.rows_of(unversioned) == ((1, 2, 2),)
        unversioned[0, 2] = 4
        assert towers.rows_of(unversioned) == ((1, 2, 4),)


def test_what_is_no_grid():
    assert [towers.rows_of(x) for x in (None, [[1, 2, 2]], torch.ones(2, 3), torch.ones(3).long())] == [None] * 4
    assert towers.rows_of(torch.ones(1, 3, dtype=torch.long, device="meta")) is None


@pytest.mark.parametrize("tower", (QWEN2, QWEN25, QWEN3), ids=lambda t: t.id)
def test_the_tower_itself_reads_nothing_of_a_grid_met_before(tower, reads):
    model, feed = optimized(tower.build(), *([] if tower.table is None else [BilinearPosEmbed()])), tower.inputs()
    tower.outputs(model, feed)
    reads.clear()
    tower.outputs(model, feed)
    in_attention = 3 * len(model.blocks)  # of the segments' lengths, which are not derived here
    assert len(reads) == in_attention
    assert not any(x is feed["grid_thw"] for x in reads)


@pytest.mark.parametrize("tower", (QWEN25, QWEN3), ids=lambda t: t.id)
def test_what_the_caller_gives_wins_with_all_that_belongs_to_it(tower):
    stock = tower.build()
    ours, feed = optimized(copy.deepcopy(stock)), feed_of(((1, 8, 4),))
    apart = feed_of(((2, 4, 4),))
    plain = tower.outputs(ours, feed)
    for name in ("cu_seqlens", "position_ids"):
        given = towers.metadata(stock, ((2, 4, 4),), torch.device("cpu"))[name]
        want = tower.outputs(stock, {**feed, name: given})
        assert same(tower.outputs(ours, {**feed, name: given}), want) and not same(want, plain)
    given = towers.metadata(ours, ((1, 8, 4),), torch.device("cpu"), given={"cu_seqlens", "interp_weights"})
    assert not given.keys() & {"cu_seqlens", "max_seqlen", "interp_indices", "interp_weights"}
    assert same(tower.outputs(ours, {**feed, "cu_seqlens": None}), plain)
    assert same(tower.outputs(ours, apart), tower.outputs(stock, apart))


@pytest.mark.parametrize("grid", [torch.empty(0, 3, dtype=torch.long), torch.tensor([[1, 3, 5]])], ids=["empty", "odd"])
@pytest.mark.parametrize("tower", (QWEN2, QWEN25, QWEN3), ids=lambda t: t.id)
def test_stock_says_what_is_wrong_with_a_grid(tower, grid):
    said = []
    for model in (stock := tower.build(), optimized(copy.deepcopy(stock))):
        with pytest.raises((RuntimeError, ValueError, IndexError)) as error, torch.no_grad():
            model(torch.zeros(int(grid.prod(-1).sum()), 96), grid)
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]


def test_rotary_tables_are_made_once_and_again_when_the_frequencies_change():
    stock = QWEN2.build()
    ours, feed, made = optimized(copy.deepcopy(stock)), QWEN2.inputs(), []
    rotary = ours.rotary_pos_emb
    recompose = rotary.recomposition_frequencies
    rotary.recomposition_frequencies = lambda table: made.append(table) or recompose(table)
    for _ in range(3):
        QWEN2.outputs(ours, feed)
    assert len(made) == 2  # cosines and sines
    for change in (lambda m: m.rotary_pos_emb.inv_freq.mul_(0.5), lambda m: m.to(torch.bfloat16).to(torch.float32)):
        for model in (ours, stock):
            change(model)
        made.clear()
        assert same(QWEN2.outputs(ours, feed), QWEN2.outputs(stock, feed)) and len(made) == 2
    own = torch.tensor([[0, 1]])
    assert torch.equal(rotary(own.float(), own)[0], stock.rotary_pos_emb(own.float(), own)[0])


def test_copies_begin_with_nothing():
    model, feed = optimized(QWEN25.build()), QWEN25.inputs()
    fresh = pickle.loads(pickle.dumps(model))  # a forward of transformers leaves closures, which do not pickle
    want = QWEN25.outputs(model, feed)
    for twin in (copy.deepcopy(model), fresh):
        assert len(kept(model)) == 1 and len(kept(twin)) == 0
        assert same(QWEN25.outputs(twin, feed), want) and len(kept(twin)) == 1


def test_what_inference_mode_left_serves_a_gradient():
    stock = QWEN3.build()
    ours, feed = optimized(copy.deepcopy(stock)), QWEN3.inputs()
    with torch.inference_mode():
        ours(**feed)
    grads = []
    for model in (ours, stock):
        model.requires_grad_(True)(**feed).last_hidden_state.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert grads[0] and same(*grads) and counts(ours) == (1, 1)


def test_a_compiler_sees_stock():
    model, feed = optimized(QWEN2.build()), QWEN2.inputs()
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, backend="eager")(**feed).last_hidden_state
    assert torch.equal(got, QWEN2.outputs(QWEN2.build(), feed)[0]) and counts(model) == (0, 0)


def test_hidden_states_for_a_pipeline_hit():
    stock = QWEN25.build()
    ours, feed = optimized(copy.deepcopy(stock)), QWEN25.inputs()
    with torch.no_grad():
        got, want = (m(**feed, output_hidden_states=True).hidden_states for m in (ours, stock))
    assert len(got) == 3 and same(list(got), list(want)) and counts(ours) == (1, 0)


@pytest.mark.parametrize("before", [False, True], ids=["optimize then offload", "offload then optimize"])
def test_sequential_offload(before):
    stock, feed = QWEN25.build().requires_grad_(False), QWEN25.inputs()
    want = QWEN25.outputs(stock, feed)
    model = stock if before else optimized(stock)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    model = optimized(model) if before else model
    assert model.merger.mlp[0].weight.device.type == "meta"
    assert all(same(QWEN25.outputs(model, feed), want) for _ in range(2)) and counts(model) == (1, 1)


def test_with_positions_resampled_by_the_kernel(monkeypatch):
    module = sys.modules[BilinearPosEmbed.__module__]
    calls, kernel = [], module.bilinear_pos_embed
    monkeypatch.setattr(module, "bilinear_pos_embed", lambda *a, **k: calls.append(a) or kernel(*a, **k))
    stock, feed = QWEN3.build(), QWEN3.inputs()
    ours = optimized(copy.deepcopy(stock), BilinearPosEmbed())
    for got, want in zip(QWEN3.outputs(ours, feed), QWEN3.outputs(stock, feed), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (entry,) = kept(ours)._entries.values()
    assert len(calls) == 1 and counts(ours) == (1, 0) and "interp_indices" not in entry
    vae_accel.restore(ours)
    assert same(QWEN3.outputs(ours, feed), QWEN3.outputs(stock, feed))


def test_siglip2_reads_its_sizes_once(reads):
    tower = TOWERS["siglip2"]
    stock = tower.build()
    ours, feed = optimized(copy.deepcopy(stock)), tower.inputs()
    assert same(tower.outputs(ours, feed), tower.outputs(stock, feed))
    sizes = feed["spatial_shapes"]
    reads.clear()
    tower.outputs(ours, feed)
    with torch.no_grad():
        by_position = ours.embeddings(feed["pixel_values"], sizes)
    assert not any(x is sizes or x._base is sizes for x in reads)
    assert torch.equal(by_position, stock.embeddings(feed["pixel_values"], sizes))


class Qwen2VisionTransformerPretrainedModel(nn.Module):
    """The part of transformers 4.57's class of that name that reads its grid; it answers with what it was handed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.config = nn.Linear(1, 1), SimpleNamespace(_attn_implementation="sdpa")

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Tensor:
        return grid_thw


class Glm4vVisionModel(Qwen2VisionTransformerPretrainedModel):
    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Tensor:
        return grid_thw


def test_towers_of_earlier_transformers(reads):
    model, x, grid = optimized(Qwen2VisionTransformerPretrainedModel()), torch.zeros(4, 1), torch.tensor([[1, 2, 2]])
    assert ledger_of(model).outcomes[0].taken == [""]
    for handed in (model(x, grid), model(x, grid_thw=grid), model(hidden_states=x, grid_thw=grid)):
        assert handed is not grid and handed.device.type == "cpu" and torch.equal(handed, grid)
    assert len(reads) == 1
    model.config._attn_implementation = "flash_attention_2"  # whose kernel wants the segments on the device
    assert model(x, grid) is grid
    (site,) = VisionMetadata().sites(Glm4vVisionModel(), Ledger())
    assert "transformers 5." in site.refused and "takes none" in site.refused


def test_refusals():
    model = QWEN2.build()
    model.rotary_pos_emb = nn.Identity()
    assert "rotary_pos_emb is a Identity" in towers.refusal(model)
    del model.spatial_merge_size
    assert "spatial_merge_size" in towers.refusal(model)

    class Derived(type(QWEN2.build())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert "forward of its own" in towers.refusal(Derived(QWEN2.build().config))
    assert towers.refusal(nn.Linear(1, 1)) is None
    with pytest.raises(KeyError, match="Linear"):
        towers.packing(nn.Linear(1, 1))


def test_a_setting_of_the_tower_that_changes_is_seen():
    stock = QWEN25.build()
    ours, feed = optimized(copy.deepcopy(stock)), QWEN25.inputs()
    before = QWEN25.outputs(ours, feed)
    for model in (ours, stock):
        model.window_size = 8
    after = QWEN25.outputs(stock, feed)
    assert same(QWEN25.outputs(ours, feed), after) and not same(before, after)
    assert len(kept(ours)) == 2
