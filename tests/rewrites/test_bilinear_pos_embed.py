"""Positions resampled by the kernel inside transformers' towers: no further from an fp64 oracle than stock's."""

from __future__ import annotations

import copy
import pickle
import sys
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

import vae_accel
from tests.towers import HOLDER, RELATIVES, TABLE, Tower
from vae_accel.edits import Ledger, ledger_of
from vae_accel.families import position_embeddings
from vae_accel.platforms import Cpu, base
from vae_accel.rewrites.bilinear_pos_embed import BilinearPosEmbed

TOWERS = [t for t in (*TABLE, HOLDER, *RELATIVES) if t.table is not None]
QWEN3 = next(t for t in TABLE if t.id == "qwen3-vl")
BIT_OF_FP32 = 2e-6  # of values of order one


def optimized(model: nn.Module) -> nn.Module:
    base.run(model, Cpu(), [base.Step(BilinearPosEmbed(), "on", "test")], "encoder", {"only": "bilinear_pos_embed"})
    return model


def refusal(model: nn.Module) -> str | None:
    (site,) = BilinearPosEmbed().sites(model, Ledger())
    return site.refused


def holder_of(tower: Tower, model: nn.Module) -> Any:
    return model.get_submodule(str(tower.table))


def with_positions_alone(tower: Tower, dtype: torch.dtype) -> nn.Module:
    """The tower with a table of values of order one and patch embeddings of zero."""
    model = tower.build().requires_grad_(False)
    holder = holder_of(tower, model)
    row = position_embeddings.table_of(holder)
    assert row is not None
    table = holder.get_submodule(row.table)
    table.weight.copy_(torch.randn(table.weight.shape, generator=torch.Generator().manual_seed(1)))
    for parameter in holder.get_submodule(row.projection).parameters():
        parameter.zero_()
    return model.to(dtype)


