"""How a tile of our convolutions meets memory: descriptors of clips and weights, its first and its last step."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor

from . import bordered
from ._dispatch import LazyFunction
from .tiles import Tile

tl: Any = None  # triton.language, bound at the first launch


@LazyFunction
def finish(out, acc, frame, o0, n0, ROW, H, W, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Stores a tile of a bordered clip. Pixels that are border are zeros."""
    row = o0 + tl.arange(0, ROWS)
    inside = (row < H * ROW) & (row % ROW < W)
    acc = tl.where(inside[:, None], acc, 0.0)
    out.store([frame, o0, n0], acc.to(out.dtype).reshape(1, ROWS, COLS))


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
