"""The forwards of the convolutions of Wan and Qwen-Image, on the fused convolution.

Each is what stock's is, and takes keywords that only the blocks of `families/wan.py` pass. What ours does not do (a
gradient, autocast, another dtype, shape or card) goes below in the model's dtype, and the keyword's work is done after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.edits import unusable_weight
from vae_accel.families.match import known_as
from vae_accel.kernels.bordered import clip, pictures
from vae_accel.kernels.conv import conv as fused
from vae_accel.kernels.conv_law import interleaved
from vae_accel.kernels.eligible import runs
from vae_accel.kernels.half_operands import HALVED
from vae_accel.kernels.line_pairs import conv_lines
from vae_accel.kernels.thin_conv import MOST, thin_conv
from vae_accel.kernels.winograd import conv_pairs
from vae_accel.rewrite import runs_stock

CAUSAL = ("WanCausalConv3d", "QwenImageCausalConv3d", "QwenImage21CausalConv3d")  # the last is a Conv2d


def causal_conv(
    conv: Any,
    below: Callable[..., Tensor],
    x: Tensor,
    cache_x: Tensor | None = None,
    residual: Tensor | None = None,
    pairs: bool = False,
    lines: bool = False,
) -> Tensor:
    """[N, C, T, H, W] behind the frames `cache_x` [N, C, 1 or 2, H, W], or zeros, plus `residual` [N, C', T, H, W].

    With `pairs`, of a clip that `rms_norm_pairs` transformed, its history with it; with `lines`, of single frames that
    `norm_lines` did, with nothing in front of them.
    """
    if lines:
        weight = conv.weight if conv.weight.dim() == 4 else conv.weight[:, :, -1]
        frames = None if residual is None else pictures(residual)
        return clip(conv_lines(x, weight, conv.bias, residual=frames), 1)
    if pairs:
        return conv_pairs(x, conv.weight, conv.bias, residual=residual)
    history = _history(conv, cache_x)
    if _ours(conv, x, residual) and _continues(conv, x, history):
        return _convolve(conv, x, history, residual)
    return _added(below(_plain(conv, x), _plain(conv, cache_x)), residual)


def doubling_conv(
    conv: Any, below: Callable[..., Tensor], x: Tensor, cache_x: Tensor | None = None, interleave: bool = False
) -> Tensor:
    """With `interleave` [N, C', 2T, H, W]: the first half of the output channels in even frames, the second in odd."""
    if not interleave:
        return causal_conv(conv, below, x, cache_x)
    history = _history(conv, cache_x)
    if not (_ours(conv, x) and _continues(conv, x, history)):
        return interleaved(below(_plain(conv, x), _plain(conv, cache_x)), 2, x)
    return fused(x, conv.weight, conv.bias, before=conv._padding[4], history=history, split=2)


def unlike_causal(conv: nn.Module) -> str | None:
    """Why a convolution is not one for `causal_conv`, or None."""
    padding: Any = getattr(conv, "_padding", ())
    if known_as(conv, CAUSAL) and isinstance(conv, nn.Conv3d) and padding[4] != conv.kernel_size[0] - 1:
        return f"a padding of {padding} changes the number of frames"
    return _unlike(conv, CAUSAL)


def _unlike(conv: nn.Module, known: tuple[str, ...]) -> str | None:
    if known_as(conv, known) is None or not isinstance(conv, nn.Conv2d | nn.Conv3d):
        return f"{type(conv).__name__} is no convolution known here"
    if set(conv.stride) != {1} or set(conv.dilation) != {1} or conv.groups != 1 or conv.padding_mode != "zeros":
        return "stride, dilation, groups or a padding mode"
    return unusable_weight(conv)


def _convolve(conv: Any, x: Tensor, history: Tensor | None, residual: Tensor | None) -> Tensor:
    weight, padding = conv.weight, (conv._padding[2], conv._padding[0])
    thin = conv.out_channels <= MOST and padding == (1, 1) and residual is None
    if weight.dim() == 4:  # Qwen-Image-2.1's: one frame
        if thin:
            return clip(thin_conv(pictures(x), weight, conv.bias), 1)
        residual = None if residual is None else pictures(residual)
        return clip(fused(pictures(x), weight, conv.bias, padding=padding, residual=residual), 1)
    before = conv._padding[4]
    if history is not None and history.dtype != x.dtype:
        history = history.to(x.dtype)
    if thin:
        return thin_conv(x, weight, conv.bias, before=before, history=history)
    return fused(x, weight, conv.bias, padding=padding, before=before, history=history, residual=residual)


def _history(conv: Any, cache_x: Tensor | None) -> Tensor | None:
    """The cache as far as it matters: a kernel without taps in time is given one and ignores it."""
    return None if conv.weight.dim() == 5 and conv._padding[4] == 0 else cache_x


def _ours(conv: Any, x: Tensor, residual: Tensor | None = None) -> bool:
    if x.dim() < 4 or x.shape[1] != conv.in_channels or x.numel() == 0:
        return False
    fits = runs(x) and (x.dtype == conv.weight.dtype or _is_half(conv, x))
    return fits and not runs_stock(x, residual, conv.weight, conv.bias)


def _continues(conv: Any, x: Tensor, history: Tensor | None) -> bool:
    """Whether the shapes are those of a clip and of frames in front of it; else stock says what is wrong."""
    if x.dim() != 5 or (conv.weight.dim() == 4 and (x.shape[2] != 1 or history is not None)):
        return False
    if history is None:
        return True
    n, c, t, h, w = history.shape
    return (n, c, h, w) == (*x.shape[:2], *x.shape[3:]) and t <= conv._padding[4]


def _plain(conv: Any, x: Tensor | None) -> Any:
    """In the model's dtype again where a norm wrote fp16."""
    return x.to(conv.weight.dtype) if x is not None and _is_half(conv, x) else x


def _is_half(conv: Any, x: Tensor) -> bool:
    return x.dtype == torch.float16 and conv.weight.dtype in HALVED


def _added(y: Tensor, residual: Tensor | None) -> Tensor:
    return y if residual is None else y + residual
