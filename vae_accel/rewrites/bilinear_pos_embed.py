"""Position embeddings resampled in one launch instead of about 60, for Qwen3-VL and its relatives in transformers.

Stock computes four indices and weights a patch, gathers four rows of the table and sums them. The weights of a row may
be read inside the embedding's own call alone (under sequential offload they are elsewhere before and after), and
stock's forward is not copied: the tower is handed a `Grid` in the place of its `interp_indices`, the embedding it calls
with them answers a `Grid` with the finished positions, [patches, 1, D], and stock's product with `interp_weights` and
sum over taps run over a single tap of weight one, which changes no bit of them.

Stock runs where the caller passes indices of its own, where a gradient is wanted, under autocast, and under
`torch.compile`, which fuses the gather itself and cannot read a grid without breaking its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, obstacle, unusable_weight
from vae_accel.families import position_embeddings, towers
from vae_accel.families.position_embeddings import PositionTable, Resampling
from vae_accel.kernels.bilinear_pos_embed import bilinear_pos_embed
from vae_accel.rewrite import Rewrite, Site, Tier, runs_stock


class Grid(NamedTuple):
    """What the tower asks its embedding for: (t, h, w) of every image, and the dtype in which positions are added."""

    images: tuple[tuple[int, int, int], ...]
    how: Resampling
    dtype: torch.dtype


@dataclass(frozen=True)
class BilinearPosEmbed(Rewrite):
    name = "bilinear_pos_embed"
    tier = Tier.ROUNDING
    over = ("vision_metadata",)

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        for path, module in root.named_modules():
            row = position_embeddings.table_of(module)
            reason = position_embeddings.refusal(module)
            if row is None or reason is not None:
                if reason is not None:
                    yield Site(path, reason)
                continue
            method = position_embeddings.method_of(module)
            table = getattr(module, row.table)
            inner = f"{path}.{row.table}" if path else row.table
            reason = _unlike_a_table(table) or obstacle(root, ledger, path, str(method), self.over)
            reason = reason or obstacle(root, ledger, inner, "forward")
            yield Site(path, reason, {"row": row, "method": method, "table": inner})

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        method = site.facts["method"]
        pen.method(site.facts["table"], "forward", table_forward)
        pen.method(site.path, method, forward if method == "forward" else interpolate, site.facts["row"])


def forward(tower: nn.Module, below: Callable[..., Any], row: PositionTable, *args: Any, **kwargs: Any) -> Any:
    """A tower's `forward(hidden_states, grid_thw, **kwargs)`: stock's, with the positions resampled by the kernel."""
    patches, thw = towers.call_of(args, kwargs)
    if "interp_indices" in kwargs or "interp_weights" in kwargs:
        return below(*args, **kwargs)
    projection: Any = tower.get_submodule(row.projection)
    grid = _grid(tower, row, patches, thw, projection.weight.dtype)
    if grid is None:
        return below(*args, **kwargs)
    one = torch.ones((1, 1), dtype=torch.bool, device=patches.device)
    return below(*args, **kwargs, interp_indices=grid, interp_weights=one)


def interpolate(tower: nn.Module, below: Callable[..., Tensor], row: PositionTable, grid_thw: Any) -> Tensor:
    """`fast_pos_embed_interpolate(grid_thw)` of transformers 4.57: [patches, D] in the table's dtype."""
    table = getattr(tower, row.table)
    grid = _grid(tower, row, grid_thw, grid_thw, table.weight.dtype)
    return below(grid_thw) if grid is None else table(grid).squeeze(1)


def table_forward(table: nn.Embedding, below: Callable[..., Tensor], input: Tensor | Grid) -> Tensor:
    """`nn.Embedding.forward`; a Grid in the place of indices is answered with its positions, [patches, 1, D].

    In the wider of the dtypes of the table and of the hidden states, so that they are rounded once, as stock's are.
    """
    if not isinstance(input, Grid):
        return below(input)
    images, how, dtype = input
    positions = bilinear_pos_embed(
        table.weight,
        images,
        how.side,
        how.merge,
        align_corners=how.align_corners,
        padding=how.padding,
        dtype=torch.promote_types(table.weight.dtype, dtype),
    )
    return positions.unsqueeze(1)


def _grid(tower: nn.Module, row: PositionTable, patches: Any, thw: Any, dtype: torch.dtype) -> Grid | None:
    """What to ask the table for; None where stock must run. `patches` says where: the weight may be elsewhere yet."""
    table = getattr(tower, row.table)
    if not isinstance(patches, Tensor) or torch.compiler.is_compiling() or runs_stock(patches, table.weight):
        return None
    rows = towers.rows_of(thw)
    if not rows or len(rows[0]) != 3:
        return None
    how = position_embeddings.read(row, tower)
    images = tuple((t, w, h) if row.swapped else (t, h, w) for t, h, w in rows)
    if _unlike_a_table(table) or how.side**2 != table.num_embeddings:
        return None
    if any(size < 1 or size % how.merge for _, *sizes in images for size in sizes):
        return None
    return Grid(images, how, dtype)


def _unlike_a_table(table: nn.Module) -> str | None:
    if type(table) is not nn.Embedding:
        return f"its table is a {type(table).__name__}"
    if table.max_norm is not None:
        return "its table renormalises rows (max_norm)"
    return unusable_weight(table)
