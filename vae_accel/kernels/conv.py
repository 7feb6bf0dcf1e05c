"""Convolution as an implicit GEMM: `[N, C, H, W]` or `[N, C, T, H, W]`, stride 1, one group.

What stock does around the vendor's convolution happens inside this one: frames in front of the clip come from a cache
tensor or are zeros (no cat, no pad), bias and residual are added in fp32 before the only rounding. Activations are
bordered clips (`kernels/bordered.py`): a tap is a shift of rows of the matrix `[pixels, C]`, and the taps of a row are
one run of `kw * C` numbers, read through a tensor descriptor whose rows overlap. So the inner loop is that of a plain
matrix product, both operands by the copy engine. A descriptor with height and width in it would need a reshape of the
first operand, for which Triton 3.6 goes through registers (seen in its IR; the loads of a row stay in shared memory).

Of an fp32 model the operands are fp16 (`kernels/half_operands.py`), bias, residual, sums and result fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _dispatch, bordered, conv3x3
from ._dispatch import Signature, differentiates, lazy_kernel, signature
from .conv_law import has_form, vendor
from .conv_law import reference as reference
from .eligible import unsupported
from .group_statistics import empty_partials, layout_of, neighbours_of, note
from .half_operands import scaled, terms_of
from .tile_choice import choose
from .tile_io import add, begin, block_of, clear_head, finish, frames_of, gather_moments, rows_of, weight_matrix
from .tiles import Tile, key_of

tl: Any = None  # triton.language, bound at the first launch

# Fewer input channels than this are given zeros up to a multiple of 8, which the copy engine moves: the pictures of an
# encoder. The vendor's convolution of 3 channels takes 48 of the 323 ms in which Wan 2.1 encodes 480x832x81. Of fp32
# models it stays the vendor's: with fp16 operands (in one term) an encode was 1.056 of stock's error, 1.05 is granted.
THIN = 16


@lazy_kernel(alike="frames T S K H W ROW FRAME O first channels tiles_n units chunks border")
def _conv(
    x, history, w, w2, bias, unit, residual, residual2, out, out2, head, partials,
    frames, T, S, K, H, W, ROW, FRAME, O, first, channels, tiles_n, units, chunks, border,
    NEIGHBOURS: tl.constexpr, BEFORE: tl.constexpr, REPEAT: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr,
    KB: tl.constexpr, TERMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MORE: tl.constexpr,
    DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`x`, `history`: overlapping rows [pixels, kw C]. `w`: [O, TERMS, taps, KB DEPTH]. `out`: [frames, FRAME,
    channels].

    A sample has T frames, of `x` S, of `history` K. With `REPEAT` the first and the last stand for those beyond them.
    """
    clear_head(head, border, 4 * ROWS)
    pid = tl.program_id(0)
    side = pid % tiles_n  # neighbours share pixels: first those of a tile, then those of its frames
    f = pid // tiles_n % frames
    o0 = pid // (tiles_n * frames) * ROWS
    n = f // T
    t = f % T
    split = O // channels
    tiles_c = tiles_n // split  # a tile holds channels of one output frame: what it reads beyond them is not stored
    frame = f * split + side // tiles_c
    c0 = side % tiles_c * (COLS + MORE)
    n0 = side // tiles_c * channels + c0
    LATE: tl.constexpr = out.dtype == tl.float32  # `half_operands` says why
    acc = begin(None if LATE else bias, None if LATE else residual, frame, o0, n0, c0, O, ROWS, COLS)
    if MORE:
        acc2 = begin(
            None if LATE else bias, None if LATE else residual2, frame, o0, n0 + COLS, c0 + COLS, O, ROWS, MORE
        )
    PER: tl.constexpr = KH * KB
    here = 0 if REPEAT else tl.maximum(BEFORE - t, 0)  # the first tap in time that sees a frame of x
    if BEFORE and not REPEAT:
        past = (n * K + K + t - BEFORE) * FRAME + o0 + first
        for i in tl.range(tl.maximum(here - K, 0) * PER, here * PER, num_stages=STAGES):
            a = history.load([past + i // PER * FRAME + i // KB % KH * ROW, i % KB * DEPTH])
            acc = tl.dot(a, w.load([n0, i * DEPTH]).T, acc)
            if TERMS == 2:
                acc = tl.dot(a, w.load([n0, (i + KT * PER) * DEPTH]).T, acc)
            if MORE:
                acc2 = tl.dot(a, w2.load([n0 + COLS, i * DEPTH]).T, acc2)
                if TERMS == 2:
                    acc2 = tl.dot(a, w2.load([n0 + COLS, (i + KT * PER) * DEPTH]).T, acc2)
    now = (n * S + t - BEFORE) * FRAME + o0 + first
    for i in tl.range(here * PER, KT * PER, num_stages=STAGES):
        s = i // PER
        if REPEAT:
            s = tl.minimum(tl.maximum(s, BEFORE - t), S - 1 + BEFORE - t)
        a = x.load([now + s * FRAME + i // KB % KH * ROW, i % KB * DEPTH])
        acc = tl.dot(a, w.load([n0, i * DEPTH]).T, acc)
        if TERMS == 2:
            acc = tl.dot(a, w.load([n0, (i + KT * PER) * DEPTH]).T, acc)
        if MORE:
            acc2 = tl.dot(a, w2.load([n0 + COLS, i * DEPTH]).T, acc2)
            if TERMS == 2:
                acc2 = tl.dot(a, w2.load([n0 + COLS, (i + KT * PER) * DEPTH]).T, acc2)
    if LATE:
        acc = add(acc, unit, bias, residual, frame, o0, n0, c0, O, ROWS, COLS)
        if MORE:
            acc2 = add(acc2, unit, bias, residual2, frame, o0, n0 + COLS, c0 + COLS, O, ROWS, MORE)
    value, inside = finish(out, acc, frame, o0, c0, ROW, H, W, ROWS, COLS)
    if partials is not None:
        gather_moments(
            partials, value, inside, frame, frames * split, o0 // ROWS, chunks, c0, channels, units,
            NEIGHBOURS, ROWS, COLS,
        )  # fmt: skip
    if MORE:
        value, inside = finish(out2, acc2, frame, o0, c0 + COLS, ROW, H, W, ROWS, MORE)
        if partials is not None:
            gather_moments(
                partials, value, inside, frame, frames * split, o0 // ROWS, chunks, c0 + COLS, channels, units,
                NEIGHBOURS, ROWS, MORE,
            )  # fmt: skip


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: int,
    history: Tensor | None,
    residual: Tensor | None,
    split: int,
    after: int = 0,
    time: str = "zeros",
    space: str = "zeros",
    *,
    statistics: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    n, channels_in, *spatial = x.shape
    work = weight[0].numel()
    if channels_in % 8:
        x, weight = thickened(x), thickened(weight)
        history = None if history is None else thickened(history)
    dtype, frames_in = weight.dtype, spatial[0] if len(spatial) == 3 else 1
    if weight.dim() == 5 and x.dtype != dtype and _sees_one_frame(frames_in, weight, before + after, history, time):
        weight, before, after = weight.sum(2, keepdim=True, dtype=torch.float32), 0, 0
    channels_out, kt, kh, kw = weight.shape[0], *((1,) * (4 - weight.dim() + 1) + tuple(weight.shape[2:]))
    frames_out = (frames_in + before + after - kt + 1) * split
    shape = (n, channels_out // split, *((frames_out,) if len(spatial) == 3 else ()), *spatial[-2:])
    terms, unit = terms_of(dtype), None
    if dtype == torch.float32:
        x, history, weight, unit = scaled(x, history, weight)
    if kh == 3:
        x = bordered.bordered(x, border=space)
    elif not bordered.is_bordered(x):
        x = bordered.laid_out(x, border=space)
    place = bordered.geometry(x)
    out = bordered.empty(shape, dtype, x.device, place.border, versions=statistics)
    history = None if history is None else bordered.bordered(history, x.dtype, place.border)
    residual = None if residual is None else bordered.laid_out(residual, border=place.border)
    repeat = time == "replicate" and history is None
    if tile is None and split == 1 and conv3x3.takes(x, weight, dtype):
        return conv3x3.conv(x, weight, bias, before, history, residual, out, repeat=repeat, statistics=statistics)
    together = _together(x, weight, split)
    tile = tile or tile_of(channels_in, channels_out // split * together, kt * kh * kw, terms)
    matrix = weight_matrix(weight, x.dtype, tile.depth, together, terms)
    bias = bias if bias is None or together == 1 else bias.repeat(together)
    sides = [frames_of(clip, tile, cols, together) for clip in (residual, out) for cols in (tile.cols, tile.more)]
    columns = matrix.shape[0]
    tiles_n = split * -(-(columns // split) // (tile.cols + tile.more))
    frames, frame = n * (frames_out // split), place.frame // together
    tiles = -(-frame // tile.rows)
    partials = empty_partials(out, tiles * together) if statistics else None
    if _dispatch.tally is not None:
        _dispatch.tally("_conv", 2 * out.numel() * work, 0)
    with torch.cuda.device_of(x):
        _conv[(tiles_n * frames * tiles,)](
            rows_of(x, kw, tile, together), rows_of(x if history is None else history, kw, tile, together),
            block_of(matrix, tile.cols, tile), block_of(matrix, tile.more, tile) if tile.more else None,
            bias, unit, *sides, bordered.pixels_of(out), partials, frames, frames // n, frames_in,
            0 if history is None else history.shape[2], place.height, place.width // together, place.row // together,
            frame, columns, 0 if kh == 3 else place.first, columns // split, tiles_n, *layout_of(partials),
            place.first * out.shape[1],
            NEIGHBOURS=neighbours_of(out.shape[1]), BEFORE=before, REPEAT=repeat,
            KT=kt, KH=kh, KB=matrix.shape[1] // (terms * kt * kh * tile.depth), TERMS=terms, MORE=tile.more,
            **tile.constexprs(), num_warps=tile.warps,
        )  # fmt: skip
    if partials is not None:
        note(out, partials)
    return out


def _sees_one_frame(frames: int, weight: Tensor, around: int, history: Tensor | None, time: str) -> bool:
    """Whether every tap in time sees the only frame, so that their sum does: a third of the work.

    Rounded to fp16 it is as good as operands are that a norm wrote in fp16 for a bf16 model; in bf16, or where the
    weight is fp16 too, it would be a rounding that stock has not.
    """
    return frames == 1 and around == weight.shape[2] - 1 and history is None and time == "replicate"


def _together(x: Tensor, weight: Tensor, split: int) -> int:
    """How many neighbouring pixels are computed as one of so many times the channels: two of 96 channels, of which a
    tile of 128 would waste a quarter. Four taps of a row stand for three, which wastes as much, but 192 channels read
    the pixels less often, and the second level cache is busy: 6.2 TB/s with one pixel at a time, 71 % by its counters.
    Expected from that, and not yet timed by itself against one pixel at a time.
    """
    return 2 if weight.shape[-1] == 3 and split == 1 and weight.shape[0] == 96 and x.shape[-1] % 2 == 0 else 1


def thickened(x: Tensor) -> Tensor:
    """`[N, C, *sizes]`, channels-last, with zeros for channels up to a multiple of 8."""
    wide = x.new_zeros((x.shape[0], *x.shape[2:], x.shape[1] + -x.shape[1] % 8)).movedim(-1, 1)
    wide[:, : x.shape[1]] = x
    return wide


def tile_of(channels_in: int, channels_out: int, taps: int, terms: int = 1) -> Tile:
    """The tile for a convolution: best of the few measured on an H100, of weights in two `terms` on an H200
    (platforms/cuda/README.md)."""
    run = (channels_in + -channels_in % 8) * (3 if taps % 9 == 0 else 1)
    depth = 32 if run <= 32 or (run % 64 and run > 64) else 64
    if channels_out % 192 == 0 and channels_out % 128:
        return Tile(256, 128, 64, 64, 3, 8).beside(terms)
    if channels_out % 128 == 0 and taps == 27 and terms > 1:
        return Tile(128, 128, 0, 32, 4, 4)
    if channels_out % 256 == 0 and taps == 27 and terms == 1:
        return Tile(256, 128, 0, 64, 4, 8) if channels_out >= 1024 else Tile(128, 256, 0, 64, 3, 8)
    if channels_out % 256 == 0 and terms == 1:
        return Tile(128, 256, 0, 64, 4, 8)
    cols = min(max(1 << (channels_out - 1).bit_length(), 16), 128)
    return Tile(256, cols, 0, depth, 4 * 64 // depth, 8).beside(terms)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    padding: tuple[int, int] = (0, 0),
    before: int = 0,
    history: Tensor | None = None,
    residual: Tensor | None = None,
    split: int = 1,
    after: int = 0,
    time: str = "zeros",
    space: str = "zeros",
    statistics: bool = False,
) -> Tensor:
    """`[N, I, (T,) H, W]` convolved by `weight` `[O, I, (kt,) kh, kw]`: `[N, O, (T',) H', W']` in the weight's dtype.

    Args:
        x: activations; fp16 beside a bf16 or fp32 weight is allowed, and is computed with fp16 operands.
        padding: pixels around each frame, (height, width), as `space` says: one of `bordered.BORDERS`.
        before: frames in front of a clip, and `after` behind it: T' = T + before + after - (kt - 1).
        history: `[N, I, K, H, W]`, K <= before, the frames directly in front of `x`.
        residual: like the result; added in fp32 before the one rounding.
        split: the output channels are so many frames: `[N, O / split, T' * split, H, W]`, as an upsampling in time.
        time: what the frames are that are not in `history`: zeros, or with "replicate" the first and the last of all.
        statistics: a GroupNorm comes next: our kernel notes its statistics beside the result.

    The result of our kernel is a bordered clip, which is what the next one reads; of the vendor's, channels-last.
    """
    frames, tile = (before, history, residual, split, after, time, space), None
    multiple = 1 if x.shape[1] < THIN and weight.dtype != torch.float32 else 8
    ours = has_form(x, before, history, after, time, space)
    ours = ours and unsupported(x, weight, padding, multiple=multiple) is None
    ours = ours and not differentiates(x, weight, bias, history, residual)
    if ours and not (split == 1 and conv3x3.takes(x, weight, weight.dtype)):
        tile = _chosen(x, weight, split)
        ours = tile is not None
    if not ours:
        return vendor(x, weight, bias, padding, *frames)
    return _launch(x, weight, bias, *frames, statistics=statistics, tile=tile)


def _chosen(x: Tensor, weight: Tensor, split: int) -> Tile | None:
    """The tile, or None where the vendor's convolution was measured to be faster."""
    together = _together(x, weight, split)
    key = key_of("conv" if together == 1 else "conv_pixel_pairs", x, weight, split=split)
    return choose(key, tile_of(key.channels_in, key.channels_out * together, key.taps, key.terms), x.device)


def signatures() -> list[Signature]:
    """The kernel as it is compiled ahead of time in the tests: all a tile can have, and nothing."""
    wide, plain = tile_of(192, 192, 27), tile_of(96, 96, 9)
    taps = {"KT": 3, "KH": 3, "KB": 9, "REPEAT": False}
    absent = dict.fromkeys(("w2", "bias", "unit", "residual", "residual2", "out2", "partials"))
    pixels = {"x": wide.pixels("fp16"), "history": wide.pixels("fp16"), "w": wide.taps("fp16"), "bias": "bf16"}
    more = {"w2": wide.taps("fp16", wide.more), "partials": "fp32", "head": "bf16"}
    for name in ("residual", "out"):
        more |= {name: wide.frames("bf16"), f"{name}2": wide.frames("bf16", wide.more)}
    clips = dict.fromkeys(("x", "history"), plain.pixels("fp16"))
    in_two = tile_of(192, 192, 27, 2)
    of_fp32 = dict.fromkeys(("bias", "unit", "partials", "head"), "fp32")
    of_fp32 |= dict.fromkeys(("x", "history"), in_two.pixels("fp16"))
    of_fp32 |= {"w": in_two.taps("fp16"), "w2": in_two.taps("fp16", in_two.more)}
    for name in ("residual", "out"):
        of_fp32 |= {name: in_two.frames("fp32"), f"{name}2": in_two.frames("fp32", in_two.more)}
    least = {**clips, "w": plain.taps("fp16"), "out": plain.frames("fp16"), "head": "fp16"}
    all_of_it = {"BEFORE": 2, "MORE": wide.more, "NEIGHBOURS": 2, "TERMS": 1, **taps, **wide.constexprs()}
    nothing = {"BEFORE": 0, "MORE": 0, "NEIGHBOURS": 1, "TERMS": 1, **taps, **plain.constexprs(), **absent}
    return [
        signature(_conv, pixels | more, {**all_of_it, "unit": None}, warps=wide.warps),
        signature(_conv, of_fp32, {**all_of_it, "TERMS": 2, "KB": 18, **in_two.constexprs()}, warps=in_two.warps),
        signature(_conv, least, nothing, warps=plain.warps),
        signature(_conv, least, {**nothing, "BEFORE": 2, "REPEAT": True}, warps=plain.warps),
    ]
