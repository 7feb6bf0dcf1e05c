"""Kernels in CUDA C++: compiled at first use by the NVRTC that torch brings along, kept on disk, launched by the
driver.

Beside Triton, for what it cannot say of a card. A second's work for each form, once a machine.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vae_accel.settings import cache_directory

_KINDS = {torch.float8_e4m3fn: 0, torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType; 0: bytes
_WIDE, _NARROW = 3, 2  # CUtensorMapSwizzle, of rows of 128 and of 64 bytes
_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Program(NamedTuple):
    """A kernel `name` in the text `source`, as `options` make it, for the architecture `arch`."""

    source: str
    name: str
    options: tuple[str, ...]
    arch: str


class CompileError(RuntimeError):
    """What the compiler said."""


@functools.cache
def unavailable() -> str | None:
    """Why nothing can be compiled and launched here, or None."""
    try:
        _nvrtc()
        _driver()
    except OSError as error:
        return f"{error}"
    return None


def compile(program: Program) -> tuple[bytes, str]:
    """The machine code of a program, and what the assembler says of registers.

    Raises:
        CompileError: with the compiler's words.
        OSError: there is no NVRTC.
    """
    nvrtc, handle = _nvrtc(), ctypes.c_void_p()
    options = [f"-arch={program.arch}", "-std=c++17", "-default-device", "--ptxas-options=-v", *program.options]
    _check(
        nvrtc.nvrtcCreateProgram(ctypes.byref(handle), program.source.encode(), b"kernel.cu", 0, None, None), "source"
    )
    try:
        failed = nvrtc.nvrtcCompileProgram(
            handle, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options))
        )
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, handle).rstrip(b"\0").decode()
        if failed:
            raise CompileError(f"{program.name} for {program.arch}: {log}")
        return _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, handle), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(handle))


def load(program: Program, shared: int, device: int) -> ctypes.c_void_p:
    """The kernel on a card, with so many bytes of dynamic shared memory. It stays loaded.

    Raises:
        CompileError, OSError: it cannot be compiled.
        RuntimeError: it cannot be loaded.
    """
    _make_current(device)
    driver, module, function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    path = _path(program)
    if driver.cuModuleLoadData(ctypes.byref(module), _machine_code(program, path)):
        path.unlink(missing_ok=True)  # what lay there is broken
        _check(driver.cuModuleLoadData(ctypes.byref(module), _machine_code(program, path)), f"{program.name} to load")
    _check(driver.cuModuleGetFunction(ctypes.byref(function), module, program.name.encode()), program.name)
    _check(driver.cuFuncSetAttribute(function, _DYNAMIC_SHARED, shared), f"{shared} bytes of shared memory")
    return function


def launch(
    function: ctypes.c_void_p, grid: int, threads: int, shared: int, arguments: Sequence[Any], device: int
) -> None:
    """On torch's current stream of a card. `arguments` are ctypes values or tensor maps, read before this returns."""
    _make_current(device)
    at = (ctypes.c_void_p * len(arguments))(
        *(a.at if isinstance(a, TensorMap) else ctypes.addressof(a) for a in arguments)
    )
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    _check(_driver().cuLaunchKernel(function, grid, 1, 1, threads, 1, 1, shared, stream, at, None), "launch")


def _make_current(device: int) -> None:
    """Gives a thread that has asked CUDA for nothing yet the context which torch uses."""
    driver, context = _driver(), ctypes.c_void_p()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "context")
    if not context.value:
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "context")
        _check(driver.cuCtxSetCurrent(context), "context")


class TensorMap:
    """How the copy engine sees memory of 8 or 16 bits: `sizes` from the innermost dimension, dense, in boxes of `box`.

    Strides are in elements, of all but the innermost. What a box reaches beyond a size is read as zeros and not
    written. A box's rows are of 64 or 128 bytes, and swizzled in shared memory as wgmma reads them.
    """

    def __init__(self, x: Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> None:
        self._memory, self._x = ctypes.create_string_buffer(192), x  # which lives as long as its map
        self.at = (ctypes.addressof(self._memory) + 63) // 64 * 64
        rank, width = len(sizes), x.element_size()
        swizzle = _WIDE if box[0] * width == 128 else _NARROW
        error = _driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(self.at), _KINDS[x.dtype], rank, ctypes.c_void_p(x.data_ptr()),
            (ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * (rank - 1))(*(s * width for s in strides)),
            (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank), 0, swizzle, 2, 0,
        )  # fmt: skip
        _check(error, f"a tensor map of {tuple(sizes)} in boxes of {tuple(box)}")


def _path(program: Program) -> Path:
    """Where the machine code of a program is kept, for the compiler of this torch."""
    text = "\0".join((program.source, *program.options, program.arch, torch.version.cuda or ""))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return cache_directory() / "kernels" / f"{program.name}-{digest[:24]}.cubin"


def _machine_code(program: Program, path: Path) -> bytes:
    """What is kept at `path`, or compiled and put there."""
    try:
        return path.read_bytes()
    except OSError:
        code, _ = compile(program)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}")  # processes side by side write whole files
        half.write_bytes(code)
        half.replace(path)
    except OSError:
        pass  # a cache that cannot be written costs the next process a second
    return code


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _nvrtc() -> Any:
    """The library of torch's own CUDA, from beside torch or from the system; of any CUDA where torch has none."""
    major = (torch.version.cuda or "13").split(".")[0]
    name = f"libnvrtc.so.{major}"
    for folder in (lib for root in _beside_torch() for lib in sorted(root.glob("*/lib"))):
        if (folder / name).exists():
            for builtins in folder.glob(f"libnvrtc-builtins.so.{major}.*"):
                ctypes.CDLL(str(builtins))  # which NVRTC looks for by name alone
            return ctypes.CDLL(str(folder / name))
    return ctypes.CDLL(name)


def _beside_torch() -> list[Path]:
    return [Path(torch.__file__).parents[1] / "nvidia"]


def _text(size_of: Any, read: Any, handle: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(handle, ctypes.byref(size)), "size")
    text = ctypes.create_string_buffer(size.value)
    _check(read(handle, text), "read")
    return text.raw


def _check(error: int, what: str) -> None:
    if error:
        raise RuntimeError(f"CUDA error {error}: {what}")
