"""Which packed towers graphs know: those whose metadata buckets can pad, and exact graphs can hold."""

from __future__ import annotations

import sys

from torch import nn

from vae_accel.families import towers
from vae_accel.families.match import known_as

ROWS = ("Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen3VLVisionModel")


def is_packed(module: nn.Module) -> bool:
    return known_as(module, ROWS) is not None


def refusal(module: nn.Module) -> str | None:
    """Why a packed tower cannot be captured, or None: the grid is read back in a forward that takes no metadata."""
    if towers.row_of(module) is None:
        return f"transformers {sys.modules['transformers'].__version__} reads the grid back in the tower"
    return towers.refusal(module)
