"""Linear layers of few tokens as one launch: several weights on one input, bias, activation, gate and residual with it.

A vision tower of 256 tokens is bound by the number of its kernels: some 2 us lie between two nodes of a CUDA graph, and
Qwen2.5-VL's 3.0 ms are 2.0 of kernels and 389 of those gaps. Three projections of one input, an activation over the
MLP's width and the sum with the residual are launches that do next to nothing; here they are part of the product.

Sides of a product are 32 at least: with 16 columns Triton 3.6 multiplies wrongly on an H100.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch
from ._dispatch import Signature, differentiates, lazy_kernel, signature, triton_available

tl: Any = None  # triton.language, bound at the first launch

ACTS = ("silu", "quick_gelu", "gelu", "gelu_tanh")
QUICK = 1.702
MOST_WEIGHTS = 3
MOST_ROWS = 1536  # beyond, launches no longer bind and a library's product is faster. Chosen, not measured yet.


class Tile(NamedTuple):
    """Rows, columns and channels of a product that a program has at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tile_for(rows: int) -> Tile:
    """Small ones while there are fewer of them than processors: 257 rows of 1280 columns are 100. Not measured yet."""
    return Tile(64, 64, 64, 4, 4) if rows <= 512 else Tile(128, 64, 64, 4, 3)


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    act: str | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """torch's steps, each in the dtype of `x`: in fp64 the law, elsewhere what runs where the kernel does not."""
    parts = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    if act == "silu":
        parts[0] = F.silu(parts[0])
    elif act == "quick_gelu":
        parts[0] = parts[0] * torch.sigmoid(QUICK * parts[0])
    elif act is not None:
        parts[0] = F.gelu(parts[0], approximate="tanh" if act == "gelu_tanh" else "none")
    out = parts[0] * parts[1] if gated else parts[0] if len(parts) == 1 else torch.stack(parts, -2)
    return out if residual is None else residual + out