def positions(tower: Tower, model: nn.Module, feed: dict[str, Tensor]) -> Tensor:
    """What the holder adds to its patches: what it returns, or what a tower hands its first block."""
    holder, seen = holder_of(tower, model), []
    if hasattr(holder, "blocks"):
        handle = holder.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    else:
        handle = holder.register_forward_hook(lambda module, args, output: seen.append(output))
    tower.outputs(model, feed)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def oracle(tower: Tower, model: nn.Module, feed: dict[str, Tensor]) -> Tensor:
    """torch's own resampling in fp64, put into the order of the tower's patches."""
    holder = holder_of(tower, model)
    row = position_embeddings.table_of(holder)
    assert row is not None
    how = position_embeddings.read(row, holder)
    table = holder.get_submodule(row.table).weight.double().reshape(how.side, how.side, -1)
    images = []
    for t, h, w in feed["grid_thw" if "grid_thw" in feed else "image_grid_thw"].tolist():
        source = (table.transpose(0, 1) if row.swapped else table).permute(2, 0, 1)[None]
        if how.padding == "border":
            image = F.interpolate(source, (h, w), mode="bilinear", align_corners=how.align_corners)
        else:
            y, x = ((2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in (h, w))
            places = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)[None]
            image = F.grid_sample(source, places, mode="bilinear", padding_mode="zeros", align_corners=False)
        m = how.merge
        rows = image[0].permute(1, 2, 0)
        if row.swapped:  # the caller's patches are numbered along the swapped grid
            rows = rows.transpose(0, 1)
            h, w = w, h
        images.append(rows.reshape(h // m, m, w // m, m, -1).transpose(1, 2).reshape(h * w, -1).repeat(t, 1))
    return torch.cat(images)


@pytest.mark.parametrize("tower", TOWERS, ids=lambda t: t.id)
def test_positions_against_fp64(tower: Tower) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        feed = tower.inputs("picture", dtype=dtype)
        stock = with_positions_alone(tower, dtype)
        exact = oracle(tower, stock, feed)
        want = (positions(tower, stock, feed) - exact).abs()
        got_positions = positions(tower, optimized(stock), feed)
        got = (got_positions.double() - exact).abs()
        assert got_positions.dtype == dtype
        assert got.max() <= want.max() + (BIT_OF_FP32 if dtype == torch.float32 else 0)
        assert got.square().mean() <= 1.05 * want.square().mean() + 1e-14
        if dtype == torch.bfloat16:
            assert (got <= 2**-8 * exact.abs() + BIT_OF_FP32).all()  # rounded once


@pytest.mark.parametrize("tower", TOWERS, ids=lambda t: t.id)
def test_towers(tower: Tower) -> None:
    feed = tower.inputs("picture")
    stock = tower.build()
    ours = optimized(copy.deepcopy(stock))
    assert ledger_of(ours).outcomes[0].taken == [tower.table]
    assert list(ours.state_dict()) == list(stock.state_dict())
    for got, want in zip(tower.outputs(ours, feed), tower.outputs(stock, feed), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.fixture
def pair() -> SimpleNamespace:
    """Qwen3-VL's tower, stock and optimized, and a feed; `calls` counts the kernel's."""
    stock = QWEN3.build().requires_grad_(False)
    return SimpleNamespace(stock=stock, ours=optimized(copy.deepcopy(stock)), feed=QWEN3.inputs("noise"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from vae_accel.rewrites import bilinear_pos_embed as module

    seen: list[Any] = []
    kernel = module.bilinear_pos_embed
    monkeypatch.setattr(module, "bilinear_pos_embed", lambda *a, **k: seen.append(a) or kernel(*a, **k))
    return seen


def same(pair: SimpleNamespace, **more: Any) -> bool:
    feed = {**pair.feed, **more}
    outputs = zip(QWEN3.outputs(pair.ours, feed), QWEN3.outputs(pair.stock, feed), strict=True)
    return all(torch.equal(a, b) for a, b in outputs)


def test_indices_of_the_callers_own_run_stock(pair, calls):
    indices, weights = get_vision_interpolation_indices_and_weights(pair.feed["grid_thw"], 6, spatial_merge_size=2)
    assert same(pair, interp_indices=indices, interp_weights=weights * 2)
    assert not calls
    QWEN3.outputs(pair.ours, pair.feed)
    assert len(calls) == 1


def test_positional_arguments_and_the_tables_other_callers(pair, calls):
    with torch.no_grad():
        by_name = pair.ours(**pair.feed).last_hidden_state
        by_position = pair.ours(pair.feed["hidden_states"], pair.feed["grid_thw"]).last_hidden_state
    assert torch.equal(by_name, by_position) and len(calls) == 2
    ids = torch.arange(3)
    assert torch.equal(pair.ours.pos_embed(ids), pair.stock.pos_embed.weight[:3])


def test_gradients_and_autocast_run_stock(pair, calls):
    with torch.autocast("cpu", torch.bfloat16):
        assert same(pair)
    grads = []
    for model in (pair.ours, pair.stock):
        model.pos_embed.weight.requires_grad_()
        model(**pair.feed).last_hidden_state.square().sum().backward()
        grads.append(model.pos_embed.weight.grad)
    assert torch.equal(*grads) and not calls


def test_a_grid_that_is_none_of_the_kernels_runs_stock(pair, calls):
    odd = torch.tensor([[1, 3, 5], [1, 1, 7]])
    outcomes = []
    for model in (pair.ours, pair.stock):
        with pytest.raises(RuntimeError) as error, torch.no_grad():
            model(pair.feed["hidden_states"][:22], odd)
        outcomes.append(str(error.value))
    assert outcomes[0] == outcomes[1] and not calls


def test_hidden_states_wider_than_the_table_are_rounded_once(pair):
    for model in (pair.stock, pair.ours):
        model.pos_embed.to(torch.bfloat16)
    got, want = (QWEN3.outputs(model, pair.feed)[0] for model in (pair.ours, pair.stock))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_merge_into_the_table_is_seen(pair):
    for model in (pair.stock, pair.ours):
        model.pos_embed.weight.data += torch.linspace(-1, 1, 36)[:, None]
    got, want = (QWEN3.outputs(model, pair.feed)[0] for model in (pair.ours, pair.stock))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_table_wrapped_afterwards_runs_stock(pair, calls):
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner
            self.weight = inner.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids) + F.embedding(ids, torch.ones(36, 1))

    for model in (pair.stock, pair.ours):
        model.pos_embed = Wrapped(model.pos_embed)
    assert same(pair) and not calls


@pytest.mark.parametrize("before", [False, True], ids=["optimize then offload", "offload then optimize"])
def test_sequential_offload(pair, calls, before):
    want = QWEN3.outputs(pair.ours, pair.feed)
    model = copy.deepcopy(pair.stock) if before else pair.ours
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if before:
        optimized(model)
    assert model.pos_embed.weight.device.type == "meta"
    calls.clear()
    assert all(torch.equal(a, b) for a, b in zip(QWEN3.outputs(model, pair.feed), want, strict=True))
    assert len(calls) == 1


def test_torch_compile_runs_stock(calls):
    tower = next(t for t in RELATIVES if t.id == "paddleocr-vl")
    stock = holder_of(tower, tower.build()).requires_grad_(False)
    ours = optimized(copy.deepcopy(stock))
    feed = tower.inputs()
    got, want = (torch.compile(m, backend="eager")(feed["pixel_values"], feed["grid_thw"]) for m in (ours, stock))
    assert torch.equal(got, want) and not calls


def test_restore_deepcopy_pickle(pair):
    got = QWEN3.outputs(pair.ours, pair.feed)
    for twin in (copy.deepcopy(pair.ours), pickle.loads(pickle.dumps(pair.ours))):
        assert all(torch.equal(a, b) for a, b in zip(QWEN3.outputs(twin, pair.feed), got, strict=True))
    vae_accel.restore(pair.ours)
    assert "forward" not in {**vars(pair.ours), **vars(pair.ours.pos_embed)}
    assert same(pair)


def test_refusals(monkeypatch):
    model = QWEN3.build()
    model.interpolation_mode = "bicubic"
    assert refusal(model) == "its interpolation is bicubic"
    model = QWEN3.build()
    model.pos_embed.max_norm = 1.0
    assert "max_norm" in str(refusal(model))
    model.pos_embed = nn.Linear(2, 2)
    assert "Linear" in str(refusal(model))
    del model.num_grid_per_side
    assert "num_grid_per_side" in str(refusal(model))

    class Derived(type(QWEN3.build())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert "forward of its own" in str(refusal(Derived(QWEN3.build().config)))
    home = sys.modules[type(QWEN3.build()).__module__]
    monkeypatch.delattr(home, "get_vision_interpolation_indices_and_weights")
    assert "not known here" in str(refusal(QWEN3.build()))


class Qwen3VLVisionModel(nn.Module):
    """The part of transformers 4.57's class of that name that resamples: a method of its own, in the table's dtype."""

    def __init__(self, side: int = 6, merge: int = 2, width: int = 8):
        super().__init__()
        self.pos_embed = nn.Embedding(side * side, width)
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(4, width)})
        self.num_grid_per_side = side
        self.config = SimpleNamespace(spatial_merge_size=merge)

    def fast_pos_embed_interpolate(self, grid_thw: Tensor) -> Tensor:
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid_thw, self.num_grid_per_side, align_corners=True, spatial_merge_size=self.config.spatial_merge_size
        )
        return (self.pos_embed(indices) * weights[:, :, None].to(self.pos_embed.weight.dtype)).sum(1)

    def forward(self, hidden_states: Tensor, grid_thw: Tensor) -> Tensor:
        return self.patch_embed["proj"](hidden_states) + self.fast_pos_embed_interpolate(grid_thw)


def test_the_method_of_transformers_4(calls):
    model = Qwen3VLVisionModel().requires_grad_(False)
    grid = torch.tensor([[2, 4, 6], [1, 8, 10]])
    x = torch.randn(128, 4)
    want = model(x, grid)
    torch.testing.assert_close(optimized(model)(x, grid), want, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1 and set(vars(model)) & {"forward", "fast_pos_embed_interpolate"} == {
        "fast_pos_embed_interpolate"
    }
    model = copy.deepcopy(model).to(torch.bfloat16)
    assert model.fast_pos_embed_interpolate(grid).dtype == torch.bfloat16
    vae_accel.restore(model)
    assert "fast_pos_embed_interpolate" not in vars(model)
