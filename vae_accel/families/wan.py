"""Wan 2.1, Wan 2.2, Qwen-Image and Qwen-Image-2.1 on the fused convolution: the blocks of both encoder and decoder.

Stock moves every activation three times around a causal convolution (clone of the kept frames, `cat` with the cache,
`F.pad`) and once more for the residual. Here the convolution reads the cache where it lies and adds the residual before
it rounds. The loops over chunks, the list of caches and its order stay stock's: a slot holds the last two frames that
went into a convolution, or "Rep" where an upsampler in time has seen the first latent alone.

In a bf16 model the norms write fp16, three bits more in front of each convolution, where no activation can overflow it:
an RMS norm is bounded by sqrt(C) |gamma| + |bias| whatever comes in. Frames are then kept in fp16 too. So they do in an
fp32 model whose convolutions are TF32 in stock, which is as many bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.families.frames_attend import attend
from vae_accel.families.half import ROOM, peaks
from vae_accel.families.image_conv import (
    downsampled_conv,
    image_conv,
    in_lines,
    unlike,
    unlike_downsampled,
    upsampled_conv,
)
from vae_accel.families.row import Block, Hand
from vae_accel.families.wan_conv import causal_conv, doubling_conv, unlike_causal
from vae_accel.families.wan_shortcuts import average, duplicate, uneven
from vae_accel.kernels.bordered import clip, is_bordered, last_frames, pictures
from vae_accel.kernels.downsample_conv import SIDES
from vae_accel.kernels.eligible import wants_fp16
from vae_accel.kernels.winograd import suits as in_pairs
from vae_accel.rewrite import runs_stock

KEPT = 2  # frames a causal convolution leaves for the next chunk

Cache = list[Any] | None


def residual_block(
    block: Any,
    below: Callable[..., Tensor],
    half: bool,
    x: Tensor,
    feat_cache: Cache = None,
    feat_idx: list[int] | None = None,
) -> Tensor:
    """[N, C, T, H, W] -> [N, C', T, H, W]; the shortcut is added by the second convolution."""
    feat_idx = [0] if feat_idx is None else feat_idx
    if runs_stock(x) or (block.training and block.dropout.p):
        return below(x, feat_cache, feat_idx)
    shortcut = block.conv_shortcut(x)
    y = _normed_conv(block, 1, half, x, feat_cache, feat_idx)
    return _normed_conv(block, 2, half, y, feat_cache, feat_idx, residual=shortcut)


def attention_block(block: Any, below: Callable[..., Tensor], half: bool, x: Tensor) -> Tensor:
    """Attention within each frame of [N, C, T, H, W]: channels-last, every step but the arithmetic is a view."""
    if x.numel() == 0 or runs_stock(x):  # stock refuses an empty batch
        return below(x)
    frames = pictures(x)
    qkv = block.to_qkv(normed(block.norm, half, frames)).permute(0, 2, 3, 1).flatten(1, 2).contiguous()
    y = attend(*qkv.chunk(3, -1)).transpose(1, 2).unflatten(2, x.shape[3:])
    return clip(block.proj(y, residual=frames), x.shape[2])


def upsample(
    module: Any, below: Callable[..., Tensor], x: Tensor, feat_cache: Cache = None, feat_idx: list[int] | None = None
) -> Tensor:
    """[N, C, T, H, W] -> [N, C', T, 2H, 2W]; `upsample3d` 2T frames, but of the first latent and without a cache."""
    feat_idx = [0] if feat_idx is None else feat_idx
    if x.numel() == 0 or runs_stock(x) or _is_adapted(module):
        return below(x, feat_cache, feat_idx)
    if module.mode == "upsample3d" and feat_cache is not None:
        slot = feat_idx[0]
        if feat_cache[slot] is None:
            feat_cache[slot] = "Rep"
            feat_idx[0] += 1
        else:
            if isinstance(feat_cache[slot], str):  # zeros stand in front: the first latent never enters time
                feat_cache[slot] = None
            x = _chunk(module.time_conv, feat_cache, feat_idx, x, interleave=True)
    return clip(module.resample[1](pictures(x), small=True), x.shape[2])


def _is_adapted(module: Any) -> bool:
    """Whether an adapter wraps a convolution that upsamples: it would add to the small clip."""
    convs = [module.resample[1], *([module.time_conv] if module.mode == "upsample3d" else [])]
    return not all(isinstance(conv, nn.Conv2d | nn.Conv3d) for conv in convs)


def downsample(
    module: Any, below: Callable[..., Tensor], x: Tensor, feat_cache: Cache = None, feat_idx: list[int] | None = None
) -> Tensor:
    """[N, C, T, H, W] -> [N, C, T, H/2, W/2]; `downsample3d` T/2 frames, but of a first frame and without a cache."""
    feat_idx = [0] if feat_idx is None else feat_idx
    if x.numel() == 0 or runs_stock(x):
        return below(x, feat_cache, feat_idx)
    conv = module.resample[1]
    adapted = not isinstance(conv, nn.Conv2d)  # which would add to the whole clip
    y = clip(module.resample(pictures(x)) if adapted else conv(pictures(x), whole=True), x.shape[2])
    if module.mode != "downsample3d" or feat_cache is None:
        return y
    slot = feat_idx[0]
    feat_idx[0] += 1
    previous, feat_cache[slot] = feat_cache[slot], y if y.shape[2] == 1 else y[:, :, -1:].clone()
    return y if previous is None else module.time_conv(torch.cat([previous.to(y.device), y], 2))


def up_block(
    block: Any,
    below: Callable[..., Tensor],
    x: Tensor,
    feat_cache: Cache = None,
    feat_idx: list[int] | None = None,
    first_chunk: bool = False,
) -> Tensor:
    """Wan 2.2's, without the clone of its input; the shortcut is added as it is read."""
    feat_idx = [0] if feat_idx is None else feat_idx
    if runs_stock(x):
        return below(x, feat_cache, feat_idx, first_chunk)
    y = x
    for layer in (*block.resnets, block.upsampler):
        y = y if layer is None else layer(y, feat_cache=feat_cache, feat_idx=feat_idx)
    return y if block.avg_shortcut is None else block.avg_shortcut(x, first_chunk=first_chunk, residual=y)


def down_block(
    block: Any, below: Callable[..., Tensor], x: Tensor, feat_cache: Cache = None, feat_idx: list[int] | None = None
) -> Tensor:
    """Wan 2.2's, without the clone of its input."""
    feat_idx = [0] if feat_idx is None else feat_idx
    if runs_stock(x):
        return below(x, feat_cache, feat_idx)
    y = x
    for layer in (*block.resnets, block.downsampler):
        y = y if layer is None else layer(y, feat_cache=feat_cache, feat_idx=feat_idx)
    return y + block.avg_shortcut(x)


def _normed_conv(
    block: Any, which: int, half: bool, x: Tensor, feat_cache: Cache, feat_idx: list[int], **more: Any
) -> Tensor:
    """A convolution behind its norm and SiLU, by pairs of frames, or of lines of one, where that is worth it."""
    norm, conv = getattr(block, f"norm{which}"), getattr(block, f"conv{which}")
    if half and feat_cache is None and x.shape[2] == 1 and in_lines(norm, conv, picture := pictures(x)):
        lines = norm(picture, lines=True)
        if lines is not None:
            return conv(lines, lines=True, **more)
    previous = None if feat_cache is None else feat_cache[feat_idx[0]]
    made = norm(x, pairs=True, history=previous) if half and _pairs(norm, conv, x, previous) else None
    if made is None:
        return _chunk(conv, feat_cache, feat_idx, block.nonlinearity(normed(norm, half, x)), **more)
    y, kept = made
    if feat_cache is not None:
        feat_cache[feat_idx[0]] = kept
        feat_idx[0] += 1
    return conv(y, pairs=True, **more)


def _pairs(norm: nn.Module, conv: Any, x: Tensor, previous: Tensor | None) -> bool:
    """Whether norm and convolution may take `x` behind the frames `previous` by pairs.

    What goes between them is no clip: nobody else may see it (a hook, an adapter around the convolution), and it has no
    gradient.
    """
    if not isinstance(conv, nn.Conv3d) or conv.in_channels != x.shape[1]:
        return False
    if not in_pairs(x, conv.out_channels, conv.kernel_size) or runs_stock(
        x, *norm.parameters(recurse=False), conv.weight, conv.bias
    ):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks for m in (norm, conv)):
        return False
    if previous is None:
        return True
    n, c, t, h, w = previous.shape
    return (n, c, h, w) == (*x.shape[:2], *x.shape[3:]) and t <= KEPT and previous.device == x.device


