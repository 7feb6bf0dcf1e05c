"""A gated MLP at a width that fast matrix products take: Qwen2.5-VL's is 3420, whose rows of 16 bits are 6840 bytes.

Rows that do not begin on 16 bytes keep a product off the tensor memory accelerator and off wide loads. Weights and
biases are stored in larger zeros (`Pen.pad`), so that the products have 3456 columns; what is added is
SiLU(0) * 0 times zero. Padding them in each call instead would move 1.7 GB in 32 layers: 0.6 ms of the 4 that a small
image may take.

Each projection is called as a module and reads its weight in its own call. It answers with the part of its result that
stock would have, and notes the whole on it; where a hook or an adapter put another tensor in its place, there is no
note, and what follows runs at its own width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, ledger_of, obstacle, unusable_weight
from vae_accel.families.match import estranged, known_as
from vae_accel.kernels.gated_act import gated_act
from vae_accel.rewrite import Rewrite, Site, Tier, runs_stock
from vae_accel.storage import padded

# Classes whose forward is down_proj(act_fn(gate_proj(x)) * up_proj(x)).
NAMES = ("Qwen2_5_VLMLP", "Qwen2_5OmniMLP", "Exaone4_5_MLP", "GlmOcrVisionMlp")
ALIGNED, MULTIPLE = 8, 64  # values of 16 bits in 16 bytes; channels a tile of a product has at a time
PADDED, PLAIN = "layers at a padded width", "layers at their own width: a gradient, autocast, a hook or an adapter"
_WHOLE = "_vae_accel_whole"


@dataclass(frozen=True)
class PaddedMlp(Rewrite):
    name = "padded_mlp"
    tier = Tier.ROUNDING

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        for path, module in root.named_modules():
            if known_as(module, NAMES) is not None:
                yield Site(path, _refusal(root, ledger, path))
            elif (stranger := estranged(module, NAMES)) is not None:
                yield Site(path, stranger)

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        gate, up, down = (_join(site.path, name) for name in ("gate_proj", "up_proj", "down_proj"))
        inner: Any = root.get_submodule(down).in_features
        width: int = inner + -inner % MULTIPLE
        for path, function in ((gate, widened), (up, widened), (down, narrowed)):
            linear: Any = root.get_submodule(path)
            rows, columns = linear.out_features, linear.in_features
            pen.pad(path, "weight", (rows, width) if path == down else (width, columns))
            if path != down and linear.bias is not None:
                pen.pad(path, "bias", (width,))
            pen.method(path, "forward", function, width)
        pen.method(site.path, "forward", forward, ledger_of(root))


def forward(mlp: Any, below: Callable[..., Tensor], ledger: Ledger, x: Tensor) -> Tensor:
    """`forward(x [..., C])`: [..., C]. Stock's, on the padded whole of what its projections answer."""
    if torch.compiler.is_compiling() or x.is_meta:
        return below(x)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    wide_gate, wide_up = getattr(gate, _WHOLE, None), getattr(up, _WHOLE, None)
    if wide_gate is None or wide_up is None:
        ledger.count(PaddedMlp.name, PLAIN)
        return mlp.down_proj(mlp.act_fn(gate) * up)
    ledger.count(PaddedMlp.name, PADDED)
    act = mlp.act_fn
    inner = gated_act(wide_gate, wide_up) if _is_silu(act) else act(wide_gate) * wide_up
    return mlp.down_proj(_part(inner, gate.shape[-1]))


def widened(linear: Any, below: Callable[..., Tensor], width: int, x: Tensor) -> Tensor:
    """A gate's or up's `forward(x [..., C])`: the first `out_features` of [..., width], which is noted on them."""
    if _runs_stock(linear, x):
        return below(x)
    weight = padded(linear, "weight", (width, linear.in_features))
    bias = None if linear.bias is None else padded(linear, "bias", (width,))
    if weight is None or (bias is None) != (linear.bias is None):
        return below(x)
    return _part(F.linear(x, weight, bias), linear.out_features)


def narrowed(linear: Any, below: Callable[..., Tensor], width: int, x: Tensor) -> Tensor:
    """Down's `forward(x [..., in_features])`: of the whole that is noted on `x`."""
    whole = getattr(x, _WHOLE, None)
    if whole is None or _runs_stock(linear, x):
        return below(x)
    weight = padded(linear, "weight", (linear.out_features, width))
    return below(x) if weight is None else F.linear(whole, weight, linear.bias)


def _part(whole: Tensor, size: int) -> Tensor:
    part = whole[..., :size]
    setattr(part, _WHOLE, whole)
    return part


def _is_silu(act: nn.Module) -> bool:
    """Whether an activation is SiLU and nobody would notice that it is not called."""
    watched = act._forward_hooks or act._forward_pre_hooks or "forward" in vars(act)
    return known_as(act, ("SiLU", "SiLUActivation")) is not None and not watched


def _runs_stock(linear: nn.Module, x: Tensor) -> bool:
    return torch.compiler.is_compiling() or runs_stock(x, *linear._parameters.values())


def _refusal(root: nn.Module, ledger: Ledger, path: str) -> str | None:
    mlp: Any = root.get_submodule(path)
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(mlp, name, None)
        if type(linear) is not nn.Linear:
            return f"its {name} is a {type(linear).__name__}: optimize before adapters are attached"
        reason = unusable_weight(linear) or obstacle(root, ledger, _join(path, name), "forward")
        if reason is not None or not linear.weight.is_contiguous():
            return f"{name}: {reason or 'its weight is stored in another order'}"
    if mlp.down_proj.in_features % ALIGNED == 0:
        return f"its width of {mlp.down_proj.in_features} is aligned"
    return obstacle(root, ledger, path, "forward")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
