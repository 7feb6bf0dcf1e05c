"""What a row of a family says about a block whose forward is ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hand:
    """A method that is exchanged: `function(module, below, *facts, *call_args)` for the module at `path` (from the
    block)."""

    path: str
    slot: str
    function: Callable[..., Any]
    facts: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Block:
    """hands: the block's own forward and those of the convolutions in it. norms: paths of the norms (with their SiLU)
    that must be taken by `fused_norm_act`, because the block asks them for another dtype."""

    hands: tuple[Hand, ...]
    norms: tuple[str, ...] = ()
