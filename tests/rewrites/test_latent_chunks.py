"""Any number of latents a step computes what stock computes with one, and memory decides how many."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import Tensor, nn

from tests.subjects import plan
from tests.vaes import TABLE, Tiny
from vae_accel import api
from vae_accel.edits import ledger_of
from vae_accel.families import chunked
from vae_accel.platforms import base
from vae_accel.rewrites import latent_chunks
from vae_accel.rewrites.latent_chunks import LatentChunks, latents_per_step
from vae_accel.workloads import inputs

TINY = {t.id: t for t in TABLE if t.id in ("wan2.1", "wan2.2-5b", "qwen-image")}
each_tiny = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY)
each_step = pytest.mark.parametrize("step", [1, 2, 3, 4, 8])


def chunks(vae: nn.Module, step: int, **options: Any) -> Any:
    made = plan((base.Step(LatentChunks(most=step, **options), "on", "test"),))
    base.run(vae, made, made.vae, "vae", {"strict": True})
    return vae


def latents(tiny: Tiny, frames: int, size: tuple[int, int] = (3, 2), batch: int = 1) -> Tensor:
    return inputs.latents("ramp", (batch, tiny.latent_shape[1], frames, *size)).double()


def pixels(tiny: Tiny, frames: int, batch: int = 1) -> Tensor:
    return inputs.pixels("ramp", (batch, 3, frames, *tiny.pixel_shape[3:])).double()


class Calls:
    """How many frames a module is given, call by call."""

    def __init__(self, module: nn.Module) -> None:
        self.frames: list[int] = []
        module.register_forward_pre_hook(lambda _, args: self.frames.append(args[0].shape[2]))


class Full:
    """A decoder, or encoder, that runs out of memory from its `calls`-th call with more than `most` frames on."""

    def __init__(self, module: nn.Module, most: int, calls: int = 1) -> None:
        self.most, self.calls = most, calls
        module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.calls -= args[0].shape[2] > self.most
        if self.calls <= 0 and args[0].shape[2] > self.most:
            raise torch.OutOfMemoryError("full")


@each_tiny
@each_step
@torch.no_grad()
def test_decode_is_that_of_stock(tiny: Tiny, step: int) -> None:
    vae = tiny.build(dtype=torch.float64)
    cases = [latents(tiny, n) for n in (1, 2, 3, 6)] + [latents(tiny, 9, (1, 1)), latents(tiny, 4, (1, 3), batch=2)]
    stock = [vae.decode(z).sample for z in cases]
    calls = Calls(chunks(vae, step).decoder)
    for z, expected in zip(cases, stock, strict=True):
        calls.frames.clear()
        torch.testing.assert_close(vae.decode(z).sample, expected, rtol=0, atol=1e-13)
        assert sum(calls.frames) == z.shape[2] and calls.frames[0] == 1 and max(calls.frames[1:], default=0) <= step
        assert len(calls.frames) == 1 - (1 - z.shape[2]) // step


@each_tiny
@each_step
@torch.no_grad()
def test_encode_is_that_of_stock(tiny: Tiny, step: int) -> None:
    """Frames past the last whole group of four are not looked at, in stock either (11 and 16 here)."""
    vae = tiny.build(dtype=torch.float64)
    cases = [pixels(tiny, n) for n in (1, 5, 9, 11, 16, 33)] + [pixels(tiny, 9, batch=2)]
    stock = [vae.encode(x).latent_dist.parameters for x in cases]
    chunks(vae, step)
    for x, expected in zip(cases, stock, strict=True):
        torch.testing.assert_close(vae.encode(x).latent_dist.parameters, expected, rtol=0, atol=1e-13)


@each_tiny
@torch.no_grad()
def test_one_latent_keeps_no_frames(tiny: Tiny) -> None:
    vae = chunks(tiny.build(dtype=torch.float64), 2)
    given: list[Any] = []
    for part in (vae.decoder, vae.encoder):
        part.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs["feat_cache"]), with_kwargs=True)
    for count in (1, 2):
        given.clear()
        vae.decode(latents(tiny, count))
        vae.encode(pixels(tiny, 4 * count))  # the last three frames are no whole group
        assert all((cache is None) == (count == 1) for cache in given) and len(given) == 2 * count


@each_tiny
@pytest.mark.parametrize("dtype, ratio", [(torch.float32, 1.2), (torch.bfloat16, 1.05)], ids=str)
@torch.no_grad()
def test_rounding_is_no_worse_than_stock(tiny: Tiny, dtype: torch.dtype, ratio: float) -> None:
    """fp32: 3e-7 to 2e-6 apart; the few values of one step of a tiny clip are added in another order."""
    vae = tiny.build(dtype=dtype)
    z = latents(tiny, 5).to(dtype)
    stock, golden = vae.decode(z).sample, tiny.build(dtype=dtype).double().decode(z.double()).sample
    ours = chunks(vae, 4).decode(z).sample
    assert ours.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)
    assert (ours - golden).square().mean().sqrt() <= ratio * (stock - golden).square().mean().sqrt()


@each_tiny
def test_the_estimates_say_what_the_widest_stage_holds(tiny: Tiny) -> None:
    """Against the largest input of a convolution of the decoder, and output of one of the encoder, with two latents."""
    vae, largest = tiny.build().requires_grad_(False), [0]

    def watch(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        largest[0] = max(largest[0], out.numel() * out.element_size())

    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(watch)
    z, x = latents(tiny, 3).float(), pixels(tiny, 9).float()
    chunks(vae, 2).decode(z)
    assert largest[0] == 2 * chunked.decode_bytes(vae, z) // chunked.LIVE
    largest[0] = 0
    vae.encode(x)
    assert largest[0] == 2 * chunked.encode_bytes(vae, x) // chunked.LIVE


def test_as_many_latents_as_the_memory_is_good_for() -> None:
    gib = 1 << 30
    assert latents_per_step(gib, most=4, budget=6 * gib, free=None) == 4
    assert latents_per_step(gib, most=8, budget=6 * gib, free=None) == 6
    assert latents_per_step(gib, most=8, budget=6 * gib, free=12 * gib) == 3  # a quarter
    assert latents_per_step(gib, most=8, budget=6 * gib, free=gib) == 1  # never none
    assert latents_per_step(0, most=8, budget=6 * gib, free=0) == 1


@torch.no_grad()
def test_a_budget_bounds_the_step() -> None:
    tiny = TINY["wan2.1"]
    vae, z = tiny.build(dtype=torch.float64), latents(TINY["wan2.1"], 6)
    calls = Calls(chunks(vae, 8, budget=2 * chunked.decode_bytes(vae, z) + 1).decoder)
    vae.decode(z)
    assert calls.frames == [1, 2, 2, 1]


@each_tiny
@torch.no_grad()
def test_out_of_memory_begins_again_with_half_as_many(tiny: Tiny) -> None:
    vae, z, x = tiny.build(dtype=torch.float64), latents(tiny, 8), pixels(tiny, 17)
    stock, moments = vae.decode(z).sample, vae.encode(x).latent_dist.parameters
    chunks(vae, 7)
    Full(vae.decoder, 1)
    Full(vae.encoder, 12)
    with pytest.warns(RuntimeWarning) as told:
        ours = vae.decode(z).sample
    steps = ((7, 3), (3, 1))
    assert [str(w.message) for w in told] == [
        f"out of memory at {more} latents a step: begun again at {fewer}" for more, fewer in steps
    ]
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-13)
    with pytest.warns(RuntimeWarning, match="at 7 latents a step: begun again at 3"):
        encoded = vae.encode(x).latent_dist.parameters
    torch.testing.assert_close(encoded, moments, rtol=0, atol=1e-13)


@torch.no_grad()
def test_out_of_memory_half_way_yields_no_frame_twice() -> None:
    """Steps of 3 after the first, of which the second fails: begun again in steps of 1, four of which were yielded."""
    tiny = TINY["wan2.1"]
    vae, z = tiny.build(dtype=torch.float64), latents(tiny, 9)
    stock = vae.decode(z).sample
    Full(chunks(vae, 3).decoder, 1, calls=2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        parts = list(latent_chunks.frames(vae, z, LatentChunks(most=3)))
    assert len(told) == 1 and [part.shape[2] for part in parts] == [1, 12, 4, 4, 4, 4, 4]
    torch.testing.assert_close(torch.cat(parts, 2), stock, rtol=0, atol=1e-13)


@torch.no_grad()
def test_out_of_memory_at_one_latent_is_the_callers() -> None:
    tiny = TINY["qwen-image"]
    vae, z = tiny.build(dtype=torch.float64), latents(tiny, 3)
    stock = vae.decode(z).sample
    hook = vae.decoder.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    chunks(vae, 2)
    with pytest.raises(torch.OutOfMemoryError, match="full"), pytest.warns(RuntimeWarning, match="again at 1"):
        vae.decode(z)
    assert not any(torch.is_tensor(kept) for kept in vae._feat_map)
    hook.remove()
    assert torch.equal(vae.decode(z).sample, stock)


@each_tiny
@torch.no_grad()
def test_tiles_are_stocks(tiny: Tiny) -> None:
    vae, z = tiny.tile(tiny.build(dtype=torch.float64)), latents(tiny, 3, (3, 3))
    stock = vae.decode(z).sample
    calls = Calls(chunks(vae, 4).decoder)
    assert torch.equal(vae.decode(z).sample, stock)
    assert set(calls.frames) == {1}


@each_tiny
@torch.no_grad()
def test_slices_are_decoded_one_by_one(tiny: Tiny) -> None:
    vae, z = tiny.build(dtype=torch.float64), latents(tiny, 4, batch=3)
    stock = vae.decode(z).sample
    chunks(vae, 4).enable_slicing()
    seen = []
    vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    torch.testing.assert_close(vae.decode(z).sample, stock, rtol=0, atol=1e-13)
    assert seen == [1] * 6


def test_a_gradient_autocast_and_a_compiler_take_stocks_steps() -> None:
    tiny = TINY["wan2.1"]
    vae = chunks(tiny.build(), 4)
    z = latents(tiny, 4, (1, 1)).float()
    calls = Calls(vae.decoder)
    vae.requires_grad_(True).decode(z).sample.sum().backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        vae.decode(z)
    assert calls.frames == [1] * 8
    with torch.no_grad():
        expected = api.restore(tiny.build()).decode(z).sample
        vae = chunks(tiny.build(), 4)
        assert torch.equal(torch.compile(vae.decode, backend="eager", fullgraph=True)(z).sample, expected)


@torch.no_grad()
def test_the_clip_has_the_layout_of_its_parts() -> None:
    vae = chunks(TINY["wan2.1"].build(), 2)
    z = latents(TINY["wan2.1"], 3).float()
    assert vae.decode(z).sample.is_contiguous()
    vae.decoder.register_forward_hook(lambda _, args, out: out.to(memory_format=torch.channels_last_3d))
    clip = vae.decode(z).sample
    assert clip.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(vae.decode(z, return_dict=False)[0], clip)
    assert torch.equal(vae._decode(z, return_dict=False)[0], clip)


def test_a_decode_of_ones_own_is_refused() -> None:
    stock = type(TINY["wan2.1"].build())

    class Mine(stock):  # type: ignore[misc, valid-type]
        def _decode(self, z: Tensor, return_dict: bool = True) -> Any:
            return super()._decode(z, return_dict)

    vae = Mine(**TINY["wan2.1"].config)
    (site,) = LatentChunks().sites(vae, base.Ledger())
    assert site.refused == "Mine has no _decode of diffusers'"


def test_patches_are_those_of_diffusers() -> None:
    x = torch.randn(2, 3, 2, 4, 6)
    assert torch.equal(chunked.patchify(x, 2), wan.patchify(x, 2))
    y = torch.randn(2, 12, 2, 3, 2)
    assert torch.equal(chunked.unpatchify(y, 2), wan.unpatchify(y, 2))
    assert torch.equal(chunked.unpatchify(chunked.patchify(x, 2), 2), x)


def test_paused_and_restored_are_stock() -> None:
    vae = chunks(TINY["wan2.1"].build(), 3)
    assert latent_chunks.chunks_of(vae) == LatentChunks(most=3)
    with api.paused(vae):
        assert latent_chunks.chunks_of(vae) is None
    assert ledger_of(api.restore(vae)) is None and latent_chunks.chunks_of(vae) is None
