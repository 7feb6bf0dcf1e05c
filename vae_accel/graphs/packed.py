"""The seam to packed towers: which they are, and what follows from the grids of their images."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.families import segments
from vae_accel.families.match import known_as

Grids = tuple[tuple[int, int, int], ...]

ROWS = ("Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen3VLVisionModel")


def is_packed(module: nn.Module) -> bool:
    return known_as(module, ROWS) is not None


def refusal(module: nn.Module) -> str | None:
    if "transformers.vision_utils" not in sys.modules:
        return f"transformers {sys.modules['transformers'].__version__} reads the grid back in the tower"
    return None


def metadata(tower: Any, grids: Grids, device: torch.device) -> dict[str, Any]:
    """Everything the tower's forward takes precomputed, on `device`."""
    derive = sys.modules["transformers.vision_utils"]
    with torch.inference_mode(False), torch.device("cpu"):
        grid = torch.tensor(grids)
        merge = tower.spatial_merge_size
        found: dict[str, Tensor] = {
            "position_ids": derive.get_vision_position_ids(grid, merge),
            "cu_seqlens": derive.get_vision_cu_seqlens(grid),
        }
        if hasattr(tower, "window_size"):
            found["window_index"], found["cu_window_seqlens"] = derive.get_vision_window_index(
                grid, merge, tower.window_size, tower.patch_size
            )
        if hasattr(tower, "num_grid_per_side"):
            found["interp_indices"], found["interp_weights"] = derive.get_vision_interpolation_indices_and_weights(
                grid, tower.num_grid_per_side, align_corners=True, spatial_merge_size=merge
            )
    result: dict[str, Any] = {name: tensor.to(device) for name, tensor in found.items()}
    for name, longest in (("cu_seqlens", "max_seqlen"), ("cu_window_seqlens", "max_window_seqlen")):
        if name in found:
            known = segments.of(found[name])
            segments.mark(result[name], known.lengths, known.longest)
            result[longest] = known.longest
    return result
