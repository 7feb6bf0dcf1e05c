"""Every kernel compiles for every GPU it may meet, without one: the only check the AMD and Blackwell forms get here."""

import importlib
import pkgutil

import pytest

import vae_accel.kernels
from vae_accel.kernels import winograd
from vae_accel.kernels._dispatch import LazyFunction, LazyKernel

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
MODULES = [
    importlib.import_module(f"vae_accel.kernels.{m.name}") for m in pkgutil.iter_modules(vae_accel.kernels.__path__)
]
KERNELS = {kernel for module in MODULES for kernel in vars(module).values() if isinstance(kernel, LazyKernel)}
SIGNATURES = {
    f"{signature.kernel.__name__}-{index}": signature
    for module in MODULES
    if hasattr(module, "signatures")
    for index, signature in enumerate(module.signatures())
}


@pytest.fixture(autouse=True)
def compiled_form(monkeypatch, tmp_path):
    if not isinstance(triton.language.sum, JITFunction):
        pytest.skip("Triton was imported with TRITON_INTERPRET set: nothing can be compiled in this process")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


def compiled(signature, target):
    kernel, types, constexprs, warps, _ = signature
    source = ASTSource(fn=kernel.bind(), signature=types, constexprs=constexprs)
    return triton.compile(source, target=target, options={"num_warps": warps})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SIGNATURES)
def test_compiles(name, target):
    only = SIGNATURES[name].only
    if only and target not in only:
        pytest.skip(f"it runs on {', '.join(only)} alone")
    binary = compiled(SIGNATURES[name], TARGETS[target])
    assert len(binary.asm["cubin" if TARGETS[target].backend == "cuda" else "hsaco"]) > 0


SATURATING = [
    name for name, s in SIGNATURES.items() if s.constexprs.get("SATURATE") or s.kernel is winograd._norm_pairs
]


@pytest.mark.parametrize("name", SATURATING)
def test_saturation_keeps_what_is_not_a_number(name):
    """PTX's plain min and max return the other operand: an overflow would leave as a finite 65504."""
    assert "min.NaN" in compiled(SIGNATURES[name], TARGETS["sm_90"]).asm["ptx"]


def test_every_kernel_is_covered():
    assert {signature.kernel for signature in SIGNATURES.values()} == KERNELS


def test_a_function_of_kernels_is_for_kernels():
    function = next(f for module in MODULES for f in vars(module).values() if type(f) is LazyFunction)
    with pytest.raises(RuntimeError, match=f"{function.__name__} is a function of Triton kernels"):
        function(1)