def normed(norm: nn.Module, half: bool, x: Tensor) -> Tensor:
    """The norm of `x`, in fp16 where it may be (`half`) and ours reads it."""
    return norm(x, dtype=torch.float16) if half and wants_fp16(x) else norm(x)


def _chunk(conv: nn.Module, feat_cache: Cache, feat_idx: list[int], x: Tensor, **more: Any) -> Tensor:
    """Convolves a chunk behind the frames that the one before it left, and leaves its own."""
    if feat_cache is None:
        return conv(x, **more)
    slot = feat_idx[0]
    feat_idx[0] += 1
    previous, feat_cache[slot] = feat_cache[slot], _kept(x, feat_cache[slot])
    return conv(x, previous, **more)


def _kept(x: Tensor, previous: Tensor | None) -> Tensor:
    """The last two frames; a chunk of one borrows the other. Cloned only where a longer chunk would be kept alive."""
    if x.shape[2] > KEPT:
        return last_frames(x, KEPT) if is_bordered(x) else x[:, :, -KEPT:].clone()
    if x.shape[2] == KEPT or previous is None:
        return x
    return torch.cat([previous[:, :, -1:].to(x), x], 2)


def fits_fp16(norm: Any, conv: Any) -> bool:
    """Whether fp16 holds all that `conv` can be given to multiply."""
    found = peaks(norm.gamma, norm.bias if isinstance(norm.bias, Tensor) else None, conv.weight)
    return found is not None and math.sqrt(norm.gamma.numel()) * found[0] + found[1] < ROOM


