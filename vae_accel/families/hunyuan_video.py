"""HunyuanVideo on the fused convolution: the blocks of both encoder and decoder.

Its convolutions stand in the clip's own pixels, repeated on all sides and in front of the first frame, for which stock
copies every clip (591 of the 3208 ms of a decode on an H200). Here a clip has room for them around each frame, norms
write them there as they go, and frames in front of the first are the first. A convolution gathers the statistics of
the norm behind it (1117 ms of stock's decode are its norms' first pass). In the middle frames attend to earlier
frames and to themselves: each by itself to as many keys as it may, without the mask (19 GiB at 720p).

In a bf16 model the norms write fp16, three bits more in front of each convolution, where nothing can overflow it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vae_accel.families import clip_conv
from vae_accel.families.frames_attend import attend_to_earlier
from vae_accel.families.kl import is_stock, reach, residual_block
from vae_accel.families.row import Block, Hand
from vae_accel.families.upsamplers import upsampler_of
from vae_accel.rewrite import runs_stock


def upsample(block: Any, below: Callable[..., Tensor], double: bool, x: Tensor) -> Tensor:
    """[N, C, T, H, W] -> [N, C', T, 2H, 2W], or 2T - 1 frames: the first stays single."""
    if x.dim() != 5 or x.numel() == 0 or not clip_conv.upsamples(block.conv, x):
        return below(x)
    return block.conv(x, upsampled={"double": double})


def mid_block(block: Any, below: Callable[..., Tensor], hidden_states: Tensor) -> Tensor:
    """[N, C, T, H, W]: residual blocks, between which each frame attends to those up to it."""
    x = hidden_states
    if x.dim() != 5 or x.numel() == 0 or runs_stock(x) or not all(map(_attends, block.attentions)):
        return below(x)
    x = block.resnets[0](x)
    for attn, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = resnet(x if attn is None else _attended(attn, x))
    return x


def _attended(attn: Any, x: Tensor) -> Tensor:
    """What `attn` does to [N, C, T, H, W] under the mask of stock."""
    tokens = attn.group_norm(x).permute(0, 2, 3, 4, 1).flatten(1, 3)
    q, k, v = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
    y = attend_to_earlier(q, k, v, x.shape[2])
    for layer in attn.to_out:
        y = layer(y)
    return y.unflatten(1, x.shape[2:]).permute(0, 4, 1, 2, 3) + x


def _attends(attn: Any) -> bool:
    """Whether that is all that an `Attention` does, and nobody watches it."""
    if attn is None:
        return True
    plain = attn.group_norm is not None and all(n is None for n in (attn.spatial_norm, attn.norm_q, attn.norm_k))
    plain = plain and attn.heads == 1 and attn.rescale_output_factor == 1 and attn.residual_connection
    return plain and is_stock(attn.processor) and not (attn._forward_hooks or attn._forward_pre_hooks)


def _residual(m: Any) -> Block | str:
    names = [name for name in ("conv1", "conv2", "conv_shortcut") if getattr(m, name) is not None]
    limits = reach(m.norm1, m.conv1.conv), reach(m.norm2, m.conv2.conv)
    norms = ("norm1", "norm2") if any(limits) else ()
    return clip_conv.with_convs(m, names, (Hand("", "forward", residual_block, (limits,)),), norms)


def _mid(m: Any) -> Block:
    return Block((Hand("", "forward", mid_block),))


def _upsample(m: Any) -> Block | str | None:
    found = upsampler_of(m)
    if found is None or isinstance(found, str):
        return found
    hands = (Hand("", "forward", upsample, (found.time == "double",)), *clip_conv.hands(m, "conv", normed=True))
    return clip_conv.unlike_all(m, ["conv"]) or Block(hands)


def _ends(m: Any) -> Block | str:
    return clip_conv.with_convs(m, ["conv_in", "conv_out"])


ROWS: dict[str, Callable[[Any], Block | str | None]] = {
    "HunyuanVideoResnetBlockCausal3D": _residual,
    "HunyuanVideoMidBlock3D": _mid,
    "HunyuanVideoUpsampleCausal3D": _upsample,
    **dict.fromkeys(("HunyuanVideoEncoder3D", "HunyuanVideoDecoder3D"), _ends),
}
