"""What vision towers write as chains of elementwise kernels, or as slow ones, in one kernel each.

Qwen2.5-VL's RMS norm is six kernels through fp32, 44 bytes an element where 4 are needed, twice a layer; QuickGELU, in
CLIP and Qwen2-VL, is three over the MLP's width; torch's LayerNorm takes 4.4 us of 256 rows of 1280 on an H200. In a
captured graph, where launches cost little, they are what is left beside matrix products and attention.

Inside towers only: the language model or text encoder around one has norms and activations of the same classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, obstacle
from vae_accel.families import row_norms, towers
from vae_accel.families.match import estranged, known_as
from vae_accel.kernels.gated_act import gated_act
from vae_accel.rewrite import Rewrite, Site, Tier, runs_stock

QUICK = 1.702


@dataclass(frozen=True)
class FusedElementwise(Rewrite):
    name = "fused_elementwise"
    tier = Tier.ROUNDING

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        for path, module in towers.inside(root):
            name = known_as(module, FORWARDS)
            if name is not None:
                reason = row_norms.refusal(module) if name in row_norms.NAMES else None
                yield Site(path, reason or obstacle(root, ledger, path, "forward"), {"name": name})
            elif (stranger := estranged(module, FORWARDS)) is not None:
                yield Site(path, stranger)

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        pen.method(site.path, "forward", FORWARDS[site.facts["name"]])


def quick_gelu(module: nn.Module, below: Callable[..., Tensor], input: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`."""
    if torch.compiler.is_compiling() or input.numel() == 0 or runs_stock(input):
        return below(input)
    return gated_act(input, slope=QUICK)


FORWARDS: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(row_norms.NAMES, row_norms.forward),
    "QuickGELUActivation": quick_gelu,
}