def _residual(m: Any) -> Block | str:
    names = [name for name in ("conv1", "conv2", "conv_shortcut") if type(getattr(m, name)) is not nn.Identity]
    reason = _unlike(m, names)
    if reason is not None:
        return reason
    half = fits_fp16(m.norm1, m.conv1) and fits_fp16(m.norm2, m.conv2)
    hands = (Hand(name, "forward", causal_conv) for name in names)
    return Block((Hand("", "forward", residual_block, (half,)), *hands), ("norm1", "norm2") if half else ())


def _attention(m: Any) -> Block | str:
    names = ["to_qkv", "proj"]
    reason = _unlike(m, names, unlike)
    if reason is not None:
        return reason
    half = fits_fp16(m.norm, m.to_qkv)
    hands = (Hand(name, "forward", image_conv, (False,)) for name in names)
    return Block((Hand("", "forward", attention_block, (half,)), *hands), ("norm",) if half else ())


def _resample(m: Any) -> Block | str | None:
    if m.mode == "upsample3d":
        hands = (*_UPSAMPLE, Hand("time_conv", "forward", doubling_conv))
        return _unlike(m, ["time_conv"]) or _unlike(m, ["resample.1"], unlike) or Block(hands)
    if m.mode == "upsample2d":
        return _unlike(m, ["resample.1"], unlike) or Block(_UPSAMPLE)
    if m.mode not in ("downsample2d", "downsample3d"):
        return None
    pad = m.resample[0]
    if type(pad) is not nn.ZeroPad2d or tuple(pad.padding) != SIDES:
        return f"resample.0: {pad} is no pixel of zeros to the right and below"
    return _unlike(m, ["resample.1"], unlike_downsampled) or Block(_DOWNSAMPLE)


_DOWNSAMPLE = (Hand("", "forward", downsample), Hand("resample.1", "forward", downsampled_conv, (False,)))
_UPSAMPLE = (Hand("", "forward", upsample), Hand("resample.1", "forward", upsampled_conv, (True, False)))


def _up(m: Any) -> Block | str:
    hand, shortcut = Hand("", "forward", up_block), m.avg_shortcut
    if shortcut is None:
        return Block((hand,))
    return uneven(shortcut, shortcut.repeats) or Block((hand, Hand("avg_shortcut", "forward", duplicate)))


def _down(m: Any) -> Block | str:
    hands = (Hand("", "forward", down_block), Hand("avg_shortcut", "forward", average))
    return uneven(m.avg_shortcut, m.avg_shortcut.group_size) or Block(hands)


def _ends(m: Any) -> Block | str:
    names = ["conv_in", "conv_out"]
    return _unlike(m, names) or Block(tuple(Hand(name, "forward", causal_conv) for name in names))


def _unlike(m: nn.Module, names: list[str], reason_of: Callable[[nn.Module], str | None] = unlike_causal) -> str | None:
    reasons = ((name, reason_of(m.get_submodule(name))) for name in names)
    return next((f"{name}: {reason}" for name, reason in reasons if reason is not None), None)


ROWS: dict[str, Callable[[Any], Block | str | None]] = {
    **dict.fromkeys(("WanResidualBlock", "QwenImageResidualBlock", "QwenImage21ResidualBlock"), _residual),
    **dict.fromkeys(("WanAttentionBlock", "QwenImageAttentionBlock", "QwenImage21AttentionBlock"), _attention),
    **dict.fromkeys(("WanResample", "QwenImageResample", "QwenImage21Resample"), _resample),
    **dict.fromkeys(("WanResidualUpBlock", "QwenImage21ResidualUpBlock"), _up),
    **dict.fromkeys(("WanResidualDownBlock", "QwenImage21ResidualDownBlock"), _down),
    **dict.fromkeys(
        (f"{family}{part}3d" for family in ("Wan", "QwenImage", "QwenImage21") for part in ("Encoder", "Decoder")),
        _ends,
    ),
}
