"""Attention of transformers' packed vision towers: the classes whose one forward `packed_attention` takes over.

All of them project to `[L, 3, heads, D]`, turn queries and keys by `position_embeddings`, attend within the segments of
`cu_seqlens` and project back; compared by source in transformers 5.23. Not here: those that normalise queries and keys
on the way (Dots3, GLM-5, GLM-OCR), have fewer keys than queries (EXAONE 4.5), three projections (Qwen2.5-Omni) or no
rotary (GLM-Image).
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn

from vae_accel.families.match import estranged, known_as

NAMES = (
    "VisionAttention",  # of Qwen2-VL
    "Qwen2_5_VLVisionAttention",
    "Qwen3VLVisionAttention",
    "Qwen3VLMoeVisionAttention",
    "Qwen3_5VisionAttention",
    "Qwen3_5MoeVisionAttention",
    "Qwen3OmniMoeVisionAttention",
    "Qwen4ExpVisionAttention",
    "CohereCompassVisionAttention",
    "Ernie4_5_VLMoeVisionAttention",
    "Glm4vVisionAttention",
    "Glm4vMoeVisionAttention",
)
_READ = ("qkv", "proj", "num_heads", "scaling", "config", "attention_dropout")


def is_packed(module: nn.Module) -> bool:
    """Whether a module runs the forward of one of NAMES, or says by its name that it does."""
    return known_as(module, NAMES) is not None


def refusal(module: nn.Module) -> str | None:
    """Why a module with a known name, or derived from one, cannot be taken; None where it can or is something else."""
    if not is_packed(module):
        return estranged(module, NAMES)
    cls = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    takes = inspect.signature(vars(cls)["forward"]).parameters
    missing = [name for name in _READ if not hasattr(module, name)]
    missing += [name for name in ("cu_seqlens", "position_embeddings") if name not in takes]
    missing += [name for name in ("apply_rotary_pos_emb_vision",) if not hasattr(sys.modules[cls.__module__], name)]
    if missing:
        return f"this {cls.__name__} is not transformers' class of that name: it has no {missing[0]}"
    return None


def implementation(attention: Any) -> str:
    """What the user lets this module attend with, by transformers' name for it; '' where none is chosen."""
    return getattr(attention.config, "_attn_implementation", None) or ""
