"""What every kernel file shares: Triton bound at first launch, the choice of form, and the two dense layouts.

Triton is imported by the first launch, not by the import of a kernel file, so that machines without it (NPU, macOS)
import and run the references, and a CPU run never pays for it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

# While a profile is taken: told (kernel, floating-point operations, bytes) at each launch whose work is known.
tally: Callable[[str, int, int], None] | None = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP16_MAX = 65504.0
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
LARGEST: dict[torch.dtype | None, float] = {torch.float16: FP16_MAX, E4M3: E4M3_MAX}  # what is finite may not fit these


class LazyFunction:
    """A function of Triton kernels not yet bound: the first kernel that names it binds it.

    `alike` names integers for whose values Triton is not to compile the kernel anew (it does for 1 and for multiples of
    16): sizes that only count, and align nothing.
    """

    bound: ClassVar[list[LazyFunction]] = []

    def __init__(self, fn: Callable[..., Any], alike: str = "") -> None:
        self.fn = fn
        self.alike = alike.split()
        self._form: Any = None
        self.__name__ = fn.__name__

    def bind(self) -> Any:
        """The `triton.jit` form: compiled, or interpreted where Triton's knob says so."""
        triton = importlib.import_module("triton")
        scope = self.fn.__globals__
        scope["tl"] = importlib.import_module("triton.language")
        named = {name: scope[name] for name in self.fn.__code__.co_names if isinstance(scope.get(name), LazyFunction)}
        fn = self.fn
        if named:  # Triton looks names up in the function's globals: give it some in which they are bound
            scope = {**scope, **{name: function.bind() for name, function in named.items()}}
            fn = functools.update_wrapper(types.FunctionType(fn.__code__, scope, fn.__name__), fn)
            del fn.__wrapped__  # type: ignore[attr-defined]
        self._form = triton.jit(fn, do_not_specialize=self.alike)
        LazyFunction.bound.append(self)
        return self._form

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Kernels alone call it, by the form they bind. In their source it is a function, to a type checker too.

        Raises:
            RuntimeError: called from Python.
        """
        raise RuntimeError(f"{self.__name__} is a function of Triton kernels: nothing else can call it")

    @classmethod
    def unbind_all(cls) -> None:
        """Forget every bound form. Needed when Triton's `interpret` knob is turned, which is read when binding."""
        for function in cls.bound:
            function._form = None
        cls.bound.clear()


class LazyKernel(LazyFunction):
    """A Triton kernel not yet bound: the first `kernel[grid](...)` imports Triton as `tl` and compiles."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return (self._form or self.bind())[grid]


def lazy_kernel(alike: str) -> Callable[[Callable[..., None]], LazyKernel]:
    """`LazyKernel` as a decorator with the integers it is not compiled anew for."""
    return lambda fn: LazyKernel(fn, alike)


class Signature(NamedTuple):
    """What `triton.compiler.ASTSource` takes to compile a kernel ahead of time, without a GPU.

    `only`: the targets whose numbers it has, of a kernel that runs nowhere else; empty: all.
    """

    kernel: LazyKernel
    types: dict[str, str]
    constexprs: dict[str, Any]
    warps: int
    only: tuple[str, ...] = ()


def descriptor(dtype: str, *block: int) -> str:
    """The type of a tensor descriptor that loads and stores `block`, for `signature`."""
    return f"tensordesc<{dtype}{list(block)}>"


def signature(
    kernel: LazyKernel,
    pointers: dict[str, str],
    constexprs: dict[str, Any],
    *,
    warps: int = 4,
    only: tuple[str, ...] = (),
) -> Signature:
    """Pointers (by dtype), tensor descriptors and constexprs as named; `eps` and `gain` are floats, any other a 32-bit
    integer."""
    types = {}
    for name in inspect.signature(kernel.fn).parameters:
        rest = "fp32" if name in ("eps", "gain") else "i32"
        given = pointers.get(name, "")
        pointer = given if given.startswith("tensordesc") else f"*{given}"
        types[name] = "constexpr" if name in constexprs else pointer if given else rest
    return Signature(kernel, types, constexprs, warps, only)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    # A process that has not imported Triton cannot have asked for its interpreter; before 3.4 there are no knobs.
    knobs = getattr(sys.modules.get("triton"), "knobs", None)
    return knobs is not None and bool(knobs.runtime.interpret)


def triton_available(x: Tensor) -> bool:
    """Whether `x` can go through a Triton kernel: on CUDA or HIP with Triton installed, or on the CPU interpreted."""
    if x.dtype not in DTYPES:
        return False
    return _has_triton() if x.is_cuda else x.device.type == "cpu" and _interpreting()


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an op on these tensors. The Triton forms have no backward: the references do."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_channels_last(x: Tensor) -> bool:
    """Whether `[N, C, *spatial]` is nearer to channels-last than to contiguous (any number of spatial dimensions)."""
    return x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()


def empty_in_layout_of(
    x: Tensor, shape: tuple[int, ...] | torch.Size | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Uninitialised `shape` (default: that of `x`) on x's device, in the dense layout nearest to x's.

    `dtype` is x's own by default.
    """
    shape, dtype = x.shape if shape is None else shape, dtype or x.dtype
    if not is_channels_last(x):
        return torch.empty(shape, dtype=dtype, device=x.device)
    if len(shape) == 3:  # which has no memory format
        return torch.empty((shape[0], shape[2], shape[1]), dtype=dtype, device=x.device).movedim(-1, 1)
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)


def in_layout_of(x: Tensor, result: Tensor) -> Tensor:
    """`result` in the dense layout nearest to x's: itself where it already has those strides."""
    out = empty_in_layout_of(x, result.shape, result.dtype)
    return result if result.stride() == out.stride() else out.copy_(result)


@functools.lru_cache(maxsize=4096)
def flat_stride(shape: torch.Size, strides: tuple[int, ...]) -> int | None:
    """The stride of these dimensions walked as one axis, or None where they are no single axis."""
    stride = extent = None
    for size, step in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride, extent = step, step
        elif step != extent:
            return None
        extent *= size
    return 1 if stride is None else stride


def flattenable(x: Tensor, start: int = 2) -> Tensor:
    """`x`, or a copy in its nearest dense layout where dimensions `start:` cannot be walked with one stride."""
    return x if flat_stride(x.shape[start:], x.stride()[start:]) is not None else empty_in_layout_of(x).copy_(x)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` rounded to `dtype`; what is finite stays finite in fp16, which ends at 65504, and in e4m3, at 448."""
    largest = LARGEST.get(dtype)
    return (values if largest is None else values.clamp(-largest, largest)).to(dtype)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
