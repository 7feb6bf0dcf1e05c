"""HunyuanVideo 1.5 on the fused convolution, and the refiner of HunyuanImage 2.1: the same network of a single frame.

Residual blocks of RMS norm, SiLU and a convolution in the clip's own pixels, as HunyuanVideo's. Between levels channels
become pixels and frames, and a shortcut repeats channels: stock shuffles, slices, repeats and concatenates before it
adds; here the addition reads both where they lie. Frames attend to earlier ones without a mask, which stock fills row
by row (7,936 launches a tile at 121 frames).

In a bf16 model the norms write fp16 where nothing can overflow it, as in Wan's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.families import clip_conv
from vae_accel.families.frames_attend import attend_to_earlier
from vae_accel.families.row import Block, Hand
from vae_accel.families.wan import fits_fp16, normed
from vae_accel.kernels import bordered
from vae_accel.kernels._dispatch import empty_in_layout_of
from vae_accel.rewrite import module_runs_stock, runs_stock


def residual_block(block: Any, below: Callable[..., Tensor], half: bool, hidden_states: Tensor) -> Tensor:
    """[N, C, T, H, W] -> [N, C', T, H, W]; the shortcut is added by the second convolution."""
    x = hidden_states
    if x.dim() != 5 or runs_stock(x):
        return below(x)
    shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
    y = block.conv1(block.nonlinearity(normed(block.norm1, half, x)))
    return block.conv2(block.nonlinearity(normed(block.norm2, half, y)), residual=shortcut)


def attention_block(block: Any, below: Callable[..., Tensor], x: Tensor) -> Tensor:
    """[1, C, T, H, W]: each frame attends to those up to it. Several clips stock refuses."""
    if x.dim() != 5 or len(x) != 1 or x.numel() == 0 or runs_stock(x):
        return below(x)
    y = bordered.dense(block.norm(x))
    q, k, v = (project(y).permute(0, 2, 3, 4, 1).flatten(1, 3) for project in (block.to_q, block.to_k, block.to_v))
    y = attend_to_earlier(q, k, v, x.shape[2]).unflatten(1, x.shape[2:]).permute(0, 4, 1, 2, 3)
    return block.proj_out(y) + x


def upsample(block: Any, below: Callable[..., Tensor], x: Tensor) -> Tensor:
    """[N, C, T, H, W] -> [N, C', T, 2H, 2W], or 2T - 1 frames: the first stays single."""
    if x.dim() != 5 or x.numel() == 0 or module_runs_stock(block, x):
        return below(x)
    y = block.conv(x)
    n, packed, t, h, w = y.shape
    times = 2 if block.add_temporal_upsample else 1
    shape = (n, packed // (4 * times), times * (t - 1) + 1, 2 * h, 2 * w)
    if bordered.is_bordered(y):
        out = bordered.empty(shape, y.dtype, y.device, bordered.geometry(y).border)
    else:
        out = empty_in_layout_of(y, shape)
    single = t if times == 1 else 1
    # A single frame is made of half as many channels: of every two packed together, the first.
    _spread(out[:, :, :single], y[:, :, :single], x[:, :, :single], 1, times)
    if single < t:
        _spread(out[:, :, single:], y[:, :, single:], x[:, :, single:], times, 1)
    return out


def _spread(out: Tensor, y: Tensor, x: Tensor, times: int, halves: int) -> None:
    """The channels of `y`, the first of so many `halves` of each pixel's, and of `x` as often as they fit, into pixels.

    Packed outermost are the frames, then rows, then columns; `x` is repeated channel by channel.
    """
    t, h, w = y.shape[2:]
    channels = out.shape[1]
    kinds = x.shape[1] // (4 * times)
    blocks = out.unflatten(4, (w, 2)).unflatten(3, (h, 2)).unflatten(2, (t, times)).unflatten(1, (kinds, -1))
    pixels = y.unflatten(1, (times, 2, 2, -1))[:, :, :, :, :channels].unflatten(4, (kinds, -1))
    repeated = x.unflatten(1, (times, 2, 2, kinds, 1))
    # n, frame, row, column, kind, copy, T, H, W -> n, kind, copy, T, frame, H, row, W, column
    order = (0, 4, 5, 6, 1, 7, 2, 8, 3)
    assert y.shape[1] == 4 * times * halves * channels
    torch.add(pixels.permute(order), repeated.permute(order), out=blocks)


def _residual(m: Any) -> Block | str:
    names = ["conv1", "conv2"]
    reason = clip_conv.unlike_all(m, names)
    if reason is None and m.conv_shortcut is not None and (why := clip_conv.unlike_pointwise(m.conv_shortcut)):
        reason = f"conv_shortcut: {why}"
    if reason is not None:
        return reason
    half = fits_fp16(m.norm1, m.conv1.conv) and fits_fp16(m.norm2, m.conv2.conv)
    hands = [Hand("", "forward", residual_block, (half,)), *_convs(m, names)]
    if m.conv_shortcut is not None:
        hands.append(Hand("conv_shortcut", "forward", clip_conv.pointwise))
    return Block(tuple(hands), ("norm1", "norm2") if half else ())


def _attention(m: Any) -> Block:
    return Block((Hand("", "forward", attention_block),))


def _upsample(m: Any) -> Block | str:
    times = 2 if m.add_temporal_upsample else 1
    if m.repeats % times or m.repeats * m.conv.conv.in_channels != m.conv.conv.out_channels:
        return f"its shortcut repeats {m.conv.conv.in_channels} channels {m.repeats} times"
    return clip_conv.unlike_all(m, ["conv"]) or Block((Hand("", "forward", upsample), *_convs(m, ["conv"])))


def _resample(m: Any) -> Block | str:
    return clip_conv.unlike_all(m, ["conv"]) or Block(_convs(m, ["conv"]))


def _ends(m: Any) -> Block | str:
    names = ["conv_in", "conv_out"]
    return clip_conv.unlike_all(m, names) or Block(_convs(m, names))


def _convs(m: nn.Module, names: list[str]) -> tuple[Hand, ...]:
    return tuple(hand for name in names for hand in clip_conv.hands(m, name))


NAMES = ("HunyuanVideo15", "HunyuanImageRefiner")
ROWS: dict[str, Callable[[Any], Block | str | None]] = {
    "HunyuanVideo15AttnBlock": _attention,
    "HunyuanVideo15Upsample": _upsample,
    "HunyuanVideo15Downsample": _resample,
    "HunyuanImageRefinerUpsampleDCAE": _resample,
    "HunyuanImageRefinerDownsampleDCAE": _resample,
    **dict.fromkeys((f"{name}ResnetBlock" for name in NAMES), _residual),
    **dict.fromkeys(
        (
            f"{family}{part}3D"
            for family in ("HunyuanVideo15", "HunyuanImageRefiner")
            for part in ("Encoder", "Decoder")
        ),
        _ends,
    ),
}
