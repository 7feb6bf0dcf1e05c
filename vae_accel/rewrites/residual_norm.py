"""The two sums of a tower's layer, each in one launch with the norm that reads it.

Between any two launches of a captured tower lie some 1.5 us, and the sum of 256 rows is one of 1.45. The sum behind
attention is followed by the layer's second norm. That behind the MLP leaves the layer as it always did: the first norm
of the layer after is noted on it, and taken from there if that layer is called with this tensor, not written since.

Attention and MLP are called as modules with what stock would give them. A norm that is joined is not called: where
somebody would notice (a hook, an offloaded weight, a patch), sums run by themselves.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, is_unseen, ledger_of, obstacle
from vae_accel.families import row_norms, towers
from vae_accel.families.layers import LAYERS, Layer
from vae_accel.families.match import estranged, known_as
from vae_accel.rewrite import Rewrite, Site, Tier, module_runs_stock

JOINED, APART = "sums with the norm of them", "sums by themselves"
_NOTE = "_vae_accel_normed"


@dataclass(frozen=True)
class ResidualNorm(Rewrite):
    name = "residual_norm"
    tier = Tier.ROUNDING

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        for path, module in towers.inside(root):
            name = known_as(module, LAYERS)
            if name is not None:
                reason = _refusal(module, LAYERS[name]) or obstacle(root, ledger, path, "forward")
                yield Site(path, reason, {"row": LAYERS[name], "following": _following(root, path)})
            elif (stranger := estranged(module, LAYERS)) is not None:
                yield Site(path, stranger)

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        following = site.facts["following"]
        norm = None if following is None else root.get_submodule(following)
        pen.method(site.path, "forward", forward, ledger_of(root), site.facts["row"], norm)


def forward(
    layer: Any,
    below: Callable[..., Any],
    ledger: Ledger,
    row: Layer,
    following: nn.Module | None,
    hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`forward(hidden_states [..., C], ...)`: [..., C]. What follows the first argument is the attention's."""
    if torch.compiler.is_compiling() or hidden_states.is_meta:
        return below(hidden_states, *args, **kwargs)
    if module_runs_stock(layer, hidden_states):
        ledger.count(ResidualNorm.name, "layers as they were: a gradient or autocast")
        return below(hidden_states, *args, **kwargs)
    first, second = (getattr(layer, name) for name in row.norms)
    normed = _taken(hidden_states, first)
    normed = first(hidden_states) if normed is None else normed
    attended = getattr(layer, row.attention)(normed, *args, **kwargs)
    attended = attended[0] if isinstance(attended, tuple) else attended  # beside its weights
    total, normed = _summed(ledger, hidden_states, attended, second)
    out = getattr(layer, row.mlp)(second(total) if normed is None else normed)
    if following is None:
        return total + out
    total, normed = _summed(ledger, total, out, following)
    if normed is not None and not total.is_inference():  # which does not count its versions
        setattr(total, _NOTE, (following, normed, total.data_ptr(), total._version))
    return total


def _summed(ledger: Ledger, x: Tensor, y: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """`x + y` [..., C], and its norm where that is not to be called."""
    if (y.shape, y.dtype, y.device) != (x.shape, x.dtype, x.device):
        reason: str | None = "of two shapes, dtypes or devices"
    elif not is_unseen(norm):
        reason = "a hook or a patch on the norm"
    else:
        reason = row_norms.unlike(norm, x)
    ledger.count(ResidualNorm.name, JOINED if reason is None else f"{APART}: {reason}")
    return row_norms.of_sum(norm, x, y) if reason is None else (x + y, None)


def _taken(x: Tensor, norm: nn.Module) -> Tensor | None:
    """The norm of `x` that is noted on it, once: hidden states that somebody keeps are not to keep it."""
    noted = vars(x).pop(_NOTE, None)
    if noted is None or noted[0] is not norm or not is_unseen(norm):
        return None
    _, normed, pointer, version = noted
    return normed if (x.data_ptr(), x._version) == (pointer, version) else None


def _following(root: nn.Module, path: str) -> str | None:
    """The path of the first norm of the layer after this one in the list that holds both; None after the last."""
    parent, _, index = path.rpartition(".")
    stack = root.get_submodule(parent)
    if not isinstance(stack, nn.ModuleList) or int(index) + 1 >= len(stack):
        return None
    after = stack[int(index) + 1]
    name = known_as(after, LAYERS)
    if name is None or _refusal(after, LAYERS[name]) is not None:
        return None
    return f"{parent}.{int(index) + 1}.{LAYERS[name].norms[0]}"


def _refusal(layer: nn.Module, row: Layer) -> str | None:
    for name in (row.attention, row.mlp, *row.norms):
        if name not in layer._modules:
            return f"this {type(layer).__name__} is not transformers' class of that name: it has no {name}"
    if "output_attentions" in inspect.signature(type(layer).forward).parameters:
        return f"transformers {sys.modules['transformers'].__version__} returns a tuple from its layers"
    for name in row.norms:
        norm = layer.get_submodule(name)
        if known_as(norm, row_norms.NAMES) is None:
            return f"its {name} is a {type(norm).__name__}"
        if (reason := row_norms.refusal(norm)) is not None:
            return f"{name}: {reason}"
    return None
