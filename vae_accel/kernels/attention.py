"""Self-attention with one wide head, `softmax(q kᵀ · scale) v`: the middle of most VAEs.

Fused kernels end at 256 channels a head; for 384 to 1024 of them `scaled_dot_product_attention` takes a kernel of an
older architecture (sm80 on Hopper): 7.8 of the 31.5 ms of a Qwen-Image decode. At that width the two products are
large GEMMs, and the logits between them are few beside the arithmetic: L² of them against 4 L² D operations. Two forms:

- `chunks`: the vendor's GEMMs, over as many query rows at a time as keep their fp32 logits near the L2 cache.
- `flash`: one pass with a running maximum (Dao, 2023), the whole head in registers, which ends at 512 channels.

Both round the probabilities once, to v's dtype, and divide by the sum of what was rounded: the weights add up to one.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import LazyKernel, Signature, differentiates, next_power_of_2, signature, triton_available

tl: Any = None  # triton.language, bound at the first launch

Form = Literal["chunks", "flash", "sdpa"]
FORMS = ("chunks", "flash", "sdpa")
BUDGET = 32 << 20  # bytes of fp32 logits at a time; the L2 cache of an H200 holds 50 MiB
ROW_TILE = 128  # query rows of a GEMM tile: a chunk is a multiple
ROW_BLOCK = 16384  # logits of a row that one program holds; longer rows are read twice
QUERIES, KEYS, WARPS, STAGES = 64, 32, 8, 2  # of the flash form: 64 x 512 fp32 sums are 128 registers a thread
WIDEST = 512


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The law: in fp32 (fp64 for fp64), rounded once."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(wide) @ k.to(wide).mT * scale
    return (logits.softmax(-1) @ v.to(wide)).to(q.dtype)


@LazyKernel
def _exponentials(logits, out, sums, L, row_stride, SCALE: tl.constexpr, FITS: tl.constexpr, BLOCK: tl.constexpr):
    """exp(scale * (logits - their maximum)) of one row, rounded, and the sum of what was rounded. SCALE is in log2."""
    row = tl.program_id(0).to(tl.int64)
    source, target = logits + row * L, out + row * row_stride
    item = tl.arange(0, BLOCK)
    if FITS:
        value = tl.load(source + item, mask=item < L, other=float("-inf"))
        power = tl.exp2((value - tl.max(value, 0)) * SCALE).to(out.dtype.element_ty)
        tl.store(target + item, power, mask=item < L)
        tl.store(sums + row, tl.sum(power.to(tl.float32), 0))
    else:
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        for first in range(0, L, BLOCK):
            inside = first + item < L
            highest = tl.maximum(highest, tl.load(source + first + item, mask=inside, other=float("-inf")))
        peak = tl.max(highest, 0)
        total = tl.full([BLOCK], 0, tl.float32)
        for first in range(0, L, BLOCK):
            inside = first + item < L
            value = tl.load(source + first + item, mask=inside, other=float("-inf"))
            power = tl.exp2((value - peak) * SCALE).to(out.dtype.element_ty)
            tl.store(target + first + item, power, mask=inside)
            total += power.to(tl.float32)
        tl.store(sums + row, tl.sum(total, 0))


@LazyKernel
def _flash(
    q, k, v, out, L, q_batch, q_row, k_batch, k_row, v_batch, v_row,
    SCALE: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """QUERIES rows of one sample against all keys. The head is two powers of 2: HEAD channels, then REST or none."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    key = tl.arange(0, KEYS)
    head, rest = tl.arange(0, HEAD), HEAD + tl.arange(0, REST if REST else 1)
    inside = row[:, None] < L
    source = q + batch * q_batch + row.to(tl.int64)[:, None] * q_row
    q_head = tl.load(source + head[None, :], mask=inside, other=0)
    acc = tl.full([QUERIES, HEAD], 0, tl.float32)
    if REST:
        q_rest = tl.load(source + rest[None, :], mask=inside, other=0)
        acc_rest = tl.full([QUERIES, REST], 0, tl.float32)
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.full([QUERIES], 0, tl.float32)
    keys, values = k + batch * k_batch + key[None, :] * k_row, v + batch * v_batch + key[:, None] * v_row
    for first in range(0, L, KEYS):
        present = first + key < L
        logits = tl.dot(q_head, tl.load(keys + head[:, None], mask=present[None, :], other=0))
        if REST:
            logits = tl.dot(q_rest, tl.load(keys + rest[:, None], mask=present[None, :], other=0), logits)
        logits = tl.where(present[None, :], logits * SCALE, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        fade = tl.exp2(peak - higher)
        power = tl.exp2(logits - higher[:, None]).to(out.dtype.element_ty)
        total = total * fade + tl.sum(power.to(tl.float32), 1)
        value = tl.load(values + head[None, :], mask=present[:, None], other=0)
        acc = tl.dot(power, value, acc * fade[:, None])
        if REST:
            value = tl.load(values + rest[None, :], mask=present[:, None], other=0)
            acc_rest = tl.dot(power, value, acc_rest * fade[:, None])
        peak = higher
        keys += KEYS * k_row
        values += KEYS * v_row
    target = out + (batch * L + row.to(tl.int64)[:, None]) * (HEAD + REST)
    tl.store(target + head[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)
    if REST:
        tl.store(target + rest[None, :], (acc_rest / total[:, None]).to(out.dtype.element_ty), mask=inside)


def chunks(batch: int, length: int, budget: int = BUDGET) -> list[tuple[slice, slice]]:
    """Samples and query rows to take together, so that their fp32 logits stay within `budget` bytes.

    Whole samples where one fits, else rows of one sample; never fewer rows than a GEMM tile has.
    """
    rows = budget // (4 * length)
    samples = max(1, rows // length)
    rows = length if rows >= length else max(rows // ROW_TILE, 1) * ROW_TILE
    return [
        (slice(b, min(b + samples, batch)), slice(r, min(r + rows, length)))
        for b in range(0, batch, samples)
        for r in range(0, length, rows)
    ]


def split_head(width: int) -> tuple[int, int] | None:
    """A head's channels as the flash form takes them, (power of 2, another or 0); None: it does not."""
    head = 1 << width.bit_length() - 1
    rest = width - head
    fits = 16 <= width <= WIDEST and (rest == 0 or (rest >= 16 and rest & (rest - 1) == 0))
    return (head, rest) if fits else None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`[B, M, K] @ [B, K, N]` of 16 bits, summed and kept in fp32: on CUDA from torch 2.8, else of fp32 copies."""
    if a.is_cuda and torch.version.cuda is not None and hasattr(torch.ops.aten.bmm, "dtype"):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _in_chunks(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int = BUDGET) -> Tensor:
    batch, length, width = q.shape
    out = torch.empty((batch, length, width), dtype=q.dtype, device=q.device)
    row_stride = -(-length // 8) * 8  # vendors' 16-bit GEMMs want rows that start at multiples of 16 bytes
    block = min(next_power_of_2(length), ROW_BLOCK)
    warps = max(1, min(16, block // 512))
    for samples, rows in chunks(batch, length, budget):
        logits = _product(q[samples, rows], k[samples].mT)
        shape = logits.shape[:2]
        powers = torch.empty((*shape, row_stride), dtype=v.dtype, device=v.device)
        sums = torch.empty((*shape, 1), dtype=torch.float32, device=q.device)
        _exponentials[shape.numel(),](
            logits, powers, sums, length, row_stride,
            SCALE=scale * math.log2(math.e), FITS=block >= length, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        torch.div(_product(powers[..., :length], v[samples]), sums, out=out[samples, rows])
    return out


def _in_one_pass(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    batch, length, width = q.shape
    split = split_head(width)
    assert split is not None
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    out = torch.empty((batch, length, width), dtype=q.dtype, device=q.device)
    _flash[-(-length // QUERIES), batch](
        q, k, v, out, length, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        SCALE=scale * math.log2(math.e), HEAD=split[0], REST=split[1], QUERIES=QUERIES, KEYS=KEYS,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


def _stock(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Four dimensions: with three it materialises all logits, whatever the device."""
    return F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), scale=scale).squeeze(1)


def _run(q: Tensor, k: Tensor, v: Tensor, scale: float | None, form: str) -> Tensor:
    if form == "sdpa" or q.dtype.itemsize != 2 or not triton_available(q) or q.numel() == 0:
        return _stock(q, k, v, scale).contiguous()
    with torch.cuda.device_of(q):
        return (_in_one_pass if form == "flash" else _in_chunks)(
            q, k, v, q.shape[2] ** -0.5 if scale is None else scale
        )


_op = torch.library.custom_op("vae_accel::wide_head_attention", _run, mutates_args=())
_op.register_fake(lambda q, k, v, scale, form: torch.empty(q.shape, dtype=q.dtype, device=q.device))


def wide_head_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, form: Form = "chunks"
) -> Tensor:
    """`softmax(q kᵀ · scale) v` of one head: `[B, L, D]` three times, one dtype, and a contiguous `[B, L, D]`.

    `scale` is 1/√D by default. Logits and sums are fp32. Where there is no Triton, for more than 16 bits, and where
    autograd records, it is `scaled_dot_product_attention`.

    Raises:
        ValueError: shapes or dtypes that differ, an unknown `form`, or a head the flash form does not take (channels
            that are not the sum of two powers of 2 from 16 on, or more than 512).
    """
    if q.dim() != 3 or not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        given = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (q, k, v))
        raise ValueError(f"q, k and v must be [B, L, D] of one shape and dtype, got {given}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    if form == "flash" and split_head(q.shape[2]) is None:
        raise ValueError(f"the flash form does not take a head of {q.shape[2]} channels")
    if differentiates(q, k, v):
        return _stock(q, k, v, scale)
    run = _op if torch.compiler.is_compiling() else _run
    return run(q, k, v, scale, form)


def signatures() -> list[Signature]:
    """The kernels as they are compiled ahead of time in the tests."""
    row = {"logits": "fp32", "out": "bf16", "sums": "fp32"}
    head = {"SCALE": 0.0736, "HEAD": 256, "REST": 128, "QUERIES": QUERIES, "KEYS": KEYS}
    return [
        signature(_exponentials, row, {"SCALE": 0.0736, "FITS": True, "BLOCK": 1024}),
        signature(_exponentials, row, {"SCALE": 0.0736, "FITS": False, "BLOCK": 1024}),
        signature(_flash, dict.fromkeys(("q", "k", "v", "out"), "bf16"), head),
    ]
