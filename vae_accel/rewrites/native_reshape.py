"""einops out of the hot path: the same views, compiled from the pattern once, without parsing in every call.

diffusers and transformers do not import einops; the original Wan, LTX and HunyuanVideo code and remote-code models do.
Two kinds of site:

- the layers of `einops.layers.torch`, whose `forward` becomes the native operation;
- methods whose code calls `rearrange`, `reduce` or `repeat` as a global of its Python module, imported by name or as
  `einops.rearrange`. Each call runs the method's own code in a namespace that holds what the module's globals hold at
  that moment, except that these names mean the compiled front-ends below. Closures (`super()`) and defaults are the
  method's own, and nothing in the Python module is touched.

Left as they are: functions outside classes, imports inside a method, what a base class does through `super()`, and a
global that the method itself rebinds while it runs (seen from its next call on). `torch.compile` gets the stock code:
no string is left in its graphs anyway.
"""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
import sys
import timeit
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, obstacle
from vae_accel.kernels.reshape import Native, PatternError, compile_pattern
from vae_accel.rewrite import Rewrite, Site, Tier

_FUNCTIONS = ("rearrange", "reduce", "repeat")
_MODULE_FACTS = ("__name__", "__package__", "__spec__", "__builtins__")  # what import statements and builtins need
_SEES_GLOBALS = {"globals", "eval", "exec"}


@dataclass(frozen=True)
class NativeReshape(Rewrite):
    name = "native_reshape"
    tier = Tier.EXACT

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        if "einops" not in sys.modules:
            return
        of_class: dict[type, dict[str, str | tuple[str, ...]]] = {}
        for path, module in root.named_modules():
            if _is_layer(module):
                yield Site(path, _layer_refusal(module) or obstacle(root, ledger, path, "forward"))
                continue
            if type(module) not in of_class:
                of_class[type(module)] = _methods(type(module))
            methods, reasons = {}, []
            for name, found in of_class[type(module)].items():
                reason = found if isinstance(found, str) else obstacle(root, ledger, path, name)
                if reason is None:
                    methods[name] = found
                else:
                    reasons.append(f"{name}: {reason}")
            if methods or reasons:
                yield Site(path, None if methods else "; ".join(reasons), {"methods": methods})

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        if _is_layer(root.get_submodule(site.path)):
            pen.method(site.path, "forward", layer_forward)
            pen.method(site.path, "__reduce_ex__", reduce_layer)
        for name, names in site.facts.get("methods", {}).items():
            pen.method(site.path, name, method, names)


def layer_forward(layer: Any, below: Callable[..., Tensor], input: Tensor) -> Tensor:
    """`forward` of `einops.layers.torch.Rearrange` and `Reduce`."""
    if torch.compiler.is_compiling():
        return below(input)
    native = _native(input, layer.pattern, getattr(layer, "reduction", "rearrange"), layer.axes_lengths)
    return below(input) if native is None else native(input)


def reduce_layer(layer: Any, below: Callable[..., Any], protocol: int) -> tuple[Any, ...]:
    """Copies and pickles a layer with all it holds: einops keeps the pattern alone, and would drop our `forward`."""
    return _hollow, (type(layer),), dict(vars(layer))


def _hollow(cls: type) -> Any:
    """A layer that takes its state into its `__dict__`, instead of by the `__setstate__` of its class."""
    new: Any = cls.__new__
    layer = new(cls)
    vars(layer)["__setstate__"] = functools.partial(_fill, layer)
    return layer


def _fill(layer: Any, state: dict[str, Any]) -> None:
    del vars(layer)["__setstate__"]
    vars(layer).update(state)


def method(module: nn.Module, below: Any, names: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
    """A method of `module`, its code run in a namespace where einops is compiled. `names` are the globals it reads."""
    if torch.compiler.is_compiling():
        return below(*args, **kwargs)
    stock = below.func
    live, native = stock.__globals__, _replacements()
    scope = {name: native.get(id(live[name]), live[name]) for name in names if name in live}
    function = types.FunctionType(stock.__code__, scope, stock.__name__, stock.__defaults__, stock.__closure__)
    function.__kwdefaults__ = stock.__kwdefaults__
    return function(module, *args, **kwargs)


def rearrange(tensor: Any, pattern: str, **axes_lengths: Any) -> Any:
    """`einops.rearrange`: the compiled form, or einops itself for what is not compiled (lists, other frameworks)."""
    native = _native(tensor, pattern, "rearrange", axes_lengths)
    return _stock("rearrange", tensor, pattern, **axes_lengths) if native is None else native(tensor)


def reduce(tensor: Any, pattern: str, reduction: Any, **axes_lengths: Any) -> Any:
    """`einops.reduce`; a `reduction` that is a Python function goes to einops."""
    native = _native(tensor, pattern, reduction, axes_lengths)
    return _stock("reduce", tensor, pattern, reduction, **axes_lengths) if native is None else native(tensor)


def repeat(tensor: Any, pattern: str, **axes_lengths: Any) -> Any:
    """`einops.repeat`."""
    native = _native(tensor, pattern, "repeat", axes_lengths)
    return _stock("repeat", tensor, pattern, **axes_lengths) if native is None else native(tensor)


class Einops:
    """Stands in a method's namespace for the module `einops`: its three functions compiled, the rest its own."""

    rearrange = staticmethod(rearrange)
    reduce = staticmethod(reduce)
    repeat = staticmethod(repeat)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.modules["einops"], name)


