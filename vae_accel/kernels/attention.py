"""Self-attention with one wide head, `softmax(q kᵀ · scale) v`: the middle of most VAEs.

Fused kernels end at 256 channels a head; for 384 to 1024 of them `scaled_dot_product_attention` takes a kernel of an
older architecture (sm80 on Hopper): 7.8 of the 31.5 ms of a Qwen-Image decode. At that width the two products are
large GEMMs, and the logits between them are few beside the arithmetic: L² of them against 4 L² D operations. So there
are two products: ours where they were measured (`kernels/wide_head.py`), elsewhere the vendor's over as many query rows
at a time as a budget allows, and one pass over the logits between them. The probabilities are rounded once, to v's
dtype, and the result divided by the sum of what was rounded: the weights add up to one.

One pass with a running maximum (Dao, 2023) was slower in Triton at 512 channels (3.4 ms against 1.7 at 16384 pixels on
an H100; SDPA 4.6), where the sums of a tile fill the registers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import wide_head
from ._dispatch import LazyKernel, Signature, differentiates, next_power_of_2, signature, triton_available

tl: Any = None  # triton.language, bound at the first launch

FUSED = 256  # channels of the widest head of every fused kernel of `scaled_dot_product_attention`
BUDGET = 256 << 20  # bytes of fp32 logits at a time: 1.7 ms at 16384 pixels of 512 channels, 6.3 with 32 MiB
KEY_TILE = 64  # keys are padded to a multiple: GEMMs want rows of logits that start at multiples of 16 bytes
ROW_BLOCK = 16384  # logits of a row that one program holds; longer rows are read twice


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The law: in fp32 (fp64 for fp64), rounded once."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(wide) @ k.to(wide).mT * scale
    return (logits.softmax(-1) @ v.to(wide)).to(q.dtype)


@LazyKernel
def _exponentials(logits, out, sums, L, span, SCALE: tl.constexpr, FITS: tl.constexpr, BLOCK: tl.constexpr):
    """exp(scale * (logits - their maximum)) of one row, rounded, and the sum of what was rounded. SCALE is in log2.

    Of `span` logits the first L count, the others give zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    source, target = logits + row * span, out + row * span
    item = tl.arange(0, BLOCK)
    if FITS:
        value = tl.load(source + item, mask=item < L, other=float("-inf"))
        power = tl.exp2((value - tl.max(value, 0)) * SCALE).to(out.dtype.element_ty)
        tl.store(target + item, power, mask=item < span)
        tl.store(sums + row, tl.sum(power.to(tl.float32), 0))
    else:
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        for first in range(0, L, BLOCK):
            inside = first + item < L
            highest = tl.maximum(highest, tl.load(source + first + item, mask=inside, other=float("-inf")))
        peak = tl.max(highest, 0)
        total = tl.full([BLOCK], 0, tl.float32)
        for first in range(0, span, BLOCK):
            value = tl.load(source + first + item, mask=first + item < L, other=float("-inf"))
            power = tl.exp2((value - peak) * SCALE).to(out.dtype.element_ty)
            tl.store(target + first + item, power, mask=first + item < span)
            total += power.to(tl.float32)
        tl.store(sums + row, tl.sum(total, 0))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`[B, M, K] @ [B, K, N]` of 16 bits, summed and kept in fp32: on CUDA from torch 2.8, else of fp32 copies."""
    if a.is_cuda and torch.version.cuda is not None and hasattr(torch.ops.aten.bmm, "dtype"):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _in_chunks(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int = BUDGET) -> Tensor:
    batch, length, width = q.shape
    out = torch.empty((batch, length, width), dtype=q.dtype, device=q.device)
    span = -(-length // KEY_TILE) * KEY_TILE
    k, v = (F.pad(t, (0, 0, 0, span - length)) for t in (k, v))
    block = min(next_power_of_2(span), ROW_BLOCK)
    warps = max(1, min(16, block // 512))
    for samples, rows in wide_head.chunks(batch, length, budget // (4 * length)):
        logits = _product(q[samples, rows], k[samples].mT)
        powers = torch.empty(logits.shape, dtype=v.dtype, device=v.device)
        sums = torch.empty((*logits.shape[:2], 1), dtype=torch.float32, device=q.device)
        _exponentials[sums.numel(),](
            logits, powers, sums, length, span,
            SCALE=scale * math.log2(math.e), FITS=block >= span, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        torch.div(_product(powers, v[samples]), sums, out=out[samples, rows])
    return out


def _stock(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Four dimensions: with three it materialises all logits, whatever the device."""
    return F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), scale=scale).squeeze(1)


def _run(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    if q.dtype.itemsize != 2 or not triton_available(q) or q.numel() == 0:
        return _stock(q, k, v, scale).contiguous()
    with torch.cuda.device_of(q):
        form = wide_head.attend if wide_head.suits(q) else _in_chunks
        return form(q, k, v, q.shape[2] ** -0.5 if scale is None else scale)


_op = torch.library.custom_op("vae_accel::wide_head_attention", _run, mutates_args=())
_op.register_fake(lambda q, k, v, scale: torch.empty(q.shape, dtype=q.dtype, device=q.device))


def wide_head_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """`softmax(q kᵀ · scale) v` of one head: `[B, L, D]` three times, one dtype, and a contiguous `[B, L, D]`.

    `scale` is 1/√D by default. Logits and sums are fp32. Where there is no Triton, for more than 16 bits, and where
    autograd records, it is `scaled_dot_product_attention`.

    Raises:
        ValueError: shapes or dtypes that differ.
    """
    if q.dim() != 3 or not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        given = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (q, k, v))
        raise ValueError(f"q, k and v must be [B, L, D] of one shape and dtype, got {given}")
    if differentiates(q, k, v):
        return _stock(q, k, v, scale)
    run = _op if torch.compiler.is_compiling() else _run
    return run(q, k, v, scale)


def signatures() -> list[Signature]:
    """The kernel as it is compiled ahead of time in the tests."""
    row = {"logits": "fp32", "out": "bf16", "sums": "fp32"}
    return [signature(_exponentials, row, {"SCALE": 0.0736, "FITS": fits, "BLOCK": 1024}) for fits in (True, False)]
