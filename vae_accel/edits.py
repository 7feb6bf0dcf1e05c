"""The only code that changes somebody else's module, and the ledger that undoes it.

A *slot* is a method on an instance or the memory layout of a parameter. Each has one owner; a second claim is an error
unless the claimant declares that it goes `over` the owner (it handles a case and hands the rest down). The ledger sits
on the root, finds modules by path, and survives deepcopy and pickle together with the edits it lists.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vae_accel.storage import is_laid_out, is_padded, is_part, join_stored, pad, restride, shrink, stored, strides_in

LEDGER = "_vae_accel"


class SlotTaken(RuntimeError):
    """A rewrite claimed a slot that another one owns, or that code outside this package has replaced."""


@dataclass
class Edit:
    """One change: `old` and `new` are functions for a method slot (None: the class's), strides for a layout, for a
    parameter that is padded the shape it has room for (None: its own), and for one that is joined the paths of all the
    modules whose parameters of that name lie side by side (None: it lies by itself)."""

    by: str
    path: str
    slot: str
    kind: str
    old: Any
    new: Any


@dataclass
class Outcome:
    """What became of one rewrite. `state` is on, off, or failed (rolled back); `why` says so in words.

    `direction` is the only one it changes (None: both); `counts` is what calls met since: how often, by what it was;
    `bytes` is what it holds of the device's memory beside the model.
    """

    name: str
    tier: str
    state: str
    why: str
    taken: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    direction: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    bytes: int = 0


@dataclass
class Ledger:
    """What was done to a root, in order. `request` identifies the call that did it, so that two calls equal one.

    `active` is False while the root is paused: its edits are undone, and wait to be redone.
    """

    platform: str = ""
    request: str = ""
    note: str = ""
    active: bool = True
    outcomes: list[Outcome] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)

    def owner(self, path: str, slot: str) -> str | None:
        """The rewrite that holds a slot now, or None."""
        return next((e.by for e in reversed(self.edits) if (e.path, e.slot) == (path, slot)), None)

    def count(self, name: str, what: str) -> None:
        """Notes on the outcome of rewrite `name` that a call met `what`."""
        counts = next(outcome for outcome in self.outcomes if outcome.name == name).counts
        counts[what] = counts.get(what, 0) + 1

    def undo(self, root: nn.Module) -> None:
        """Takes every edit back; a module that was removed or exchanged since has nothing to take back.

        Raises:
            SlotTaken: code outside this package has wrapped an edit. Nothing was changed.
        """
        if not self.active:
            return
        for edit in {(e.path, e.slot): e for e in self.edits if e.kind == "method"}.values():
            _locate(root, edit, edit.new)
        for edit in reversed(self.edits):
            _put(root, edit, edit.new, edit.old)
        self.active = False

    def redo(self, root: nn.Module) -> None:
        """Makes every edit again after `undo`."""
        if self.active:
            return
        for edit in self.edits:
            _put(root, edit, edit.old, edit.new)
        self.active = True


def ledger_of(root: nn.Module) -> Ledger | None:
    """The ledger of a root that was optimized, or None."""
    return root.__dict__.get(LEDGER)


class Pen:
    """Writes for one rewrite on one root. Edits reach the ledger at once; `rollback` takes back what this pen wrote.

    `outcome` is the rewrite's own, for what its calls will meet; None where nothing is reported.
    """

    def __init__(
        self,
        root: nn.Module,
        ledger: Ledger,
        by: str,
        over: tuple[str, ...] = (),
        outcome: Outcome | None = None,
    ):
        self._root, self._ledger, self._by, self._over = root, ledger, by, over
        self.outcome = outcome
        self._start = len(ledger.edits)

    def method(self, path: str, name: str, function: Callable[..., Any], *facts: Any) -> None:
        """Makes `module.name(*args)` call `function(module, below, *facts, *args)`; `below` is what was there before.

        Beneath hooks: a `forward` that accelerate or diffusers wrapped on the instance keeps its wrapper.

        Raises:
            SlotTaken: another rewrite owns the slot, or the instance carries a forward this package cannot see through.
        """
        self._claim(path, name)
        module = self._root.get_submodule(path)
        holder, key = _held(module, name, self._ledger) or (module.__dict__, name)
        old = holder.get(key)
        # Not the bound method, which pickle finds by its name: that may be the instance's by then, itself again.
        below = functools.partial(getattr(type(module), name), module) if old is None else old
        new = functools.partial(function, module, below, *facts)
        holder[key] = new
        self._ledger.edits.append(Edit(self._by, path, name, "method", old, new))

    def layout(self, path: str, name: str, order: tuple[int, ...]) -> None:
        """Stores a parameter with its dimensions in memory `order` (outermost first). Values and shape stay.

        A layout instead of a second tensor: it cannot go stale, and it costs no memory.
        """
        self._claim(path, name)
        parameter = stored(self._root.get_submodule(path), name)
        if parameter is None:
            return
        old = parameter.stride()
        new = strides_in(parameter.shape, order)
        restride(parameter, new)
        self._ledger.edits.append(Edit(self._by, path, name, "layout", old, new))

    def pad(self, path: str, name: str, shape: tuple[int, ...]) -> None:
        """Stores a contiguous parameter as the first corner of zeros of a larger `shape`, which `padded` gives whole.

        What is written to it in place lands in its corner. A copy of it is dense, until `padded` is asked again.
        """
        self._claim(path, name)
        parameter = stored(self._root.get_submodule(path), name)
        if parameter is None:
            return
        pad(parameter, shape)
        self._ledger.edits.append(Edit(self._by, path, name, "padded", None, shape))

    def join(self, paths: tuple[str, ...], name: str) -> None:
        """Stores the contiguous parameters `name` of several modules side by side, which `joint` gives as one.

        What is written to them in place lands there. Copies of them lie apart, until `joint` is asked again.
        """
        for path in paths:
            self._claim(path, name)
        if join_stored([self._root.get_submodule(path) for path in paths], name):
            self._ledger.edits += [Edit(self._by, path, name, "joined", None, paths) for path in paths]

    def rollback(self) -> None:
        for edit in reversed(self._ledger.edits[self._start :]):
            _put(self._root, edit, edit.new, edit.old)
        del self._ledger.edits[self._start :]

    def _claim(self, path: str, slot: str) -> None:
        reason = obstacle(self._root, self._ledger, path, slot, self._over)
        if reason is not None:
            raise SlotTaken(f"{self._by} cannot write {path or 'the root'!r}: {reason}")


def obstacle(root: nn.Module, ledger: Ledger, path: str, slot: str, over: tuple[str, ...] = ()) -> str | None:
    """Why a rewrite that goes `over` others cannot claim a slot, in words; None when it can."""
    owner = ledger.owner(path, slot)
    if owner is not None and owner not in over:
        return f"{slot} is owned by {owner}"
    module = root.get_submodule(path)
    replaced = module.__dict__.get(slot)
    if replaced is not None and _held(module, slot, ledger) is None:
        return (
            f"{slot} was replaced on the instance by {_name(replaced)}: undo that patch, or optimize before it is made"
        )
    return None


def is_unseen(module: nn.Module) -> bool:
    """Whether nobody would notice that a module is not called: no hooks, and a forward that is its class's or ours.

    Its parameters are then where they are to be; those of an offloaded module come in its call, by a hook.
    """
    replaced = getattr(vars(module).get("forward"), "func", None)
    ours = getattr(replaced, "__module__", "").startswith(f"{__package__}.")
    hooked = module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in vars(module)
    return not hooked and (ours or "forward" not in vars(module)) and "_diffusers_hook" not in vars(module)


def unusable_weight(module: nn.Module, name: str = "weight") -> str | None:
    """Why a parameter cannot be read or laid out as a plain tensor (parametrized, quantized), or None."""
    parameter = module._parameters.get(name)
    if parameter is None:
        return f"{name} is computed by a parametrization"
    if type(parameter.data) is not Tensor:
        return f"{name} is quantized or wrapped ({type(parameter.data).__name__})"
    if not parameter.is_floating_point():
        return f"{name} is quantized ({parameter.dtype})"
    return None


def _holders(module: nn.Module, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Every place where a method's own function may sit: the instance, or inside a hook that wrapped it.

    accelerate keeps it as `_old_forward`; diffusers' HookRegistry in `_fn_refs` (hooks.py, 0.35 to 0.42).
    """
    yield module.__dict__, name
    if name == "forward":
        if "_old_forward" in module.__dict__:
            yield module.__dict__, "_old_forward"
        for reference in getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", ()):
            yield vars(reference), "forward"
            yield vars(reference), "original_forward"


def _held(module: nn.Module, name: str, ledger: Ledger) -> tuple[dict[str, Any], str] | None:
    """Where the innermost function sits that is the class's own or this package's; None where neither is found."""
    ours = [e.new for e in ledger.edits]
    for holder, key in _holders(module, name):
        function = holder.get(key)
        if _is_plain(module, name, function) or any(function is new for new in ours):
            return holder, key
    return None


def _bound(module: nn.Module, name: str) -> Callable[..., Any]:
    return getattr(type(module), name).__get__(module)


def _is_plain(module: nn.Module, name: str, function: Any) -> bool:
    return getattr(function, "__func__", None) is getattr(type(module), name)


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:  # the user dropped it, as pipelines that only decode drop the encoder
        return None


def _locate(root: nn.Module, edit: Edit, present: Any) -> tuple[dict[str, Any], str] | None:
    """Where `present` sits, wherever a hook may have moved it since; None where the module is gone or was exchanged."""
    module = _submodule(root, edit.path)
    if module is None:
        return None
    for holder, key in _holders(module, edit.slot):
        here = holder.get(key)
        if here is present or (present is None and _is_plain(module, edit.slot, here)):
            return holder, key
    if edit.slot not in module.__dict__ or any(
        _is_plain(module, edit.slot, h.get(k)) for h, k in _holders(module, edit.slot)
    ):
        return None
    raise SlotTaken(
        f"{edit.path or 'the root'!r}: {edit.slot} was replaced by {_name(module.__dict__[edit.slot])} after {edit.by} "
        "wrote it: undo that patch first"
    )


def _put(root: nn.Module, edit: Edit, present: Any, wanted: Any) -> None:
    """Replaces `present` by `wanted` in a slot."""
    if edit.kind != "method":
        module = _submodule(root, edit.path)
        parameter = None if module is None else stored(module, edit.slot)
        if parameter is None:
            return
        if edit.kind == "layout" and is_laid_out(parameter, present):
            restride(parameter, wanted)
        elif edit.kind == "padded" and wanted is not None:
            pad(parameter, wanted)
        elif edit.kind == "padded" and is_padded(parameter, present):
            shrink(parameter)
        elif edit.kind == "joined" and wanted is not None:
            join_stored([_submodule(root, path) for path in wanted], edit.slot)
        elif edit.kind == "joined" and is_part(parameter):
            shrink(parameter)
        return
    place = _locate(root, edit, present)
    if place is None:
        return
    holder, key = place
    module = root.get_submodule(edit.path)
    if wanted is not None:
        holder[key] = wanted
    elif holder is module.__dict__ and key == edit.slot:
        holder.pop(key, None)
    else:  # a hook wrapped the module after us: it keeps calling, now the class's own
        holder[key] = _bound(module, edit.slot)
