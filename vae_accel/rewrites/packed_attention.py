"""Attention of a packed vision tower in one launch a layer, or a few, without asking the device how long images are.

Stock turns queries and keys in about 14 kernels, reads the lengths of the segments back three times a layer, and
attends segment by segment in a loop: for a picture of 74x74 patches Qwen2.5-VL's windows are 100 calls in each of 28
layers. Here the lengths are those noted on `cu_seqlens` (families/segments.py; `vision_metadata` and graphs note them).
The projections are called as modules, so that hooks and adapters stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, ledger_of, obstacle
from vae_accel.families import packed_attention as family
from vae_accel.families import segments
from vae_accel.families.segments import Segments
from vae_accel.kernels import segment_attention as kernel
from vae_accel.kernels.rotary import rotary
from vae_accel.kernels.segment_attention import segment_attention
from vae_accel.rewrite import Rewrite, Site, Tier, module_runs_stock

# Segments up to here are the kernel's that turns queries and keys as it loads them; longer ones, a library's after a
# pass that turns them. Windows are of 64 tokens. On an H100 256 tokens take 13.6 us in one kernel and 11.1 in two, 784
# take 42.8 and 22.1.
SHORT = 128


class Form(str, Enum):
    """How a layer attends; the words in which the report counts it."""

    KERNEL = "layers in one kernel with rotary"
    BATCHED = "layers batched by runs of equal segments"
    VARLEN = "layers by torch's varlen_attn"


@dataclass(frozen=True)
class PackedAttention(Rewrite):
    name = "packed_attention"
    tier = Tier.ROUNDING

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        for path, module in root.named_modules():
            reason = family.refusal(module)
            if reason is not None:
                yield Site(path, reason)
            elif family.is_packed(module):
                yield Site(path, obstacle(root, ledger, path, "forward"))

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        pen.method(site.path, "forward", forward, ledger_of(root))


def forward(
    attention: Any,
    below: Callable[..., Tensor],
    ledger: Ledger,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """`forward(hidden_states [L, C], cu_seqlens [segments + 1], position_embeddings=(cos, sin) [L, D])`: [L, C]."""
    if torch.compiler.is_compiling() or hidden_states.is_meta:
        return below(hidden_states, cu_seqlens, *args, **kwargs)
    found = None if "flash" in family.implementation(attention) else segments.of(cu_seqlens)
    angles: Any = None if args else kwargs.get("position_embeddings")
    reason = _unproved(attention, hidden_states, found, angles, kwargs)
    form = None
    if reason is None and found is not None:
        form = form_of(found, hidden_states, angles[0].shape[-1], cu_seqlens.device == hidden_states.device)
    if form is None or found is None:
        ledger.count(PackedAttention.name, f"layers left to stock: {reason or f'a bucket in {hidden_states.dtype}'}")
        ends = cu_seqlens if found is None else _on_the_host(cu_seqlens, found)
        return below(hidden_states, ends, *args, **kwargs)
    ledger.count(PackedAttention.name, form.value)
    cos, sin = angles
    length, scale = len(hidden_states), attention.scaling
    qkv = attention.qkv(hidden_states).reshape(length, 3, attention.num_heads, -1)
    if form is Form.KERNEL:
        q, k, v = qkv.unbind(1)
        out = segment_attention(q, k, v, cu_seqlens, found.longest, scale, cos, sin)
    else:
        q, k = rotary(qkv, cos, sin)
        if form is Form.VARLEN:
            out = _varlen(q, k, qkv[:, 2], cu_seqlens, found.longest, scale)
        else:
            out = by_runs(q, k, qkv[:, 2], found.runs(), scale)
    return attention.proj(out.reshape(length, -1))


def _unproved(
    attention: Any,
    hidden_states: Tensor,
    found: Segments | None,
    angles: tuple[Tensor, Tensor] | None,
    kwargs: dict[str, Any],
) -> str | None:
    """Why a call is stock's, or None. `found` is None where stock's attention takes `cu_seqlens` as they are."""
    chosen = family.implementation(attention)
    if found is None or chosen != "sdpa":
        return f"its attention is {chosen or 'not chosen'}"
    if angles is None or hidden_states.dim() != 2 or len(hidden_states) == 0:
        return "an unusual call"
    if kwargs.get("output_attentions"):
        return "its weights are asked for"
    if attention.training and attention.attention_dropout > 0:
        return "dropout"
    if module_runs_stock(attention, hidden_states):
        return "a gradient or autocast"
    known = {len(hidden_states)} if found.lengths is None else {len(hidden_states), sum(found.lengths)}
    return None if {len(t) for t in angles} == known else "segments or positions of another length"


def form_of(found: Segments, x: Tensor, head: int, beside: bool) -> Form | None:
    """How hidden states `x` attend within segments, by heads of so many channels; None where nothing here can.
    `beside`: `cu_seqlens` is on the device of `x`, where kernels want it."""
    fused = beside and kernel.takes(x, head)
    if found.lengths is None:
        return Form.KERNEL if fused or x.device.type == "cpu" else None
    if fused and found.longest <= SHORT:
        return Form.KERNEL
    if len(found.runs()) == 1:
        return Form.BATCHED
    if beside and x.is_cuda and x.dtype.itemsize == 2 and head % 8 == 0 and _has_varlen():
        return Form.VARLEN
    return Form.KERNEL if fused else Form.BATCHED


def by_runs(q: Tensor, k: Tensor, v: Tensor, runs: list[tuple[int, int]], scale: float) -> Tensor:
    """Attention within segments of `[L, heads, D]`, those of a run as one batch: `[L, heads, D]`."""
    parts: list[Tensor] = []
    start = 0
    for count, length in runs:
        rows = slice(start, start + count * length)
        query, key, value = (t[rows].unflatten(0, (count, length)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(query, key, value, scale=scale)
        parts.append(out.transpose(1, 2).flatten(0, 1))
        start += count * length
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # as late as it is needed: importing it registers operators

    ends = cu_seqlens.int()
    out: Any = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale)
    return out


@cache
def _has_varlen() -> bool:
    try:
        from torch.nn.attention import varlen
    except ImportError:  # before torch 2.10
        return False
    return hasattr(varlen, "varlen_attn") and not torch.version.hip


def _on_the_host(cu_seqlens: Tensor, found: Segments) -> Tensor:
    """For stock's loop, which reads it three times: there that waits for nobody."""
    if found.lengths is None or cu_seqlens.device.type == "cpu":
        return cu_seqlens
    return torch.tensor([0, *found.lengths], dtype=cu_seqlens.dtype, device="cpu").cumsum(0, dtype=cu_seqlens.dtype)
