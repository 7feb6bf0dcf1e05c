"""Layers of transformers' vision towers: which linear layers one launch joins, and what of their surroundings it takes.

A weight is read in its own module's call alone, so a linear layer lends it: `forward(x, inside=function)` returns what
`function(weight, bias)` makes of it there. Calls nest. Three projections of one input are inside their calls together
when the innermost function runs, and an offloaded weight is where it is to be.

Forwards were compared by source in transformers 5.23.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vae_accel.edits import carries_ours, unusable_weight
from vae_accel.families.match import known_as
from vae_accel.kernels.linear import linear as product
from vae_accel.storage import padded

CAPTURES = "transformers.utils.output_capturing"  # whose hooks read the weights of an attention, not its output


@dataclass(frozen=True)
class Mlp:
    """`outer(act(inner(x)))`, or `outer(act(gate(x)) * up(x))` with two in `inner`: the names of its children."""

    inner: tuple[str, ...]
    act: str
    outer: str


@dataclass(frozen=True)
class Layer:
    """`x + attention(norm(x))`, then the same with an MLP: the names of its children.

    `projections`: those of the attention whose forward is ours; none where it is `packed_attention`'s, with one `qkv`.
    """

    norms: tuple[str, str]
    attention: str
    projections: tuple[str, ...]
    out: str
    mlp: str = "mlp"


@dataclass(frozen=True)
class Parts:
    """A layer's children by path from it: those that must still be ours when it is called, and the activation's."""

    attention: str
    mlp: str
    linears: tuple[str, ...]
    act: str

    @property
    def all(self) -> tuple[str, ...]:
        return (self.attention, self.mlp, *self.linears)


def lent(
    linear: Any,
    below: Callable[..., Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    input: Tensor,
    inside: Callable[[Tensor, Tensor | None], Any] | None = None,
) -> Any:
    """An nn.Linear's `forward(input)`; given `inside`, what that returns, or None where there is no plain weight.

    `shapes` are those of parameters which `padded_mlp` stores in larger zeros: they are lent whole.
    """
    if inside is None:
        return below(input)
    if unusable_weight(linear) is not None:
        return None
    weight, bias = (
        padded(linear, name, shapes[name]) if name in shapes else getattr(linear, name) for name in ("weight", "bias")
    )
    if weight is None or (bias is None) != (linear.bias is None):
        return None
    return inside(weight, bias)


def fused(linears: Sequence[nn.Module], x: Tensor, residual: Tensor | None = None, **how: Any) -> Tensor | None:
    """`kernels.linear` of `x` with the weights of `linears`; None where one lends nothing or dtypes are to promote."""

    def within(rest: Sequence[nn.Module], held: tuple[tuple[Tensor, Tensor | None], ...]) -> Tensor | None:
        if rest:
            return rest[0](x, inside=lambda *parameters: within(rest[1:], (*held, parameters)))
        weights, biases = zip(*held, strict=True)
        if any(t is not None and t.dtype != x.dtype for t in (*weights, *biases, residual)):
            return None
        return product(x, weights, biases, residual=residual, **how)

    return within(linears, ())


def added(linear: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """`residual + linear(x)`."""
    out = fused((linear,), x, residual)
    return residual + linear(x) if out is None else out


def mlp(module: Any, below: Callable[..., Tensor], row: Mlp, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """`forward(x [..., C])`: [..., C], plus a `residual` of that shape that only `fused_linears` passes."""
    if residual is None:
        return below(x)
    inner = [getattr(module, name) for name in row.inner]
    hidden = fused(inner, x, act=activation(getattr(module, row.act)), gated=len(inner) == 2)
    out = None if hidden is None else fused((getattr(module, row.outer),), hidden, residual)
    return residual + below(x) if out is None else out


def attend(
    attention: Any,
    below: Callable[..., tuple[Tensor, Any]],
    row: Layer,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    residual: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """CLIP's and SigLIP's `forward([N, L, C], mask)`: [N, L, C], plus a `residual` as above, and stock's weights."""
    projections = [getattr(attention, name) for name in row.projections]
    qkv = None if residual is None else fused(projections, hidden_states)
    if qkv is None or residual is None:
        out, weights = below(hidden_states, attention_mask, **kwargs)
        return (out if residual is None else residual + out), weights
    home = _home(attention)
    q, k, v = (t.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for t in qkv.unbind(-2))
    implementation = attention.config._attn_implementation
    run = home.ALL_ATTENTION_FUNCTIONS.get_interface(implementation, home.eager_attention_forward)
    how = {"is_causal": attention.is_causal, "dropout": attention.dropout if attention.training else 0.0, **kwargs}
    out, weights = run(attention, q, k, v, attention_mask, scaling=attention.scale, **how)
    return added(getattr(attention, row.out), out.reshape(hidden_states.shape), residual), weights


def activation(act: nn.Module) -> str | None:
    """What `kernels.linear` calls an activation, or None where it has none like it."""
    if (name := known_as(act, ACTS)) == "GELU":
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return None if name is None else ACTS[name]


