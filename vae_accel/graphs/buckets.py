"""Which images share a replay: budgets in output tokens, and the arithmetic of padding one. Plain functions of numbers.

Padding is *isolated*: rows that no image fills are segments of their own, so that every row of the graph is written in
every layer, and no image attends to one. (vLLM's padded rows belong to no segment: attention leaves them unwritten, and
NaN from the shared pool came through, vllm-project/vllm#57136. Isolation is TensorRT-LLM's, #14829.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FRAMES = 8  # segments of full attention a bucket has room for; every one more is a row of idle blocks in each launch
PADS = 8  # segments the padding is cut into, as attention is quadratic in the longest


@dataclass(frozen=True)
class Size:
    """What images ask of a bucket: tokens after the patch merger, frames (segments of full attention), windows."""

    tokens: int
    frames: int
    windows: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.tokens + other.tokens, self.frames + other.frames, self.windows + other.windows)


@dataclass(frozen=True)
class Room:
    """What a bucket has: `tokens` is its budget, of `unit` patches each; `window` the tokens of a whole window."""

    tokens: int
    unit: int
    window: int = 0
    frames: int = FRAMES

    @property
    def rows(self) -> int:
        return self.tokens * self.unit

    @property
    def windows(self) -> int:
        """Half as many tokens a window as a whole one has: thin images leave windows that are not full."""
        return -(-2 * self.tokens // self.window) if self.window else 0

    def holds(self, size: Size) -> bool:
        fits = size.tokens <= self.tokens and size.frames <= self.frames
        return fits and (not self.window or size.windows <= self.windows)

    def frame_ends(self, lengths: Sequence[int]) -> list[int]:
        """cu_seqlens of full attention, in patches, for frames of `lengths` patches."""
        return ends(lengths, self.rows, self.frames, -(-self.rows // PADS))

    def window_ends(self, lengths: Sequence[int]) -> list[int]:
        """cu_seqlens of windowed attention, in patches."""
        return ends(lengths, self.rows, self.windows, self.window * self.unit)


@dataclass(frozen=True)
class Batch:
    """Images that run together, by index in ascending order; `room` None: none holds them."""

    room: Room | None
    images: tuple[int, ...]


def smallest(size: Size, rooms: Sequence[Room]) -> Room | None:
    """The smallest room that holds `size`, or None."""
    return min((room for room in rooms if room.holds(size)), key=lambda room: room.tokens, default=None)


def pack(sizes: Sequence[Size], rooms: Sequence[Room]) -> list[Batch]:
    """Images into rooms, small ones first, each to the batch before it while that is cheaper than a room of its own.

    So two images of 70 tokens are not put into a bucket of 256 where two of 100 would do. An image that no room holds
    runs without one, together with others like it.
    """
    batches: list[Batch] = []
    outside = [i for i, size in enumerate(sizes) if smallest(size, rooms) is None]
    open_room: Room | None = None
    open_size, members = Size(0, 0), list[int]()
    for i in sorted(set(range(len(sizes))) - set(outside), key=lambda i: sizes[i].tokens):
        alone, together = smallest(sizes[i], rooms), smallest(open_size + sizes[i], rooms)
        assert alone is not None
        apart = alone.tokens + (open_room.tokens if open_room else 0)
        if together is None or together.tokens > apart:
            batches.append(Batch(open_room, tuple(sorted(members))))
            open_room, open_size, members = alone, sizes[i], [i]
        else:
            open_room, open_size = together, open_size + sizes[i]
            members.append(i)
    if members:
        batches.append(Batch(open_room, tuple(sorted(members))))
    return [*batches, *([Batch(None, tuple(outside))] if outside else [])]


def ends(lengths: Sequence[int], rows: int, most: int, pad: int) -> list[int]:
    """Cumulative ends [slots + 1] of up to `most` segments, then of the rows left over in segments of `pad` at most,
    then of empty ones. Never descending: a kernel takes differences for lengths.

    Raises:
        ValueError: more than `most` segments, or longer together than `rows`.
    """
    if len(lengths) > most or sum(lengths) > rows:
        raise ValueError(f"{len(lengths)} segments of {sum(lengths)} rows in a bucket of {most} and {rows}")
    found = [0]
    for length in lengths:
        found.append(found[-1] + length)
    while found[-1] < rows:
        found.append(min(found[-1] + pad, rows))
    return found + [rows] * (1 + most + -(-rows // pad) - len(found))
