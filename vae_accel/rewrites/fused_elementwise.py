"""What transformers' packed towers write as chains of elementwise kernels, as one kernel each.

Qwen2.5-VL's RMS norm is six kernels through fp32, 44 bytes an element where 4 are needed, twice a layer; Qwen2-VL's
QuickGELU is three over the MLP's width. In a captured graph, where launches cost little, they are what is left beside
matrix products and attention.

Inside towers only: the language model around one has norms of the same classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, obstacle, unusable_weight
from vae_accel.families import towers
from vae_accel.families.match import estranged, known_as
from vae_accel.kernels.gated_act import gated_act
from vae_accel.kernels.rms_norm_act import rms_norm_act
from vae_accel.rewrite import Rewrite, Site, Tier, runs_stock

QUICK = 1.702


@dataclass(frozen=True)
class FusedElementwise(Rewrite):
    name = "fused_elementwise"
    tier = Tier.ROUNDING

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        outer = [path for path, module in root.named_modules() if towers.row_of(module) is not None]
        for path, module in root.named_modules():
            if not any(not tower or path.startswith(f"{tower}.") for tower in outer):
                continue
            name = known_as(module, FORWARDS)
            if name is not None:
                reason = unusable_weight(module) if module._parameters else None
                yield Site(path, reason or obstacle(root, ledger, path, "forward"), {"name": name})
            elif (stranger := estranged(module, FORWARDS)) is not None:
                yield Site(path, stranger)

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        pen.method(site.path, "forward", FORWARDS[site.facts["name"]])


def rms_norm(module: Any, below: Callable[..., Tensor], hidden_states: Tensor) -> Tensor:
    """`weight * x / sqrt(mean(x²) + eps)` over the last dimension. Stock's statistics of fp64 are fp32: left to it."""
    x, weight = hidden_states, module.weight
    if _runs_stock(x, weight) or weight.dtype != x.dtype or x.dtype == torch.float64 or x.shape[-1] != weight.numel():
        return below(x)
    rows = x.reshape(-1, x.shape[-1]).t().unsqueeze(0)  # [1, C, L], channels innermost in memory
    out = rms_norm_act(rows, weight, None, module.variance_epsilon, act=False, mode="mean")
    return out.squeeze(0).t().reshape(x.shape)


def quick_gelu(module: nn.Module, below: Callable[..., Tensor], input: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`."""
    return below(input) if _runs_stock(input) else gated_act(input, slope=QUICK)


FORWARDS: dict[str, Callable[..., Tensor]] = {
    "Qwen2_5_VLRMSNorm": rms_norm,
    "Qwen2_5OmniRMSNorm": rms_norm,
    "Exaone4_5_RMSNorm": rms_norm,
    "QuickGELUActivation": quick_gelu,
}


def _runs_stock(x: Tensor, *parameters: Tensor) -> bool:
    return torch.compiler.is_compiling() or x.numel() == 0 or runs_stock(x, *parameters)
