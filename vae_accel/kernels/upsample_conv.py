"""Nearest 2x and the 3x3 convolution after it, as one convolution on the small bordered picture.

Along each axis an even pixel sees two source pixels by (w0, w1 + w2), an odd one two by (w0 + w1, w2): four phases of
2x2 taps, 4/9 of the work, and the upsampled picture is never written. Each phase writes its pixels where they belong.
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
from .half_operands import scaled
from .tile_choice import choose
from .tile_io import add, begin, block_of, clear_head, gather_moments, rows_of
from .tiles import Tile, key_of

tl: Any = None  # triton.language, bound at the first launch


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The law, frame by frame: `[N, I, (T,) H, W]` to `[N, O, (T,) 2H, 2W]`; fp16 beside bf16 in fp32."""
    x = x.to(torch.promote_types(x.dtype, weight.dtype))
    frames = x.transpose(1, 2).flatten(0, 1) if x.dim() == 5 else x
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(F.interpolate(frames, scale_factor=2.0), weight.to(x.dtype), bias, padding=1).to(weight.dtype)
    return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2) if x.dim() == 5 else y


@lazy_kernel(alike="total O")
def _fold(weight, out, total, O, C, run, stride_o, stride_h, stride_w, BLOCK: tl.constexpr):
    """Sums of taps in fp32: [O, 3, 3, C] to [4 phases, O, 2, padded run], rounded once."""
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = item % run % C
    v = item % run // C
    u = item // run % 2
    o = item // (2 * run) % O
    phase = item // (2 * run * O)
    a = phase // 2
    b = phase % 2
    inside = (item < total) & (v < 2)
    value = tl.full([BLOCK], 0, tl.float32)
    for i in range(3):
        for j in range(3):
            # Tap 0 of an even phase is w0 and tap 1 the rest; of an odd phase tap 1 is w2 and tap 0 the rest.
            seen = ((i > a) == (u == 1)) & ((j > b) == (v == 1))
            value += tl.load(weight + o * stride_o + i * stride_h + j * stride_w + c, mask=inside & seen, other=0).to(
                tl.float32
            )
    tl.store(out + item, value.to(out.dtype.element_ty), mask=item < total)


