"""The attention modules of diffusers 0.42's VAEs that call `scaled_dot_product_attention`, and the width of a head.

Mostly one head over all channels, per frame or over the clip: 384 to 1024 wide, where language models have 64 to 128.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vae_accel.families.match import estranged, known_as


def head_dim_of(module: nn.Module) -> int | str | None:
    """Channels of a head; the reason where the module is like a known attention but not one; None where it is none."""
    name = known_as(module, ROWS)
    if name is None:
        return estranged(module, ROWS)
    try:
        return int(ROWS[name](module))
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):
        return f"this {type(module).__name__} lacks the attributes of diffusers' class of that name"


def _fused(m: Any) -> int:
    return m.to_qkv.out_channels // 3


def _single(m: Any) -> int:
    return m.to_q.out_channels


ROWS: dict[str, Callable[[Any], int]] = {
    "Attention": lambda m: m.inner_dim // m.heads,
    "WanAttentionBlock": _fused,
    "QwenImageAttentionBlock": _fused,
    "QwenImage21AttentionBlock": _fused,
    "HunyuanImageAttentionBlock": _single,
    "HunyuanImageRefinerAttnBlock": _single,
    "HunyuanVideo15AttnBlock": _single,
    "VidTokAttnBlock": lambda m: getattr(m.q, "conv", m.q).out_channels,
    "CosmosCausalAttention": lambda m: m.to_q.out_channels // m.num_attention_heads,
}
