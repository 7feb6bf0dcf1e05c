"""What of a call is constant in an exact graph, in the form that lets a forward be captured: nothing to read back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vae_accel.families import segments, towers
from vae_accel.graphs import packed
from vae_accel.graphs.call import Call

GRID = "grid_thw"
_READ_BACK = (GRID, "spatial_shapes")  # a forward asks for their numbers alone: on the host that waits for nobody
_SEGMENTS = ("cu_seqlens", "cu_window_seqlens")


@dataclass(frozen=True)
class Beneath:
    """What lies beneath the graphs of a tower.

    derives: keyword arguments that a rewrite there derives itself, from a grid on the host.
    loops: attention is stock's, a loop over segments whose lengths it reads in every layer.
    """

    derives: tuple[str, ...] = ()
    loops: bool = False


@dataclass(frozen=True)
class Constants:
    """Arguments of the forward. `asks`: it looks at a mask unless it sees that it is captured."""

    arguments: Mapping[str, Any]
    asks: bool


def constants(module: nn.Module, call: Call, beneath: Beneath) -> Constants:
    """The integer arguments of `call` and its options; of a packed tower also what follows from its grid."""
    found: dict[str, Any] = {}
    asks = False
    for name, value in call.steering.items():
        if name in _READ_BACK:
            found[name] = value
        elif name.endswith("attention_mask") and _skips_masks(module):
            # A mask of ones is no mask, as transformers finds out by reading it, and would build one under capture.
            ones = bool(value.all())
            found[name] = None if ones else value.to(call.device)
            asks = asks or not ones
        else:
            found[name] = value.to(call.device)
            if name in _SEGMENTS:  # the caller's own: a note, on a copy, so that nobody reads them back
                found[name] = segments.mark(found[name].clone(), segments.of(value).lengths)
    if GRID in found and packed.is_packed(module):
        derived = towers.metadata(module, tuple(map(tuple, found[GRID].tolist())), call.device)
        found = {**{name: v for name, v in derived.items() if name not in (*beneath.derives, *call.options)}, **found}
    if beneath.loops and not _takes_segments(module):
        found |= {name: value.cpu() for name, value in found.items() if name in _SEGMENTS and isinstance(value, Tensor)}
    return Constants({**found, **call.options}, asks)


def _skips_masks(module: nn.Module) -> bool:
    """Whether a forward is written with transformers 5's masks."""
    return hasattr(sys.modules[type(module).__module__], "create_bidirectional_mask")


def _takes_segments(module: Any) -> bool:
    """Whether its attention takes `cu_seqlens` as they are: transformers asks for this word in its name."""
    return "flash" in (getattr(getattr(module, "config", None), "_attn_implementation", None) or "")
