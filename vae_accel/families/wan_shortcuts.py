"""The shortcuts of Wan 2.2's and Qwen-Image-2.1's up- and downsampling blocks, without the copies that stock makes.

Both regard a channel of the small clip and a block of `times x sides x sides` values of the large one as neighbours in
one list, frames outermost and columns innermost, and cut it evenly. Where a cut falls between frames, rows or columns,
repeating channels upwards is a broadcast, and averaging them downwards a mean over some axes of the block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vae_accel.kernels.bordered import is_bordered
from vae_accel.kernels.duplicate import add_duplicates
from vae_accel.rewrite import runs_stock


def duplicate(
    shortcut: Any, below: Callable[..., Tensor], x: Tensor, first_chunk: bool = False, residual: Tensor | None = None
) -> Tensor:
    """DupUp3D, [N, C, T, H, W] -> [N, C', 2T, 2H, 2W] or [N, C', T, 2H, 2W], plus `residual` of that shape.

    Stock writes the repeated and the shuffled clip, up to 8 times its input each, before it adds.
    """
    times, sides = shortcut.factor_t, shortcut.factor_s
    if residual is None or runs_stock(x, residual) or (first_chunk and x.shape[2] > 1):
        y = below(x, first_chunk=first_chunk)
        return y if residual is None else residual + y
    if is_bordered(residual):
        return add_duplicates(residual, x, times, sides, shortcut.repeats, times - 1 if first_chunk else 0)
    t, h, w = x.shape[2:]
    own = (shortcut.out_channels, *_own(times, sides, shortcut.repeats))
    x = x.unflatten(1, own).permute(0, 1, 5, 2, 6, 3, 7, 4)
    if first_chunk:  # stock drops its leading frames
        x, times = x[:, :, :, -1:], 1
    return (_blocks(residual, (t, h, w), times, sides) + x).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def average(shortcut: Any, below: Callable[..., Tensor], x: Tensor) -> Tensor:
    """AvgDown3D, the reverse: stock pads, even by nothing, and shuffles the large clip before it takes means."""
    times, sides = shortcut.factor_t, shortcut.factor_s
    if runs_stock(x) or x.shape[3] % sides or x.shape[4] % sides:
        return below(x)
    if x.shape[2] % times:
        x = F.pad(x, (0, 0, 0, 0, times - x.shape[2] % times, 0))
    t, h, w = x.shape[2] // times, x.shape[3] // sides, x.shape[4] // sides
    own = _own(times, sides, shortcut.group_size)
    shared = [axis for axis, size in zip((3, 5, 7), own, strict=True) if size == 1]
    x = _blocks(x, (t, h, w), times, sides)
    x = x.mean(shared, keepdim=True) if shared else x
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def uneven(shortcut: Any, together: int) -> str | None:
    """Why a shortcut that takes so many neighbours `together` is none of these, or None."""
    sides = shortcut.factor_s
    if together in (1, sides, sides**2, shortcut.factor_t * sides**2):
        return None
    return f"its shortcut takes {together} values together, across frames, rows and columns"


def _own(times: int, sides: int, together: int) -> list[int]:
    """How many parts of the list a block has along frames, rows and columns, of `together` neighbours each."""
    return [size if together <= inner else 1 for size, inner in ((times, sides**2), (sides, sides), (sides, 1))]


def _blocks(x: Tensor, small: tuple[int, int, int], times: int, sides: int) -> Tensor:
    """[N, C, T times, H sides, W sides] -> [N, C, T, times, H, sides, W, sides], a view."""
    t, h, w = small
    return x.unflatten(4, (w, sides)).unflatten(3, (h, sides)).unflatten(2, (t, times))
