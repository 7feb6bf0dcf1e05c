"""Whether a module is still what it was when its forward was captured: asked before every replay, in under 0.1 ms.

A graph reads weights at addresses and does what Python decided at capture. New values at the same addresses need no
new graph; other addresses, other modules, other hooks or another configuration do. Loops run in C (map, chain, dict
comparison by identity): 321 modules with 384 parameters take about 90 us on a server's core, a walk over them 1 ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as every_module

_TRAINING = itemgetter("training")
_DTYPE = attrgetter("dtype")


class Witness:
    """Remembers a module's state. It holds the parameters, not the memory they had: `.to("cpu")` frees that."""

    def __init__(self, root: nn.Module):
        modules = list(root.modules())
        self._dicts = [vars(m) for m in modules]
        self._children = [m._modules for m in modules]
        self._hooks = [h for m in modules[1:] for h in (m._forward_hooks, m._forward_pre_hooks)]  # root's run outside
        self._slots: list[dict[str, Any]] = [slots for m in modules for slots in (m._parameters, m._buffers) if slots]
        self._configs = list({id(c): vars(c) for m in modules if (c := vars(m).get("config")) is not None}.values())
        self.refusal = _refusal(root, modules)

        self._tensors = [t for t in self._values() if t is not None]
        self._wide = [t for t in self._tensors if t.dim() > 2]  # whose memory can be in another order, same address
        self._children_then = [dict(c) for c in self._children]
        self._configs_then = [dict(c) for c in self._configs]
        self._then = self._glance()
        self.identity = self._identity(modules)

    def holds(self) -> bool:
        """Whether nothing was changed since. A False may be of no matter to a graph: compare a new `identity`."""
        return (
            self._children == self._children_then
            and self._configs == self._configs_then
            and self._glance() == self._then
        )

    def in_place(self) -> bool:
        """Whether every tensor it remembers is where it was: its memory can be read, whatever else may have changed."""
        return list(map(Tensor.data_ptr, self._tensors)) == self._then[1]

    def _values(self) -> Iterator[Tensor | None]:
        return chain.from_iterable(map(dict.values, self._slots))

    def _glance(self) -> tuple[Any, ...]:
        return (
            list(map(id, self._values())),
            list(map(Tensor.data_ptr, self._tensors)),
            list(map(_DTYPE, self._tensors)),
            list(map(Tensor.stride, self._wide)),
            list(map(_TRAINING, self._dicts)),
            list(map(len, self._dicts)),
            list(map(dict.get, self._dicts[1:], repeat("forward"))),  # the root's own leads back here
            list(chain.from_iterable(self._hooks)),
            bool(every_module._global_forward_hooks or every_module._global_forward_pre_hooks),
        )

    def _identity(self, modules: list[nn.Module]) -> tuple[Any, ...]:
        """What a graph depends on, without what only says that it may not be used now, or does not matter to it."""
        _, addresses, dtypes, strides, _, _, forwards, *_ = self._then
        return modules, addresses, dtypes, strides, forwards, self._configs_then


def _refusal(root: nn.Module, modules: list[nn.Module]) -> str | None:
    """Why a module in this state is not to be captured, or None."""
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        return "hooks are on every module of the process"
    for module in modules:
        held = vars(module)
        if "_hf_hook" in held or getattr(held.get("_diffusers_hook"), "hooks", None):
            return "hooks fetch or cast its weights"
        if module.training:
            return "it is in training mode"
        if type(module).__module__.startswith("peft."):
            return "adapters are attached, whose scale a graph would keep: merge them"
        if module is not root and any(map(_foreign, _hooks(module))):
            return "hooks are on its modules, which no replay would call"
    return None


def _hooks(module: nn.Module) -> Iterator[Any]:
    yield from module._forward_hooks.values()
    yield from module._forward_pre_hooks.values()


def _foreign(hook: Any) -> bool:
    """transformers 5 notes hidden states and attentions by hooks that do nothing else: a capture holds what they do."""
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"
