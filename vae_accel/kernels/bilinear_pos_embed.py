"""A learned square table of position embeddings resampled bilinearly to every image of a batch, in one launch.

Interpolation, spatial-merge order and temporal repeat at once, for Qwen3-VL and its relatives. transformers runs
about 60 small kernels and gathers four rows a patch into memory (453 MB of temporaries at 16384 patches).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._dispatch import (
    DTYPES,
    LazyKernel,
    Signature,
    differentiates,
    next_power_of_2,
    signature,
    triton_available,
)

tl: Any = None  # triton.language, bound at the first launch

PADDINGS = ("border", "zeros")
ROWS, COLS = 16, 256  # patches and channels of a program
WARPS = 4


def _taps(size: int, side: int, align_corners: bool, padding: str) -> tuple[Tensor, Tensor]:
    """`[size, 2]` source indices of an axis and their fp64 weights.

    The source coordinate is a fraction of integers, so its floor is exact: transformers' fp32 closed form and
    `linspace` floor differently for a few of the sizes below 512.
    """
    target = torch.arange(size)
    if align_corners:
        numerator, denominator = target * (side - 1), max(size - 1, 1)
    else:
        numerator, denominator = (2 * target + 1) * side - size, 2 * size
    floor = numerator.div(denominator, rounding_mode="floor")
    fraction = (numerator - floor * denominator).double() / denominator
    taps, weights = torch.stack([floor, floor + 1], 1), torch.stack([1 - fraction, fraction], 1)
    if padding == "zeros":
        weights = weights * ((taps >= 0) & (taps < side))
    return taps.clamp(0, side - 1), weights


def reference(
    table: Tensor,
    grid_thw: Sequence[Sequence[int]] | Tensor,
    side: int,
    merge: int,
    *,
    align_corners: bool = True,
    padding: str = "border",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The law: four taps a patch, weighted and summed in fp32 (fp64 for fp64), rounded once."""
    wide = torch.promote_types(table.dtype, torch.float32)
    table_2d = table.reshape(side, side, -1)
    images = []
    for t, h, w in _as_grid(grid_thw):
        rows, row_weights = (a.to(table.device) for a in _taps(h, side, align_corners, padding))
        columns, column_weights = (a.to(table.device) for a in _taps(w, side, align_corners, padding))
        taps = table_2d[rows[:, None, :, None], columns[None, :, None, :]].to(wide)
        weights = row_weights[:, None, :, None] * column_weights[None, :, None, :]
        image = torch.einsum("hwijd,hwij->hwd", taps, weights.to(wide))
        blocks = image.reshape(h // merge, merge, w // merge, merge, -1).transpose(1, 2).reshape(h * w, -1)
        images.append(blocks.repeat(t, 1))
    return torch.cat(images).to(dtype or table.dtype) if images else table.new_empty((0, table.shape[1]), dtype=dtype)


@LazyKernel
def _bilinear(
    table, out, plan, images, D, side, merge,
    ALIGN: tl.constexpr, ZEROS: tl.constexpr, IMAGES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """`ROWS` patches of one frame by `COLS` channels, written to each of the image's frames.

    `plan` is int32 `[5, images]`: the first program of each image, its first output row, t, h and w.
    """
    program = tl.program_id(0)
    item = tl.arange(0, IMAGES)
    first = tl.load(plan + item, mask=item < images, other=2147483647)
    image = tl.sum((first <= program).to(tl.int32), axis=0) - 1
    patch = (program - tl.load(plan + image)) * ROWS + tl.arange(0, ROWS)[:, None]
    start = tl.load(plan + images + image).to(tl.int64)
    t = tl.load(plan + 2 * images + image)
    h = tl.load(plan + 3 * images + image)
    w = tl.load(plan + 4 * images + image)

    block, inner = patch // (merge * merge), patch % (merge * merge)
    row = block // (w // merge) * merge + inner // merge
    column = block % (w // merge) * merge + inner % merge
    # Coordinates are fractions of integers, so that the floor is exact. Shifted by one denominator to stay >= 0.
    if ALIGN:
        row_denominator, column_denominator = tl.maximum(h - 1, 1), tl.maximum(w - 1, 1)
        row_numerator = row * (side - 1) + row_denominator
        column_numerator = column * (side - 1) + column_denominator
    else:
        row_denominator, column_denominator = 2 * h, 2 * w
        row_numerator = (2 * row + 1) * side - h + row_denominator
        column_numerator = (2 * column + 1) * side - w + column_denominator
    top, left = row_numerator // row_denominator - 1, column_numerator // column_denominator - 1
    down = (row_numerator % row_denominator).to(tl.float32) / row_denominator
    right = (column_numerator % column_denominator).to(tl.float32) / column_denominator
    up_weight, down_weight, left_weight, right_weight = 1 - down, down, 1 - right, right
    if ZEROS:
        up_weight = tl.where(top >= 0, up_weight, 0.0)
        down_weight = tl.where(top + 1 < side, down_weight, 0.0)
        left_weight = tl.where(left >= 0, left_weight, 0.0)
        right_weight = tl.where(left + 1 < side, right_weight, 0.0)
    upper = tl.minimum(tl.maximum(top, 0), side - 1) * side
    lower = tl.minimum(tl.maximum(top + 1, 0), side - 1) * side
    first_column = tl.minimum(tl.maximum(left, 0), side - 1)
    second_column = tl.minimum(tl.maximum(left + 1, 0), side - 1)

    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    inside = (patch < h * w) & (col < D)
    value = tl.load(table + (upper + first_column) * D + col, mask=inside, other=0) * (up_weight * left_weight)
    value += tl.load(table + (upper + second_column) * D + col, mask=inside, other=0) * (up_weight * right_weight)
    value += tl.load(table + (lower + first_column) * D + col, mask=inside, other=0) * (down_weight * left_weight)
    value += tl.load(table + (lower + second_column) * D + col, mask=inside, other=0) * (down_weight * right_weight)
    rounded = value.to(out.dtype.element_ty)
    target = out + (start + patch) * D + col
    for _ in range(0, t):
        tl.store(target, rounded, mask=inside)
        target += h.to(tl.int64) * w * D


def _as_grid(grid_thw: Sequence[Sequence[int]] | Tensor) -> tuple[tuple[int, int, int], ...]:
    rows = grid_thw.tolist() if isinstance(grid_thw, Tensor) else grid_thw
    return tuple((int(t), int(h), int(w)) for t, h, w in rows)


@functools.lru_cache(maxsize=128)
def _plan(grid: tuple[tuple[int, int, int], ...], device: torch.device) -> tuple[Tensor, int]:
    """The kernel's table of images on `device`, and the number of programs. Cached: no copy for a grid seen before."""
    first, start, columns = 0, 0, []
    for t, h, w in grid:
        columns.append((first, start, t, h, w))
        first, start = first - (-h * w // ROWS), start + t * h * w
    with torch.inference_mode(False):
        return torch.tensor(columns, dtype=torch.int32).T.contiguous().to(device), first


def _launch(
    table: Tensor, grid: tuple[tuple[int, int, int], ...], side: int, merge: int, align: bool, zeros: bool, out: Tensor
) -> Tensor:
    plan, programs = _plan(grid, table.device)
    D = table.shape[1]
    with torch.cuda.device_of(table):
        _bilinear[programs, -(-D // COLS)](
            table, out, plan, len(grid), D, side, merge, ALIGN=align, ZEROS=zeros,
            IMAGES=next_power_of_2(len(grid)), ROWS=ROWS, COLS=COLS, num_warps=WARPS,
        )  # fmt: skip
    return out


def _empty(table: Tensor, flat_grid: Sequence[int], dtype: torch.dtype) -> Tensor:
    patches = sum(t * h * w for t, h, w in _unflatten(flat_grid))
    return torch.empty((patches, table.shape[1]), dtype=dtype, device=table.device)


def _unflatten(flat_grid: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    return tuple(zip(flat_grid[::3], flat_grid[1::3], flat_grid[2::3], strict=True))


def _run(
    table: Tensor, flat_grid: Sequence[int], side: int, merge: int, align: bool, padding: str, dtype: torch.dtype
) -> Tensor:
    grid = _unflatten(flat_grid)
    if not (triton_available(table) and dtype in DTYPES):
        return reference(table, grid, side, merge, align_corners=align, padding=padding, dtype=dtype)
    out = _empty(table, flat_grid, dtype)
    return _launch(table.contiguous(), grid, side, merge, align, padding == "zeros", out) if out.numel() else out


_op = torch.library.custom_op("vae_accel::bilinear_pos_embed", _run, mutates_args=())
_op.register_fake(lambda table, flat_grid, side, merge, align, padding, dtype: _empty(table, flat_grid, dtype))


def bilinear_pos_embed(
    table: Tensor,
    grid_thw: Sequence[Sequence[int]] | Tensor,
    side: int,
    merge: int,
    *,
    align_corners: bool = True,
    padding: str = "border",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`table` `[side * side, D]` resampled to every `(t, h, w)` of `grid_thw`: `[sum(t * h * w), D]` in `dtype`.

    Rows are in spatial-merge order (blocks of `merge` x `merge` patches) and each image's frames repeat. The same
    function as transformers' `get_vision_interpolation_indices_and_weights` with its weighted sum: `align_corners` as
    in `F.interpolate`, `padding` "border" clamps the taps outside the table and "zeros" drops them. Accumulated in
    fp32 and rounded once to `dtype` (default: the table's). A `grid_thw` on an accelerator costs a synchronisation to
    read: pass a list to avoid it. Where autograd records, the reference runs.

    Raises:
        ValueError: an unknown padding, a table that is not `side` x `side`, or a grid `merge` does not divide.
    """
    grid = _as_grid(grid_thw)
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {PADDINGS}, got {padding!r}")
    if table.dim() != 2 or table.shape[0] != side * side:
        raise ValueError(f"table must be [{side} * {side}, D], got {tuple(table.shape)}")
    if any(h % merge or w % merge for _, h, w in grid):
        raise ValueError(f"h and w of every image must be multiples of merge={merge}, got {grid}")
    dtype = dtype or table.dtype
    if differentiates(table):
        return reference(table, grid, side, merge, align_corners=align_corners, padding=padding, dtype=dtype)
    run = _op if torch.compiler.is_compiling() else _run
    return run(table, [n for image in grid for n in image], side, merge, align_corners, padding, dtype)


def signatures() -> list[Signature]:
    """The kernel as it is compiled ahead of time in the tests."""
    pointers = {"table": "bf16", "out": "bf16", "plan": "i32"}
    shape = {"IMAGES": 4, "ROWS": ROWS, "COLS": COLS}
    return [
        signature(_bilinear, pointers, {**shape, "ALIGN": True, "ZEROS": False}),
        signature(_bilinear, pointers, {**shape, "ALIGN": False, "ZEROS": True}),
    ]
