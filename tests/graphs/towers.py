"""Towers optimized with graphs alone, in tests of them: on a CPU, where a recorder stands for the card."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import vae_accel
from tests.recorder import Recorder
from tests.subjects import plan
from tests.towers import TABLE, Tower, packed
from vae_accel.edits import Outcome, ledger_of
from vae_accel.platforms import Step
from vae_accel.rewrites.cuda_graph import CudaGraph

ROWS = {tower.id: tower for tower in TABLE}
PACKED = tuple(ROWS[id] for id in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl"))
FIRST = "run as before: the first of its size"

Grids = tuple[tuple[int, int, int], ...]


def optimized(model: nn.Module, *before: Step, **settings: Any) -> nn.Module:
    steps = (*before, Step(CudaGraph(capture=Recorder()), "on", "test"))
    return vae_accel.optimize_encoder(model, platform=plan((), steps), strict=True, **settings)


def outcome(model: nn.Module) -> Outcome:
    ledger = ledger_of(model)
    assert ledger is not None
    return next(o for o in ledger.outcomes if o.name == "cuda_graph")


def counts(model: nn.Module) -> dict[str, int]:
    return outcome(model).counts


def images(*grids: tuple[int, int, int], seed: int = 0, **more: Any) -> dict[str, Any]:
    """What a processor hands a packed tower of `PACKED`, whose patches are 4 pixels wide."""
    return {**packed(4, grids=grids)("picture", seed), **more}


def flat(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    values = tree.values() if hasattr(tree, "values") else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for value in values for tensor in flat(value)]


def run(model: nn.Module, feed: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model(**feed)


def equal(a: Any, b: Any) -> bool:
    """Whether two outputs are of one class and hold the same bits."""
    left, right = flat(a), flat(b)
    return type(a) is type(b) and len(left) == len(right) > 0 and all(map(torch.equal, left, right))


__all__ = ["FIRST", "PACKED", "ROWS", "Tower", "counts", "equal", "flat", "images", "optimized", "run"]
