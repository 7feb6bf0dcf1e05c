"""Hooks of accelerate and diffusers: enabled before or after optimizing, removed before or after restoring.

On the CPU the execution device is the CPU too; what is moved, hooked and cast is the same. A hook puts a `forward`
on the instance, and weights may wait on meta or in another dtype: nothing of ours may be bypassed by it, nor bypass it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.hooks.hooks import HookRegistry
from torch import Tensor, nn

import vae_accel
from tests.snapshots import assert_equal_values, snapshot
from tests.subjects import everything
from tests.tiny import Tiny
from tests.vaes import TABLE
from vae_accel.edits import Edit, ledger_of
from vae_accel.platforms import ALL, Platform, base, execution_device

CPU = torch.device("cpu")
FULL: Platform = max((everything(cls) for cls in ALL.values()), key=lambda platform: len(platform.vae))
TINIES = {tiny.id: tiny for tiny in TABLE if tiny.id in ("wan2.1", "hunyuan-video", "cogvideox", "sd", "ltx-0.9.0")}
each_tiny = pytest.mark.parametrize("tiny", TINIES.values(), ids=TINIES)


def model_offload(vae: Any) -> Callable[[], None]:
    _, hook = accelerate.cpu_offload_with_hook(vae, CPU)
    return hook.remove


def sequential_offload(vae: Any) -> Callable[[], None]:
    accelerate.cpu_offload(vae, CPU, offload_buffers=True)
    return lambda: remove_hook_from_submodules(vae)


def group_offload_leaf(vae: Any) -> Callable[[], None]:
    apply_group_offloading(vae, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    return lambda: unhook(vae)


def group_offload_block(vae: Any) -> Callable[[], None]:
    vae.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1)
    return lambda: unhook(vae)


def unhook(vae: Any) -> None:
    registry = HookRegistry.check_if_exists_or_initialize(vae)
    names = {name for m in vae.modules() for name in getattr(m.__dict__.get("_diffusers_hook"), "hooks", {})}
    for name in names:
        registry.remove_hook(name)


def layerwise_casting(vae: Any) -> Callable[[], None]:
    apply_layerwise_casting(
        vae, storage_dtype=torch.float32, compute_dtype=torch.float64, skip_modules_pattern=("norm",)
    )
    return lambda: None  # diffusers 0.42 cannot take it off again


HOOKS = {
    f.__name__: f
    for f in (model_offload, sequential_offload, group_offload_leaf, group_offload_block, layerwise_casting)
}
each_hook = pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)


def install(vae: nn.Module) -> nn.Module:
    base.run(vae, FULL, FULL.vae, "vae", {"strict": True})
    return vae


def build(tiny: Tiny) -> nn.Module:
    """In fp64, of values that fp32 holds: layerwise casting stores them so."""
    return tiny.build(dtype=torch.float32).to(torch.float64)


def decode(tiny: Tiny, vae: nn.Module) -> Tensor:
    return tiny.decode(vae, tiny.latent().double())


def reach(tiny: Tiny, vae: nn.Module) -> tuple[Tensor, set[str]]:
    """The decoded frames, and the modules whose rewritten methods the call went through."""
    reached = set()

    def counting(edit: Edit) -> Callable[..., Any]:
        function = edit.new.func

        def count(*args: Any, **kwargs: Any) -> Any:
            reached.add(edit.path)
            return function(*args, **kwargs)

        return count

    edits = [edit for edit in ledger_of(vae).edits if edit.kind == "method"]
    functions = [edit.new.func for edit in edits]
    for edit in edits:  # inside the partial, which hooks hold by reference
        edit.new.__setstate__((counting(edit), edit.new.args, edit.new.keywords, {}))
    out = decode(tiny, vae)
    for edit, function in zip(edits, functions, strict=True):
        edit.new.__setstate__((function, edit.new.args, edit.new.keywords, {}))
    return out, reached


@each_tiny
@each_hook
@pytest.mark.parametrize("order", ["before", "after"])
@torch.no_grad()
def test_hooks_before_and_after(tiny, hook, order):
    reference = build(tiny)
    before = snapshot(reference)
    stock = decode(tiny, reference)
    install(reference)
    _, expected = reach(tiny, reference)

    vae = build(tiny)
    if order == "before":
        remove = hook(vae)
        install(vae)
    else:
        install(vae)
        remove = hook(vae)
    ours, reached = reach(tiny, vae)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-6 * float(stock.abs().max()))
    refused = tuple(path for o in ledger_of(vae).outcomes for path in o.refused)
    bypassed = [path for path in expected - reached if not path.startswith(refused)]
    assert reached and not bypassed

    vae_accel.restore(vae)
    torch.testing.assert_close(decode(tiny, vae), stock, rtol=0, atol=1e-12)
    install(vae)
    torch.testing.assert_close(decode(tiny, vae), stock, rtol=0, atol=1e-6 * float(stock.abs().max()))
    remove()
    vae_accel.restore(vae)
    if hook is not layerwise_casting:
        assert_equal_values(snapshot(vae), before)
        assert snapshot(vae).strides == before.strides
    assert torch.equal(decode(tiny, vae), stock)


@each_hook
@torch.no_grad()
def test_optimizing_what_was_once_hooked(hook):
    """accelerate and diffusers leave a `forward` on the instance when their hooks are removed."""
    tiny = TINIES["wan2.1"]
    vae = build(tiny)
    stock = decode(tiny, vae)
    hook(vae)()
    install(vae)
    assert not [
        o for o in ledger_of(vae).outcomes for reason in o.refused.values() if "replaced on the instance" in reason
    ]
    ours, reached = reach(tiny, vae)
    assert reached
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-9)


@pytest.mark.parametrize("hook", [model_offload, sequential_offload, group_offload_leaf])
def test_the_platform_is_that_of_the_execution_device(hook):
    vae = TINIES["sd"].build()
    hook(vae)
    assert execution_device(vae) == CPU


def test_the_execution_device_is_found_while_weights_wait_elsewhere():
    vae = TINIES["sd"].build()
    accelerate.cpu_offload(vae, CPU)
    assert all(p.device.type == "meta" for p in vae.parameters())
    assert execution_device(vae) == CPU
    vae_accel.optimize(vae)
    assert ledger_of(vae).platform == "cpu"
