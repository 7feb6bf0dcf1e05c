"""The image autoencoders descended from Stable Diffusion's on the fused convolution: decoder and encoder.

AutoencoderKL (SD, FLUX.1, Z-Image), AutoencoderKLFlux2, the two-dimensional half of SVD's, and HunyuanImage: residual
blocks of GroupNorm, SiLU and a 3x3 convolution, twice; the shortcut is added by the second convolution before it
rounds. In the middle stands attention with one head over all channels, whose every step but the arithmetic is a view
of a channels-last picture.

A convolution gathers the statistics of the norm behind it, which is then one pass over the picture instead of two.

In a bf16 model the norms write fp16, three bits more in front of each convolution, where nothing can overflow it; in an
fp32 model too where stock's convolutions are TF32, which is as many bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
from vae_accel.families.upsamplers import upsampler_of
from vae_accel.kernels._dispatch import is_channels_last
from vae_accel.kernels.attention import FUSED, wide_head_attention
from vae_accel.kernels.bordered import dense
from vae_accel.kernels.eligible import wants_fp16
from vae_accel.rewrite import runs_stock

Reach = tuple[float, float]

# What a GroupNorm reads next, as a rule the one of the next block: a sixth of these is read by an upsampling instead.
NORMED = ("conv1", "conv2", "conv_in", "proj")


def residual_block(block: Any, below: Callable[..., Tensor], reach: Reach, *args: Any, **kwargs: Any) -> Tensor:
    """[N, C, (T,) H, W] -> [N, C', (T,) H, W]. A second argument (a time embedding, the deprecated `scale`) is stock's.

    `reach` is that of each norm, see `reach`.
    """
    if not alone(args, kwargs) or block.training or runs_stock(args[0]):
        return below(*args, **kwargs)
    x: Tensor = args[0]
    shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
    y = _normed_conv(block, 1, reach[0], x)
    return _normed_conv(block, 2, reach[1], y, residual=shortcut)


def _normed_conv(block: Any, which: int, reach: float, x: Tensor, **more: Any) -> Tensor:
    """A convolution behind its norm and SiLU, by pairs of lines where that is worth it."""
    norm, conv = getattr(block, f"norm{which}"), getattr(block, f"conv{which}")
    whole = isinstance(conv, nn.Conv2d) and (conv.padding_mode, conv.padding) == ("zeros", (1, 1))
    made = norm(x, lines=True) if whole and _halves(norm, reach, x) and in_lines(norm, conv, x) else None
    if made is not None:
        return conv(made, lines=True, **more)
    return conv(block.nonlinearity(normed(norm, reach, x)), **more)


def upsample(block: Any, below: Callable[..., Tensor], conv: str, *args: Any, **kwargs: Any) -> Tensor:
    """Upsample2D, [N, C, H, W] -> [N, C', 2H, 2W]. Any further argument (`output_size`) is stock's."""
    child = getattr(block, conv)
    adapted = not isinstance(child, nn.Conv2d)  # which would add to the small picture
    if adapted or not alone(args, kwargs) or args[0].numel() == 0 or runs_stock(args[0]):
        return below(*args, **kwargs)
    return child(args[0], small=True)


def downsample(block: Any, below: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Downsample2D, [N, C, H, W] -> [N, C', H / 2, W / 2]. Any further argument is stock's."""
    adapted = not isinstance(block.conv, nn.Conv2d)  # which would add to the whole picture
    if adapted or not alone(args, kwargs) or args[0].dim() != 4 or args[0].numel() == 0 or runs_stock(args[0]):
        return below(*args, **kwargs)
    return block.conv(args[0], whole=True)


def attention(attn: Any, below: Callable[..., Tensor], wide: bool, *args: Any, **kwargs: Any) -> Tensor:
    """`Attention` over the pixels of [N, C, H, W] with one `wide` head under its stock processor.

    Masks and other sequences are stock's, whose processors view a picture as a sequence: a bordered one has no such
    view.
    """
    if not (wide and alone(args, kwargs) and _is_picture(args[0]) and is_stock(attn.processor)):
        return below(*(dense(a) if isinstance(a, Tensor) else a for a in args), **kwargs)
    x: Tensor = args[0]
    pixels = attn.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)
    y = wide_head_attention(attn.to_q(pixels), attn.to_k(pixels), attn.to_v(pixels))
    for layer in attn.to_out:
        y = layer(y)
    y = y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    return y + x if attn.residual_connection else y


def hunyuan_attention(block: Any, below: Callable[..., Tensor], x: Tensor) -> Tensor:
    """HunyuanImage's, [N, C, H, W]: 1x1 convolutions for projections, the last of which adds the residual."""
    if not _is_picture(x):
        return below(x)
    y = block.norm(x)
    q, k, v = (project(y).permute(0, 2, 3, 1).flatten(1, 2) for project in (block.to_q, block.to_k, block.to_v))
    y = wide_head_attention(q, k, v).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    return block.proj(y, residual=x)


def reach(norm: Any, conv: Any) -> float:
    """Up to how many elements of a group `norm` may write fp16 for `conv`; 0 where never.

    |GroupNorm| <= sqrt(n) max|gamma| + max|beta| for n elements, whatever comes in.
    """
    found = peaks(norm.weight, norm.bias, conv.weight)
    if found is None or found[1] >= ROOM:
        return 0.0
    return ((ROOM - found[1]) / found[0]) ** 2 if found[0] else math.inf


def normed(norm: Any, reach: float, x: Tensor) -> Tensor:
    """The norm of `x`, in fp16 where ours reads it and nothing can overflow it."""
    return norm(x, dtype=torch.float16) if _halves(norm, reach, x) else norm(x)


def _halves(norm: Any, reach: float, x: Tensor) -> bool:
    return wants_fp16(x) and x[0].numel() // norm.num_groups < reach


def alone(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a picture, or a clip, is all that a call gives."""
    return len(args) > 0 and all(value is None for value in (*args[1:], *kwargs.values())) and args[0].dim() in (4, 5)


def _is_picture(x: Tensor) -> bool:
    return x.dim() == 4 and x.numel() > 0 and is_channels_last(x) and not runs_stock(x)


def is_stock(processor: Any) -> bool:
    """A processor can be exchanged at any time (`fuse_qkv_projections`, xFormers)."""
    return type(processor).__name__ == "AttnProcessor2_0"


def _residual(m: Any) -> Block | str:
    if m.up or m.down:
        return "it resamples between its norm and its convolution"
    if m.time_emb_proj is not None or m.time_embedding_norm == "scale_shift":
        return "it is conditioned on a time step"
    if m.output_scale_factor != 1:
        return f"it divides its output by {m.output_scale_factor}"
    return _blocks(m)


def _upsample(m: Any) -> Block | str | None:
    found = upsampler_of(m)
    if found is None or isinstance(found, str):
        return found
    (name,) = found.convs
    reason = unlike(m.get_submodule(name))
    hands = (Hand("", "forward", upsample, (name,)), Hand(name, "forward", upsampled_conv, (False, True)))
    return Block(hands) if reason is None else f"{name}: {reason}"


def _downsample(m: Any) -> Block | str | None:
    if not m.use_conv or m.padding != 0 or m.norm is not None:  # an average, or a padding on every side
        return None
    hands = (Hand("", "forward", downsample), Hand("conv", "forward", downsampled_conv, (True,)))
    reason = unlike_downsampled(m.conv)
    return Block(hands) if reason is None else f"conv: {reason}"


def _hunyuan_residual(m: Any) -> Block | str:
    if m.conv_shortcut is not None:  # which stock applies to the wrong tensor: no model has one
        return "its shortcut is a convolution"
    return _blocks(m)


def _blocks(m: Any) -> Block | str:
    names = [name for name in ("conv1", "conv2", "conv_shortcut") if getattr(m, name) is not None]
    limits = reach(m.norm1, m.conv1), reach(m.norm2, m.conv2)
    norms = ("norm1", "norm2") if any(limits) else ()
    return _with_convs(m, names, (Hand("", "forward", residual_block, (limits,)),), norms)


def _attention(m: Any) -> Block:
    """Every one, since the blocks beside it hand it bordered pictures."""
    plain = m.group_norm is not None and all(n is None for n in (m.spatial_norm, m.norm_q, m.norm_k))
    wide = plain and m.heads == 1 and m.inner_dim > FUSED and m.rescale_output_factor == 1
    return Block((Hand("", "forward", attention, (wide,)),))


def _hunyuan_attention(m: Any) -> Block | str | None:
    if m.to_q.out_channels <= FUSED:
        return None
    return _with_convs(m, ["to_q", "to_k", "to_v", "proj"], (Hand("", "forward", hunyuan_attention),))


def _ends(m: Any) -> Block | str | None:
    if getattr(m, "mid_block", None) is None:  # DC-AE's, of the same name
        return None
    return _with_convs(m, ["conv_in", "conv_out"])


def _resample(m: Any) -> Block | str:
    return _with_convs(m, ["conv"])


def _with_convs(
    m: nn.Module, names: list[str], hands: tuple[Hand, ...] = (), norms: tuple[str, ...] = ()
) -> Block | str:
    reasons = ((name, unlike(m.get_submodule(name))) for name in names)
    refusal = next((f"{name}: {reason}" for name, reason in reasons if reason is not None), None)
    return refusal or Block((*hands, *(Hand(name, "forward", image_conv, (name in NORMED,)) for name in names)), norms)


ROWS: dict[str, Callable[[Any], Block | str | None]] = {
    "ResnetBlock2D": _residual,
    "Upsample2D": _upsample,
    "Downsample2D": _downsample,
    "HunyuanImageResnetBlock": _hunyuan_residual,
    "Attention": _attention,
    "HunyuanImageAttentionBlock": _hunyuan_attention,
    **dict.fromkeys(("Encoder", "Decoder", "TemporalDecoder", "HunyuanImageEncoder2D", "HunyuanImageDecoder2D"), _ends),
    **dict.fromkeys(("HunyuanImageDownsample", "HunyuanImageUpsample"), _resample),  # pixels are shuffled, not repeated
}
