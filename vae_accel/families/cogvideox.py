"""CogVideoX on the fused convolution: the residual blocks of both encoder and decoder, and what resamples between them.

Its convolutions stand in zeros, behind the two frames that the step before left (two latents a step, eight frames when
it encodes) or behind the clip's first one again: they read these where they lie, and leave copies of the last two.
The decoder's norms are scaled and shifted by what is convolved from the latent (`rewrites/fused_norm_act.py`); bordered
clips stay bordered there, and a convolution gathers the statistics of the norm behind it.

An upsampling convolves each frame once, folded with the nearest 2x before it, and then writes it twice. A downsampling
averages neighbouring frames in the layout they have, in the padded clip that its convolution reads; stock copies the
clip with its frames innermost, and back.

In a bf16 model the encoder's norms write fp16 where nothing can overflow it. Of the decoder's no weight says how far
they reach, since the latent scales them: they write bf16, rounded once where stock rounds four times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.families import clip_conv
from vae_accel.families.image_conv import unlike, upsampled_conv
from vae_accel.families.kl import normed, reach
from vae_accel.families.row import Block, Hand
from vae_accel.families.upsamplers import doubled, twice
from vae_accel.kernels import bordered
from vae_accel.kernels._dispatch import empty_in_layout_of
from vae_accel.kernels.eligible import runs
from vae_accel.kernels.group_statistics import note, noted
from vae_accel.rewrite import runs_stock

Caches = dict[str, Any]


def residual_block(
    block: Any,
    below: Callable[..., tuple[Tensor, Caches]],
    limits: tuple[float, float],
    inputs: Tensor,
    temb: Tensor | None = None,
    zq: Tensor | None = None,
    conv_cache: Caches | None = None,
) -> tuple[Tensor, Caches]:
    """[N, C, T, H, W] -> [N, C', T, H, W]; the shortcut is added by the second convolution. `limits`: `reach` of each
    norm, where no latent `zq` scales it. A time embedding is stock's."""
    if temb is not None or inputs.dim() != 5 or block.training or runs_stock(inputs, zq):
        return below(inputs, temb, zq, conv_cache)
    given, kept, shortcut = conv_cache or {}, {}, inputs
    if block.in_channels != block.out_channels and block.use_conv_shortcut:
        shortcut, kept["conv_shortcut"] = block.conv_shortcut(inputs, conv_cache=given.get("conv_shortcut"))
    elif block.in_channels != block.out_channels:
        shortcut = block.conv_shortcut(inputs)
    y = inputs
    for i, more in ((1, {}), (2, {"residual": shortcut})):
        norm, conv = getattr(block, f"norm{i}"), getattr(block, f"conv{i}")
        if zq is None:
            y = normed(norm, limits[i - 1], y)
        else:
            y, kept[f"norm{i}"] = norm(y, zq, conv_cache=given.get(f"norm{i}"))
        y, kept[f"conv{i}"] = conv(block.nonlinearity(y), conv_cache=given.get(f"conv{i}"), **more)
    return y, kept


def upsample(block: Any, below: Callable[..., Tensor], inputs: Tensor) -> Tensor:
    """[N, C, T, H, W] -> [N, C', T, 2H, 2W]; where time is compressed 2T frames, or 2T - 1 of an odd T."""
    x = inputs
    adapted = not isinstance(block.conv, nn.Conv2d)  # which would add to the small clip
    if adapted or not _ours(x):
        return below(x)
    frames = x.shape[2]
    pictures = block.conv(bordered.pictures(x), small=True)
    y, partials = bordered.clip(pictures, frames), noted(pictures, 1)
    if block.compress_time and frames > 1:
        return _twice(y, partials, frames % 2)
    if partials is not None:
        note(y, partials)
    return y


def downsample(block: Any, below: Callable[..., Tensor], x: Tensor) -> Tensor:
    """[N, C, T, H, W] -> [N, C', T, H/2, W/2]; where time is compressed T/2 frames, beside the first of an odd T."""
    if not _ours(x):
        return below(x)
    n, c, t, h, w = x.shape
    alone = t % 2 if block.compress_time else t
    padded = empty_in_layout_of(x, (n, c, alone + (t - alone) // 2, h + 1, w + 1))
    padded[..., h, :].zero_()
    padded[..., w].zero_()
    frames = padded[..., :h, :w]
    frames[:, :, :alone].copy_(x[:, :, :alone])
    # Halves first: in fp16 a sum could overflow, which stock's, in fp32, does not.
    torch.mul(x[:, :, alone::2], 0.5, out=frames[:, :, alone:]).add_(x[:, :, alone + 1 :: 2], alpha=0.5)
    return bordered.clip(block.conv(bordered.pictures(padded)), padded.shape[2])


def _ours(x: Tensor) -> bool:
    return x.dim() == 5 and x.numel() > 0 and not runs_stock(x) and runs(x)


def _twice(x: Tensor, partials: Tensor | None, alone: int) -> Tensor:
    """`twice`; of a bordered clip the memory, its border with it, and its `partials` for the norm behind it."""
    if not bordered.is_bordered(x):
        return twice(x, alone)
    n, c, t, h, w = x.shape
    frames, place = 2 * t - alone, bordered.geometry(x)
    out = bordered.empty((n, c, frames, h, w), x.dtype, x.device, versions=partials is not None)
    source, target = bordered.pixels_of(x), bordered.pixels_of(out)
    doubled(_frames(source, n, t, place.frame), _frames(target, n, frames, place.frame), 1, alone)
    target[n * frames * place.frame :].zero_()
    if partials is not None:
        parts = partials.unflatten(1, (n, t))
        note(out, doubled(parts, parts.new_empty((3, n, frames, *parts.shape[3:])), 2, alone).flatten(1, 2))
    return out


def _frames(pixels: Tensor, n: int, frames: int, size: int) -> Tensor:
    """`[n, frames, size * C]` of the memory `[pixels, C]` of a bordered clip."""
    return pixels[: n * frames * size].view(n, frames, -1)


def _residual(m: Any) -> Block | str:
    names, hands = ["conv1", "conv2"], []
    if m.in_channels != m.out_channels and m.use_conv_shortcut:
        names.append("conv_shortcut")
    elif m.in_channels != m.out_channels:
        if reason := clip_conv.unlike_pointwise(m.conv_shortcut):
            return f"conv_shortcut: {reason}"
        hands.append(Hand("conv_shortcut", "forward", clip_conv.pointwise))
    limits = (0.0, 0.0)
    if m.spatial_norm_dim is None:
        limits = reach(m.norm1, m.conv1.conv), reach(m.norm2, m.conv2.conv)
    norms = ("norm1", "norm2") if any(limits) else ()
    return clip_conv.with_convs(m, names, (Hand("", "forward", residual_block, (limits,)), *hands), norms)


def _upsample(m: Any) -> Block | str:
    hands = Hand("", "forward", upsample), Hand("conv", "forward", upsampled_conv, (False, True))
    reason = unlike(m.conv)
    return Block(hands) if reason is None else f"conv: {reason}"


def _downsample(m: Any) -> Block:
    return Block((Hand("", "forward", downsample),))


def _ends(m: Any) -> Block | str:
    return clip_conv.with_convs(m, ["conv_in", "conv_out"])


ROWS: dict[str, Callable[[Any], Block | str | None]] = {
    "CogVideoXResnetBlock3D": _residual,
    "CogVideoXUpsample3D": _upsample,
    "CogVideoXDownsample3D": _downsample,
    **dict.fromkeys(("CogVideoXEncoder3D", "CogVideoXDecoder3D"), _ends),
}
