"""Nearest 2x and the 3x3 convolution after it, as one convolution on the small bordered picture.

Along each axis an even pixel sees two source pixels by (w0, w1 + w2), an odd one two by (w0 + w1, w2): four phases of
2x2 taps, 4/9 of the work, and the upsampled picture is never written. Each phase writes its pixels where they belong.
Where time is doubled too, all but its first frame, and the convolution is causal behind that frame repeated, the same
holds along time: eight phases, 8/27 of the work. A frame is the odd one between two and the even one after it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, bordered, conv3x3
from ._dispatch import Signature, differentiates, lazy_kernel, signature
from .conv_law import reference as conv_reference
from .eligible import unsupported
from .group_statistics import empty_partials, layout_of, neighbours_of, note
from .half_operands import in_terms, scaled, terms_of
from .tile_choice import choose
from .tile_io import add, begin, block_of, clear_head, gather_moments, rows_of
from .tiles import Tile, key_of

tl: Any = None  # triton.language, bound at the first launch


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, *, double: bool = False, space: str = "zeros") -> Tensor:
    """The law: `[N, I, (T,) H, W]` frame by frame, or a clip by `[O, I, 3, 3, 3]`; fp16 beside bf16 in fp32."""
    frames = x.transpose(1, 2).flatten(0, 1) if x.dim() == 5 else x
    wide = F.interpolate(frames.to(torch.promote_types(x.dtype, weight.dtype)), scale_factor=2.0)
    if weight.dim() == 4:
        y = conv_reference(wide, weight, bias, padding=(1, 1), space=space)
        return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2) if x.dim() == 5 else y
    wide = wide.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    if double:
        wide = wide.repeat_interleave(2, 2)[:, :, 1:]
    return conv_reference(wide, weight, bias, padding=(1, 1), before=2, time="replicate", space=space)


@lazy_kernel(alike="total O")
def _fold(
    weight, out, total, O, C, run, stride_o, stride_t, stride_h, stride_w,
    TAPS: tl.constexpr, KT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of taps in fp32: [O, TAPS, 3, 3, C] to [4 or 8 phases, O, KT, 2, padded run], rounded once."""
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = item % run % C
    v = item % run // C
    u = item // run % 2
    s = item // (2 * run) % KT
    o = item // (2 * run * KT) % O
    phase = item // (2 * run * KT * O)
    a = phase // 2 % 2
    b = phase % 2
    inside = (item < total) & (v < 2)
    value = tl.full([BLOCK], 0, tl.float32)
    for k in range(TAPS):
        now = s == k if KT == TAPS else (k > 1 - phase // 4) == (s == 1)  # of the doubled, the odd one comes first
        for i in range(3):
            for j in range(3):
                # Tap 0 of an even phase is w0 and tap 1 the rest; of an odd phase tap 1 is w2 and tap 0 the rest.
                seen = now & ((i > a) == (u == 1)) & ((j > b) == (v == 1))
                place = weight + o * stride_o + k * stride_t + i * stride_h + j * stride_w + c
                value += tl.load(place, mask=inside & seen, other=0).to(tl.float32)
    tl.store(out + item, value.to(out.dtype.element_ty), mask=item < total)


@lazy_kernel(alike="frames T H W ROW FRAME FRAME_OUT tiles_n units chunks border")
def _upsample_conv(
    x, w, bias, unit, out, partials,
    frames, T, H, W, ROW, FRAME, FRAME_OUT, O, tiles_n, units, chunks, border,
    NEIGHBOURS: tl.constexpr, KT: tl.constexpr, DOUBLE: tl.constexpr, KB: tl.constexpr, TERMS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`x`: overlapping rows [pixels, 2 C] of the small picture. `w`: [phases O, TERMS KT 2 KB DEPTH]. `out`: pixels.

    A sample has T frames of `x`, the first of which stands in front of itself. Of the border, the pixel behind each row
    of the small picture and the row below it are zeros that go where theirs would: to the right of the large one, and
    in front of its next row and frame.
    """
    clear_head(out, border, 4 * ROWS)
    PHASES: tl.constexpr = 8 if DOUBLE else 4
    pid = tl.program_id(0)
    n0 = (pid % tiles_n) * COLS
    phase = pid // tiles_n % PHASES  # neighbours share pixels
    f = pid // (tiles_n * PHASES) % frames
    o0 = pid // (tiles_n * PHASES * frames) * ROWS
    a = phase // 2 % 2
    b = phase % 2
    t = f % T
    g = f
    count = frames
    exists = True
    if DOUBLE:
        g = f // T * (2 * T - 1) + 2 * t - 1 + phase // 4
        count = frames // T * (2 * T - 1)
        exists = 2 * t + phase // 4 > 0  # there is no frame between the first and itself
    acc = begin(None if unit is not None else bias, None, f, o0, n0, n0, O, ROWS, COLS)
    first = f * FRAME + o0 + a * ROW + b
    for i in tl.range(0, KT * 2 * KB, num_stages=STAGES):
        s = 0
        if KT > 1:
            s = tl.maximum(i // (2 * KB) - (KT - 1), -t)
        pixels = x.load([first + s * FRAME + i // KB % 2 * ROW, i % KB * DEPTH])
        acc = tl.dot(pixels, w.load([phase * O + n0, i * DEPTH]).T, acc)
        if TERMS == 2:
            acc = tl.dot(pixels, w.load([phase * O + n0, (i + KT * 2 * KB) * DEPTH]).T, acc)
    if unit is not None:
        acc = add(acc, unit, bias, None, f, o0, n0, n0, O, ROWS, COLS)
    pixel = o0 + tl.arange(0, ROWS)
    h = pixel // ROW
    v = pixel % ROW
    col = n0 + tl.arange(0, COLS)
    wide = 2 * W + 2
    target = g.to(tl.int64) * FRAME_OUT + (2 * h + a + 1) * wide + 2 * v + b + 1
    inside = (h < H) & (v < W)
    value = tl.where(inside[:, None], acc, 0.0).to(out.dtype.element_ty)
    written = (h + a <= H) & (v <= W) & exists
    tl.store(out + target[:, None] * O + col[None, :], value, mask=written[:, None] & (col < O)[None, :])
    if partials is not None:  # noqa: SIM102 - settled when compiling, the inner one when running
        if exists:
            gather_moments(
                partials, value, inside, g, count, o0 // ROWS * 4 + phase % 4, chunks, n0, O, units,
                NEIGHBOURS, ROWS, COLS,
            )  # fmt: skip


def folded_taps(weight: Tensor, dtype: torch.dtype, depth: int, double: bool = False, terms: int = 1) -> Tensor:
    """`[phases O, terms * taps in time * 2 * padded run]` of `[O, I, (3,) 3, 3]`: the taps of each phase, summed in
    fp32 and rounded once, or in two terms."""
    o, c = weight.shape[:2]
    taps = (weight if weight.dim() == 5 else weight.unsqueeze(2)).movedim(1, -1)
    taps = taps if taps.stride(-1) == 1 else taps.contiguous()
    run, kt = -(-2 * c // depth) * depth, 2 if double else taps.shape[1]
    folded = torch.float32 if terms == 2 else dtype
    out = torch.empty(((8 if double else 4) * o, kt * 2 * run), dtype=folded, device=weight.device)
    with torch.cuda.device_of(weight):
        _fold[(-(-out.numel() // 1024),)](
            taps, out, out.numel(), o, c, run, *taps.stride()[:4], TAPS=taps.shape[1], KT=kt, BLOCK=1024, num_warps=4
        )
    return in_terms(out, dtype, terms)


def tile_of(channels_in: int, channels_out: int, terms: int = 1) -> Tile:
    depth = 64 if 2 * channels_in % 64 == 0 else 32
    if 64 < channels_out < 128 and terms == 1:  # 830 instead of 693 TFLOP/s of the direct convolution for 192 to 96
        return Tile(128, 128, 0, depth, 3, 4)
    cols = min(max(1 << (channels_out - 1).bit_length(), 16), 128)
    return Tile(256, cols, 0, depth, 4 * 64 // depth, 8).beside(terms)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: Tile | None = None,
    *,
    double: bool = False,
    space: str = "zeros",
    statistics: bool = False,
) -> Tensor:
    channels_out, terms, unit = weight.shape[0], terms_of(weight.dtype), None
    if weight.dtype == torch.float32:
        x, _, weight, unit = scaled(x, None, weight)
    x = bordered.bordered(x, border=space)
    place = bordered.geometry(x)
    time = x.shape[2:-2].numel()
    frames = ((2 * time - 1 if double else time),) if x.dim() == 5 else ()
    shape = (x.shape[0], channels_out, *frames, 2 * place.height, 2 * place.width)
    out = bordered.empty(shape, weight.dtype, x.device, space, versions=statistics)
    wide = bordered.geometry(out)
    if tile is None and _on_hopper(x, weight, space):
        return conv3x3.upsample_conv(x, folded_taps(weight, x.dtype, 1), bias, out, statistics=statistics)
    tile = tile or tile_of(x.shape[1], channels_out, terms)
    matrix = folded_taps(weight, x.dtype, tile.depth, double, terms)
    kt = 1 if weight.dim() == 4 else 2 if double else 3
    tiles_n, tiles = -(-channels_out // tile.cols), -(-place.frame // tile.rows)
    partials = empty_partials(out, 4 * tiles) if statistics else None
    if _dispatch.tally is not None:
        _dispatch.tally("_upsample_conv", 2 * out.numel() * 4 * kt * weight.shape[1], 0)
    with torch.cuda.device_of(x):
        _upsample_conv[(tiles_n * (8 if double else 4) * place.frames * tiles,)](
            rows_of(x, 2, tile), block_of(matrix, tile.cols, tile), bias, unit, bordered.pixels_of(out), partials,
            place.frames, time, place.height, place.width, place.row, place.frame, wide.frame, channels_out, tiles_n,
            *layout_of(partials), wide.first * channels_out,
            NEIGHBOURS=neighbours_of(channels_out), KT=kt, DOUBLE=double,
            KB=matrix.shape[1] // (terms * 2 * kt * tile.depth), TERMS=terms, **tile.constexprs(), num_warps=tile.warps,
        )  # fmt: skip
    if partials is not None:
        note(out, partials)
    return out


def upsample_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    double: bool = False,
    space: str = "zeros",
    statistics: bool = False,
) -> Tensor:
    """`[N, I, (T,) H, W]` upsampled 2x by nearest and convolved by `[O, I, 3, 3]`, frame by frame, or by
    `[O, I, 3, 3, 3]` behind the first frame twice; around each frame one pixel that `space` says, zeros or "replicate".

    The result `[N, O, (T,) 2H, 2W]` of our kernel is bordered; of the vendor's, as the vendor leaves it. With `double`,
    for which a kernel has taps in time, every frame but the first is doubled before: 2T - 1 frames. With `statistics`
    our kernel notes those of a GroupNorm of each frame beside it.
    """
    more: dict[str, Any] = {"double": double, "space": space}
    if differentiates(x, weight, bias) or unsupported(x, weight, (1, 1)) is not None:
        return reference(x, weight, bias, **more)
    tile = None
    if not _on_hopper(x, weight, space):
        key = key_of("upsample_conv", x, weight)
        tile = choose(key, tile_of(key.channels_in, key.channels_out, key.terms), x.device)
        if tile is None:
            return reference(x, weight, bias, **more)
    return _launch(x, weight, bias, tile, statistics=statistics, **more)


def _on_hopper(x: Tensor, weight: Tensor, space: str) -> bool:
    return weight.dim() == 4 and space == "zeros" and conv3x3.takes(x, weight, weight.dtype)


def signatures() -> list[Signature]:
    """The kernels as they are compiled ahead of time in the tests."""
    tile = tile_of(192, 96)
    in_two = tile_of(192, 96, 2)
    operands, of_fp32 = ({"x": t.pixels("fp16"), "w": t.taps("fp16"), "partials": "fp32"} for t in (tile, in_two))
    constants = {"NEIGHBOURS": 2, "KT": 1, "DOUBLE": False, "KB": 6, "TERMS": 1, **tile.constexprs()}
    of_bf16, of_fp32 = {**operands, "bias": "bf16", "out": "bf16"}, {**of_fp32, "bias": "fp32", "out": "fp32"}
    fold, fold_fp32 = {"weight": "bf16", "out": "fp16"}, {"weight": "fp32", "out": "fp32"}
    return [
        signature(_fold, fold, {"TAPS": 1, "KT": 1, "BLOCK": 1024}),
        signature(_fold, fold, {"TAPS": 3, "KT": 2, "BLOCK": 1024}),
        signature(_fold, fold_fp32, {"TAPS": 1, "KT": 1, "BLOCK": 1024}),
        signature(_upsample_conv, of_bf16, {**constants, "unit": None}, warps=tile.warps),
        signature(_upsample_conv, of_bf16, {**constants, "unit": None, "KT": 2, "DOUBLE": True}, warps=tile.warps),
        signature(
            _upsample_conv,
            {**of_fp32, "unit": "fp32"},
            {**constants, "TERMS": 2, **in_two.constexprs()},
            warps=in_two.warps,
        ),
    ]