@lazy_kernel(alike="frames H W ROW FRAME tiles_n units chunks border")
def _upsample_conv(
    x, w, bias, unit, out, partials, frames, H, W, ROW, FRAME, O, tiles_n, units, chunks, border,
    NEIGHBOURS: tl.constexpr, KB: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`x`: overlapping rows [pixels, 2 C] of the small picture. `w`: [4 O, 2 KB DEPTH]. `out`: its bordered pixels.

    Of the border, the pixel behind each row of the small picture and the row below it are zeros that go where theirs
    would: to the right of the large one, and in front of its next row and frame.
    """
    clear_head(out, border, 4 * ROWS)
    pid = tl.program_id(0)
    n0 = (pid % tiles_n) * COLS
    phase = pid // tiles_n % 4  # neighbours share pixels
    f = pid // (tiles_n * 4) % frames
    o0 = pid // (tiles_n * 4 * frames) * ROWS
    a = phase // 2
    b = phase % 2
    acc = begin(None if unit is not None else bias, None, f, o0, n0, n0, O, ROWS, COLS)
    first = f * FRAME + o0 + a * ROW + b
    for i in tl.range(0, 2 * KB, num_stages=STAGES):
        pixels = x.load([first + i // KB * ROW, i % KB * DEPTH])
        acc = tl.dot(pixels, w.load([phase * O + n0, i * DEPTH]).T, acc)
    if unit is not None:
        acc = add(acc, unit, bias, None, f, o0, n0, n0, O, ROWS, COLS)
    pixel = o0 + tl.arange(0, ROWS)
    h = pixel // ROW
    v = pixel % ROW
    col = n0 + tl.arange(0, COLS)
    wide = 2 * W + 2
    target = (f * (2 * H + 1) + 2 * h + a + 1).to(tl.int64) * wide + 2 * v + b + 1
    inside = (h < H) & (v < W)
    value = tl.where(inside[:, None], acc, 0.0).to(out.dtype.element_ty)
    written = (h + a <= H) & (v <= W)
    tl.store(out + target[:, None] * O + col[None, :], value, mask=written[:, None] & (col < O)[None, :])
    if partials is not None:
        gather_moments(
            partials, value, inside, f, frames, o0 // ROWS * 4 + phase, chunks, n0, O, units, NEIGHBOURS, ROWS, COLS
        )


def folded_taps(weight: Tensor, dtype: torch.dtype, depth: int) -> Tensor:
    """`[4 O, 2 * padded run]` of `[O, I, 3, 3]`: the taps of each phase, summed in fp32 and rounded once."""
    o, c = weight.shape[:2]
    taps = weight.movedim(1, -1)
    taps = taps if taps.stride(-1) == 1 else taps.contiguous()
    run = -(-2 * c // depth) * depth
    out = torch.empty((4 * o, 2 * run), dtype=dtype, device=weight.device)
    with torch.cuda.device_of(weight):
        _fold[(-(-out.numel() // 1024),)](
            taps, out, out.numel(), o, c, run, *taps.stride()[:3], BLOCK=1024, num_warps=4
        )
    return out


def tile_of(channels_in: int, channels_out: int) -> Tile:
    depth = 64 if 2 * channels_in % 64 == 0 else 32
    if 64 < channels_out < 128:  # 830 instead of 693 TFLOP/s of the direct convolution for 192 to 96
        return Tile(128, 128, 0, depth, 3, 4)
    cols = min(max(1 << (channels_out - 1).bit_length(), 16), 128)
    return Tile(256, cols, 0, depth, 4 * 64 // depth, 8)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile | None = None, *, statistics: bool = False
) -> Tensor:
    channels_out = weight.shape[0]
    tile = tile or tile_of(x.shape[1], channels_out)
    unit = None
    if x.dtype == torch.float32:
        x, _, weight, unit = scaled(x, None, weight)
    x = bordered.bordered(x)
    place = bordered.geometry(x)
    shape = (x.shape[0], channels_out, *x.shape[2:-2], 2 * place.height, 2 * place.width)
    out = bordered.empty(shape, weight.dtype, x.device, versions=statistics)
    pixels = bordered.pixels_of(out)
    matrix = folded_taps(weight, x.dtype, tile.depth)
    tiles_n, tiles = -(-channels_out // tile.cols), -(-place.frame // tile.rows)
    partials = empty_partials(out, 4 * tiles) if statistics else None
    if _dispatch.tally is not None:
        _dispatch.tally("_upsample_conv", 2 * out.numel() * 4 * weight.shape[1], 0)
    with torch.cuda.device_of(x):
        _upsample_conv[(tiles_n * 4 * place.frames * tiles,)](
            rows_of(x, 2, tile), block_of(matrix, tile.cols, tile), bias, unit, pixels, partials, place.frames,
            place.height, place.width, place.row, place.frame, channels_out, tiles_n, *layout_of(partials),
            bordered.geometry(out).first * channels_out,
            NEIGHBOURS=neighbours_of(channels_out), KB=matrix.shape[1] // (2 * tile.depth),
            **tile.constexprs(), num_warps=tile.warps,
        )  # fmt: skip
    if partials is not None:
        note(out, partials)
    return out


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, *, statistics: bool = False) -> Tensor:
    """`[N, I, (T,) H, W]` upsampled 2x by nearest and convolved by `[O, I, 3, 3]` with one pixel of zeros around.

    The result `[N, O, (T,) 2H, 2W]` of our kernel is bordered; of the vendor's, as the vendor leaves it. With
    `statistics` our kernel notes those of a GroupNorm of each frame beside it.
    """
    if differentiates(x, weight, bias) or unsupported(x, weight, (1, 1)) is not None:
        return reference(x, weight, bias)
    tile = choose(key_of("upsample_conv", x, weight), tile_of(x.shape[1], weight.shape[0]), x.device)
    return reference(x, weight, bias) if tile is None else _launch(x, weight, bias, tile, statistics=statistics)


def signatures() -> list[Signature]:
    """The kernels as they are compiled ahead of time in the tests."""
    tile = tile_of(192, 96)
    operands = {"x": tile.pixels("fp16"), "w": tile.taps("fp16"), "partials": "fp32"}
    constants = {"NEIGHBOURS": 2, "KB": 6, **tile.constexprs()}
    of_bf16, of_fp32 = ({**operands, "bias": dtype, "out": dtype} for dtype in ("bf16", "fp32"))
    return [
        signature(_fold, {"weight": "bf16", "out": "fp16"}, {"BLOCK": 1024}),
        signature(_upsample_conv, of_bf16, {**constants, "unit": None}, warps=tile.warps),
        signature(_upsample_conv, {**of_fp32, "unit": "fp32"}, constants, warps=tile.warps),
    ]
