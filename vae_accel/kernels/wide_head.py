"""Attention with one head of hundreds of channels as two products of ours, between which logits never reach memory.

The first kernel takes a tile of `q kᵀ` to exponentials in its registers: it stores `2^(s - e)` in 16 bits, where `e` is
the largest logit (in log2) of each row of the tile, and `e` beside it. A small kernel turns them into factors
`2^(e - max e)`, and the third multiplies tiles by these on the way into `p v`, rounds again, and divides by the sum of
what it multiplied: the weights add up to one. What is largest is 1 and rounds to itself, as in stock; were `e` a whole
number, for factors that round nothing, the error would be 2.04e-3 instead of 1.85e-3 (once rounded: 1.83e-3).

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
GROUP = 16  # tiles of queries: 65536 keys of 512 channels are 67 MB, more than the second level cache holds
COLS = 256  # channels of the result a program sums; 128 where they do not divide the head (1.19 ms, not 1.52, for 384)
FACTOR_TILES, FACTOR_ROWS = 32, 32  # what a program of the small kernel holds at once
BUDGET = 1 << 30  # bytes of probabilities: at 65536 pixels 64 tiles of queries, 128 programs, as many as a card runs


@lazy_kernel(alike="L step rows tiles")
def _scores(
    q, k, out, peaks, L, step, rows, tiles, SCALE: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`q`: [N step, D]. `k`: [N tiles KEYS, D], of whose samples `L` rows count. `out`: [N rows, tiles KEYS]."""
    n = tl.program_id(1)
    pid = tl.program_id(0)
    first = pid // (GROUP * tiles) * GROUP  # row tiles that take turns at a tile of keys, which stays in the cache
    group = tl.minimum(rows // ROWS - first, GROUP)
    pid = pid % (GROUP * tiles)
    tile = pid // group
    row0 = (first + pid % group) * ROWS
    acc = tl.full([ROWS, KEYS], 0, tl.float32)
    for d in tl.range(0, D, DEPTH, num_stages=STAGES):
        acc = tl.dot(q.load([n * step + row0, d]), k.load([(n * tiles + tile) * KEYS, d]).T, acc)
    acc = tl.where((tile * KEYS + tl.arange(0, KEYS) < L)[None, :], acc * SCALE, float("-inf"))
    peak = tl.max(acc, axis=1)
    out.store([n * rows + row0, tile * KEYS], tl.exp2(acc - peak[:, None]).to(out.dtype))
    tl.store(peaks + (n * tiles + tile).to(tl.int64) * rows + row0 + tl.arange(0, ROWS), peak)


@lazy_kernel(alike="rows tiles")
def _factors(peaks, rows, tiles, TILES: tl.constexpr, ROWS: tl.constexpr):
    """Of `peaks` [N, tiles, rows] makes the factors of a row's tiles."""
    n = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    item = tl.arange(0, TILES)[:, None]
    place = peaks + (n * tiles + item) * rows + row
    highest = tl.full([TILES, ROWS], float("-inf"), tl.float32)
    for first in range(0, tiles, TILES):
        peak = tl.load(place + first * rows, mask=first + item < tiles, other=float("-inf"))
        highest = tl.maximum(highest, peak)
    peak = tl.max(highest, axis=0, keep_dims=True)
    for first in range(0, tiles, TILES):
        inside = first + item < tiles
        factor = tl.exp2(tl.load(place + first * rows, mask=inside, other=float("-inf")) - peak)
        tl.store(place + first * rows, factor, mask=inside)


@lazy_kernel(alike="rows tiles columns")
def _mix(
    p, v, factors, out, rows, tiles, columns,
    ROWS: tl.constexpr, COLS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`p`: [N rows, tiles KEYS]. `v`: [N tiles KEYS, D]. `factors`: [N, tiles, rows]. `out`: [N, L, D]."""
    n = tl.program_id(1)
    col0 = tl.program_id(0) % columns * COLS
    row0 = tl.program_id(0) // columns * ROWS
    factor = factors + n.to(tl.int64) * tiles * rows + row0 + tl.arange(0, ROWS)
    acc = tl.full([ROWS, COLS], 0, tl.float32)
    total = tl.full([ROWS], 0, tl.float32)
    STEPS: tl.constexpr = KEYS // DEPTH
    for i in tl.range(0, tiles * STEPS, num_stages=STAGES):
        power = p.load([n * rows + row0, i * DEPTH]).to(tl.float32)
        weight = (power * tl.load(factor + i // STEPS * rows)[:, None]).to(p.dtype)
        total += tl.sum(weight.to(tl.float32), axis=1)
        acc = tl.dot(weight, v.load([n * tiles * KEYS + i * DEPTH, col0]), acc)
    acc = acc / total[:, None]
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
    peaks = torch.empty((n, tiles, rows), dtype=torch.float32, device=q.device)
    cols = COLS if width % COLS == 0 else COLS // 2
    columns = -(-width // cols)
    if _dispatch.tally is not None:
        work = 2 * n * length * keys * width
        _dispatch.tally("_scores", work, 0)
        _dispatch.tally("_mix", work, 0)
    _scores[tiles * rows // ROWS, n](
        _matrix(q, ROWS), _matrix(k, KEYS), descriptor_of(powers, [ROWS, KEYS]), peaks, keys, length, rows, tiles,
        SCALE=scale * math.log2(math.e), D=width, ROWS=ROWS, KEYS=KEYS, DEPTH=DEPTH, GROUP=GROUP, STAGES=3, num_warps=4,
    )  # fmt: skip
    _factors[rows // FACTOR_ROWS, n](peaks, rows, tiles, TILES=FACTOR_TILES, ROWS=FACTOR_ROWS, num_warps=4)
    _mix[columns * rows // ROWS, n](
        descriptor_of(powers, [ROWS, DEPTH]), _matrix(v, DEPTH, cols), peaks,
        descriptor_of(out, [1, ROWS, cols]), rows, tiles, columns,
        ROWS=ROWS, COLS=cols, KEYS=KEYS, DEPTH=DEPTH, STAGES=3, num_warps=cols // 32,
    )  # fmt: skip


def _matrix(x: Tensor, rows: int, cols: int = DEPTH) -> Any:
    """All rows of `[N, L, D]` as one matrix; of slices of a fused projection without a copy."""
    matrix = x.flatten(0, 1)
    return descriptor_of(matrix if matrix.stride(1) == 1 else matrix.contiguous(), [rows, cols])


def signatures() -> list[Signature]:
    """The kernels as they are compiled ahead of time in the tests."""
    tile = {"ROWS": ROWS, "KEYS": KEYS, "DEPTH": DEPTH, "STAGES": 3}
    scores = {"q": descriptor("bf16", ROWS, DEPTH), "k": descriptor("bf16", KEYS, DEPTH)}
    mix = {"p": descriptor("bf16", ROWS, DEPTH), "v": descriptor("bf16", DEPTH, COLS)}
    mix |= {"factors": "fp32", "out": descriptor("bf16", 1, ROWS, COLS)}
    scores |= {"out": descriptor("bf16", ROWS, KEYS), "peaks": "fp32"}
    return [
        signature(_scores, scores, tile | {"SCALE": 0.06, "D": 512, "GROUP": GROUP}),
        signature(_factors, {"peaks": "fp32"}, {"TILES": FACTOR_TILES, "ROWS": FACTOR_ROWS}),
        signature(_mix, mix, tile | {"COLS": COLS}, warps=8),
    ]
