"""Queries and keys of a packed projection turned by their positions, in one pass over what the projection wrote.

transformers' `apply_rotary_pos_emb_vision` is about 14 kernels a layer that pass through fp32: some 30 bytes an element
where reading and writing once are four.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._dispatch import LazyKernel, Signature, differentiates, next_power_of_2, signature, triton_available

tl: Any = None  # triton.language, bound at the first launch

WARPS = 4


def reference(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The law: in fp32 (fp64 for fp64), rounded once."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    x = qkv[:, :2].to(wide)
    first, second = x.chunk(2, -1)
    cos, sin = (t.to(wide)[:, None, None] for t in (cos, sin))
    return (x * cos + torch.cat((-second, first), -1) * sin).to(qkv.dtype).transpose(0, 1).contiguous()


@LazyKernel
def _rotate(
    qkv, out, cos, sin, heads, stride_l, stride_p, stride_h, angle_l,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """All heads of one token; `program_id(1)` is 0 for its query, 1 for its key. ROWS heads by COLS >= D / 2."""
    HALF: tl.constexpr = D // 2
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    inside = (row < heads) & (col < HALF)
    source = qkv + token * stride_l + part * stride_p + row * stride_h + col
    first = tl.load(source, mask=inside, other=0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0).to(tl.float32)
    angle = token * angle_l + col
    cos_1 = tl.load(cos + angle, mask=col < HALF, other=0).to(tl.float32)
    cos_2 = tl.load(cos + angle + HALF, mask=col < HALF, other=0).to(tl.float32)
    sin_1 = tl.load(sin + angle, mask=col < HALF, other=0).to(tl.float32)
    sin_2 = tl.load(sin + angle + HALF, mask=col < HALF, other=0).to(tl.float32)
    target = out + ((part * tl.num_programs(0) + token) * heads + row) * D + col
    tl.store(target, (first * cos_1 - second * sin_1).to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (second * cos_2 + first * sin_2).to(out.dtype.element_ty), mask=inside)


def _run(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if not triton_available(qkv) or qkv.numel() == 0:
        return reference(qkv, cos, sin)
    length, _, heads, D = qkv.shape
    qkv, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (qkv, cos, sin))
    sin = sin if sin.stride() == cos.stride() else sin.contiguous()
    cos = cos if sin.stride() == cos.stride() else cos.contiguous()
    out = torch.empty((2, length, heads, D), dtype=qkv.dtype, device=qkv.device)
    if _dispatch.tally is not None:
        _dispatch.tally("_rotate", 0, 2 * out.numel() * out.element_size())
    with torch.cuda.device_of(qkv):
        _rotate[length, 2](
            qkv, out, cos, sin, heads, qkv.stride(0), qkv.stride(1), qkv.stride(2), cos.stride(0),
            D=D, ROWS=next_power_of_2(heads), COLS=next_power_of_2(D // 2), num_warps=WARPS,
        )  # fmt: skip
    return out


_op = torch.library.custom_op("vae_accel::rotary", _run, mutates_args=())


@_op.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    length, _, heads, D = qkv.shape
    return torch.empty((2, length, heads, D), dtype=qkv.dtype, device=qkv.device)


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys, `[L, heads, D]` each, of a packed projection `qkv` `[L, 3, heads, D]`.

    `cos` and `sin` are `[L, D]` in any floating dtype; channel i turns with channel i + D / 2 (Su et al., 2021, in the
    half-split form). Arithmetic is fp32 with one rounding. Where autograd records, the reference runs.

    Raises:
        ValueError: an odd D, a projection that is not packed in threes, or angles that are not `[L, D]`.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3 or qkv.shape[3] % 2:
        raise ValueError(f"qkv must be [L, 3, heads, D] with an even D, got {tuple(qkv.shape)}")
    angles = (qkv.shape[0], qkv.shape[3])
    if cos.shape != angles or sin.shape != angles:
        raise ValueError(f"cos and sin must be {angles}, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if differentiates(qkv, cos, sin):
        q, k = reference(qkv, cos, sin)
        return q, k
    run = _op if torch.compiler.is_compiling() else _run
    q, k = run(qkv, cos, sin)
    return q, k


def signatures() -> list[Signature]:
    """The kernel as it is compiled ahead of time in the tests."""
    pointers = {"qkv": "bf16", "out": "bf16", "cos": "fp32", "sin": "fp32"}
    return [signature(_rotate, pointers, {"D": D, "ROWS": 16, "COLS": next_power_of_2(D // 2)}) for D in (72, 80, 128)]