def per_call_time(calls: int = 2000) -> dict[str, tuple[float, float]]:
    """Microseconds a call, (einops, native), of patterns that video VAEs use, on tensors too small to cost anything.

    Raises:
        ImportError: einops is not installed.
    """
    einops = importlib.import_module("einops")
    patterns: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
        "... h d -> ... (h d)": ((1, 8, 4, 16), {}),
        "b c t h w -> (b t) c h w": ((1, 4, 2, 4, 4), {}),
        "(b t) c h w -> b c t h w": ((2, 4, 4, 4), {"t": 2}),
        "b c h w -> b 1 (h w) c": ((2, 4, 4, 4), {}),
        "b c (f p) (h q) (w r) -> b (c p r q) f h w": ((1, 3, 2, 4, 4), {"p": 1, "q": 2, "r": 2}),
    }

    def fastest(function: Callable[[], Any]) -> float:
        return min(timeit.repeat(function, number=calls, repeat=5)) / calls * 1e6

    times = {}
    for pattern, (shape, axes) in patterns.items():
        call = (torch.zeros(shape), pattern)
        stock, native = (functools.partial(f, *call, **axes) for f in (einops.rearrange, rearrange))
        times[pattern] = (fastest(stock), fastest(native))
    return times


def _native(tensor: Any, pattern: Any, operation: Any, axes: dict[str, Any]) -> Native | None:
    """The compiled form; None where einops must do it, or must say in its own words what is wrong."""
    if not isinstance(tensor, Tensor) or (operation == "mean" and not tensor.is_floating_point()):
        return None
    try:
        return compile_pattern(pattern, operation, tensor.shape, tuple(axes.items()))
    except (PatternError, TypeError):  # TypeError: a size that is no number, or cannot be a key of the cache
        return None


def _stock(name: str, *args: Any, **axes: Any) -> Any:
    return getattr(sys.modules["einops"], name)(*args, **axes)


@functools.cache
def _replacements() -> dict[int, Any]:
    """What stands for einops and its functions in a namespace, by id: a global need not be hashable."""
    einops = sys.modules["einops"]
    own = {"rearrange": rearrange, "reduce": reduce, "repeat": repeat}
    return {id(einops): Einops(), **{id(getattr(einops, name)): own[name] for name in _FUNCTIONS}}


def _is_layer(module: nn.Module) -> bool:
    layers = sys.modules.get("einops.layers.torch")
    return layers is not None and isinstance(module, (layers.Rearrange, layers.Reduce))


def _layer_refusal(layer: nn.Module) -> str | None:
    if type(layer).__module__ != "einops.layers.torch":
        return f"{type(layer).__name__} is a subclass that may do more"
    if callable(getattr(layer, "reduction", None)):
        return "its reduction is a Python function"
    return None


def _methods(cls: type) -> dict[str, str | tuple[str, ...]]:
    """The methods of a class whose code calls einops: the globals each one reads, or why it is left alone."""
    found: dict[str, str | tuple[str, ...]] = {}
    seen: set[str] = set()
    for owner in cls.__mro__:
        if owner in (nn.Module, object):
            continue
        for name, value in vars(owner).items():
            if name in seen or name.startswith("__"):
                continue
            inner = inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value)))
            if _calls_einops(inner):
                found[name] = _refusal(value, inner) or tuple(sorted({*_globals(inner.__code__), *_MODULE_FACTS}))
        seen |= set(vars(owner))
    return found


def _refusal(value: Any, inner: types.FunctionType) -> str | None:
    """Why einops cannot be replaced in `inner`, the function at the bottom of a class attribute, or None."""
    if value is not inner:
        return "einops is used beneath a decorator"
    if set(_instructions(inner.__code__, "STORE_GLOBAL", "DELETE_GLOBAL")):
        return "it assigns globals"
    if _SEES_GLOBALS & set(_globals(inner.__code__)):
        return "it looks into its globals"
    return None


def _calls_einops(function: Any) -> bool:
    """Whether a function reads one of the three functions from its globals, or from the module einops there."""
    if not isinstance(function, types.FunctionType):
        return False
    live, einops = function.__globals__, sys.modules["einops"]
    if not any(id(live.get(name)) in _replacements() for code in _codes(function.__code__) for name in code.co_names):
        return False  # most methods: nothing to disassemble
    read = [live[name] for name in _globals(function.__code__) if id(live.get(name)) in _replacements()]
    attributes = set(_instructions(function.__code__, "LOAD_ATTR", "LOAD_METHOD"))
    return any(value is not einops or attributes & set(_FUNCTIONS) for value in read)


def _globals(code: types.CodeType) -> Iterator[str]:
    return _instructions(code, "LOAD_GLOBAL")


def _instructions(code: types.CodeType, *operations: str) -> Iterator[str]:
    """The names that instructions of these kinds carry, in a code object and in those it defines."""
    for each in _codes(code):
        yield from (i.argval for i in dis.get_instructions(each) if i.opname in operations)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
