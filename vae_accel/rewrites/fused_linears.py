"""A layer of a vision tower in about seven launches: projections of one input joined, and with each linear layer the
activation or the sum that follows it.

With few tokens the number of kernels is what a captured tower takes time for: CLIP-H's 489 and Qwen2.5-VL's 389 are
some 2 us apart. What remains of a layer is two norms, the projections, attention, and three products.

The layer decides in each call. Modules are called as modules, but attention and MLP return the sum with the residual
that they are handed: where a hook or an adapter would see that, the layer runs as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, ledger_of, obstacle
from vae_accel.families import linears as family
from vae_accel.families.linears import Layer, Parts
from vae_accel.families.match import estranged
from vae_accel.kernels.linear import MOST_ROWS, takes
from vae_accel.rewrite import Rewrite, Site, Tier, runs_stock

FUSED = "layers in few launches"


@dataclass(frozen=True)
class FusedLinears(Rewrite):
    name = "fused_linears"
    tier = Tier.ROUNDING
    over = ("padded_mlp",)

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        for path, module in root.named_modules():
            try:
                found = family.read(module) or estranged(module, family.LAYERS)
            except AttributeError as missing:
                found = f"this {type(module).__name__} is not transformers' class of that name: {missing}"
            if isinstance(found, str):
                yield Site(path, found)
            elif found is not None:
                row, mlp, parts = found
                yield Site(
                    path, self._refusal(root, ledger, path, row, parts), {"row": row, "mlp": mlp, "parts": parts}
                )

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        ledger, row, parts = ledger_of(root), site.facts["row"], site.facts["parts"]
        assert ledger is not None
        pen.method(site.path, "forward", forward, ledger, row, parts)
        pen.method(_join(site.path, parts.mlp), "forward", family.mlp, site.facts["mlp"])
        if row.projections:
            pen.method(_join(site.path, parts.attention), "forward", family.attend, row)
        for part in parts.linears:
            path = _join(site.path, part)
            shapes = {edit.slot: edit.new for edit in ledger.edits if (edit.path, edit.kind) == (path, "padded")}
            pen.method(path, "forward", family.lent, shapes)

    def _refusal(self, root: nn.Module, ledger: Ledger, path: str, row: Layer, parts: Parts) -> str | None:
        attention = _join(path, parts.attention)
        if not row.projections and ledger.owner(attention, "forward") != "packed_attention":
            return f"{parts.attention} is not taken by packed_attention"
        own = ("", *parts.all) if row.projections else ("", parts.mlp, *parts.linears)
        for part in own:
            if (reason := obstacle(root, ledger, _join(path, part), "forward", self.over)) is not None:
                return f"{part or 'the layer'}: {reason}"
        reason = obstacle(root, ledger, _join(path, parts.act), "forward", ("fused_elementwise",))
        return None if reason is None else f"{parts.act}: {reason}"


def forward(
    layer: Any,
    below: Callable[..., Tensor],
    ledger: Ledger,
    row: Layer,
    parts: Parts,
    hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """`forward(hidden_states [..., C], ...)`: [..., C]. What follows the first argument is the attention's."""
    if torch.compiler.is_compiling() or hidden_states.is_meta:
        return below(hidden_states, *args, **kwargs)
    reason = _unproved(layer, row, parts, hidden_states)
    if reason is not None:
        ledger.count(FusedLinears.name, f"layers as they were: {reason}")
        return below(hidden_states, *args, **kwargs)
    ledger.count(FusedLinears.name, FUSED)
    first, second = (getattr(layer, name) for name in row.norms)
    attention, mlp = getattr(layer, row.attention), getattr(layer, row.mlp)
    summed = attention(first(hidden_states), *args, residual=hidden_states, **kwargs)
    summed = summed[0] if row.projections else summed
    return mlp(second(summed), residual=summed)


def _unproved(layer: nn.Module, row: Layer, parts: Parts, x: Tensor) -> str | None:
    """Why a call is not ours, or None. On a CPU torch's steps run in the place of the kernel."""
    wanted = torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters())
    if wanted or runs_stock(x):
        return "a gradient or autocast"
    if x.device.type != "cpu" and not takes(x):
        return f"more than 16 bits or {MOST_ROWS} tokens, or no Triton"
    return family.disturbance(layer, parts, bool(row.projections))


def _join(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)
