"""Captures before the first call: what `vae_accel.warmup` asks of one tower."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vae_accel.graphs import packed
from vae_accel.graphs.capture import CannotCapture
from vae_accel.graphs.steering import GRID
from vae_accel.graphs.store import Graphs

Grid = tuple[int, int, int]


def warm(
    tower: Any,
    below: Callable[..., Any],
    graphs: Graphs,
    grids: Sequence[Sequence[Grid]],
    budgets: Sequence[int],
    images: Sequence[tuple[int, ...]],
    options: Mapping[str, Any],
) -> None:
    """Captures exact graphs for `grids` (packed towers) or `images` (others), and buckets for `budgets`; by default the
    budgets of the settings, or one image of the tower's own size. Largest first: what is smaller fits its memory.

    Raises:
        CannotCapture: one of them cannot be captured; those before it are kept.
    """
    with torch.no_grad():
        if not packed.is_packed(tower):
            for shape in sorted(images or [_own_image(tower)], key=math.prod, reverse=True):
                graphs.warm(tower, below, {"pixel_values": _zeros(tower, shape), **options})
            return
        if not grids and not budgets:
            budgets = graphs.limits.budgets
            if not budgets:
                raise CannotCapture("no grids are given, and buckets are of tier rounding where the tier is exact")
        merge = tower.spatial_merge_size
        for tokens in sorted(set(budgets), reverse=True):
            graphs.warm_bucket(tower, below, tokens, {**_patches(tower, [(1, merge, merge)]), **options})
        for call in sorted(grids, key=_rows, reverse=True):
            graphs.warm(tower, below, {**_patches(tower, call), **options})


def calls(grids: Iterable[Any]) -> Iterator[tuple[Grid, ...]]:
    """Each entry is one call: (t, h, w) of its only image, or several of them."""
    for each in grids:
        yield (tuple(each),) if isinstance(each[0], int) else tuple(map(tuple, each))


def _rows(grids: Sequence[Grid]) -> int:
    return sum(map(math.prod, grids))


def _patches(tower: Any, grids: Sequence[Grid]) -> dict[str, Any]:
    weight = tower.patch_embed.proj.weight
    rows = torch.zeros((_rows(grids), weight[0].numel()), dtype=weight.dtype, device=weight.device)
    return {"hidden_states": rows, GRID: torch.tensor(grids, device=weight.device)}


def _own_image(tower: Any) -> tuple[int, ...]:
    return 1, tower.config.image_size, tower.config.image_size


def _zeros(tower: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """Pixels of (batch, height, width)."""
    batch, height, width = shape
    parameter = next(tower.parameters())
    channels: int = tower.config.num_channels  # type: ignore[union-attr,assignment]
    return torch.zeros((batch, channels, height, width), dtype=parameter.dtype, device=parameter.device)
