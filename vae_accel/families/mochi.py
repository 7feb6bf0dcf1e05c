"""Mochi on the fused convolution: the residual blocks of both encoder and decoder, and the decoder's way up.

Its convolutions repeat the clip's pixels on all sides and its first frame in front, as HunyuanVideo's. Its norms are of
each frame: the convolution before them gathers their statistics. On the way up a linear layer makes frames, rows and
columns out of channels. It runs over the pixels as they lie, those around the pictures with them, and one copy puts
what it made where the next convolution reads it; stock copies to NCDHW and back.

Stock's caches of frames stay what they are: always None, since a clip is decoded whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_accel.edits import unusable_weight
from vae_accel.families import clip_conv
from vae_accel.families.kl import reach
from vae_accel.families.row import Block, Hand
from vae_accel.kernels import bordered
from vae_accel.kernels._dispatch import empty_in_layout_of
from vae_accel.kernels.eligible import wants_fp16
from vae_accel.rewrite import module_runs_stock, runs_stock

Caches = dict[str, Any]


def residual_block(
    block: Any,
    below: Callable[..., tuple[Tensor, Caches]],
    limits: tuple[float, float],
    inputs: Tensor,
    conv_cache: Caches | None = None,
) -> tuple[Tensor, Caches]:
    """[N, C, T, H, W] -> the same; the input is added by the second convolution. `limits`: `reach` of each norm."""
    if inputs.dim() != 5 or runs_stock(inputs):
        return below(inputs, conv_cache)
    given, kept, y = conv_cache or {}, {}, inputs
    for i, more in ((1, {}), (2, {"residual": inputs})):
        norm, conv = getattr(block, f"norm{i}"), getattr(block, f"conv{i}")
        y = block.nonlinearity(_norm(norm, limits[i - 1], y))
        y, kept[f"conv{i}"] = conv(y, conv_cache=given.get(f"conv{i}"), **more)
    return y, kept


def up_block(
    block: Any,
    below: Callable[..., tuple[Tensor, Caches]],
    hidden_states: Tensor,
    conv_cache: Caches | None = None,
) -> tuple[Tensor, Caches]:
    """[N, C, T, H, W] -> [N, C', st T, s H, s W]: residual blocks, then channels become frames and pixels."""
    x = hidden_states
    adapted = not isinstance(block.proj, nn.Linear)
    if adapted or x.dim() != 5 or x.numel() == 0 or module_runs_stock(block, x):
        return below(x, conv_cache)
    given, kept = conv_cache or {}, {}
    for i, resnet in enumerate(block.resnets):
        x, kept[f"resnet_{i}"] = resnet(x, conv_cache=given.get(f"resnet_{i}"))
    times, sides = block.temporal_expansion, block.spatial_expansion
    n, _, t, h, w = x.shape
    parts = times * sides**2
    shape = (n, block.proj.out_features // parts, times * t, sides * h, sides * w)
    if bordered.is_bordered(x):
        border = bordered.geometry(x).border
        packed = block.proj(bordered.pixels_of(x), parts=parts)
        y = bordered.view(packed, (n, packed.shape[1], t, h, w), border)
        out = bordered.empty(shape, y.dtype, y.device, border)
    else:
        y = block.proj(x.permute(0, 2, 3, 4, 1), parts=parts).permute(0, 4, 1, 2, 3)
        out = empty_in_layout_of(x, shape, y.dtype)
    blocks = out.unflatten(4, (w, sides)).unflatten(3, (h, sides)).unflatten(2, (t, times))
    # n, frame, row, column, C', T, H, W -> n, C', T, frame, H, row, W, column
    blocks.copy_(y.unflatten(1, (times, sides, sides, -1)).permute(0, 4, 5, 1, 6, 2, 7, 3))
    return out, kept


def linear(layer: Any, below: Callable[..., Tensor], input: Tensor, parts: int = 1) -> Tensor:
    """nn.Linear; with several `parts` of each output, all first parts before all second ones, so that channels that
    stay together are neighbours."""
    if parts == 1:
        return below(input)
    weight = layer.weight.unflatten(0, (-1, parts)).transpose(0, 1).flatten(0, 1)
    bias = None if layer.bias is None else layer.bias.unflatten(0, (-1, parts)).T.flatten()
    return F.linear(input, weight, bias)


def _norm(norm: Any, limit: float, x: Tensor) -> Tensor:
    """Of each frame, in fp16 where its groups are small enough that nothing can overflow it."""
    if wants_fp16(x) and x[0, :, 0].numel() // norm.norm_layer.num_groups < limit:
        return norm(x, dtype=torch.float16)
    return norm(x)


def _residual(m: Any) -> Block | str:
    limits = reach(m.norm1.norm_layer, m.conv1.conv), reach(m.norm2.norm_layer, m.conv2.conv)
    norms = ("norm1", "norm2") if any(limits) else ()
    return clip_conv.with_convs(m, ["conv1", "conv2"], (Hand("", "forward", residual_block, (limits,)),), norms)


def _up(m: Any) -> Block | str:
    reason = unusable_weight(m.proj) if type(m.proj) is nn.Linear else f"{type(m.proj).__name__} is no Linear"
    hands = (Hand("", "forward", up_block), Hand("proj", "forward", linear))
    return Block(hands) if reason is None else f"proj: {reason}"


ROWS: dict[str, Callable[[Any], Block | str | None]] = {"MochiResnetBlock3D": _residual, "MochiUpBlock3D": _up}
