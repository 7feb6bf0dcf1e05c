"""How a tile of our convolutions meets memory: descriptors of clips and weights, its first and its last step."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bordered
from ._dispatch import LazyFunction
from .half_operands import in_terms
from .tiles import Tile

tl: Any = None  # triton.language, bound at the first launch


@LazyFunction
def clear_head(pixels, length, BLOCK: tl.constexpr):
    """Zeros before the first picture, the first `length` numbers of a clip, a share by each program.

    A fill is a launch of its own: there were 35 in a decode of FLUX.1, beside as many convolutions.
    """
    zeros = tl.full([BLOCK], 0, pixels.dtype.element_ty)
    for first in range(tl.program_id(0) * BLOCK, length, tl.num_programs(0) * BLOCK):
        item = first + tl.arange(0, BLOCK)
        tl.store(pixels + item, zeros, mask=item < length)


@LazyFunction
def finish(out, acc, frame, o0, n0, ROW, H, W, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Stores a tile of a bordered clip. Pixels that are border are zeros. Returns what it stored and which pixels."""
    row = o0 + tl.arange(0, ROWS)
    inside = (row < H * ROW) & (row % ROW < W)
    value = tl.where(inside[:, None], acc, 0.0).to(out.dtype)
    out.store([frame, o0, n0], value.reshape(1, ROWS, COLS))
    return value, inside


@LazyFunction
def gather_moments(
    partials, value, inside, frame, frames, chunk, chunks, c0, channels, units,
    NEIGHBOURS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The part a tile has in the statistics of the next norm (`kernels/group_statistics.py`), of the rounded values.

    `value` is zero where a pixel is not `inside`. Of pixels computed together, `channels` are several times `units`,
    each of them a chunk of its own.
    """
    number = tl.sum(inside.to(tl.float32), 0) * NEIGHBOURS
    part = value.to(tl.float32).reshape(ROWS, COLS // NEIGHBOURS, NEIGHBOURS)
    mean = tl.sum(tl.sum(part, 2), 0) / tl.maximum(number, 1.0)
    delta = tl.where(inside[:, None, None], part - mean[None, :, None], 0.0)
    m2 = tl.sum(tl.sum(delta * delta, 2), 0)
    unit = c0 // NEIGHBOURS + tl.arange(0, COLS // NEIGHBOURS)
    together = channels // (NEIGHBOURS * units)
    plane = frames.to(tl.int64) * units * chunks
    target = partials + (frame * units + unit % units).to(tl.int64) * chunks + chunk * together + unit // units
    exists = unit * NEIGHBOURS < channels
    tl.store(target, mean, mask=exists)
    tl.store(target + plane, m2, mask=exists)
    tl.store(target + 2 * plane, tl.full([COLS // NEIGHBOURS], 0, tl.float32) + number, mask=exists)


@LazyFunction
def begin(bias, residual, frame, o0, n0, c0, O, ROWS: tl.constexpr, COLS: tl.constexpr):
    """What a tile's sum starts from: bias and residual, or zeros. `n0` is its first channel, `c0` that in `out`."""
    acc = tl.full([ROWS, COLS], 0, tl.float32)
    if bias is not None:
        col = n0 + tl.arange(0, COLS)
        acc += tl.load(bias + col, mask=col < O, other=0).to(tl.float32)[None, :]
    if residual is not None:
        acc += residual.load([frame, o0, c0]).reshape(ROWS, COLS).to(tl.float32)
    return acc


@LazyFunction
def add(acc, unit, bias, residual, frame, o0, n0, c0, O, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A finished sum in units of `unit`, if any, and what it did not start from."""
    if unit is not None:
        acc *= tl.load(unit)
    return acc + begin(bias, residual, frame, o0, n0, c0, O, ROWS, COLS)


def _descriptor(base: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    return _descriptor_class()(base, shape, strides, block)


def descriptor_of(x: Tensor, block: list[int]) -> Any:
    """All of `x`, whose last dimension is dense."""
    return _descriptor(x, list(x.shape), list(x.stride()), block)


@functools.cache
def _descriptor_class() -> Any:
    return importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor


def rows_of(x: Tensor, kw: int, tile: Tile, together: int = 1) -> Any:
    """Every pixel (or every `together`-th) and the taps behind it as one row, as far as they lie in the memory."""
    pixels = bordered.pixels_of(x)
    count, channels = pixels.shape
    taps = kw + together - 1
    shape, strides = [(count - taps) // together + 1, taps * channels], [together * channels, 1]
    return _descriptor(pixels, shape, strides, [tile.rows, tile.depth])


def halved_rows_of(x: Tensor, tile: Tile) -> Any:
    """Every second pixel of a clip bordered with zeros, from its second column's on, and the two behind it as one row.

    The first column of a picture, the second of the memory, begins in the middle of a pair of pixels.
    """
    pixels = bordered.pixels_of(x)[1:]
    count, channels = pixels.shape
    return _descriptor(pixels, [(count - 3) // 2 + 1, 3 * channels], [2 * channels, 1], [tile.rows, tile.depth])


def block_of(matrix: Tensor, cols: int, tile: Tile) -> Any:
    return descriptor_of(matrix, [cols, tile.depth])


def frames_of(x: Tensor | None, tile: Tile, cols: int, together: int = 1) -> Any:
    """The frames from their first picture pixel on: a tile that reaches over a frame's end is cut off there."""
    if x is None or not cols:
        return None
    place, channels = bordered.geometry(x), x.shape[1]
    pixels = bordered.pixels_of(x)[place.first :]
    shape = [place.frames, place.frame // together, together * channels]
    strides = [place.frame * channels, together * channels, 1]
    return _descriptor(pixels, shape, strides, [1, tile.rows, cols])


def lines_of(x: Tensor, tile: Tile) -> Any:
    """The rows of all frames, each from its first picture pixel on and with the border behind it, H + 1 to a frame."""
    place, channels = bordered.geometry(x), x.shape[1]
    shape = [place.frames * (place.height + 1), place.row, channels]
    strides = [place.row * channels, channels, 1]
    return _descriptor(bordered.pixels_of(x)[place.first :], shape, strides, [1, tile.rows, tile.cols])


def weight_matrix(weight: Tensor, dtype: torch.dtype, depth: int, together: int = 1, terms: int = 1) -> Tensor:
    """[together * O, terms * taps * padded run]: the taps of a row as one run, zeros up to a multiple of `depth`.

    Of pixels taken `together`, the later ones find their taps further on in a longer run. A view where the weight lies
    channels-last, needs no zeros and has the dtype.
    """
    taps = weight.movedim(1, -1).flatten(1, -3).flatten(2)
    if together > 1:
        step = weight.shape[1]
        taps = torch.cat([F.pad(taps, (i * step, (together - 1 - i) * step)) for i in range(together)])
    short = -taps.shape[2] % depth
    if short:
        taps = F.pad(taps, (0, short))
    return in_terms(taps.flatten(1), dtype, terms)
