"""What a packed sequence is cut into, as Python knows it: noted on `cu_seqlens`, so that nobody reads that back.

transformers asks the device for the lengths three times in every layer. Who makes `cu_seqlens` on the host marks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise

from torch import Tensor

_MARK, _READ = "_vae_accel_segments", "_vae_accel_segments_read"


@dataclass(frozen=True)
class Segments:
    """`longest` is an upper bound; `lengths` is None where a captured graph is replayed with others."""

    longest: int
    lengths: tuple[int, ...] | None

    def runs(self) -> list[tuple[int, int]]:
        """(how many, how long) of neighbours of one length, in order; empty segments are none of them.

        Raises:
            ValueError: the lengths are not known.
        """
        if self.lengths is None:
            raise ValueError("the lengths of these segments are not known on the host")
        return [(len(list(same)), length) for length, same in groupby(filter(None, self.lengths))]


def mark(cu_seqlens: Tensor, lengths: tuple[int, ...] | None, longest: int | None = None) -> Tensor:
    """Notes on `cu_seqlens`, [segments + 1] of any integer type, what it says. Returns it."""
    if longest is None:
        longest = max(lengths or (0,))
    setattr(cu_seqlens, _MARK, Segments(longest, lengths))
    return cu_seqlens


def of(cu_seqlens: Tensor) -> Segments:
    """What was noted; unmarked, it is read from the device once, and again after it was written to. In inference mode
    torch does not say whether it was, and it is read each time."""
    if hasattr(cu_seqlens, _MARK):
        return getattr(cu_seqlens, _MARK)
    stamp = None if cu_seqlens.is_inference() else (id(cu_seqlens), cu_seqlens._version)
    known, found = getattr(cu_seqlens, _READ, (None, None))
    if stamp is None or known != stamp or found is None:
        lengths = tuple(b - a for a, b in pairwise(cu_seqlens.tolist()))
        found = Segments(max(lengths or (0,)), lengths)
        setattr(cu_seqlens, _READ, (stamp, found))
    return found