def disturbance(layer: nn.Module, parts: Parts, counted: bool) -> str | None:
    """What somebody did to a part of a layer since it was taken, or hooked onto one whose result now means more.

    `counted`: the attention returns its weights beside its result.
    """
    for path in (*parts.all, parts.act):
        module = layer.get_submodule(path)
        if (module._forward_hooks or module._forward_pre_hooks) and not (
            counted and path == parts.attention and _only_captures(module)
        ):
            return f"a hook on {path}"
        if not carries_ours(module) and (path != parts.act or "forward" in vars(module)):
            return f"{path} was exchanged or patched"
    return None if activation(layer.get_submodule(parts.act)) else f"{parts.act} is another activation"


def _only_captures(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return all(getattr(hook, "__module__", "") == CAPTURES for hook in hooks)


def read(layer: nn.Module) -> tuple[Layer, Mlp, Parts] | str | None:
    """The rows of a layer and its parts; why it cannot be taken; None for another module.

    Raises:
        AttributeError: it lacks what transformers' class of its name has.
    """
    name = known_as(layer, LAYERS)
    if name is None:
        return None
    row = LAYERS[name]
    if row.projections and (reason := _unlike(layer.get_submodule(row.attention))) is not None:
        return reason
    found = known_as(layer.get_submodule(row.mlp), MLPS)
    if found is None:
        return f"its MLP is a {type(layer.get_submodule(row.mlp)).__name__}"
    mlp = MLPS[found]
    inside = [f"{row.attention}.{name}" for name in (*row.projections, row.out)]
    inside += [f"{row.mlp}.{name}" for name in (*mlp.inner, mlp.outer)]
    parts = Parts(row.attention, row.mlp, tuple(inside), f"{row.mlp}.{mlp.act}")
    for path in parts.linears:
        linear = layer.get_submodule(path)
        if type(linear) is not nn.Linear:
            return f"{path} is a {type(linear).__name__}: optimize before adapters are attached"
        if (reason := unusable_weight(linear)) is not None:
            return f"{path}: {reason}"
    act = layer.get_submodule(parts.act)
    return (row, mlp, parts) if activation(act) else f"{parts.act} is a {type(act).__name__}"


def _unlike(attention: Any) -> str | None:
    """Why an attention with three projections is not one for `attend`, or None."""
    if known_as(attention, ATTENTIONS) is None:
        return f"its attention is a {type(attention).__name__}"
    home, missing = _home(attention), [name for name in _READ if not hasattr(attention, name)]
    if missing or len({getattr(attention, name).weight.shape for name in _IMAGE.projections}) > 1:
        return f"its attention {f'has no {missing[0]}' if missing else 'projects to several widths'}"
    if not hasattr(getattr(home, "ALL_ATTENTION_FUNCTIONS", None), "get_interface"):
        return f"transformers {sys.modules['transformers'].__version__} attends and returns in another way"
    return None


def _home(module: nn.Module) -> Any:
    return sys.modules[next(cls.__module__ for cls in type(module).__mro__ if "forward" in vars(cls))]


ACTS = {
    "GELU": "",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}
_FC, _LINEAR_FC = Mlp(("fc1",), "activation_fn", "fc2"), Mlp(("linear_fc1",), "act_fn", "linear_fc2")
_GATED = Mlp(("gate_proj", "up_proj"), "act_fn", "down_proj")
MLPS: dict[str, Mlp] = {
    **dict.fromkeys(("CLIPMLP", "SiglipMLP", "Siglip2MLP"), _FC),
    **dict.fromkeys(("VisionMlp", "Ernie4_5VLVisionMLP"), Mlp(("fc1",), "act", "fc2")),
    **dict.fromkeys(("Qwen2_5_VLMLP", "Glm4VisionMlp", "Glm4vMoeisionMlp"), _GATED),
    **dict.fromkeys(("Qwen3VLVisionMLP", "Qwen3VLMoeVisionMLP", "Qwen3OmniMoeVisionMLP"), _LINEAR_FC),
    **dict.fromkeys(("Qwen3_5VisionMLP", "Qwen3_5MoeVisionMLP", "Qwen4ExpVisionMLP"), _LINEAR_FC),
    "CohereCompassVisionMLP": _LINEAR_FC,
}
_IMAGE = Layer(("layer_norm1", "layer_norm2"), "self_attn", ("q_proj", "k_proj", "v_proj"), "out_proj")
_PACKED = Layer(("norm1", "norm2"), "attn", (), "proj")
ATTENTIONS = ("CLIPAttention", "SiglipAttention", "Siglip2Attention")
_READ = ("head_dim", "scale", "dropout", "is_causal", "config")
LAYERS: dict[str, Layer] = {
    **dict.fromkeys(("CLIPEncoderLayer", "SiglipEncoderLayer", "Siglip2EncoderLayer"), _IMAGE),
    **dict.fromkeys(("Qwen2VLVisionBlock", "Qwen2_5_VLVisionBlock", "Qwen3VLVisionBlock"), _PACKED),
    **dict.fromkeys(("Qwen3VLMoeVisionBlock", "Qwen3_5VisionBlock", "Qwen3_5MoeVisionBlock"), _PACKED),
    **dict.fromkeys(("Qwen3OmniMoeVisionBlock", "Qwen4ExpVisionBlock", "CohereCompassVisionBlock"), _PACKED),
    **dict.fromkeys(("Ernie4_5_VLMoeVisionBlock", "Glm4vVisionBlock", "Glm4vMoeVisionBlock"), _PACKED),
}
