"""A packed tower's forward captured for a budget of tokens instead of one grid: filled with images and padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.families import segments, towers
from vae_accel.families.towers import Grids
from vae_accel.graphs.buckets import Room, Size
from vae_accel.graphs.capture import CannotCapture, Pool
from vae_accel.graphs.captured import Captured, copies


class Bucket:
    """`forward` with room for `room.tokens` output tokens. Its metadata are static inputs beside the patches."""

    def __init__(
        self,
        pool: Pool,
        tower: nn.Module,
        forward: Callable[..., Any],
        room: Room,
        patches: tuple[str, Tensor],
        options: Mapping[str, Any],
    ):
        self.room = room
        self._tower, self._pool = tower, pool
        self._name, like = patches
        empty = self._padded(())
        inputs = {self._name: pool.static(like.new_empty((room.rows, like.shape[1])))}
        for name, host in self._tensors(empty).items():
            inputs[name] = pool.static(torch.empty_like(host, device=like.device))
        for name, longest in (("cu_seqlens", room.rows), ("cu_window_seqlens", room.window * room.unit)):
            if name in inputs:
                segments.mark(inputs[name], None, longest)
        sizes = {name: value for name, value in empty.items() if not isinstance(value, Tensor)}
        grid = torch.tensor(_one_grid(room))
        self._fill(inputs, [], empty)
        self.captured = Captured(pool, forward, inputs, {**options, **sizes, "grid_thw": grid})
        if any(len(out) not in (room.rows, room.tokens) for out in self.captured.replay()):
            raise CannotCapture("its outputs do not have one row a patch or a token")

    def run(self, grids: Grids, patches: Sequence[Tensor]) -> list[Tensor]:
        """Copies of the tower's outputs for images [t * h * w, ...] of `grids`, each cut to the rows of the images."""
        self.captured.turn()
        self._fill(self.captured.inputs, patches, self._padded(grids))
        rows = sum(map(math.prod, grids))
        return copies([out[: self.rows_of(out, rows)] for out in self.captured.replay()])

    def rows_of(self, output: Tensor, patches: int) -> int:
        """How many rows of an output belong to so many patches: it has one a patch, or one a token."""
        return patches if output.shape[0] == self.room.rows else patches // self.room.unit

    def _fill(self, inputs: Mapping[str, Tensor], patches: Sequence[Tensor], host: Mapping[str, Any]) -> None:
        start, static = 0, inputs[self._name]
        for image in patches:
            static[start : start + len(image)].copy_(image)
            start += len(image)
        static[start:].zero_()  # what a larger call left there may not be finite
        for name, tensor in self._tensors(host).items():
            self._pool.send(tensor, inputs[name])

    def _padded(self, grids: Grids) -> dict[str, Any]:
        """The tower's metadata of `grids` on the host, padded to the room."""
        room = self.room
        known = towers.metadata(self._tower, grids or (_one_grid(room)[0],), torch.device("cpu"))
        used = sum(map(math.prod, grids))
        return {name: _pad(name, value, room, used) for name, value in known.items()}

    @staticmethod
    def _tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def size_of(tower: Any, grid: tuple[int, int, int]) -> Size:
    """What one image of (t, h, w) patches asks of a bucket."""
    (room,) = rooms(tower, (1,))
    t, h, w = grid
    side = math.isqrt(room.unit)
    span = math.isqrt(room.window) * side
    return Size(t * h * w // room.unit, t, t * -(-h // span) * -(-w // span) if span else 0)


def rooms(tower: Any, budgets: Sequence[int]) -> tuple[Room, ...]:
    """Rooms of `budgets` tokens for a tower."""
    merge = tower.spatial_merge_size
    window = (tower.window_size // merge // tower.patch_size) ** 2 if hasattr(tower, "window_size") else 0
    return tuple(Room(tokens, merge**2, window) for tokens in budgets)


def _one_grid(room: Room) -> tuple[tuple[int, int, int]]:
    """A grid of as many patches as there are rows."""
    side = math.isqrt(room.unit)
    return ((1, side, room.tokens * side),)


def _pad(name: str, value: Any, room: Room, used: int) -> Any:
    if name == "max_seqlen":
        return room.rows
    if name == "max_window_seqlen":
        return room.window * room.unit
    if name in ("cu_seqlens", "cu_window_seqlens"):
        lengths = [b - a for a, b in pairwise(value.tolist())] if used else []
        ends = room.frame_ends(lengths) if name == "cu_seqlens" else room.window_ends(lengths)
        return torch.tensor(ends, dtype=value.dtype)
    if name == "window_index":
        tokens = used // room.unit
        return torch.cat([value[:tokens] if used else value[:0], torch.arange(tokens, room.tokens, dtype=value.dtype)])
    padded = value.new_zeros((room.rows, *value.shape[1:]))  # one row a patch
    padded[:used] = value[:used]
    return padded
