"""Attention with one head of hundreds of channels as two products of ours, between which logits never reach memory.

The first kernel takes a tile of `q kᵀ` to exponentials in its registers: it stores `2^(s - e)` in 16 bits, where `e` is
the least integer not below the largest logit (in log2) of each row of the tile, and beside it `e` and the row's sum. A
small kernel turns the exponents of a row's tiles into factors `2^(e - max e)`, and the third multiplies tiles by them
on the way into `p v`. By powers of two, exactly: probabilities are rounded once.

With the vendor's products a logit costs 14 bytes (16 in rows longer than a program holds): it is written and read in
fp32, once more in 16 bits. Here 4: 17 GB instead of 69 at 65536 pixels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch
from ._dispatch import Signature, descriptor, lazy_kernel, signature
from .eligible import measured_on
from .tile_io import descriptor_of

tl: Any = None  # triton.language, bound at the first launch

ROWS = 128  # query rows of a tile
KEYS = 128  # keys of a tile of logits, which share an exponent a row
DEPTH = 64
COLS = 256  # channels of the result a program sums
FACTOR_TILES, FACTOR_ROWS = 32, 32  # what a program of the small kernel holds at once
BUDGET = 1 << 30  # bytes of probabilities: at 65536 pixels 64 tiles of queries, 128 programs, as many as a card runs


@lazy_kernel(alike="L step rows tiles")
def _scores(
    q, k, out, peaks, sums, L, step, rows, tiles, SCALE: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`q`: [N step, D]. `k`: [N tiles KEYS, D], of whose samples `L` rows count. `out`: [N rows, tiles KEYS]."""
    n = tl.program_id(1)
    tile = tl.program_id(0) % tiles
    row0 = tl.program_id(0) // tiles * ROWS
    acc = tl.full([ROWS, KEYS], 0, tl.float32)
    for d in tl.range(0, D, DEPTH, num_stages=STAGES):
        acc = tl.dot(q.load([n * step + row0, d]), k.load([(n * tiles + tile) * KEYS, d]).T, acc)
    acc = tl.where((tile * KEYS + tl.arange(0, KEYS) < L)[None, :], acc * SCALE, float("-inf"))
    peak = tl.ceil(tl.max(acc, axis=1))
    power = tl.exp2(acc - peak[:, None]).to(out.dtype)
    out.store([n * rows + row0, tile * KEYS], power)
    place = (n * tiles + tile).to(tl.int64) * rows + row0 + tl.arange(0, ROWS)
    tl.store(peaks + place, peak)
    tl.store(sums + place, tl.sum(power.to(tl.float32), axis=1))


@lazy_kernel(alike="rows tiles")
def _factors(peaks, sums, totals, rows, tiles, TILES: tl.constexpr, ROWS: tl.constexpr):
    """Of `peaks` [N, tiles, rows] makes the factors of a row's tiles, and `totals` [N, rows] of the sums by them."""
    n = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    item = tl.arange(0, TILES)[:, None]
    place = (n * tiles + item) * rows + row
    highest = tl.full([TILES, ROWS], float("-inf"), tl.float32)
    for first in range(0, tiles, TILES):
        peak = tl.load(peaks + place + first * rows, mask=first + item < tiles, other=float("-inf"))
        highest = tl.maximum(highest, peak)
    peak = tl.max(highest, axis=0, keep_dims=True)
    total = tl.full([TILES, ROWS], 0, tl.float32)
    for first in range(0, tiles, TILES):
        inside = first + item < tiles
        factor = tl.exp2(tl.load(peaks + place + first * rows, mask=inside, other=float("-inf")) - peak)
        tl.store(peaks + place + first * rows, factor, mask=inside)
        total += factor * tl.load(sums + place + first * rows, mask=inside, other=0)
    tl.store(totals + n * rows + row, tl.sum(total, axis=0, keep_dims=True))


