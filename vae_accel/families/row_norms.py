"""Norms over the last dimension in transformers' vision towers: which classes `kernels.residual_norm` takes.

RMS classes were compared by source in transformers 5.23: statistics in fp32, a rounding, then the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.edits import unusable_weight
from vae_accel.families.match import known_as
from vae_accel.kernels.residual_norm import residual_norm, row_norm
from vae_accel.rewrite import runs_stock

RMS = ("Qwen2_5_VLRMSNorm", "Qwen2_5OmniRMSNorm", "Exaone4_5_RMSNorm", "Glm4vRMSNorm", "Glm4vMoeRMSNorm")
NAMES = ("LayerNorm", *RMS)


def refusal(norm: nn.Module) -> str | None:
    """Why a norm of NAMES is not the kernel's, whatever it is called with; None where it is."""
    if isinstance(norm, nn.LayerNorm) and (len(norm.normalized_shape) > 1 or norm.weight is None):
        return "it normalises several dimensions, or has no weight"
    if known_as(norm, NAMES) == "LayerNorm" and not isinstance(norm, nn.LayerNorm):
        return f"{type(norm).__module__}'s LayerNorm is not torch's"
    return unusable_weight(norm)


def unlike(norm: nn.Module, x: Tensor) -> str | None:
    """Why the norm of `x` [..., C] is stock's, or None."""
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    if weight is None or weight.shape != x.shape[-1:] or x.numel() == 0:
        return "its weight is elsewhere, or there is nothing to normalise"
    if any(p is not None and (p.dtype, p.device) != (x.dtype, x.device) for p in (weight, bias)):
        return "it has parameters of another dtype or device"
    if x.dtype == torch.float64 and known_as(norm, RMS) is not None:
        return "stock takes statistics of fp64 in fp32"
    return "a gradient or autocast" if runs_stock(x, weight, bias) else None


def forward(norm: nn.Module, below: Callable[..., Tensor], x: Tensor) -> Tensor:
    """A norm's `forward(x [..., C])`: [..., C]."""
    if torch.compiler.is_compiling() or unlike(norm, x) is not None:
        return below(x)
    return row_norm(x, *_operands(norm))


def of_sum(norm: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`x + y` and its norm, with parameters that are read outside the norm's own call: see `edits.is_unseen`."""
    return residual_norm(x, y, *_operands(norm))


def _operands(norm: Any) -> tuple[Tensor, Tensor | None, float, str]:
    if known_as(norm, RMS) is not None:
        return norm.weight, None, norm.variance_epsilon, "rms"
    return norm.weight, norm.bias, norm.eps, "layer"
