"""Attention within the segments of a packed sequence, from the projection on: rotary is part of the loads.

Short segments are what libraries are slow at. Of Qwen2.5-VL's 32 layers 28 attend within windows of 64 tokens: of
those a program holds all queries, keys and values of a head, and what is moved is the projection once and the result.
A running maximum (Dao, 2023) takes it to segments of any length.

A head is one product of a power of two of channels, at least 32. As 64 and a rest of 16 or 32 it would be less work
for heads of 72 and 80, but there Triton 3.6 multiplies wrongly on an H100: a relative error of 0.9 in the rest with 16,
memory that is not ours with 32; its interpreter is right with both.

Where segments lie is read on the device, so that a captured graph can be replayed with others.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _dispatch
from ._dispatch import LazyFunction, LazyKernel, Signature, differentiates, next_power_of_2, signature, triton_available

tl: Any = None  # triton.language, bound at the first launch

WIDEST = 128  # channels of a head


class Tile(NamedTuple):
    """Queries and keys that a program has at a time."""

    queries: int
    keys: int
    warps: int
    stages: int


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """The law: in fp32 (fp64 for fp64), rounded once; tokens attend where they lie in one segment."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if cos is not None and sin is not None:
        q, k = (_turned(t, cos, sin) for t in (q, k))
    token = torch.arange(q.shape[0], device=q.device)
    segment = torch.bucketize(token, cu_seqlens.to(token.dtype), right=True)
    logits = torch.einsum("qhd,khd->hqk", q.to(wide), k.to(wide)) * scale
    logits = logits.masked_fill(segment[:, None] != segment[None, :], float("-inf"))
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), v.to(wide)).to(q.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).chunk(2, -1)
    cos, sin = (t.to(wide)[:, None] for t in (cos, sin))
    return (x.to(wide) * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


@LazyFunction
def channels(x, cos, sin, row, inside, stride, angle_l, D: tl.constexpr, COLS: tl.constexpr):
    """`COUNT` channels from `START` of rows of one head, [rows, COUNT]: turned, if there are angles. Zeros past D."""
    HALF: tl.constexpr = D // 2
    GRAIN: tl.constexpr = 8 if HALF % 8 == 0 else 4 if HALF % 4 == 0 else 1
    col = tl.arange(0, COLS)
    mask = inside[:, None] & (col < D)[None, :]
    source = x + row[:, None] * stride
    value = tl.load(source + col[None, :], mask=mask, other=0)
    if cos is not None:
        partner = tl.where(col < HALF, col + HALF, col - HALF)
        # Channels come in whole runs of GRAIN, which the compiler cannot see through the choice.
        partner = tl.max_contiguous(tl.multiple_of(partner, GRAIN), GRAIN)
        other = tl.load(source + partner[None, :], mask=mask, other=0).to(tl.float32)
        other = tl.where((col < HALF)[None, :], -other, other)
        angle = row[:, None] * angle_l + col[None, :]
        turned = value.to(tl.float32) * tl.load(cos + angle, mask=mask, other=0).to(tl.float32)
        turned += other * tl.load(sin + angle, mask=mask, other=0).to(tl.float32)
        value = turned.to(x.dtype.element_ty)
    return value


@LazyKernel
def _attend(
    q, k, v, out, cos, sin, cu_seqlens, q_l, q_h, k_l, k_h, v_l, v_h, out_l, out_h, angle_l,
    SCALE: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """QUERIES rows of one segment and one head. SCALE is in log2."""
    first, head, segment = tl.program_id(0) * QUERIES, tl.program_id(1).to(tl.int64), tl.program_id(2)
    start = tl.load(cu_seqlens + segment).to(tl.int64)
    length = (tl.load(cu_seqlens + segment + 1) - start).to(tl.int32)
    if first < length:
        q += start * q_l + head * q_h
        k += start * k_l + head * k_h
        v += start * v_l + head * v_h
        if cos is not None:
            cos += start * angle_l
            sin += start * angle_l
        row = first + tl.arange(0, QUERIES)
        inside = row < length
        query = channels(q, cos, sin, row, inside, q_l, angle_l, D, COLS)
        acc = tl.full([QUERIES, COLS], 0, tl.float32)
        peak = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.full([QUERIES], 0, tl.float32)
        for begin in range(0, length, KEYS):
            key = begin + tl.arange(0, KEYS)
            there = key < length
            part = channels(k, cos, sin, key, there, k_l, angle_l, D, COLS)
            logits = tl.dot(query, tl.trans(part), input_precision="ieee")
            logits = tl.where(there[None, :], logits * SCALE, float("-inf"))
            highest = tl.maximum(peak, tl.max(logits, 1))
            # Weights are rounded before they are summed, so that those which multiply the values add up to one.
            power = tl.exp2(logits - highest[:, None]).to(v.dtype.element_ty)
            fade = tl.exp2(peak - highest)
            total = total * fade + tl.sum(power.to(tl.float32), 1)
            part = channels(v, None, None, key, there, v_l, angle_l, D, COLS)
            acc = tl.dot(power, part, acc * fade[:, None], input_precision="ieee")
            peak = highest
        col = tl.arange(0, COLS)
        target = out + start * out_l + head * out_h + row[:, None] * out_l + col[None, :]
        acc = acc / total[:, None]
        tl.store(target, acc.to(out.dtype.element_ty), mask=inside[:, None] & (col < D)[None, :])


def columns_of(D: int) -> int:
    """The columns of a product that hold a head of D channels."""
    return max(next_power_of_2(D), 32)


def tile_for(longest: int) -> Tile:
    """By the longest segment. 64 by 64 is the best of four on an H100: 13.6 us for 256 tokens, where 128 queries take
    17.0, and 42.8 for 784, where they take 46.8."""
    side = min(max(next_power_of_2(longest), 16), 64)
    return Tile(side, side, 4, 1)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
    tile: Tile,
) -> Tensor:
    length, heads, D = q.shape
    out = torch.empty((length, heads, D), dtype=q.dtype, device=q.device)
    segments = cu_seqlens.numel() - 1
    if out.numel() == 0 or segments < 1 or longest < 1:
        return out
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    if _dispatch.tally is not None:
        _dispatch.tally("_attend", 0, 4 * out.numel() * out.element_size())
    with torch.cuda.device_of(q):
        _attend[-(-longest // tile.queries), heads, segments](
            q, k, v, out, cos, sin, cu_seqlens, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], D,
            SCALE=scale * math.log2(math.e), D=D, COLS=columns_of(D), QUERIES=tile.queries, KEYS=tile.keys,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def takes(x: Tensor, D: int) -> bool:
    """Whether the Triton form takes heads of D channels in the dtype of `x`, where `x` is: 16 bits (fp32 products would
    be slow) and no wide head."""
    return x.dtype.itemsize == 2 and D <= WIDEST and triton_available(x)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
) -> Tensor:
    if not takes(q, q.shape[2]):
        return reference(q, k, v, cu_seqlens, scale, cos, sin).contiguous()
    return _launch(q, k, v, cos, sin, cu_seqlens, longest, scale, tile_for(longest))


_op = torch.library.custom_op("vae_accel::segment_attention", _run, mutates_args=())
_op.register_fake(
    lambda q, k, v, cos, sin, cu_seqlens, longest, scale: torch.empty(q.shape, dtype=q.dtype, device=q.device)
)


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """`softmax(q kᵀ · scale) v` within each segment: `[L, heads, D]` three times, and a contiguous `[L, heads, D]`.

    `cu_seqlens` `[segments + 1]` are the ends of segments, from 0 to L; no segment is longer than `longest`. With `cos`
    and `sin`, `[L, D]` each, queries and keys are turned first, and rounded, as `kernels.rotary` does. Logits and sums
    are fp32. Where there is no Triton, for more than 16 bits and where autograd records, the reference runs, which
    holds all logits: `[heads, L, L]`.

    Raises:
        ValueError: shapes or dtypes that differ.
    """
    if q.dim() != 3 or not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        given = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (q, k, v))
        raise ValueError(f"q, k and v must be [L, heads, D] of one shape and dtype, got {given}")
    if differentiates(q, k, v, cos, sin):
        return reference(q, k, v, cu_seqlens, scale, cos, sin)
    run = _op if torch.compiler.is_compiling() else _run
    return run(q, k, v, cos, sin, cu_seqlens, longest, scale)


def signatures() -> list[Signature]:
    """The kernel as it is compiled ahead of time in the tests."""
    data = {"q": "bf16", "k": "bf16", "v": "bf16", "out": "bf16", "cu_seqlens": "i32"}
    heads = {"SCALE": 0.16, "D": 80, "COLS": columns_of(80)}
    turned = signature(_attend, {**data, "cos": "fp32", "sin": "fp32"}, {**heads, "QUERIES": 64, "KEYS": 64})
    plain = signature(_attend, data, {**heads, "cos": None, "sin": None, "QUERIES": 128, "KEYS": 64}, warps=8)
    return [turned, plain]
