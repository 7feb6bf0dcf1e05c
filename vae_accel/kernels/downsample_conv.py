"""The 3x3 convolution of stride 2 that halves a picture, with one pixel of zeros to its right and below: bordered to
bordered, without the padded copy that the vendor's reads.

Rows of a bordered clip have an even number of pixels, so that every second one is a row of the matrix `[pixels / 2,
2 C]`, and the taps of a row are one run of 3 C numbers in it, as at stride 1. The zeros to pad with are those that lie
around each picture. Two rows of the picture are not one of the result in memory: a tile therefore is of one row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, bordered
from ._dispatch import Signature, differentiates, lazy_kernel, signature
from .eligible import unsupported
from .group_statistics import empty_partials, layout_of, neighbours_of, note
from .tile_choice import choose
from .tile_io import begin, block_of, clear_head, gather_moments, halved_rows_of, lines_of, weight_matrix
from .tiles import Tile, key_of

tl: Any = None  # triton.language, bound at the first launch

SIDES = (0, 1, 0, 1)  # left, right, top and bottom, as in F.pad


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The law, `[N, I, H, W]` by `[O, I, 3, 3]`: the vendor's convolution of the padded picture."""
    return F.conv2d(F.pad(x, SIDES), weight, bias, 2)


@lazy_kernel(alike="W O H ROW FRAME lines tiles_n tiles_w units chunks border")
def _downsample_conv(
    x, w, bias, out, head, partials, H, W, ROW, FRAME, O, lines, tiles_n, tiles_w, units, chunks, border,
    NEIGHBOURS: tl.constexpr, KB: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`x`: overlapping rows [pixels / 2, 3 C], of which ROW are one row of a picture and FRAME one frame. `w`: [O, 3 KB
    DEPTH]. `out`: [lines, pixels, O], H + 1 to a frame and the last of these border; H and W are its picture's."""
    clear_head(head, border, 4 * ROWS)
    pid = tl.program_id(0)
    n0 = pid % tiles_n * COLS  # neighbours share pixels
    x0 = pid // tiles_n % tiles_w * ROWS
    line = pid // (tiles_n * tiles_w)
    frame = line // (H + 1)
    y = line % (H + 1)
    acc = begin(bias, None, frame, x0, n0, n0, O, ROWS, COLS)
    first = frame * FRAME + (2 * y + 1) * ROW + x0
    steps = tl.where((y < H) & (x0 < W), 3 * KB, 0)  # else border alone
    for i in tl.range(0, steps, num_stages=STAGES):
        acc = tl.dot(x.load([first + i // KB * ROW, i % KB * DEPTH]), w.load([n0, i * DEPTH]).T, acc)
    inside = (x0 + tl.arange(0, ROWS) < W) & (y < H)
    value = tl.where(inside[:, None], acc, 0.0).to(out.dtype)
    out.store([line, x0, n0], value.reshape(1, ROWS, COLS))
    if partials is not None:
        gather_moments(
            partials, value, inside, frame, lines // (H + 1), y * tiles_w + x0 // ROWS, chunks, n0, O, units,
            NEIGHBOURS, ROWS, COLS,
        )  # fmt: skip


def tile_of(channels_in: int, channels_out: int) -> Tile:
    """128 pixels: of rows of 512, 256 and 128 nothing is wasted, of 416, 208 and 104 a fifth."""
    depth = 64 if 3 * channels_in % 64 == 0 else 32
    return Tile(128, min(max(1 << (channels_out - 1).bit_length(), 16), 128), 0, depth, 3 * 64 // depth, 4)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile, *, statistics: bool = False) -> Tensor:
    channels_out = weight.shape[0]
    x = bordered.bordered(x)
    large = bordered.geometry(x)
    shape = (x.shape[0], channels_out, large.height // 2, large.width // 2)
    out = bordered.empty(shape, weight.dtype, x.device, versions=statistics)
    place = bordered.geometry(out)
    matrix = weight_matrix(weight, x.dtype, tile.depth)
    tiles_n, tiles_w = -(-channels_out // tile.cols), -(-place.row // tile.rows)
    lines = place.frames * (place.height + 1)
    partials = empty_partials(out, (place.height + 1) * tiles_w) if statistics else None
    if _dispatch.tally is not None:
        _dispatch.tally("_downsample_conv", 2 * out.numel() * weight[0].numel(), 0)
    with torch.cuda.device_of(x):
        _downsample_conv[(tiles_n * tiles_w * lines,)](
            halved_rows_of(x, tile), block_of(matrix, tile.cols, tile), bias, lines_of(out, tile),
            bordered.pixels_of(out), partials, place.height, place.width, large.row // 2, large.frame // 2,
            channels_out, lines, tiles_n, tiles_w, *layout_of(partials), place.first * channels_out,
            NEIGHBOURS=neighbours_of(channels_out), KB=matrix.shape[1] // (3 * tile.depth),
            **tile.constexprs(), num_warps=tile.warps,
        )  # fmt: skip
    if partials is not None:
        note(out, partials)
    return out


def downsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, *, statistics: bool = False) -> Tensor:
    """`[N, I, H, W]` with one pixel of zeros to its right and below, convolved by `[O, I, 3, 3]` at every second pixel:
    `[N, O, H // 2, W // 2]`.

    The result of our kernel is bordered; of the vendor's, as the vendor leaves it. Ours multiplies what it is given:
    of fp32, for which it has no form, it is the vendor's. With `statistics` our kernel notes those of a GroupNorm
    beside it.

    Raises:
        RuntimeError: pictures of one row or column, of which stock's has none either.
    """
    ours = x.dtype == weight.dtype != torch.float32 and min(x.shape[-2:]) > 1
    ours = ours and not differentiates(x, weight, bias) and unsupported(x, weight, (1, 1)) is None
    tile = None
    if ours:
        tile = choose(key_of("downsample_conv", x, weight), tile_of(x.shape[1], weight.shape[0]), x.device)
    if tile is None:
        return reference(x, weight, bias)
    return _launch(x, weight, bias, tile, statistics=statistics)


def signatures() -> list[Signature]:
    """The kernel as it is compiled ahead of time in the tests."""
    tile = tile_of(96, 96)
    least = {"x": tile.pixels("bf16"), "w": tile.taps("bf16"), "out": tile.frames("bf16"), "head": "bf16"}
    constants = {"NEIGHBOURS": 2, "KB": 9, **tile.constexprs()}
    return [
        signature(_downsample_conv, {**least, "bias": "bf16", "partials": "fp32"}, constants, warps=tile.warps),
        signature(_downsample_conv, least, {**constants, "bias": None, "partials": None}, warps=tile.warps),
    ]
