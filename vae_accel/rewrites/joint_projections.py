"""Queries, keys and values of an attention by one product.

On an H200 three projections of 256 rows of 1280 channels take 17 us, one to 3840 takes 7.2; of 784 rows 24.2 and 13.9.

Their weights and biases are stored side by side (`Pen.join`), so that all of them are one matrix and each is still a
parameter of its own shape. The attention's forward stays its class's: it computes the product first and notes the three
parts on its input, for as long as its call lasts, and each projection, called as a module, answers with its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, is_unseen, ledger_of, obstacle, unusable_weight
from vae_accel.families import towers
from vae_accel.families.match import estranged, known_as
from vae_accel.rewrite import Rewrite, Site, Tier, runs_stock
from vae_accel.storage import joint

# Attentions that project the `hidden_states` they are called with: the names of their projections.
_PROJ = ("q_proj", "k_proj", "v_proj")
ATTENTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("CLIPAttention", "SiglipAttention", "Siglip2Attention", "Dinov2Attention"), _PROJ),
    "Dinov2SelfAttention": ("query", "key", "value"),  # as transformers named it before 5.23
    "Qwen2_5OmniVisionAttention": ("q", "k", "v"),
}
JOINED, APART = "attentions with one product", "attentions as they were"
_NOTE = "_vae_accel_projected"


@dataclass(frozen=True)
class JointProjections(Rewrite):
    name = "joint_projections"
    tier = Tier.ROUNDING

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        for path, module in towers.inside(root):
            name = known_as(module, ATTENTIONS)
            if name is not None:
                names = ATTENTIONS[name]
                yield Site(path, _refusal(root, ledger, path, names), {"names": names})
            elif (stranger := estranged(module, ATTENTIONS)) is not None:
                yield Site(path, stranger)

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        paths = tuple(f"{site.path}.{name}" for name in site.facts["names"])
        for name, parameter in root.get_submodule(paths[0])._parameters.items():
            if parameter is not None:
                pen.join(paths, name)
        for path in paths:
            pen.method(path, "forward", project)
        pen.method(site.path, "forward", attend, ledger_of(root), site.facts["names"])


def attend(
    attention: nn.Module,
    below: Callable[..., Any],
    ledger: Ledger,
    names: tuple[str, ...],
    hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """An attention's `forward(hidden_states [..., K], ...)`, with what its projections answer noted on its input."""
    if torch.compiler.is_compiling() or hidden_states.is_meta:
        return below(hidden_states, *args, **kwargs)
    projections: list[Any] = [getattr(attention, name) for name in names]
    whole = _product(projections, hidden_states)
    if isinstance(whole, str):
        ledger.count(JointProjections.name, f"{APART}: {whole}")
        return below(hidden_states, *args, **kwargs)
    ledger.count(JointProjections.name, JOINED)
    parts = whole.split([linear.out_features for linear in projections], -1)
    setattr(hidden_states, _NOTE, dict(zip(projections, parts, strict=True)))
    try:
        return below(hidden_states, *args, **kwargs)
    finally:
        delattr(hidden_states, _NOTE)


def project(linear: nn.Module, below: Callable[..., Tensor], input: Tensor) -> Tensor:
    """A projection's `forward(input [..., K])`: its part of the product noted on `input`, [..., N], a view."""
    part = getattr(input, _NOTE, {}).get(linear)
    return below(input) if part is None else part


def _product(projections: list[Any], x: Tensor) -> Tensor | str:
    """[..., sum of N], or the reason why each projection is to run by itself."""
    if not all(type(linear) is nn.Linear and is_unseen(linear) for linear in projections):
        return "a hook, a patch or an adapter on a projection"
    if runs_stock(x, *(p for linear in projections for p in linear._parameters.values())):
        return "a gradient or autocast"
    weight, biased = joint(projections, "weight"), projections[0].bias is not None
    bias = joint(projections, "bias") if biased else None
    if weight is None or biased != (bias is not None) or any((p.bias is not None) != biased for p in projections):
        return "weights that are not side by side"
    return F.linear(x, weight, bias)


def _refusal(root: nn.Module, ledger: Ledger, path: str, names: tuple[str, ...]) -> str | None:
    kinds, parameters = set(), []
    for name in names:
        linear: Any = root.get_submodule(path)._modules.get(name)
        if type(linear) is not nn.Linear:
            return f"its {name} is a {type(linear).__name__}: optimize before adapters are attached"
        reason = unusable_weight(linear) or obstacle(root, ledger, f"{path}.{name}", "forward")
        if reason is not None or not linear.weight.is_contiguous():
            return f"{name}: {reason or 'its weight is stored in another order'}"
        weight = linear.weight
        kinds.add((weight.shape[1], weight.dtype, weight.device, linear.bias is None))
        parameters += [p for p in (weight, linear.bias) if p is not None]
    if len(kinds) > 1 or len(set(map(id, parameters))) < len(parameters):
        return "its projections differ in input, dtype, device or bias, or share a parameter"
    return obstacle(root, ledger, path, "forward")
