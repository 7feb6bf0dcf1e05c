"""A stream is the decode of the same VAE in pieces, and leaves nothing behind wherever it ends."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor

import vae_accel
from tests.subjects import everything, plan
from tests.test_offload import HOOKS
from tests.tiny import Tiny
from tests.vaes import TABLE
from vae_accel.edits import ledger_of
from vae_accel.platforms import Cuda, Platform, base
from vae_accel.rewrites.latent_chunks import LatentChunks
from vae_accel.workloads import inputs

TINY = {t.id: t for t in TABLE if t.id in ("wan2.1", "wan2.2-5b", "qwen-image")}
WAN = TINY["wan2.1"]
each_tiny = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY)
PLANS: dict[str, Platform] = {
    "stock": plan(()),
    "in-threes": plan((base.Step(LatentChunks(most=3), "on", "test"),)),
    "everything": everything(Cuda),
}
each_plan = pytest.mark.parametrize("steps", PLANS.values(), ids=PLANS)


def latents(tiny: Tiny, frames: int = 5, size: tuple[int, int] = (3, 2), batch: int = 1) -> Tensor:
    return inputs.latents("ramp", (batch, tiny.latent_shape[1], frames, *size))


def build(tiny: Tiny, steps: Platform = PLANS["in-threes"], dtype: torch.dtype = torch.float32) -> Any:
    vae = tiny.build(dtype=dtype)
    base.run(vae, steps, steps.vae, "vae", {"strict": True})
    return vae


@each_tiny
@each_plan
@torch.no_grad()
def test_together_the_parts_are_the_decode(tiny: Tiny, steps: Platform) -> None:
    vae = build(tiny, steps)
    for z in (latents(tiny), latents(tiny, 1), latents(tiny, 4, (1, 3), batch=2)):
        parts = list(vae_accel.decode_stream(vae, z))
        assert torch.equal(torch.cat(parts, 2), vae.decode(z).sample)
        per_step = 1 if steps is PLANS["stock"] else steps.vae[-1].rewrite.most if len(steps.vae) == 1 else 4
        assert parts[0].shape[2] == 1 and max(part.shape[2] for part in parts[1:] or parts) <= 4 * per_step
        assert len(parts) == 1 - (1 - z.shape[2]) // per_step


@torch.no_grad()
def test_slices_go_through_each_step_one_by_one() -> None:
    vae, z = build(WAN), latents(WAN, batch=3)
    vae.enable_slicing()
    seen = []
    hook = vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    parts = list(vae_accel.decode_stream(vae, z))
    assert [part.shape[:3] for part in parts] == [(3, 3, 1), (3, 3, 12), (3, 3, 4)] and seen == [1] * 9
    hook.remove()
    assert torch.equal(torch.cat(parts, 2), vae.decode(z).sample)


@torch.no_grad()
def test_progress_and_host_memory() -> None:
    vae, z, told = build(WAN), latents(WAN), []
    parts = list(vae_accel.decode_stream(vae, z, progress=lambda *done: told.append(done), to="cpu"))
    assert told == [(1, 5), (4, 5), (5, 5)]
    assert all(part.device.type == "cpu" for part in parts)
    assert torch.equal(torch.cat(parts, 2), vae.decode(z).sample)


@each_plan
@torch.no_grad()
def test_a_stream_may_be_abandoned_and_interleaved(steps: Platform) -> None:
    """Its caches are its own: nothing of it is in the VAE, and another decode half-way disturbs neither."""
    vae, z, other = build(WAN, steps), latents(WAN), latents(WAN, 3).flip(-1)
    expected, apart = vae.decode(z).sample, vae.decode(other).sample
    stream = vae_accel.decode_stream(vae, z)
    parts = [next(stream), next(stream)]
    assert vae._feat_map == [None] * len(vae._feat_map)
    assert torch.equal(vae.decode(other).sample, apart)
    assert torch.equal(torch.cat([*parts, *stream], 2), expected)

    stream = vae_accel.decode_stream(vae, z)
    next(stream)
    stream.close()
    assert torch.equal(vae.decode(z).sample, expected)
    with pytest.raises(KeyError):
        for _ in vae_accel.decode_stream(vae, z):
            raise KeyError
    assert torch.equal(vae.decode(z).sample, expected)


@torch.no_grad()
def test_one_step_is_kept_at_most() -> None:
    vae, kept = build(WAN), []
    for part in vae_accel.decode_stream(vae, latents(WAN, 8, (1, 1))):
        kept.append(weakref.ref(part))
        del part
        gc.collect()
        assert sum(ref() is not None for ref in kept) <= 1


def test_the_callers_grad_mode_is_its_own() -> None:
    vae = build(WAN).requires_grad_(True)
    for part in vae_accel.decode_stream(vae, latents(WAN, 2)):
        assert torch.is_grad_enabled() and not part.requires_grad


@torch.no_grad()
def test_under_autocast_it_is_stocks_decode() -> None:
    vae, z = build(WAN), latents(WAN, 4)
    with torch.autocast("cpu", torch.bfloat16):
        parts = list(vae_accel.decode_stream(vae, z))
        assert len(parts) == 4 and torch.equal(torch.cat(parts, 2), vae.decode(z).sample)


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
@torch.no_grad()
def test_offloaded_weights_are_brought_as_for_decode(hook: Any) -> None:
    vae = WAN.build().double()
    z, steps = latents(WAN).double(), PLANS["in-threes"]
    stock = vae.decode(z).sample
    base.run(vae, steps, steps.vae, "vae", {"strict": True})
    hook(vae)
    streamed = torch.cat(list(vae_accel.decode_stream(vae, z)), 2)
    torch.testing.assert_close(streamed, stock, rtol=0, atol=1e-6)
    assert torch.equal(streamed, vae.decode(z).sample)


@torch.no_grad()
def test_the_hook_that_moves_a_whole_model_is_called_first() -> None:
    vae, order = build(WAN), []

    class Watch(accelerate.hooks.ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            order.append(module)
            return args, kwargs

    vae._hf_hook = Watch()
    stream = vae_accel.decode_stream(vae, latents(WAN, 2))
    assert not order
    next(stream)
    assert order == [vae]


@torch.no_grad()
def test_memory_that_runs_out_half_way_costs_no_frame() -> None:
    vae, z = build(WAN), latents(WAN, 7)
    expected, told = vae.decode(z).sample, []

    def full(module: Any, args: tuple[Tensor, ...]) -> None:
        if told and args[0].shape[2] > 1:
            raise torch.OutOfMemoryError("full")

    stream = vae_accel.decode_stream(vae, z, progress=lambda *done: told.append(done))
    parts = [next(stream), next(stream)]
    vae.decoder.register_forward_pre_hook(full)
    with pytest.warns(RuntimeWarning, match="begun again at 1"):
        parts += stream
    assert told == [(n, 7) for n in (1, 4, 5, 6, 7)]
    torch.testing.assert_close(torch.cat(parts, 2), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "tiny", [t for t in TABLE if t.id in ("cogvideox", "sd", "qwen-image-2.1")], ids=lambda t: t.id
)
def test_what_cannot_be_streamed_is_told_at_the_call(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=f"{tiny.vae_class} cannot be streamed: only AutoencoderKLWan and "):
        vae_accel.decode_stream(tiny.build(), tiny.latent())


def test_bad_calls_are_told_at_the_call() -> None:
    vae, z = build(WAN), latents(WAN)
    for wrong in (z[0], z[:0], z[:, :, :0]):
        with pytest.raises(ValueError, match="latents must be"):
            vae_accel.decode_stream(vae, wrong)
    with pytest.raises(ValueError, match="'disk'"):
        vae_accel.decode_stream(vae, z, to="disk")  # type: ignore[arg-type]
    vae.enable_tiling()
    with pytest.raises(ValueError, match="disable_tiling"):
        vae_accel.decode_stream(vae, z)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
@torch.no_grad()
def test_pinned_copies_are_the_frames() -> None:
    vae, z = build(WAN).cuda(), latents(WAN, 9, (16, 16)).cuda()
    told: list[int] = []
    stream = vae_accel.decode_stream(vae, z, progress=lambda done, _: told.append(done), to="cpu")
    parts = [next(stream)]
    assert told == [1, 4], "the second step runs while the first one's frames are handed out"
    parts += stream
    assert all(part.is_pinned() for part in parts) and ledger_of(vae) is not None
    torch.testing.assert_close(torch.cat(parts, 2), vae.decode(z).sample.cpu(), rtol=0, atol=1e-5)
