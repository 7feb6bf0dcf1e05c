"""Convolution as an implicit GEMM: `[N, C, H, W]` or `[N, C, T, H, W]`, stride 1, one group.

What stock does around the vendor's convolution happens inside this one: frames in front of the clip come from a cache
tensor or are zeros (no cat, no pad), bias and residual are added in fp32 before the only rounding. Activations are
bordered clips (`kernels/bordered.py`): a tap is a shift of rows of the matrix `[pixels, C]`, and the taps of a row are
one run of `kw * C` numbers, read through a tensor descriptor whose rows overlap. So the inner loop is that of a plain
matrix product, both operands by the copy engine. A descriptor with height and width in it would need a reshape of the
first operand, for which Triton 3.6 goes through registers (seen in its IR; the loads of a row stay in shared memory).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, bordered
from ._dispatch import (
    Signature,
    differentiates,
    empty_in_layout_of,
    lazy_kernel,
    signature,
    triton_available,
)
from .causal_pad import causal_pad
from .causal_pad import reference as padded
from .tile_choice import choose
from .tile_io import begin, block_of, finish, frames_of, rows_of
from .tiles import Tile, key_of

tl: Any = None  # triton.language, bound at the first launch


def reference(
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
) -> Tensor:
    """The law: the vendor's convolution of the padded clip, and the residual added to what it rounded.

    fp16 beside bf16 is multiplied in fp32: fp16 cannot hold every result.
    """
    dtype = weight.dtype
    if x.dtype != dtype:
        x = x.to(torch.promote_types(x.dtype, dtype))
    sides = (padding[1], padding[1], padding[0], padding[0]) if space != "zeros" else (0, 0, 0, 0)
    if x.dim() == 5:
        history = None if history is None else history.to(x.dtype)
        x = padded(x, (*sides, before, after), time=time, space=space, history=history)
    elif any(sides):
        x = F.pad(x, sides, mode=space)
    padding = padding if space == "zeros" else (0, 0)
    convolve = F.conv3d if x.dim() == 5 else F.conv2d
    y = convolve(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), 1, (0,) * (x.dim() - 4) + padding)
    if split > 1:
        y = interleaved(y, split, x)
    return (y if residual is None else y + residual).to(dtype)


def interleaved(y: Tensor, split: int, like: Tensor) -> Tensor:
    """`[N, split * C, T, H, W]` as frames `[N, C, T * split, H, W]`, those of one frame after each other, in the layout
    of `like` (the vendor's may be another)."""
    frames = y.unflatten(1, (split, -1)).movedim(1, 3)
    shape = (y.shape[0], y.shape[1] // split, y.shape[2] * split, *y.shape[3:])
    out = empty_in_layout_of(like, shape, y.dtype)
    out.unflatten(2, (-1, split)).copy_(frames)
    return out


@lazy_kernel(alike="frames T S K H W ROW FRAME O first channels tiles_n")
def _conv(
    x, history, w, w2, bias, residual, residual2, out, out2,
    frames, T, S, K, H, W, ROW, FRAME, O, first, channels, tiles_n,
    BEFORE: tl.constexpr, REPEAT: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KB: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, MORE: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`x`, `history`: overlapping rows [pixels, kw C]. `w`: [O, taps, KB DEPTH]. `out`: [frames, FRAME, channels].

    A sample has T frames, of `x` S, of `history` K. With `REPEAT` the first and the last stand for those beyond them.
    """
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
    acc = begin(bias, residual, frame, o0, n0, c0, O, ROWS, COLS)
    if MORE:
        acc2 = begin(bias, residual2, frame, o0, n0 + COLS, c0 + COLS, O, ROWS, MORE)
    PER: tl.constexpr = KH * KB
    here = 0 if REPEAT else tl.maximum(BEFORE - t, 0)  # the first tap in time that sees a frame of x
    if BEFORE and not REPEAT:
        past = (n * K + K + t - BEFORE) * FRAME + o0 + first
        for i in tl.range(tl.maximum(here - K, 0) * PER, here * PER, num_stages=STAGES):
            a = history.load([past + i // PER * FRAME + i // KB % KH * ROW, i % KB * DEPTH])
            acc = tl.dot(a, w.load([n0, i * DEPTH]).T, acc)
            if MORE:
                acc2 = tl.dot(a, w2.load([n0 + COLS, i * DEPTH]).T, acc2)
    now = (n * S + t - BEFORE) * FRAME + o0 + first
    for i in tl.range(here * PER, KT * PER, num_stages=STAGES):
        s = i // PER
        if REPEAT:
            s = tl.minimum(tl.maximum(s, BEFORE - t), S - 1 + BEFORE - t)
        a = x.load([now + s * FRAME + i // KB % KH * ROW, i % KB * DEPTH])
        acc = tl.dot(a, w.load([n0, i * DEPTH]).T, acc)
        if MORE:
            acc2 = tl.dot(a, w2.load([n0 + COLS, i * DEPTH]).T, acc2)
    finish(out, acc, frame, o0, c0, ROW, H, W, ROWS, COLS)
    if MORE:
        finish(out2, acc2, frame, o0, c0 + COLS, ROW, H, W, ROWS, MORE)


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
    tile: Tile | None = None,
) -> Tensor:
    n, channels_in, *spatial = x.shape
    frames_in = spatial[0] if len(spatial) == 3 else 1
    channels_out, kt, kh, kw = weight.shape[0], *((1,) * (4 - weight.dim() + 1) + tuple(weight.shape[2:]))
    frames_out = (frames_in + before + after - kt + 1) * split
    shape = (n, channels_out // split, *((frames_out,) if len(spatial) == 3 else ()), *spatial[-2:])
    if kh == 3:
        x = bordered.bordered(x, border=space)
    elif not bordered.is_bordered(x):
        x = bordered.laid_out(x, border=space)
    place = bordered.geometry(x)
    out = bordered.empty(shape, weight.dtype, x.device, place.border)
    together = _together(x, weight, split)
    tile = tile or tile_of(channels_in, channels_out // split * together, kt * kh * kw)
    history = None if history is None else bordered.bordered(history, x.dtype, place.border)
    residual = None if residual is None else bordered.laid_out(residual, border=place.border)
    matrix = weight_matrix(weight, x.dtype, tile.depth, together)
    bias = bias if bias is None or together == 1 else bias.repeat(together)
    sides = [frames_of(clip, tile, cols, together) for clip in (residual, out) for cols in (tile.cols, tile.more)]
    columns = matrix.shape[0]
    tiles_n = split * -(-(columns // split) // (tile.cols + tile.more))
    frames, frame = n * (frames_out // split), place.frame // together
    if _dispatch.tally is not None:
        _dispatch.tally("_conv", 2 * out.numel() * weight[0].numel(), 0)
    with torch.cuda.device_of(x):
        _conv[(tiles_n * frames * -(-frame // tile.rows),)](
            rows_of(x, kw, tile, together), rows_of(x if history is None else history, kw, tile, together),
            block_of(matrix, tile.cols, tile), block_of(matrix, tile.more, tile) if tile.more else None,
            bias, *sides, frames, frames // n, frames_in, 0 if history is None else history.shape[2],
            place.height, place.width // together, place.row // together, frame, columns,
            0 if kh == 3 else place.first, columns // split, tiles_n,
            BEFORE=before, REPEAT=time == "replicate" and history is None, KT=kt, KH=kh,
            KB=matrix.shape[1] // (kt * kh * tile.depth), MORE=tile.more,
            **tile.constexprs(), num_warps=tile.warps,
        )  # fmt: skip
    return out


def _together(x: Tensor, weight: Tensor, split: int) -> int:
    """How many neighbouring pixels are computed as one of so many times the channels: two of 96 channels, of which a
    tile of 128 would waste a quarter. Four taps of a row stand for three, which wastes as much, but 192 channels read
    the pixels less often, and the second level cache is busy: 6.2 TB/s with one pixel at a time, 71 % by its counters.
    Expected from that, and not yet timed by itself against one pixel at a time.
    """
    return 2 if weight.shape[-1] == 3 and split == 1 and weight.shape[0] == 96 and x.shape[-1] % 2 == 0 else 1


def tile_of(channels_in: int, channels_out: int, taps: int) -> Tile:
    """The tile for a convolution: best of the few measured on an H100 (platforms/cuda/README.md)."""
    run = channels_in * (3 if taps % 9 == 0 else 1)
    depth = 32 if run % 64 and run > 64 else 64
    if channels_out % 192 == 0 and channels_out % 128:
        return Tile(256, 128, 64, 64, 3, 8)
    if channels_out % 256 == 0:
        return Tile(128, 256, 0, 64, 4, 8)
    cols = min(max(1 << (channels_out - 1).bit_length(), 16), 128)
    return Tile(256, cols, 0, depth, 4 * 64 // depth, 8)


def weight_matrix(weight: Tensor, dtype: torch.dtype, depth: int, together: int = 1) -> Tensor:
    """[together * O, taps * padded run]: the taps of a row as one run, zeros up to a multiple of `depth`.

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
    return taps.flatten(1).to(dtype)


@functools.cache
def measured_on(device: torch.device) -> bool:
    """Whether ours was measured on such a card; the CPU, where Triton is interpreted, and meta stand for one."""
    if device.type != "cuda":
        return device.type in ("cpu", "meta")
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] == 9


def runs(x: Tensor) -> bool:
    """Whether to convolve `x` here and not by the rewrites for the vendor's; on the CPU the reference stands in."""
    return not x.is_cuda or _unable(x) is None


def wants_fp16(x: Tensor) -> bool:
    """Whether what normalises bf16 `x` had better write fp16: not for the vendor's, which would convert it."""
    if x.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return False
    return measured_on(x.device) and (not x.is_cuda or triton_available(x))


def _unable(x: Tensor) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"{x.dtype} is no 16-bit type"
    if not triton_available(x):
        return "there is no Triton"
    if torch.compiler.is_compiling():
        return "a compiler sees through the vendor's"
    if not x.is_cuda and x.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bf16 as integers"
    return None if measured_on(x.device) else "it is measured on compute capability 9.0 alone"


def unsupported(x: Tensor, weight: Tensor, padding: tuple[int, int]) -> str | None:
    """Why the vendor's convolution runs instead of ours, or None."""
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return f"{weight.dtype} is no 16-bit type"
    if (reason := _unable(x)) is not None:
        return reason
    if x.shape[1] % 8 or weight.shape[0] % 8:
        return "the copy engine moves multiples of 16 bytes"
    if (tuple(weight.shape[-2:]), tuple(padding)) not in (((3, 3), (1, 1)), ((1, 1), (0, 0))):
        return f"a kernel of {tuple(weight.shape[2:])} with a padding of {tuple(padding)} has no form here"
    return None


def has_form(x: Tensor, before: int, history: Tensor | None, after: int, time: str, space: str) -> bool:
    """Whether a form here has what is around the clip: history and zeros in front of it, or repeated frames alone."""
    if space == "reflect" and min(x.shape[-2:]) < 2:  # stock says what is wrong
        return False
    if time == "zeros":
        return after == 0
    return history is None or (after == 0 and history.shape[2] == before)


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
) -> Tensor:
    """`[N, I, (T,) H, W]` convolved by `weight` `[O, I, (kt,) kh, kw]`: `[N, O, (T',) H', W']` in the weight's dtype.

    Args:
        x: activations; fp16 beside a bf16 weight is allowed, and is computed with fp16 operands.
        padding: pixels around each frame, (height, width), that `space` says: one of `bordered.BORDERS`.
        before: frames in front of a clip and `after` it, T' = T + before + after - (kt - 1); with a `time` of zeros
            none are after it, with "replicate" its first and last are repeated.
        history: `[N, I, K, H, W]`, K <= before, the frames directly in front of `x`; the others are zeros, and none
            are others with "replicate".
        residual: like the result; added in fp32 before the one rounding.
        split: the output channels are so many frames: `[N, O / split, T' * split, H, W]`, as an upsampling in time.

    The result of our kernel is a bordered clip, which is what the next one reads; of the vendor's, channels-last.
    """
    frames = (before, history, residual, split, after, time, space)
    tile = None
    if not differentiates(x, weight, bias, history, residual) and has_form(x, before, history, after, time, space):
        tile = None if unsupported(x, weight, padding) is not None else _chosen(x, weight, split)
    if tile is None:
        return _vendor(x, weight, bias, padding, *frames)
    return _launch(x, weight, bias, *frames, tile=tile)


def _chosen(x: Tensor, weight: Tensor, split: int) -> Tile | None:
    """The tile, or None where the vendor's convolution was measured to be faster."""
    together = _together(x, weight, split)
    key = key_of("conv" if together == 1 else "conv_pixel_pairs", x, weight, split=split)
    return choose(key, tile_of(key.channels_in, key.channels_out * together, key.taps), x.device)


def _vendor(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: tuple[int, int],
    before: int,
    history: Tensor | None,
    residual: Tensor | None,
    split: int,
    after: int,
    time: str,
    space: str,
) -> Tensor:
    """The law, with what is around the clip put there in one pass."""
    if history is not None:
        history = history.to(x.dtype)
    elif x.dim() == 5 and x.shape[2] == 1 and before == weight.shape[2] - 1 and time == "zeros":
        before, weight = 0, weight[:, :, -1:]  # behind zeros only the last tap sees anything: a third of the work
    if x.dim() == 5 and (before or after or space != "zeros"):
        sides = (padding[1], padding[1], padding[0], padding[0]) if space != "zeros" else (0, 0, 0, 0)
        x = causal_pad(x, (*sides, before, after), time=time, space=space, history=history)
        padding, space = (padding, space) if space == "zeros" else ((0, 0), "zeros")
    return reference(x, weight, bias, padding=padding, residual=residual, split=split, space=space)


def signatures() -> list[Signature]:
    """The kernel as it is compiled ahead of time in the tests: all a tile can have, and nothing."""
    wide, plain = tile_of(192, 192, 27), tile_of(96, 96, 9)
    taps = {"KT": 3, "KH": 3, "KB": 9, "REPEAT": False}
    absent = dict.fromkeys(("w2", "bias", "residual", "residual2", "out2"))
    pixels = {"x": wide.pixels("fp16"), "history": wide.pixels("fp16"), "w": wide.taps("fp16"), "bias": "bf16"}
    more = {"w2": wide.taps("fp16", wide.more)}
    for name in ("residual", "out"):
        more |= {name: wide.frames("bf16"), f"{name}2": wide.frames("bf16", wide.more)}
    clips = dict.fromkeys(("x", "history"), plain.pixels("fp16"))
    least = {**clips, "w": plain.taps("fp16"), "out": plain.frames("fp16")}
    all_of_it = {"BEFORE": 2, "MORE": wide.more, **taps, **wide.constexprs()}
    nothing = {"BEFORE": 0, "MORE": 0, **taps, **plain.constexprs(), **absent}
    repeats = {**nothing, "BEFORE": 2, "REPEAT": True}
    return [
        signature(_conv, pixels | more, all_of_it, warps=wide.warps),
        signature(_conv, least, nothing, warps=plain.warps),
        signature(_conv, least, repeats, warps=plain.warps),
    ]
