"""The forward of an nn.Conv2d on the fused convolution, for the blocks whose forward is ours.

It is stock's, and takes a `residual` that only those blocks pass. What ours does not do (a gradient, autocast, a tiling
patch of the padding, another dtype or card) goes below in the weight's dtype, and the residual is added after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_accel.edits import unusable_weight
from vae_accel.families.upsamplers import foldable, mark
from vae_accel.kernels.conv import conv as fused
from vae_accel.kernels.downsample_conv import SIDES, downsample_conv
from vae_accel.kernels.eligible import runs, unsupported
from vae_accel.kernels.half_operands import HALVED
from vae_accel.kernels.line_pairs import conv_lines, suits
from vae_accel.kernels.thin_conv import MOST, thin_conv
from vae_accel.kernels.upsample_conv import upsample_conv
from vae_accel.rewrite import runs_stock


def image_conv(
    conv: Any,
    below: Callable[..., Tensor],
    normed: bool,
    input: Tensor,
    residual: Tensor | None = None,
    lines: bool = False,
) -> Tensor:
    """[N, C, H, W], in fp16 beside a bf16 or fp32 weight if the caller likes, plus `residual` [N, C', H', W'].

    `normed`: a GroupNorm reads the result, and its statistics are gathered on the way. With `lines`, of pictures that
    `norm_lines` transformed.
    """
    if lines:
        return conv_lines(input, conv.weight, conv.bias, residual=residual, statistics=normed)
    if _ours(conv, input, residual):
        if residual is None and conv.out_channels <= MOST and (conv.kernel_size, conv.padding) == ((3, 3), (1, 1)):
            return thin_conv(input, conv.weight, conv.bias)
        return fused(input, conv.weight, conv.bias, padding=conv.padding, residual=residual, statistics=normed)
    x = input.to(conv.weight.dtype) if _is_half(conv, input) else input  # any other dtype is for stock to refuse
    y = below(x)
    return y if residual is None else residual + y


def upsampled_conv(
    conv: Any, below: Callable[..., Tensor], single: bool, normed: bool, input: Tensor, small: bool = False
) -> Tensor:
    """Behind a nearest 2x: with `small`, of [N, C, H, W] before it, to [N, C', 2H, 2W].

    `single`: stock upsamples in fp32, which is a rounding where the model is in fp64. `normed` as in `image_conv`.
    """
    if not small:
        return below(input)
    folded = conv.__dict__.get("_conv_forward")  # folded_upsample's
    if _ours(conv, input, None, folded) and unsupported(input, conv.weight, conv.padding) is None:
        return upsample_conv(input, conv.weight, conv.bias, statistics=normed)
    if folded is not None and foldable(input, conv):
        return below(mark(input, single))
    wide = F.interpolate(input.float() if single else input, scale_factor=2.0)
    return below(wide.to(input.dtype))


def in_lines(norm: nn.Module, conv: Any, x: Tensor) -> bool:
    """Whether norm and convolution may take [N, C, H, W] by pairs of lines, and it is worth it.

    What goes between them is no picture: nobody else may see it (a hook, an adapter around the convolution), and it has
    no gradient.
    """
    if not isinstance(conv, nn.Conv2d | nn.Conv3d) or conv.in_channels != x.shape[1]:
        return False
    if conv.kernel_size[-2:] != (3, 3) or "_conv_forward" in vars(conv) or not suits(x, conv.out_channels):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks for m in (norm, conv)):
        return False
    return not runs_stock(x, *norm.parameters(recurse=False), conv.weight, conv.bias)


def downsampled_conv(
    conv: Any, below: Callable[..., Tensor], normed: bool, input: Tensor, whole: bool = False
) -> Tensor:
    """Of stride 2: with `whole`, of [N, C, H, W] that is not padded yet, to [N, C', H / 2, W / 2].

    `normed` as in `image_conv`.
    """
    if not whole:
        return below(input)
    if _ours(conv, input, None) and input.dtype == conv.weight.dtype:
        return downsample_conv(input, conv.weight, conv.bias, statistics=normed)
    return below(F.pad(input, SIDES))


def unlike_downsampled(conv: nn.Module) -> str | None:
    """Why a module is not a convolution for `downsampled_conv`, or None."""
    reason = unlike(conv, stride=2)
    if reason is None and (conv.kernel_size, conv.padding) != ((3, 3), (0, 0)):
        return f"a kernel of {conv.kernel_size} with a padding of {conv.padding}"
    return reason


def unlike(conv: nn.Module, stride: int = 1) -> str | None:
    """Why a module is not a convolution for `image_conv`, or None."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is no Conv2d"
    if set(conv.stride) != {stride} or set(conv.dilation) != {1} or conv.groups != 1:
        return "stride, dilation or groups"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"a padding of {conv.padding} in mode {conv.padding_mode}"
    return unusable_weight(conv)


def _ours(conv: Any, x: Tensor, residual: Tensor | None, known: Any = None) -> bool:
    if x.dim() != 4 or x.shape[1] != conv.in_channels or x.numel() == 0:
        return False
    # Textures are made seamless by patching one of these two on a model in use.
    if conv.padding_mode != "zeros" or conv.__dict__.get("_conv_forward") is not known:
        return False
    fits = runs(x) and (x.dtype == conv.weight.dtype or _is_half(conv, x))
    return fits and not runs_stock(x, residual, conv.weight, conv.bias)


def _is_half(conv: Any, x: Tensor) -> bool:
    return x.dtype == torch.float16 and conv.weight.dtype in HALVED
