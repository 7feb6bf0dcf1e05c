"""A 3x3 or 3x3x3 convolution to a few channels: 96 -> 3 at the end of a decoder, 256 -> 12 at that of Wan 2.2's.

As a product over shifted pixels it reads its input 27 times for 3 columns of a tile that is 16 wide at least (24
TFLOP/s in cuDNN, 1.03 ms on four frames of 480 x 832). Here one product makes, at each pixel, what it gives to each of
its 9 neighbours, the taps in time summed, as 27 planes of fp32; a second pass gathers them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, bordered
from ._dispatch import Signature, differentiates, lazy_kernel, signature
from .conv import conv
from .conv_law import has_form
from .eligible import unsupported
from .half_operands import in_terms, scaled, terms_of
from .tile_choice import choose
from .tile_io import block_of, rows_of
from .tiles import Tile, key_of

tl: Any = None  # triton.language, bound at the first launch

COLUMNS = (32, 64, 128)  # so many of 9 times the output channels
MOST = COLUMNS[-1] // 9


@lazy_kernel(alike="frames T S K FRAME")
def _products(
    x, history, w, out, frames, T, S, K, FRAME,
    BEFORE: tl.constexpr, REPEAT: tl.constexpr, KT: tl.constexpr, KB: tl.constexpr, TERMS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`x`, `history`: [pixels, C]. `w`: [COLS, TERMS KT KB DEPTH]. `out`: [frames, COLS, FRAME] fp32, with the border.

    `REPEAT` and the numbers of frames as in `conv`.
    """
    f = tl.program_id(0) % frames
    o0 = tl.program_id(0) // frames * ROWS
    n = f // T
    t = f % T
    acc = tl.full([ROWS, COLS], 0, tl.float32)
    here = 0 if REPEAT else tl.maximum(BEFORE - t, 0)  # the first tap in time that sees a frame of x
    if BEFORE and not REPEAT:
        past = (n * K + K + t - BEFORE) * FRAME + o0
        for i in tl.range(tl.maximum(here - K, 0) * KB, here * KB, num_stages=STAGES):
            a = history.load([past + i // KB * FRAME, i % KB * DEPTH])
            acc = tl.dot(a, w.load([0, i * DEPTH]).T, acc)
            if TERMS == 2:
                acc = tl.dot(a, w.load([0, (i + KT * KB) * DEPTH]).T, acc)
    now = (n * S + t - BEFORE) * FRAME + o0
    for i in tl.range(here * KB, KT * KB, num_stages=STAGES):
        s = i // KB
        if REPEAT:
            s = tl.minimum(tl.maximum(s, BEFORE - t), S - 1 + BEFORE - t)
        a = x.load([now + s * FRAME, i % KB * DEPTH])
        acc = tl.dot(a, w.load([0, i * DEPTH]).T, acc)
        if TERMS == 2:
            acc = tl.dot(a, w.load([0, (i + KT * KB) * DEPTH]).T, acc)
    pixel = o0 + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    tl.store(out + (f.to(tl.int64) * COLS + col) * FRAME + pixel, acc, mask=pixel < FRAME)


@lazy_kernel(alike="total frames H W ROW FRAME")
def _gather(
    y, bias, unit, out, total, frames, H, W, ROW, FRAME, COLS: tl.constexpr, O: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`y` [frames, COLS, FRAME] to `out` [N, O, T, H, W] with T * H * W = total."""
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1)
    inside = item < total
    w = item % W
    h = item // W % H
    t = item // (W * H)
    plane = (n * frames + t).to(tl.int64) * COLS
    for o in tl.static_range(O):
        value = tl.full([BLOCK], 0, tl.float32)
        for tap in tl.static_range(9):
            pixel = (h + tap // 3) * ROW + w + tap % 3
            # Below the last row may be the next frame's zeros, of which this frame's planes hold nothing.
            value += tl.load(y + (plane + tap * O + o) * FRAME + pixel, mask=inside & (pixel < FRAME), other=0)
        if unit is not None:
            value *= tl.load(unit)
        if bias is not None:
            value += tl.load(bias + o).to(tl.float32)
        target = out + (n * O + o).to(tl.int64) * total + item
        tl.store(target, value.to(out.dtype.element_ty), mask=inside)


def tile_of(channels_in: int, channels_out: int, terms: int = 1) -> Tile:
    columns = next(c for c in COLUMNS if c >= 9 * channels_out)
    return Tile(256, columns, 0, 64 if channels_in % 64 == 0 else 32, 4, 8).beside(terms)


def thin_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    before: int = 0,
    history: Tensor | None = None,
    after: int = 0,
    time: str = "zeros",
    space: str = "zeros",
) -> Tensor:
    """`conv` of `[N, I, (T,) H, W]` by `[O, I, (kt,) 3, 3]`, O <= 14, with one pixel around each frame.

    What is around it as in `conv`. The result is `[N, O, (T',) H, W]` in the weight's dtype; our kernel's is
    contiguous.

    Raises:
        ValueError: more output channels than the planes are for.
    """
    o, i, *in_time = weight.shape[:-2]
    if o > MOST:
        raise ValueError(f"thin_conv makes at most {MOST} channels, and was asked for {o}")
    terms = terms_of(weight.dtype)
    rule = tile_of(i, o, terms)
    products = weight.new_empty((rule.cols, i, 1, 1))
    ours = not differentiates(x, weight, bias, history) and has_form(x, before, history, after, time, space)
    ours = ours and unsupported(x, products, (0, 0)) is None
    tile = choose(key_of("thin_conv", x, weight), rule, x.device) if ours else None
    if tile is None:
        around: dict[str, Any] = {"before": before, "history": history, "after": after, "time": time, "space": space}
        return conv(x, weight, bias, padding=(1, 1), **around)
    columns, depth, unit = tile.cols, tile.depth, None
    if weight.dtype == torch.float32:
        x, history, weight, unit = scaled(x, history, weight)
    taps = weight.movedim((-2, -1), (0, 1)).flatten(0, 2).movedim(1, -1).reshape(9 * o, -1, i)  # (kh, kw, o), kt, i
    matrix = F.pad(taps, (0, -i % depth, 0, 0, 0, columns - 9 * o)).flatten(1)
    matrix = in_terms(matrix, x.dtype, terms)
    x = bordered.bordered(x, border=space)
    history = None if history is None else bordered.bordered(history, x.dtype, space)
    n, kt, place = x.shape[0], taps.shape[1], bordered.geometry(x)
    frames_in = place.frames // n
    frames = (frames_in + before + after - kt + 1) * n
    y = torch.empty((frames, columns, place.frame), dtype=torch.float32, device=x.device)
    out = x.new_empty((n, o, *([frames // n] if in_time else []), *x.shape[-2:]), dtype=weight.dtype)
    total = out[0, 0].numel()
    if _dispatch.tally is not None:
        _dispatch.tally("_products", 0, x.numel() * x.element_size() + y.numel() * y.element_size())
        _dispatch.tally("_gather", 0, y.numel() * y.element_size() + out.numel() * out.element_size())
    with torch.cuda.device_of(x):
        _products[(frames * -(-place.frame // tile.rows),)](
            rows_of(x, 1, tile), rows_of(x if history is None else history, 1, tile),
            block_of(matrix, columns, tile), y, frames, frames // n, frames_in,
            0 if history is None else history.shape[2], place.frame,
            BEFORE=before, REPEAT=time == "replicate" and history is None, KT=kt,
            KB=matrix.shape[1] // (terms * kt * depth), TERMS=terms, **tile.constexprs(), num_warps=tile.warps,
        )  # fmt: skip
        _gather[-(-total // 512), n](
            y, bias, unit, out, total, frames // n, place.height, place.width, place.row, place.frame,
            COLS=columns, O=o, BLOCK=512, num_warps=4,
        )  # fmt: skip
    return out


def signatures() -> list[Signature]:
    """The kernels as they are compiled ahead of time in the tests."""
    tile = tile_of(96, 3)
    gathered = {"COLS": tile.cols, "O": 3, "BLOCK": 512}
    taps = {"BEFORE": 2, "REPEAT": False, "KT": 3, "KB": 3}
    products = {"x": tile.pixels("fp16"), "history": tile.pixels("fp16"), "w": tile.taps("fp16"), "out": "fp32"}
    return [
        signature(_products, products, {**taps, "TERMS": 1, **tile.constexprs()}, warps=tile.warps),
        signature(_products, products, {**taps, "TERMS": 2, **tile.constexprs()}, warps=tile.warps),
        signature(_gather, {"y": "fp32", "bias": "bf16", "out": "bf16"}, {"unit": None, **gathered}),
        signature(_gather, dict.fromkeys(("y", "bias", "unit", "out"), "fp32"), gathered),
    ]
