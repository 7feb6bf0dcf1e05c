"""The mean and deviation of groups of channels, split over positions and combined afterwards.

What GroupNorm needs of its first pass over the data (Chan, Golub and LeVeque, 1983), in either dense layout or of a
bordered clip. The parts, fp32 `[3, N, C / neighbours, chunks]`, are mean, squared deviations and number of the
positions of so many neighbouring channels. Who writes a clip can note them beside it, so that its norm need not read
it once more.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _dispatch, bordered
from ._dispatch import LazyKernel, Signature, flat_stride, lazy_kernel, next_power_of_2, signature
from .bordered import is_picture

tl: Any = None  # triton.language, bound at the first launch

# Best of 60 settings over eight decoder shapes on an H200.
TILE = 2048  # elements a program holds at a time
MAX_COLS = 128  # channels among them, at most
WARPS = 4
PROGRAMS = 132 * 8  # one wave of the card, no more: a few programs over it are another wave
STEPS = 8  # tiles a program gathers, at least: each writes a partial that is read again
COMBINED = 8192  # partials a program combines at a time: a convolution leaves as many of a group of 1024²

_NOTE = "_vae_accel_moments"


@LazyKernel
def _moments(
    x, partials, frames, C, S, rows, stride_n, stride_t, stride_c, stride_s, ROW, FRAME, H, W,
    BORDER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Mean, squared deviations and number of `rows` positions of each channel: Welford in a lane, Chan over lanes."""
    batch = tl.program_id(2)
    start = tl.program_id(0) * rows
    limit = tl.minimum(rows, S - start)
    row = tl.arange(0, ROWS)[:, None]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    pointer = x + (batch // frames).to(tl.int64) * stride_n + (batch % frames).to(tl.int64) * stride_t
    pointer += start.to(tl.int64) * stride_s + col.to(tl.int64) * stride_c + row.to(tl.int64) * stride_s

    lane_mean = tl.full([ROWS, COLS], 0, tl.float32)
    lane_m2 = tl.full([ROWS, COLS], 0, tl.float32)
    count = tl.full([ROWS, 1], 0, tl.float32)
    for first in range(0, limit, ROWS):
        counts = first + row < limit
        if BORDER:
            counts = counts & is_picture(start + first + row, ROW, FRAME, H, W)
            count += counts.to(tl.float32)
            share = 1.0 / tl.maximum(count, 1.0)
        else:
            share = 1.0 / (first // ROWS + 1)
        inside = counts & (col < C)
        value = tl.load(pointer, mask=inside, other=0).to(tl.float32)
        delta = tl.where(inside, value - lane_mean, 0.0)
        lane_mean += delta * share
        lane_m2 += delta * (value - lane_mean)
        pointer += ROWS * stride_s
    if not BORDER:
        count = ((limit - row + ROWS - 1) // ROWS).to(tl.float32)
    number = tl.sum(count, axis=0, keep_dims=True)
    block_mean = tl.sum(lane_mean * count, axis=0, keep_dims=True) / tl.maximum(number, 1.0)
    shift = lane_mean - block_mean
    block_m2 = tl.sum(lane_m2 + count * shift * shift, axis=0, keep_dims=True)

    chunks = tl.num_programs(0)
    partial = partials + (batch * C + col) * chunks + tl.program_id(0)
    plane = tl.num_programs(2) * C * chunks
    tl.store(partial, block_mean, mask=col < C)
    tl.store(partial + plane, block_m2, mask=col < C)
    tl.store(partial + 2 * plane, tl.broadcast_to(number, [1, COLS]), mask=col < C)


@lazy_kernel(alike="parts")
def _combine(partials, statistics, parts, eps, BLOCK: tl.constexpr):
    """Mean and 1/std of one group of one sample from its `parts`, by Chan's formula.

    The mean is a guess first, then corrected: in fp32 the first sum is an ulp or two of a large mean off.
    """
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    places = tl.num_programs(1) * tl.num_programs(0)
    mean = partials + place * parts
    m2 = mean + places * parts
    number = m2 + places * parts
    item = tl.arange(0, BLOCK)
    sums = tl.full([BLOCK], 0, tl.float32)
    counts = tl.full([BLOCK], 0, tl.float32)  # floats: one group of a long clip has more than 2^31 elements
    for first in range(0, parts, BLOCK):
        inside = first + item < parts
        count = tl.load(number + first + item, mask=inside, other=0)
        sums += tl.load(mean + first + item, mask=inside, other=0) * count
        counts += count
    total = tl.sum(counts, axis=0)
    guess = tl.sum(sums, axis=0) / total
    drifts = tl.full([BLOCK], 0, tl.float32)
    squares = tl.full([BLOCK], 0, tl.float32)
    for first in range(0, parts, BLOCK):
        inside = first + item < parts
        count = tl.load(number + first + item, mask=inside, other=0)
        delta = tl.load(mean + first + item, mask=inside, other=0) - guess
        squares += tl.load(m2 + first + item, mask=inside, other=0) + delta * delta * count
        drifts += delta * count
    drift = tl.sum(drifts, axis=0) / total
    variance = tl.sum(squares, axis=0) / total - drift * drift
    tl.store(statistics + place, guess + drift)
    tl.store(statistics + places + place, 1.0 / tl.sqrt(variance + eps))


class Walk(NamedTuple):
    """How the kernels go over a tensor: samples to normalise, frames cut from each `x[n]`, and the tiles of one."""

    batches: int
    frames: int
    C: int
    S: int
    strides: tuple[int, int, int, int]  # of sample, frame, channel and position
    ROWS: int
    COLS: int
    columns: int


@functools.lru_cache(maxsize=4096)
def _walk(shape: torch.Size, strides: tuple[int, ...], per_frame: bool) -> Walk:
    frames = shape[2] if per_frame else 1
    start = 3 if per_frame else 2
    position = flat_stride(shape[start:], strides[start:])
    assert position is not None
    # Channels are the fast axis in one layout, positions in the other.
    COLS = min(next_power_of_2(shape[1]), MAX_COLS) if strides[1] == 1 else 1
    S = math.prod(shape[start:])
    steps = (strides[0], strides[2], strides[1], position)
    return Walk(shape[0] * frames, frames, shape[1], S, steps, TILE // COLS, COLS, -(-shape[1] // COLS))


def walk(x: Tensor, per_frame: bool) -> Walk:
    """The walk over `x`, whose positions are one axis. Cached: a decode meets a few dozen shapes thousands of times."""
    return _walk(x.shape, x.stride(), per_frame)


def layout(border: bordered.Geometry | None) -> tuple[int, int, int, int]:
    """ROW, FRAME, H and W of the kernels; unread without a border."""
    return (0, 1, 0, 0) if border is None else (border.row, border.frame, border.height, border.width)


def group_statistics(
    x: Tensor, num_groups: int, eps: float, *, per_frame: bool = False, border: bordered.Geometry | None = None
) -> Tensor:
    """fp32 `[2, N, num_groups]` (`[2, N * T, num_groups]` per frame): the mean and 1/std of each group of `x`.

    With a `border`, x is `[N, C, S]` of all pixels of a bordered clip, of which its pictures count: zeros taken out of
    the sums afterwards would leave the rounding of squares of the mean, a hundredth of a deviation where that is 100
    deviations from zero. Scratch is three floats a channel for each of at most about 1056 programs.
    """
    batches, frames, C, S, strides, ROWS, COLS, columns = walk(x, per_frame)
    chunks = max(1, min(S // (ROWS * STEPS), PROGRAMS // (columns * batches)))
    rows = -(-S // (chunks * ROWS)) * ROWS
    chunks = -(-S // rows)
    partials = torch.empty((3, batches, C, chunks), dtype=torch.float32, device=x.device)
    if _dispatch.tally is not None:
        _dispatch.tally("_moments", 0, x.numel() * x.element_size())
    _moments[chunks, columns, batches](
        x, partials, frames, C, S, rows, *strides, *layout(border), BORDER=border is not None,
        ROWS=ROWS, COLS=COLS, num_warps=WARPS,
    )  # fmt: skip
    return combined(partials, num_groups, eps)


def bordered_statistics(x: Tensor, num_groups: int, eps: float, *, samples: int) -> Tensor:
    """The same of a bordered clip, of each of so many `samples`: from what is noted beside it, else from its pixels."""
    partials, place = noted(x, num_groups), bordered.geometry(x)
    if partials is not None:
        return combined(partials if samples == place.frames else of_samples(partials, samples), num_groups, eps)
    step, channels = place.frames // samples * place.frame, x.shape[1]
    pixels = bordered.pixels_of(x).as_strided((samples, channels, step), (step * channels, 1, channels))
    return group_statistics(pixels, num_groups, eps, border=place)


def combined(partials: Tensor, num_groups: int, eps: float) -> Tensor:
    """fp32 `[2, N, num_groups]`, the mean and 1/std of each group, from parts `[3, N, C / neighbours, chunks]`."""
    _, batches, units, chunks = partials.shape
    parts = units // num_groups * chunks
    statistics = torch.empty((2, batches, num_groups), dtype=torch.float32, device=partials.device)
    block = min(next_power_of_2(parts), COMBINED)
    _combine[num_groups, batches](
        partials, statistics, parts, eps, BLOCK=block, num_warps=max(block * WARPS // TILE, WARPS)
    )
    return statistics


def neighbours_of(channels: int) -> int:
    """How many channels share a part: two where 32 groups, or 16 or 8, have an even number of channels."""
    return 2 if channels % 64 == 0 else 1


def empty_partials(x: Tensor, chunks: int) -> Tensor:
    """For a part of each of so many chunks of the frames of a bordered `x`."""
    frames, units = bordered.geometry(x).frames, x.shape[1] // neighbours_of(x.shape[1])
    return torch.empty((3, frames, units, chunks), dtype=torch.float32, device=x.device)


def layout_of(partials: Tensor | None) -> tuple[int, int]:
    """Units and chunks, as the kernels that gather want them; unread without partials."""
    return (1, 1) if partials is None else (partials.shape[2], partials.shape[3])


def of_samples(partials: Tensor, samples: int) -> Tensor:
    """The parts of frames as parts of so many samples, each of which has several."""
    return partials.unflatten(1, (samples, -1)).transpose(2, 3).flatten(3).contiguous()


def note(x: Tensor, partials: Tensor) -> None:
    """Beside `x` as it is now, the parts of each of its frames (of each sample of `[N, C, H, W]`).

    `x` must count its versions, which a tensor made in inference mode does not.
    """
    setattr(x, _NOTE, (partials, x.data_ptr(), x._version))


def noted(x: Tensor, num_groups: int) -> Tensor | None:
    """The parts noted beside `x`; None where there are none, where they cut across groups, or `x` was written since."""
    partials, pointer, version = getattr(x, _NOTE, (None, 0, 0))
    if partials is None or x.data_ptr() != pointer or x._version != version:
        return None
    return partials if partials.shape[2] % num_groups == 0 else None


def signatures() -> list[Signature]:
    """The kernels as they are compiled ahead of time in the tests."""
    return [
        signature(_moments, {"x": "bf16", "partials": "fp32"}, {"BORDER": True, "ROWS": 16, "COLS": 128}),
        signature(_combine, {"partials": "fp32", "statistics": "fp32"}, {"BLOCK": COMBINED}, warps=16),
    ]