@lazy_kernel(alike="M")
def _linear(
    x, out, weight, weight_1, weight_2, bias, bias_1, bias_2, residual, M, N, K, x_m, weight_n, out_m, residual_m,
    ACT: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """`GATED`: both weights in one program, else program axis 1 picks one. `EVEN`: K is a multiple of DEPTH."""
    down, which = tl.program_id(0), tl.program_id(1)
    if not GATED:
        if weight_1 is not None and which == 1:
            weight = weight_1
        if weight_2 is not None and which == 2:
            weight = weight_2
    # Rows first: programs that run together read the same part of the weight, which is the larger operand.
    strips = (M + ROWS - 1) // ROWS
    row = down % strips * ROWS + tl.arange(0, ROWS)[:, None]
    col = down // strips * COLS + tl.arange(0, COLS)[None, :]
    deep = tl.arange(0, DEPTH)
    # Those past the end read the last one, and are not stored: no mask in the loop but that of a last, shorter step.
    left = x + tl.minimum(row, M - 1) * x_m + deep[None, :]
    right = tl.minimum(col, N - 1) * weight_n + deep[:, None]
    acc = tl.full([ROWS, COLS], 0, tl.float32)
    acc_1 = tl.full([ROWS, COLS], 0, tl.float32)
    for begin in range(0, K, DEPTH):
        if EVEN:
            part = tl.load(left + begin)
            acc = tl.dot(part, tl.load(weight + right + begin), acc, input_precision="ieee")
            if GATED:
                acc_1 = tl.dot(part, tl.load(weight_1 + right + begin), acc_1, input_precision="ieee")
        else:
            rest = K - begin
            there = deep[:, None] < rest
            part = tl.load(left + begin, mask=deep[None, :] < rest, other=0)
            acc = tl.dot(part, tl.load(weight + right + begin, mask=there, other=0), acc, input_precision="ieee")
            if GATED:
                other = tl.load(weight_1 + right + begin, mask=there, other=0)
                acc_1 = tl.dot(part, other, acc_1, input_precision="ieee")
    wide = col < N
    if bias is not None:
        added = bias
        if not GATED:
            if bias_1 is not None and which == 1:
                added = bias_1
            if bias_2 is not None and which == 2:
                added = bias_2
        acc += tl.load(added + col, mask=wide, other=0).to(tl.float32)
    if ACT == "gelu":
        acc = 0.5 * acc * (1 + tl.math.erf(acc * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # (1 + tanh(u)) / 2 is the sigmoid of 2u
        acc = acc / (1 + tl.exp(-1.5957691216057308 * (acc + 0.044715 * acc * acc * acc)))
    elif ACT == "quick_gelu":
        acc = acc / (1 + tl.exp(-1.702 * acc))
    elif ACT == "silu":
        acc = acc / (1 + tl.exp(-acc))
    if GATED:
        if bias_1 is not None:
            acc_1 += tl.load(bias_1 + col, mask=wide, other=0).to(tl.float32)
        acc *= acc_1
    inside = (row < M) & wide
    if residual is not None:
        acc += tl.load(residual + row * residual_m + col, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * out_m + which * N + col, acc.to(out.dtype.element_ty), mask=inside)


def _launch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    act: str | None,
    gated: bool,
    residual: Tensor | None,
    tile: Tile,
) -> Tensor:
    (N, K), parts = weights[0].shape, 1 if gated else len(weights)
    out = torch.empty(_shape(x, weights, gated), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows, sums = _rows(x), None if residual is None else _rows(residual)
    M = len(rows)
    if _dispatch.tally is not None:
        moved = x.numel() + len(weights) * weights[0].numel() + out.numel() + (0 if residual is None else out.numel())
        _dispatch.tally("_linear", 2 * M * N * K * len(weights), moved * x.element_size())
    none = [None] * (MOST_WEIGHTS - len(weights))
    with torch.cuda.device_of(x):
        _linear[-(-M // tile.rows) * -(-N // tile.columns), parts](
            rows, out, *weights, *none, *biases, *none, sums, M, N, K, rows.stride(0), weights[0].stride(0), parts * N,
            0 if sums is None else sums.stride(0), ACT=act, GATED=gated, ROWS=tile.rows, COLS=tile.columns,
            DEPTH=tile.depth, EVEN=K % tile.depth == 0, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def takes(x: Tensor) -> bool:
    """Whether inputs like `x` [..., K] are the kernel's: 16 bits (fp32 products would be slow), and few rows."""
    return x.dtype.itemsize == 2 and triton_available(x) and 0 < x.numel() <= MOST_ROWS * x.shape[-1]


def _run(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    act: str | None,
    gated: bool,
    residual: Tensor | None,
) -> Tensor:
    # One stride and one kind of bias for all of them, values of a row side by side, and offsets of 32 bits.
    alike = len({w.stride() for w in weights}) == 1 and len({b is None for b in biases}) == 1
    plain = weights[0].stride(1) == 1 and weights[0].shape[0] * weights[0].stride(0) < 2**31
    if not (takes(x) and alike and plain):
        return reference(x, weights, biases, act, gated, residual).contiguous()
    return _launch(x, weights, biases, act, gated, residual, tile_for(x.numel() // x.shape[-1]))


_op = torch.library.custom_op("vae_accel::linear", _run, mutates_args=())
_op.register_fake(lambda x, weights, biases, act, gated, residual: x.new_empty(_shape(x, weights, gated)))


def _shape(x: Tensor, weights: Sequence[Tensor], gated: bool) -> tuple[int, ...]:
    N = weights[0].shape[0]
    several = len(weights) > 1 and not gated
    return (*x.shape[:-1], len(weights), N) if several else (*x.shape[:-1], N)


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    act: str | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """`act(x weightᵀ + bias) + residual`: `[..., K]` and a weight `[N, K]` to `[..., N]`, contiguous.

    Two or three weights of one shape give `[..., count, N]`; two with `gated` give the first part, activated, times the
    second. `residual` is of the shape of the result. fp32 arithmetic, one rounding. Where there is no Triton, beyond
    MOST_ROWS rows, for more than 16 bits and where autograd records, the reference runs, which rounds at each step.

    Raises:
        ValueError: shapes or dtypes that do not fit, more than three weights, an unknown `act`, or an activation or a
            residual of several results.
    """
    first = tuple(weights[0].shape) if 1 <= len(weights) <= MOST_WEIGHTS else ()
    if len(first) != 2 or any(tuple(w.shape) != first for w in weights) or x.shape[-1] != first[1]:
        given = ", ".join(str(tuple(w.shape)) for w in weights)
        raise ValueError(f"there must be one to three weights [N, {x.shape[-1]}] of one shape, got {given or 'none'}")
    tensors = [t for t in (*weights, *biases, residual) if t is not None]
    if any(t.dtype != x.dtype for t in tensors):
        raise ValueError(f"all must be of one dtype, got {x.dtype} and {sorted({str(t.dtype) for t in tensors})}")
    if len(biases) != len(weights) or any(b is not None and tuple(b.shape) != first[:1] for b in biases):
        raise ValueError(f"there must be one bias [{first[0]}], or None, for each of {len(weights)} weights")
    one = gated or len(weights) == 1
    if act not in (None, *ACTS) or (gated and len(weights) != 2) or not (one or act is residual is None):
        several = "" if one else ": several results take neither activation nor residual"
        raise ValueError(f"act={act!r} (of {ACTS}) and gated={gated} with {len(weights)} weights{several}")
    if residual is not None and tuple(residual.shape) != (*x.shape[:-1], first[0]):
        raise ValueError(
            f"residual must be of the result's shape {(*x.shape[:-1], first[0])}, got {tuple(residual.shape)}"
        )
    if differentiates(x, *tensors):
        return reference(x, weights, biases, act, gated, residual)
    run = _op if torch.compiler.is_compiling() else _run
    return run(x, list(weights), list(biases), act, gated, residual)


def signatures() -> list[Signature]:
    """The kernel as it is compiled ahead of time in the tests."""
    data = dict.fromkeys(("x", "out", "weight", "bias"), "bf16")
    tile = {"ROWS": 64, "COLS": 64, "DEPTH": 64}
    none = ("weight_1", "weight_2", "bias_1", "bias_2", "residual")

    def made(more: tuple[str, ...], **constants: Any) -> Signature:
        absent = dict.fromkeys(set(none) - set(more))
        return signature(_linear, {**data, **dict.fromkeys(more, "bf16")}, {**tile, **absent, **constants})

    return [
        made(("weight_1", "weight_2", "bias_1", "bias_2"), ACT=None, GATED=False, EVEN=True),
        made(("weight_1", "bias_1"), ACT="silu", GATED=True, EVEN=True),
        made(("residual",), ACT=None, GATED=False, EVEN=False),
        *(made((), ACT=act, GATED=False, EVEN=True) for act in ACTS[1:]),
    ]
