"""How one of our convolutions is cut: the tile a program computes, and the tiles worth trying for a shape."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import descriptor, next_power_of_2
from .half_operands import terms_of

KERNELS = ("conv", "conv_pixel_pairs", "winograd", "upsample_conv", "downsample_conv", "thin_conv")
SHARED = 227 * 1024  # bytes of shared memory a program may have on compute capability 9.0
MOST_SUMS = 192  # fp32 sums a thread can hold of the 255 registers it has
LARGEST = 20  # log2 of pixels: with 46 tiles of 256 rows for each of 132 multiprocessors, more is only longer


class Tile(NamedTuple):
    """What one program computes: `rows` pixels of one frame by `cols` + `more` channels, `depth` of the sum at a time.

    192 channels are 128 + 64: two products that share the pixels. Powers of two alone would waste a quarter.
    """

    rows: int
    cols: int
    more: int
    depth: int
    stages: int
    warps: int

    def constexprs(self) -> dict[str, int]:
        """As every kernel names them; `more` is for those that have two products."""
        return {"ROWS": self.rows, "COLS": self.cols, "DEPTH": self.depth, "STAGES": self.stages}

    def staged(self, terms: int) -> int:
        """Bytes of shared memory for pixels and weights in so many `terms`, of 16 bits each."""
        return self.stages * (self.rows + terms * (self.cols + self.more)) * self.depth * 2

    def beside(self, terms: int) -> Tile:
        """Itself with as many of its stages as shared memory holds beside weights in so many `terms`."""
        return self._replace(stages=min(self.stages, SHARED // self._replace(stages=1).staged(terms)))

    def pixels(self, dtype: str) -> str:
        """The type of the descriptor of a clip's rows, to compile ahead of time."""
        return descriptor(dtype, self.rows, self.depth)

    def taps(self, dtype: str, cols: int | None = None) -> str:
        """Of the weight matrix."""
        return descriptor(dtype, cols or self.cols, self.depth)

    def frames(self, dtype: str, cols: int | None = None) -> str:
        """Of a result or a residual."""
        return descriptor(dtype, 1, self.rows, cols or self.cols)

    def __str__(self) -> str:
        cols = f"{self.cols}+{self.more}" if self.more else str(self.cols)
        return f"{self.rows}x{cols}, depth {self.depth}, {self.stages} stages, {self.warps} warps"


class Key(NamedTuple):
    """The convolutions that share a tile: `size` is log2 of their pixels times frames, the dtypes are torch's names."""

    kernel: str
    channels_in: int
    channels_out: int
    taps: int
    operands: str
    result: str
    size: int

    @property
    def has_vendor(self) -> bool:
        """Whether the vendor's can run instead at this point; of Winograd's, the clip is already transformed."""
        return self.kernel != "winograd"

    @property
    def terms(self) -> int:
        """In how many the weights are multiplied, see `half_operands`."""
        return terms_of(getattr(torch, self.result))

    def __str__(self) -> str:
        dtypes = self.operands if self.operands == self.result else f"{self.operands} to {self.result}"
        return f"{self.kernel} {self.channels_in} to {self.channels_out}, {self.taps} taps, {dtypes}, 2^{self.size}"


def key_of(kernel: str, x: Tensor, weight: Tensor, *, split: int = 1) -> Key:
    """Of `kernel` on `x` `[N, I, (T,) H, W]` and `weight` `[O, I, *taps]`, whose outputs are `split` frames."""
    pixels = x.shape.numel() // x.shape[1]
    return Key(
        kernel,
        x.shape[1],
        weight.shape[0] // split,
        weight.shape[2:].numel(),
        str(x.dtype).removeprefix("torch."),
        str(weight.dtype).removeprefix("torch."),
        min(max(pixels.bit_length() - 1, 0), LARGEST),
    )


def fits(key: Key, tile: Tile) -> bool:
    """Whether shared memory holds the stages and then, in their place, the result going out, and registers the sums.

    Winograd's form walks two frames at once.
    """
    at_once = 2 if key.kernel == "winograd" else 1
    stages = at_once * tile.staged(key.terms)
    result = tile.rows * max(tile.cols, tile.more) * (4 if key.result == "float32" else 2)
    sums = at_once * tile.rows * (tile.cols + tile.more) // (32 * tile.warps)
    return max(stages, result) <= SHARED and sums <= MOST_SUMS


def candidates(key: Key, first: Tile) -> list[Tile]:
    """`first`, the present choice, and its neighbours that fit: one thing changed, or two that outweigh each other."""
    rows, cols, _, depth, stages, _ = first
    found = [
        first,
        first._replace(stages=stages - 1),
        first._replace(stages=stages + 1),
        first._replace(warps=4),
        first._replace(depth=depth * 2, stages=stages // 2),
        first._replace(depth=depth // 2, stages=stages * 2),
        first._replace(rows=rows // 2),
        first._replace(rows=rows // 2, stages=stages + 1),
        first._replace(rows=rows // 2, warps=4),
        first._replace(rows=rows * 2, stages=stages - 1),
    ]
    if key.kernel != "thin_conv":  # whose columns are all there are
        found += [
            first._replace(cols=cols // 2, more=0, stages=stages + 1),
            first._replace(cols=cols * 2, more=0, rows=rows // 2),
            first._replace(cols=cols * 2, more=0),
            first._replace(cols=cols // 2, more=0, rows=rows * 2),
        ]
    columns = key.channels_out * (9 if key.kernel == "thin_conv" else 2 if key.kernel == "conv_pixel_pairs" else 1)
    widest = max(next_power_of_2(columns), first.cols)
    possible = [
        tile
        for tile in dict.fromkeys(found)
        if 64 <= tile.rows <= 256
        and 16 <= tile.cols <= min(widest, 256)
        and 32 <= tile.depth <= 128
        and tile.stages > 1
    ]
    return [first, *(tile for tile in possible if tile != first and fits(key, tile))]
