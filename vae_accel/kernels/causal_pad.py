"""Padding of `[N, C, T, H, W]` with cached frames in front, in one read and one write, in the input's own layout.

Stock writes every activation two or three times before a causal convolution (`torch.cat` of the cache, `F.pad`, and
for channels-last inputs a transposition: aten's `replication_pad3d` forces NCDHW and is 591 of the 3208 ms of a
HunyuanVideo decode on an H200).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import (
    LazyKernel,
    Signature,
    differentiates,
    empty_in_layout_of,
    in_layout_of,
    is_channels_last,
    next_power_of_2,
    signature,
    triton_available,
)

tl: Any = None  # triton.language, bound at the first launch

MODES = ("zeros", "replicate", "reflect")  # a kernel takes the index
TILE = 2048  # elements a program moves
MAX_COLS = 128  # channels among them, at most
WARPS = 4


def reference(
    x: Tensor,
    pad: Sequence[int],
    *,
    time: str = "replicate",
    space: str = "zeros",
    history: Tensor | None = None,
) -> Tensor:
    """The law: `torch.cat` of the history, then `F.pad` of the spatial axes and of time, each in its mode."""
    w0, w1, h0, h1, t0, t1 = pad
    if history is not None:
        x, t0 = torch.cat([history, x], dim=2), t0 - history.shape[2]
    for mode, sides in ((space, (w0, w1, h0, h1, 0, 0)), (time, (0, 0, 0, 0, t0, t1))):
        x = F.pad(x, sides) if mode == "zeros" else F.pad(x, sides, mode=mode)
    return x


@LazyKernel
def _causal_pad(
    x, history, out, K, C, T, H, W, t0, h0, w0, out_T, out_W, out_S,
    stride_n, stride_c, stride_t, stride_h, stride_w,
    history_n, history_c, history_t, history_h, history_w,
    out_n, out_c, out_t, out_s,
    TIME: tl.constexpr, SPACE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """`ROWS` positions of one output frame by `COLS` channels. Frames `[0, K)` of the source are the history's."""
    n = (tl.program_id(2) // out_T).to(tl.int64)
    frame = tl.program_id(2) % out_T
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    t, h, w = frame - t0, row // out_W - h0, row % out_W - w0
    if TIME == 1:
        t = tl.minimum(tl.maximum(t, 0), K + T - 1)
    if SPACE == 2:
        h = H - 1 - tl.abs(H - 1 - tl.abs(h))
        w = W - 1 - tl.abs(W - 1 - tl.abs(w))
    if SPACE == 1:
        h = tl.minimum(tl.maximum(h, 0), H - 1)
        w = tl.minimum(tl.maximum(w, 0), W - 1)
    inside = (t >= 0) & (t < K + T) & (h >= 0) & (h < H) & (w >= 0) & (w < W) & (row < out_S) & (col < C)

    t, h, w, c = t.to(tl.int64), h.to(tl.int64), w.to(tl.int64), col.to(tl.int64)
    source = x + n * stride_n + (t - K) * stride_t + (h * stride_h + w * stride_w) + c * stride_c
    if history is not None:  # noqa: SIM102 - settled when compiling, the inner one when running
        if t < K:
            source = history + n * history_n + t * history_t + (h * history_h + w * history_w) + c * history_c
    target = out + n * out_n + frame.to(tl.int64) * out_t + row.to(tl.int64) * out_s + c * out_c
    tl.store(target, tl.load(source, mask=inside, other=0), mask=(row < out_S) & (col < C))


def _padded_shape(x: Tensor, pad: Sequence[int]) -> tuple[int, int, int, int, int]:
    w0, w1, h0, h1, t0, t1 = pad
    n, c, t, h, w = x.shape
    return n, c, t + t0 + t1, h + h0 + h1, w + w0 + w1


def _launch(x: Tensor, pad: Sequence[int], time: str, space: str, history: Tensor | None) -> Tensor:
    out = empty_in_layout_of(x, _padded_shape(x, pad))
    if out.numel() == 0:
        return out
    w0, _, h0, _, t0, _ = pad
    n, C, T, H, W = x.shape
    _, _, out_T, out_H, out_W = out.shape
    K = 0 if history is None else history.shape[2]
    COLS = min(next_power_of_2(C), MAX_COLS) if is_channels_last(x) else 1
    ROWS = TILE // COLS
    with torch.cuda.device_of(x):
        _causal_pad[-(-out_H * out_W // ROWS), -(-C // COLS), n * out_T](
            x, history, out, K, C, T, H, W, t0 - K, h0, w0, out_T, out_W, out_H * out_W,
            *x.stride(), *(x if history is None else history).stride(), *out.stride()[:3], out.stride(4),
            TIME=MODES.index(time), SPACE=MODES.index(space), ROWS=ROWS, COLS=COLS, num_warps=WARPS,
        )  # fmt: skip
    return out


def _run(x: Tensor, pad: Sequence[int], time: str, space: str, history: Tensor | None) -> Tensor:
    if triton_available(x):
        return _launch(x, pad, time, space, history)
    result = reference(x, pad, time=time, space=space, history=history)
    return in_layout_of(x, result.clone() if result is x else result)


_op = torch.library.custom_op("vae_accel::causal_pad", _run, mutates_args=())
_op.register_fake(lambda x, pad, *_: empty_in_layout_of(x, _padded_shape(x, pad)))


def causal_pad(
    x: Tensor,
    pad: Sequence[int],
    *,
    time: str = "replicate",
    space: str = "zeros",
    history: Tensor | None = None,
) -> Tensor:
    """`x` `[N, C, T, H, W]` padded by `(w0, w1, h0, h1, t0, t1)`, each >= 0: `[N, C, T+t0+t1, H+h0+h1, W+w0+w1]`.

    `time` is "zeros" or "replicate", `space` "zeros", "replicate" or "reflect". `history` `[N, C, k, H, W]`, k <= t0,
    stands in front of `x` for k of the t0 frames, so that with k < t0 it is the history that is padded. Bit-equal to
    `torch.cat` and `F.pad`. The result is a new tensor in x's layout, channels-last or contiguous. Where autograd
    records, the reference runs.

    Raises:
        ValueError: an unknown mode, a negative pad, or a history that does not fit.
    """
    if time not in MODES[:2] or space not in MODES:
        raise ValueError(f"time must be one of {MODES[:2]} and space one of {MODES}, got {time!r} and {space!r}")
    if x.dim() != 5 or len(pad) != 6 or min(pad) < 0:
        raise ValueError(f"x must be [N, C, T, H, W] and pad six sides >= 0, got {tuple(x.shape)} and {tuple(pad)}")
    if space == "reflect" and (max(pad[:2]) >= x.shape[4] or max(pad[2:4]) >= x.shape[3]):
        raise ValueError(f"reflect needs pads below H and W, got {tuple(pad)} for {tuple(x.shape)}")
    if history is not None:
        n, c, t, h, w = history.shape
        if (n, c, h, w) != (*x.shape[:2], *x.shape[3:]) or t > pad[4] or history.dtype != x.dtype:
            raise ValueError(
                f"history must be [N, C, k <= {pad[4]}, H, W] of {x.dtype} beside x {tuple(x.shape)}, "
                f"got {tuple(history.shape)} of {history.dtype}"
            )
    if differentiates(x, history):
        return reference(x, pad, time=time, space=space, history=history)
    run = _op if torch.compiler.is_compiling() else _run
    return run(x, pad, time, space, history)


def signatures() -> list[Signature]:
    """The kernel as it is compiled ahead of time in the tests: channels-last with a history, contiguous without."""
    pointers = {"x": "bf16", "out": "bf16", "history": "bf16"}
    return [
        signature(_causal_pad, pointers, {"TIME": 0, "SPACE": 0, "ROWS": 32, "COLS": 128}),
        signature(_causal_pad, pointers, {"history": None, "TIME": 1, "SPACE": 2, "ROWS": TILE, "COLS": 1}),
    ]
