"""What a packed sequence is cut into, as Python knows it: noted on `cu_seqlens`, so that nobody reads that back.

transformers asks the device for the lengths three times in every layer. Who makes `cu_seqlens` on the host marks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

_MARK = "_vae_accel_segments"


@dataclass(frozen=True)
class Segments:
    """`longest` is an upper bound; `lengths` is None where a captured graph is replayed with others."""

    longest: int
    lengths: tuple[int, ...] | None


def mark(cu_seqlens: Tensor, lengths: tuple[int, ...] | None, longest: int | None = None) -> Tensor:
    """Notes on `cu_seqlens`, [segments + 1] of any integer type, what it says. Returns it."""
    if longest is None:
        longest = max(lengths or (0,))
    setattr(cu_seqlens, _MARK, Segments(longest, lengths))
    return cu_seqlens


def of(cu_seqlens: Tensor) -> Segments:
    """What was noted; unmarked, it is read from the device once and noted."""
    if not hasattr(cu_seqlens, _MARK):
        ends = cu_seqlens.tolist()
        mark(cu_seqlens, tuple(b - a for a, b in pairwise(ends)))
    return getattr(cu_seqlens, _MARK)
