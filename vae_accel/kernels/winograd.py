"""Winograd's F(2, 3) along time: two frames of a 3x3x3 convolution for four 3x3 convolutions instead of six.

Of frames d0 to d3, two of them in front of the pair, v = (d0 - d2, d1 + d2, d2 - d1, d1 - d3) is convolved by
g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2 and g2 to m0 to m3; the pair is m0 + m1 + m2 and m1 - m2 - m3 (Lavin and
Gray, 2016). The sums of the second transform are formed in the accumulators: m1 and m2 first, then their sum and
difference, to which m0 and -m3 are added. The first transform is written by the RMS norm and SiLU before the
convolution. Operands are fp16 on both sides, so that the whole convolution is as close to fp32 as its bf16 result can
be (relative RMS 1.67e-3, where the vendor's bf16 convolution is at 2.2e-3). Not in an fp32 model: the rounding of
transformed operands is 4.3e-4, where TF32 has 3.0e-4 (simulated: operands to nearest, sums in fp64).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, bordered
from ._dispatch import LazyFunction, Signature, lazy_kernel, next_power_of_2, signature, triton_available
from .eligible import measured_on
from .rms_norm_act import reference as rms_norm_reference
from .tile_choice import choose
from .tile_io import begin, block_of, clear_head, finish, frames_of, rows_of
from .tiles import Tile, key_of

tl: Any = None  # triton.language, bound at the first launch

TILE = 4096  # elements of a frame a program of the norm holds
KEPT = 2


def reference(x: Tensor) -> Tensor:
    """The first transform of `[N, C, 2 + T, H, W]` with T even: `[N, C, 2 T, H, W]`, four frames a pair."""
    d = [x[:, :, i : x.shape[2] - 2 + i : 2] for i in range(2)] + [x[:, :, i::2] for i in (2, 3)]
    v = torch.stack((d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]), 3)
    return v.flatten(2, 3)


@LazyFunction
def _normed(pointer, gamma, bias, inside, eps, C, ROWS: tl.constexpr, COLS: tl.constexpr, ACT: tl.constexpr):
    """RMS norm and SiLU of one tile, rounded to fp16 as the frame is kept, in fp32."""
    value = tl.load(pointer, mask=inside, other=0).to(tl.float32)
    square = tl.sum(value * value, axis=1, keep_dims=True)
    value = value * (tl.sqrt(1.0 * C) / tl.maximum(tl.sqrt(square), eps)) * gamma + bias
    if ACT:
        value = value / (1 + tl.exp(-value))
    return tl.clamp(value, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16).to(tl.float32)


@lazy_kernel(alike="T FRAME")
def _norm_pairs(
    x, history, out, kept, weight, eps, C, T, FRAME,
    ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """`ROWS` pixels of all frames of one sample: normed, transformed pair by pair, the last two kept."""
    n = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    inside = (row < FRAME) & (col < C)
    frame = FRAME.to(tl.int64) * C
    place = row.to(tl.int64) * C + col
    gamma = tl.load(weight + col, mask=col < C, other=0).to(tl.float32)
    if history is not None:
        d0 = tl.load(history + n * 2 * frame + place, mask=inside, other=0).to(tl.float32)
        d1 = tl.load(history + (n * 2 + 1) * frame + place, mask=inside, other=0).to(tl.float32)
    else:
        d0 = tl.full([ROWS, COLS], 0, tl.float32)
        d1 = tl.full([ROWS, COLS], 0, tl.float32)
    source = x + n * T * frame + place
    target = out + n * T * 2 * frame + place
    for _ in range(0, T, 2):
        d2 = _normed(source, gamma, 0.0, inside, eps, C, ROWS, COLS, ACT)
        d3 = _normed(source + frame, gamma, 0.0, inside, eps, C, ROWS, COLS, ACT)
        tl.store(target, (d0 - d2).to(tl.float16), mask=inside)
        tl.store(target + frame, (d1 + d2).to(tl.float16), mask=inside)
        tl.store(target + 2 * frame, (d2 - d1).to(tl.float16), mask=inside)
        tl.store(target + 3 * frame, (d1 - d3).to(tl.float16), mask=inside)
        d0 = d2
        d1 = d3
        source += 2 * frame
        target += 4 * frame
    tl.store(kept + n * 2 * frame + place, d0.to(tl.float16), mask=inside)
    tl.store(kept + (n * 2 + 1) * frame + place, d1.to(tl.float16), mask=inside)


@lazy_kernel(alike="total taps")
def _transform_taps(weight, out, total, taps, run, padded, stride_o, stride_t, BLOCK: tl.constexpr):
    """[O, 3, taps, run] to fp16 [O, 4, taps, padded run], the order in which the convolution walks, from fp32 sums."""
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = item % padded
    tap = item // padded % taps
    o = item // padded // taps
    inside = item < total
    source = weight + o * stride_o + tap * run + k
    real = inside & (k < run)
    g0 = tl.load(source, mask=real, other=0).to(tl.float32)
    g1 = tl.load(source + stride_t, mask=real, other=0).to(tl.float32)
    g2 = tl.load(source + 2 * stride_t, mask=real, other=0).to(tl.float32)
    target = out + (o * 4 * taps + tap) * padded + k
    tl.store(target, ((g0 + g2 + g1) * 0.5).to(tl.float16), mask=inside)
    tl.store(target + taps * padded, ((g0 + g2 - g1) * 0.5).to(tl.float16), mask=inside)
    tl.store(target + 2 * taps * padded, g0.to(tl.float16), mask=inside)
    tl.store(target + 3 * taps * padded, (-g2).to(tl.float16), mask=inside)


@lazy_kernel(alike="pairs H W ROW FRAME O tiles_n border")
def _conv_pairs(
    x, w, bias, residual, out, head, pairs, H, W, ROW, FRAME, O, tiles_n, border,
    KB: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`x`: overlapping rows [pixels, 3 C] of four frames a pair. `w`: [O, 4 * 3 * KB DEPTH]."""
    PER: tl.constexpr = 3 * KB
    clear_head(head, border, 4 * ROWS)
    pid = tl.program_id(0)
    n0 = (pid % tiles_n) * COLS
    pair = pid // tiles_n % pairs
    o0 = pid // (tiles_n * pairs) * ROWS
    first = 4 * pair * FRAME + o0
    p = tl.full([ROWS, COLS], 0, tl.float32)
    q = tl.full([ROWS, COLS], 0, tl.float32)
    for i in tl.range(0, PER, num_stages=STAGES):
        pixel = first + i // KB * ROW
        a = x.load([pixel + FRAME, i % KB * DEPTH])
        b = x.load([pixel + 2 * FRAME, i % KB * DEPTH])
        p = tl.dot(a, w.load([n0, i * DEPTH]).T, p)
        q = tl.dot(b, w.load([n0, (i + PER) * DEPTH]).T, q)
    total = p + q
    q = p - q + begin(bias, residual, 2 * pair + 1, o0, n0, n0, O, ROWS, COLS)
    p = total + begin(bias, residual, 2 * pair, o0, n0, n0, O, ROWS, COLS)
    for i in tl.range(2 * PER, 3 * PER, num_stages=STAGES):
        pixel = first + (i // KB - 6) * ROW
        a = x.load([pixel, i % KB * DEPTH])
        b = x.load([pixel + 3 * FRAME, i % KB * DEPTH])
        p = tl.dot(a, w.load([n0, i * DEPTH]).T, p)
        q = tl.dot(b, w.load([n0, (i + PER) * DEPTH]).T, q)
    finish(out, p, 2 * pair, o0, n0, ROW, H, W, ROWS, COLS)
    finish(out, q, 2 * pair + 1, o0, n0, ROW, H, W, ROWS, COLS)


def suits(x: Tensor, channels_out: int, kernel: tuple[int, ...]) -> bool:
    """Whether the convolution of a normed bf16 `[N, C, T, H, W]` is worth transforming, as measured (`tile_of`)."""
    if tuple(kernel) != (3, 3, 3) or x.dim() != 5 or x.shape[2] % 2 or x.dtype != torch.bfloat16:
        return False
    channels = x.shape[1]
    if tile_of(channels_out, channels) is None or channels % 8:  # the copy engine moves multiples of 16 bytes
        return False
    return triton_available(x) and measured_on(x.device) and not torch.compiler.is_compiling()


def tile_of(channels_out: int, channels_in: int) -> Tile | None:
    """The tile, or None where the direct form with its norm is faster: below 192 channels the input is too large beside
    the work; 192 outputs do not fit the registers twice (spilled, 460 TFLOP/s; the direct form has 730); for multiples
    of 256 the direct form reads its pixels half as often (256 channels: 9.5 ms instead of 9.9; 1024: 4.6 and 4.9)."""
    suited = channels_out % 256 == 128 and channels_in >= 192
    return Tile(128, 128, 0, 64, 3, 8) if suited else None


def rms_norm_pairs(
    x: Tensor, weight: Tensor, eps: float, history: Tensor | None, *, act: bool = True
) -> tuple[Tensor, Tensor]:
    """Wan's RMS norm of `[N, C, T, H, W]` (T even), SiLU if `act`, and the first transform, in fp16.

    Returns the transformed clip `[N, C, 2 T, H, W]` and the last two frames before the transform, which are `history`
    of the next call; both bordered. Of two frames of history, those that are missing are zeros.
    """
    n, c, t, h, w = x.shape
    if history is not None and history.shape[2] < KEPT:
        history = F.pad(history, (0, 0, 0, 0, KEPT - history.shape[2], 0))
    if not triton_available(x):
        frames = rms_norm_reference(x, weight, None, eps, act=act, dtype=torch.float16)
        before = frames.new_zeros((n, c, KEPT, h, w)) if history is None else history.to(torch.float16)
        frames = torch.cat((before, frames), 2).float()
        return reference(frames).to(torch.float16), frames[:, :, -KEPT:].to(torch.float16)
    x = bordered.bordered(x)
    history = None if history is None else bordered.pixels_of(bordered.bordered(history, torch.float16))
    out = bordered.empty((n, c, 2 * t, h, w), torch.float16, x.device)
    kept = bordered.empty((n, c, KEPT, h, w), torch.float16, x.device)
    frame = bordered.geometry(x).frame
    for clip in (out, kept):
        bordered.pixels_of(clip)[bordered.geometry(clip).frames * frame :].zero_()
    cols = next_power_of_2(c)
    rows = max(TILE // cols, 1)
    if _dispatch.tally is not None:
        _dispatch.tally("_norm_pairs", 0, 3 * x.numel() * x.element_size())
    with torch.cuda.device_of(x):
        _norm_pairs[-(-frame // rows), n](
            bordered.pixels_of(x), history, bordered.pixels_of(out), bordered.pixels_of(kept), weight, eps, c, t, frame,
            ACT=act, ROWS=rows, COLS=cols, num_warps=4,
        )  # fmt: skip
    return out, kept


def transformed_taps(weight: Tensor, depth: int) -> Tensor:
    """fp16 `[O, 4 * 3 * padded run]` of `[O, I, 3, 3, 3]`, as `_conv_pairs` reads it."""
    taps = weight.movedim(1, -1).flatten(3)
    taps = taps if taps.stride()[2:] == (taps.shape[3], 1) else taps.contiguous()
    o, _, kh, run = taps.shape
    padded = -(-run // depth) * depth
    out = torch.empty((o, 4 * kh * padded), dtype=torch.float16, device=weight.device)
    total = o * kh * padded
    with torch.cuda.device_of(weight):
        _transform_taps[(-(-total // 1024),)](
            taps, out, total, kh, run, padded, taps.stride(0), taps.stride(1), BLOCK=1024, num_warps=4
        )
    return out


def conv_pairs(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """The convolution, by `weight` `[O, I, 3, 3, 3]`, of what `rms_norm_pairs` made: `[N, O, T, H, W]`, bordered.

    Two frames stand in front, one pixel of zeros around; `residual` is added in fp32 before the one rounding.
    """
    n, _, t, h, w = x.shape
    rule = tile_of(*weight.shape[:2])
    if tile is None and rule is not None:
        tile = choose(key_of("winograd", x, weight), rule, x.device)
    assert tile is not None
    x = bordered.bordered(x)
    out = bordered.empty((n, weight.shape[0], t // 2, h, w), weight.dtype, x.device)
    residual = None if residual is None else bordered.bordered(residual)
    matrix = transformed_taps(weight, tile.depth)
    place, pairs = bordered.geometry(x), n * t // 4
    tiles_n = -(-weight.shape[0] // tile.cols)
    if _dispatch.tally is not None:  # as many as the direct convolution, for a rate that compares
        _dispatch.tally("_conv_pairs", 2 * out.numel() * weight[0].numel(), 0)
    with torch.cuda.device_of(x):
        _conv_pairs[(tiles_n * pairs * -(-place.frame // tile.rows),)](
            rows_of(x, 3, tile), block_of(matrix, tile.cols, tile), bias, frames_of(residual, tile, tile.cols),
            frames_of(out, tile, tile.cols), bordered.pixels_of(out), pairs, place.height, place.width, place.row,
            place.frame, weight.shape[0], tiles_n, place.first * out.shape[1],
            KB=matrix.shape[1] // (12 * tile.depth), **tile.constexprs(), num_warps=tile.warps,
        )  # fmt: skip
    return out


def signatures() -> list[Signature]:
    """The kernels as they are compiled ahead of time in the tests."""
    tile = tile_of(384, 384)
    assert tile is not None
    halves = dict.fromkeys(("history", "out", "kept"), "fp16")
    frames = dict.fromkeys(("residual", "out"), tile.frames("bf16"))
    convolution = {"x": tile.pixels("fp16"), "w": tile.taps("fp16"), "bias": "bf16", "head": "bf16", **frames}
    return [
        signature(_norm_pairs, {"x": "bf16", "weight": "bf16", **halves}, {"ACT": True, "ROWS": 16, "COLS": 256}),
        signature(_transform_taps, {"weight": "bf16", "out": "fp16"}, {"BLOCK": 1024}),
        signature(_conv_pairs, convolution, {"KB": 18, **tile.constexprs()}, warps=tile.warps),
    ]