@lazy_kernel(alike="rows tiles columns")
def _mix(
    p, v, factors, totals, out, rows, tiles, columns,
    ROWS: tl.constexpr, COLS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`p`: [N rows, tiles KEYS]. `v`: [N tiles KEYS, D]. `factors`: [N, tiles, rows]. `out`: [N, L, D]."""
    n = tl.program_id(1)
    col0 = tl.program_id(0) % columns * COLS
    row0 = tl.program_id(0) // columns * ROWS
    row = row0 + tl.arange(0, ROWS)
    factor = factors + n.to(tl.int64) * tiles * rows + row
    acc = tl.full([ROWS, COLS], 0, tl.float32)
    STEPS: tl.constexpr = KEYS // DEPTH
    for i in tl.range(0, tiles * STEPS, num_stages=STAGES):
        weight = p.load([n * rows + row0, i * DEPTH])
        weight *= tl.load(factor + i // STEPS * rows).to(p.dtype)[:, None]
        acc = tl.dot(weight, v.load([n * tiles * KEYS + i * DEPTH, col0]), acc)
    acc = acc / tl.load(totals + n * rows + row)[:, None]
    out.store([n, row0, col0], acc.to(out.dtype).reshape(1, ROWS, COLS))


def suits(q: Tensor) -> bool:
    """Whether `[N, L, D]` of 16 bits goes here: on cards it was measured on, and interpreted, save bf16 (which Triton's
    interpreter multiplies as integers). The copy engine moves multiples of 16 bytes."""
    return measured_on(q.device) and q.shape[2] % 8 == 0 and (q.is_cuda or q.dtype == torch.float16)


def chunks(batch: int, rows: int, room: int) -> list[tuple[slice, slice]]:
    """Samples and query rows to take together, at most `room` rows: whole samples where one fits, else rows of one."""
    samples = max(1, room // rows)
    step = rows if room >= rows else max(room // ROWS, 1) * ROWS
    return [
        (slice(b, min(b + samples, batch)), slice(r, min(r + step, rows)))
        for b in range(0, batch, samples)
        for r in range(0, rows, step)
    ]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, *, budget: int = BUDGET) -> Tensor:
    """`softmax(q kᵀ · scale) v` of `[N, L, D]`, 16 bits, D a multiple of 8: contiguous `[N, L, D]`.

    Takes `budget` bytes for probabilities, at least those of a tile of queries.
    """
    batch, length, width = q.shape
    tiles = -(-length // KEYS)
    short = tiles * KEYS - length
    k, v = (F.pad(t, (0, 0, 0, short)) if short else t for t in (k, v))
    out = torch.empty((batch, length, width), dtype=q.dtype, device=q.device)
    for samples, rows in chunks(batch, length, budget // (2 * tiles * KEYS)):
        _attend(q[samples, rows], k[samples], v[samples], out[samples, rows], length, scale)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, keys: int, scale: float) -> None:
    n, length, width = q.shape
    tiles, rows = k.shape[1] // KEYS, -(-length // ROWS) * ROWS
    powers = torch.empty((n * rows, tiles * KEYS), dtype=v.dtype, device=q.device)
    peaks, sums = (torch.empty((n, tiles, rows), dtype=torch.float32, device=q.device) for _ in range(2))
    totals = torch.empty((n, rows), dtype=torch.float32, device=q.device)
    columns = -(-width // COLS)
    if _dispatch.tally is not None:
        work = 2 * n * length * keys * width
        _dispatch.tally("_scores", work, 0)
        _dispatch.tally("_mix", work, 0)
    _scores[tiles * rows // ROWS, n](
        _matrix(q, ROWS), _matrix(k, KEYS), descriptor_of(powers, [ROWS, KEYS]), peaks, sums, keys, length, rows, tiles,
        SCALE=scale * math.log2(math.e), D=width, ROWS=ROWS, KEYS=KEYS, DEPTH=DEPTH, STAGES=3, num_warps=4,
    )  # fmt: skip
    _factors[rows // FACTOR_ROWS, n](
        peaks, sums, totals, rows, tiles, TILES=FACTOR_TILES, ROWS=FACTOR_ROWS, num_warps=4
    )
    _mix[columns * rows // ROWS, n](
        descriptor_of(powers, [ROWS, DEPTH]), _matrix(v, DEPTH, COLS), peaks, totals,
        descriptor_of(out, [1, ROWS, COLS]), rows, tiles, columns,
        ROWS=ROWS, COLS=COLS, KEYS=KEYS, DEPTH=DEPTH, STAGES=3, num_warps=8,
    )  # fmt: skip


def _matrix(x: Tensor, rows: int, cols: int = DEPTH) -> Any:
    """All rows of `[N, L, D]` as one matrix; of slices of a fused projection without a copy."""
    matrix = x.flatten(0, 1)
    return descriptor_of(matrix if matrix.stride(1) == 1 else matrix.contiguous(), [rows, cols])


def signatures() -> list[Signature]:
    """The kernels as they are compiled ahead of time in the tests."""
    tile, single = {"ROWS": ROWS, "KEYS": KEYS, "DEPTH": DEPTH, "STAGES": 3}, dict.fromkeys(("peaks", "sums"), "fp32")
    scores = {"q": descriptor("bf16", ROWS, DEPTH), "k": descriptor("bf16", KEYS, DEPTH)}
    mix = {"p": descriptor("bf16", ROWS, DEPTH), "v": descriptor("bf16", DEPTH, COLS)}
    mix |= {"factors": "fp32", "totals": "fp32", "out": descriptor("bf16", 1, ROWS, COLS)}
    factors = {"TILES": FACTOR_TILES, "ROWS": FACTOR_ROWS}
    return [
        signature(_scores, scores | {"out": descriptor("bf16", ROWS, KEYS)} | single, tile | {"SCALE": 0.06, "D": 512}),
        signature(_factors, single | {"totals": "fp32"}, factors),
        signature(_mix, mix, tile | {"COLS": COLS}, warps=8),
    ]
