"""A whole decode in fp16 inside a bf16 or fp32 model: the speed of 16 bits, with 8 times finer rounding than bf16's.

fp16 has 10 bits of mantissa where bf16 has 7, and ends at 65504. Weights beyond that are refused when the rewrite is
installed. Activations are watched: one that overflows is infinite, a norm or a convolution behind it makes NaN of it,
and a decode whose frames are not finite is decoded again as before, with a warning, and counted in the report. (What
overflows in the last convolution and is clamped to 1 behind it, as Wan's frames are, is 1 in any dtype.)

The model stays what it is: fp16 copies of what decodes stand in for its parameters during the call alone, made anew at
each (146 MB for Wan), so that they are never stale. Encoding is left alone: bf16 there is known to move results of
image to video, and fp16 was not tried.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from vae_accel.edits import Ledger, Pen, ledger_of, obstacle, unusable_weight
from vae_accel.families import norms
from vae_accel.rewrite import Rewrite, Site, Tier, runs_stock

OPT_IN = "not asked for: fp16 has less range than bf16 (VAE_ACCEL_TIER=lowered with VAE_ACCEL_HALF_DECODE=1)"
FP16_MAX = torch.finfo(torch.float16).max
ENCODES = ("encoder.", "quant_conv.")  # what diffusers calls the parts that no decode reads
AGAIN = "decoded again in the model's own dtype: not finite in fp16"
# One decode of a model at a time: two at once would each put back what they found, which is the other's fp16.
_turns: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


@dataclass(frozen=True)
class HalfDecode(Rewrite):
    """Takes `_decode` of an autoencoder: `decode` itself is what offload hooks wrap. A call under torch.compile, with
    hooks on the decoder's own modules, or whose latent and weights are not both bf16 or both fp32, runs as before."""

    name = "half_decode"
    tier = Tier.LOWERED
    over = ("latent_chunks",)
    direction = "decode"

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        if hasattr(root, "decode"):
            yield Site("", _refusal(root, ledger))

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        pen.method(site.path, "_decode", decode)


class _Call(nn.Module):
    """A method of a module as a module, which is what `functional_call` calls."""

    def __init__(self, module: nn.Module, method: Callable[..., Any]):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.method(*args, **kwargs)


def decode(vae: nn.Module, below: Callable[..., Any], z: Tensor, *args: Any, **kwargs: Any) -> Any:
    """An autoencoder's `_decode(z, ...)` with everything floating-point in fp16; the result in z's dtype."""
    if torch.compiler.is_compiling():
        return below(z, *args, **kwargs)
    with _turns.setdefault(vae, threading.RLock()):
        own = dict(_decoding(vae))
        if _hooked(vae) or not _alike(z, own) or runs_stock(z, *own.values()):
            return below(z, *args, **kwargs)
        out = _in_half(vae, below, own, z.dtype, (z, *args), kwargs)
        if _finite(out):
            return _cast(out, torch.float16, z.dtype)
        ledger = ledger_of(vae)
        assert ledger is not None
        ledger.count(HalfDecode.name, AGAIN)
        warnings.warn(f"half_decode: {type(vae).__name__} {AGAIN}", RuntimeWarning, stacklevel=2)
        return below(z, *args, **kwargs)


def _in_half(
    vae: nn.Module, method: Callable[..., Any], own: dict[str, Tensor], dtype: torch.dtype, args: Any, kwargs: Any
) -> Any:
    copies = {f"module.{name}": tensor.half() for name, tensor in own.items() if tensor.dtype == dtype}
    args, kwargs = _cast((args, kwargs), dtype, torch.float16)
    return functional_call(_Call(vae, method), copies, args, kwargs)


def _finite(out: Any) -> bool:
    """Whether every value is: one reduction in fp32, in which no sum of fp16's values overflows."""
    return all(bool(x.sum(dtype=torch.float32).isfinite()) for x in tree_leaves(out) if isinstance(x, Tensor))


def _refusal(root: nn.Module, ledger: Ledger) -> str | None:
    if not hasattr(root, "_decode"):
        return "it has no _decode, and its decode is what offload hooks wrap"
    if hasattr(root, "_clear_conv_cache"):
        return "its convolutions keep frames from call to call: a decode cannot be run again"
    if _hooked(root):
        return "its weights wait elsewhere until a hook fetches them"
    for path, module in root.named_modules():
        if path.startswith(ENCODES) or not norms.overflows_unseen(module):
            continue
        if ledger.owner(path, "forward") != "fused_norm_act":
            return f"{path} squares in fp16: above 255 it gives zeros instead of infinity (fused_norm_act does not)"
    for name, parameter in root.named_parameters():
        if not name.startswith(ENCODES):
            reason = _out_of_range(root, name, parameter)
            if reason is not None:
                return reason
    return obstacle(root, ledger, "", "_decode", HalfDecode.over)


def _out_of_range(root: nn.Module, name: str, parameter: Tensor) -> str | None:
    path, _, leaf = name.rpartition(".")
    unusable = unusable_weight(root.get_submodule(path), leaf)
    if unusable is not None:
        return f"{path}: {unusable}"
    largest = float(parameter.detach().abs().amax()) if parameter.numel() else 0.0
    return None if largest <= FP16_MAX else f"{name} holds {largest:.6g}, beyond fp16's {FP16_MAX:.0f}"


def _decoding(vae: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The floating-point parameters and buffers that a decode may read."""
    for name, tensor in chain(vae.named_parameters(), vae.named_buffers()):
        if not name.startswith(ENCODES) and tensor.is_floating_point():
            yield name, tensor


def _alike(z: Tensor, own: dict[str, Tensor]) -> bool:
    """Whether latent and parameters are on one device and all bf16 or all fp32; buffers may be in another dtype."""
    if z.dtype not in (torch.bfloat16, torch.float32):
        return False
    weights = [tensor for tensor in own.values() if isinstance(tensor, nn.Parameter)]
    return all(t.device == z.device for t in own.values()) and all(w.dtype == z.dtype for w in weights)


def _hooked(vae: nn.Module) -> bool:
    """Whether hooks of accelerate or diffusers inside the model fetch or cast weights; one on the model does not."""
    inside = (module.__dict__ for path, module in vae.named_modules() if path and not path.startswith(ENCODES))
    return any("_hf_hook" in held or getattr(held.get("_diffusers_hook"), "hooks", None) for held in inside)


def _cast(tree: Any, source: torch.dtype, to: torch.dtype) -> Any:
    """Tensors of `source` dtype in a tree of arguments or outputs, in another dtype; what else it holds as it is."""
    return tree_map_only(Tensor, lambda leaf: leaf.to(to) if leaf.dtype == source else leaf, tree)
