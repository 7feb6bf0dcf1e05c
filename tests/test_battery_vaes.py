"""Every autoencoder class of diffusers with a convolution, under the plan of every platform, computes what stock does.

The plans run with all their steps on, and as they ship; each on the CPU, through the explicit platform.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import vae_accel
from tests.snapshots import assert_identical, snapshot
from tests.subjects import SUBJECTS, decode, everything
from tests.tiny import Tiny
from tests.vaes import TABLE
from vae_accel.edits import ledger_of
from vae_accel.metrics import rms_error
from vae_accel.platforms import ALL, Platform, base
from vae_accel.rewrite import Tier
from vae_accel.workloads.inputs import Kind

PLATFORMS = {name: everything(cls) for name, cls in ALL.items()}
SLOW = ("hunyuan-video-1.5", "minimax-h3")  # a mask built by a Python loop; an encoder of 17 frames

each_tiny = pytest.mark.parametrize("tiny", TABLE, ids=lambda tiny: tiny.id)
each_platform = pytest.mark.parametrize("platform", PLATFORMS.values(), ids=PLATFORMS)
LONGEST = max(PLATFORMS.values(), key=lambda platform: len(platform.vae))


def optimized(vae: nn.Module, platform: Platform) -> nn.Module:
    base.run(vae, platform, platform.vae, "vae", {"strict": True})
    return vae


def run(tiny: Tiny, vae: nn.Module) -> list[Tensor]:
    kinds: tuple[Kind, ...] = ("noise",) if tiny.id in SLOW else ("noise", "ramp")
    return [out for kind in kinds for out in SUBJECTS[tiny.id].run(vae, kind)]


@cache
def _stock(id: str, dtype: torch.dtype) -> list[Tensor]:
    (tiny,) = [tiny for tiny in TABLE if tiny.id == id]
    with torch.no_grad():
        return run(tiny, tiny.build(dtype=dtype))


def stock(tiny: Tiny, dtype: torch.dtype) -> list[Tensor]:
    return _stock(tiny.id, dtype)


@cache
def golden(id: str) -> list[Tensor]:
    """In fp64, of the weights that the model has in fp32."""
    (tiny,) = [tiny for tiny in TABLE if tiny.id == id]
    with torch.no_grad():
        return run(tiny, tiny.build().double())


def assert_close(tiny: Tiny, ours: list[Tensor], expected: list[Tensor]) -> None:
    relative = SUBJECTS[tiny.id].precision
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=relative * float(b.abs().max()))


@each_tiny
@each_platform
@torch.no_grad()
def test_the_whole_plan_computes_what_stock_does(tiny, platform):
    vae = tiny.build(dtype=torch.float64)
    before = snapshot(vae)
    optimized(vae, platform)
    assert_close(tiny, run(tiny, vae), stock(tiny, torch.float64))
    report = vae_accel.report(vae)
    (section,) = report.sections
    assert [o.name for o in section.outcomes] == [step.rewrite.name for step in platform.vae]
    for outcome in section.outcomes:
        assert outcome.state in ("on", "off") and (outcome.state == "on" or outcome.why)
        assert not set(outcome.taken) & set(outcome.refused) and all(outcome.refused.values())
        assert outcome.name in str(report) and (outcome.state == "off") == (not _may_run(outcome.name, platform))
    vae_accel.restore(vae)
    assert_identical(vae, before)
    assert all(torch.equal(a, b) for a, b in zip(run(tiny, vae), stock(tiny, torch.float64), strict=True))


def _may_run(name: str, platform: Platform) -> bool:
    (step,) = [step for step in platform.vae if step.rewrite.name == name]
    return step.rewrite.tier is not Tier.LOWERED


@pytest.mark.parametrize("name", ALL)
@each_tiny
@torch.no_grad()
def test_the_plan_as_it_ships_is_as_near_the_golden_as_stock(tiny, name):
    vae = tiny.build()
    vae_accel.optimize_vae(vae, platform=name)
    for ours, theirs, true in zip(run(tiny, vae), stock(tiny, torch.float32), golden(tiny.id), strict=True):
        # The order in which the backend adds decides in fp32 (oneDNN's channels-last: 2.9 x); 1 ulp of the range.
        assert rms_error(ours, true) <= 4 * rms_error(theirs, true) + 1e-7 * float(true.abs().max())


def grown(tiny: Tiny, latent: Tensor) -> Tensor:
    """One more row and one more column: odd sizes where the table has even ones."""
    latent = torch.cat([latent, latent[..., -1:, :]], -2)
    return torch.cat([latent, latent[..., -1:]], -1)


def single_frame(tiny: Tiny, latent: Tensor) -> Tensor:
    return latent[:, :, :1] if tiny.video else latent[:1]


def strided(tiny: Tiny, latent: Tensor) -> Tensor:
    """Same values, every second element of a larger tensor."""
    return latent.repeat_interleave(2, -1)[..., ::2]


def channels_last(tiny: Tiny, latent: Tensor) -> Tensor:
    return latent.to(memory_format=torch.channels_last_3d if tiny.video else torch.channels_last)


def transposed(tiny: Tiny, latent: Tensor) -> Tensor:
    return latent.transpose(-1, -2).contiguous().transpose(-1, -2)


def pair(tiny: Tiny, latent: Tensor) -> Tensor:
    return torch.cat([latent, latent.flip(-1)])


def empty(tiny: Tiny, latent: Tensor) -> Tensor:
    return latent[:0]


LATENTS: dict[str, Callable[[Tiny, Tensor], Tensor]] = {
    f.__name__: f for f in (grown, single_frame, strided, channels_last, transposed, pair, empty)
}


def outcome(call: Callable[[], Tensor]) -> Tensor | type[Exception]:
    try:
        return call()
    except Exception as error:
        return type(error)


@each_tiny
@torch.no_grad()
def test_latents_of_every_shape_and_layout(tiny):
    """Where stock raises, so do we, with the same kind of error."""
    vae, fast = tiny.build(dtype=torch.float64), optimized(tiny.build(dtype=torch.float64), LONGEST)
    latent = tiny.latent("ramp").double()
    for name, change in LATENTS.items():
        changed = change(tiny, latent)
        expected, actual = (outcome(lambda m=m, z=changed: decode(tiny, m, z)) for m in (vae, fast))
        if isinstance(expected, Tensor) and isinstance(actual, Tensor):
            assert actual.shape == expected.shape, name
            if expected.numel():
                assert_close(tiny, [actual], [expected])
        else:
            assert actual == expected, f"{name}: {actual} where stock gives {expected}"


@pytest.mark.parametrize("tiny", [t for t in TABLE if t.tiling], ids=lambda tiny: tiny.id)
@torch.no_grad()
def test_tiling(tiny):
    vae, fast = (tiny.tile(tiny.build(dtype=torch.float64)) for _ in range(2))
    if tiny.id == "kvae":  # a GroupNorm of one channel a group, on a last tile of one latent: rounding times 1e3 a norm
        for model in (vae, fast):
            model.tile_sample_min_size, model.tile_latent_min_size = 16, 4
    optimized(fast, LONGEST)
    latent = tiny.latent("ramp").double()
    tiled = decode(tiny, vae, latent)
    assert_close(tiny, [decode(tiny, fast, latent)], [tiled])
    vae_accel.restore(fast)
    assert torch.equal(decode(tiny, fast, latent), tiled)


@pytest.mark.parametrize("tiny", [t for t in TABLE if t.slicing and t.batch], ids=lambda tiny: tiny.id)
@torch.no_grad()
def test_slicing(tiny):
    vae, fast = tiny.build(dtype=torch.float64), optimized(tiny.build(dtype=torch.float64), LONGEST)
    for model in (vae, fast):
        model.enable_slicing()
    latent = pair(tiny, tiny.latent("ramp").double())
    assert_close(tiny, [decode(tiny, fast, latent)], [decode(tiny, vae, latent)])


def test_every_convolution_of_every_class_is_accounted_for():
    """Whoever asks for Conv3d as Conv2d can read in the report what became of each Conv3d."""
    for tiny in TABLE:
        vae = tiny.build()
        convolutions = {path for path, m in vae.named_modules() if isinstance(m, nn.Conv3d)}
        if convolutions:
            vae_accel.optimize_vae(vae, platform="cpu", only="conv3d_as_conv2d")
            (done,) = [o for o in ledger_of(vae).outcomes if o.name == "conv3d_as_conv2d"]
            assert set(done.taken) | set(done.refused) == convolutions, tiny.id
