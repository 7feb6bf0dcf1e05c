"""Which vision towers of transformers resample a learned table of positions bilinearly, and where each keeps it.

Two forms of the code: transformers 5 computes indices and weights in the holder's `forward`, which takes them as
`interp_indices` and `interp_weights` from a caller who has them; 4.57 has a method `fast_pos_embed_interpolate(grid)`.
How the table is read (side, align_corners, padding, merge) is on the instance and is read there, call by call.

Not here: bicubic tables (Kimi-K2.5, GLM-4.xV, CLIP, DINOv2), antialiased ones (SigLIP2), and Inkling2, whose caller
passes another grid than it interpolates.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from torch import nn

from vae_accel.families.match import estranged, known_as

Method = Literal["forward", "fast_pos_embed_interpolate"]
_HELPER = "get_vision_interpolation_indices_and_weights"


@dataclass(frozen=True)
class PositionTable:
    """Where a holder keeps its table.

    table: the attribute that holds the nn.Embedding of side * side positions.
    projection: the attribute whose weight's dtype the hidden states have when positions are added.
    merge: the attribute that holds the side of a spatial-merge block; '' for raster order.
    swapped: patch (h, w) reads the table at (w, h).
    """

    table: str
    projection: str
    merge: str = ""
    swapped: bool = False


@dataclass(frozen=True)
class Resampling:
    """How a holder reads its table now, as the arguments of `kernels.bilinear_pos_embed`."""

    side: int
    merge: int
    align_corners: bool
    padding: str


def table_of(module: nn.Module) -> PositionTable | None:
    """The row of a module that holds a table and resamples it in its own forward, or None."""
    name = known_as(module, ROWS)
    return None if name is None else ROWS[name]


def method_of(module: nn.Module) -> Method | None:
    """The method in which this version of transformers resamples the table; None for a form that is not known."""
    if hasattr(type(module), "fast_pos_embed_interpolate"):
        return "fast_pos_embed_interpolate"
    return "forward" if hasattr(sys.modules[type(module).__module__], _HELPER) else None


def read(row: PositionTable, module: Any) -> Resampling:
    """Raises AttributeError for a class of a known name that lacks what the row reads."""
    attrgetter(row.table, row.projection)(module)
    return Resampling(
        side=module.num_grid_per_side,
        merge=attrgetter(row.merge)(module) if row.merge else 1,
        align_corners=getattr(module, "interpolation_align_corners", True),
        padding=getattr(module, "interpolation_padding", "border"),
    )


def refusal(module: nn.Module) -> str | None:
    """Why a module with a known name, or derived from one, cannot be taken; None where it can or is something else."""
    row = table_of(module)
    if row is None:
        return estranged(module, ROWS)
    if method_of(module) is None:
        return "this version of transformers resamples in a form not known here"
    try:
        read(row, module)
    except AttributeError as missing:
        return f"this {type(module).__name__} is not transformers' class of that name: {missing}"
    if getattr(module, "interpolation_mode", "bilinear") != "bilinear":
        return f"its interpolation is {module.interpolation_mode}"
    return None


_TOWER = PositionTable("pos_embed", "patch_embed.proj", merge="config.spatial_merge_size")

ROWS: dict[str, PositionTable] = {
    "Qwen3VLVisionModel": _TOWER,
    "Qwen3VLMoeVisionModel": _TOWER,
    "Qwen3_5VisionModel": _TOWER,
    "Qwen3_5MoeVisionModel": _TOWER,
    "Qwen3OmniMoeVisionEncoder": _TOWER,
    "Qwen4ExpVisionModel": _TOWER,
    "CohereCompassVisionModel": _TOWER,
    "PaddleOCRVisionEmbeddings": PositionTable("position_embedding", "patch_embedding"),
    "MuseSparkVisionPatchEmbedder": PositionTable("position_embedding_table", "patch_embedding", swapped=True),
    "MuseGlimmerVisionPatchEmbedder": PositionTable("position_embedding_table", "patch_embedding"),
}
