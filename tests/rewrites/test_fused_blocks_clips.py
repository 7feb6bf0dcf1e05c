"""Video families whose blocks are ours, whole: stock's clips in fp64, no further from the truth in bf16, taken back."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor

from tests.rewrites.fused import ALONE, BESIDE, NORMS, TINY, WIDE, clip, optimized, outcome_of
from tests.snapshots import assert_identical, snapshot
from tests.tiny import Tiny
from vae_accel import api
from vae_accel.metrics import rms_error
from vae_accel.platforms import Cuda, base

NAMES = ("hunyuan-video", "hunyuan-video-1.5", "hunyuan-image-refiner", "mochi", "cogvideox")
CASES = [WIDE, *(TINY[name] for name in NAMES)]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def plain(case: Tiny, vae: Any) -> list[Tensor]:
    return [case.decode(vae, case.latent("ramp").double()), case.encode(vae, case.pixels("ramp").double())]


def single(case: Tiny, vae: Any) -> list[Tensor]:
    pixels = case.pixels()[:, :, :1].double()
    return [case.decode(vae, case.single_frame_latent().double()), case.encode(vae, pixels)]


def pair(case: Tiny, vae: Any) -> list[Tensor]:
    return [case.decode(vae, case.latent(batch=2).double()), case.encode(vae, case.pixels(batch=2).double())]


def odd(case: Tiny, vae: Any) -> list[Tensor]:
    side = case.pixel_shape[-1] // case.latent_shape[-1]
    n, z, t = case.latent_shape[:3]
    return [case.decode(vae, clip(n, z, t, 3, 1)), case.encode(vae, clip(*case.pixel_shape[:3], 3 * side, side))]


def sliced(case: Tiny, vae: Any) -> list[Tensor]:
    vae.enable_slicing()
    return pair(case, vae)


def tiled(case: Tiny, vae: Any) -> list[Tensor]:
    return plain(case, case.tile(vae))


def long(case: Tiny, vae: Any) -> list[Tensor]:
    """Five latents: CogVideoX takes them in steps of three and two, and encodes nine frames and then eight."""
    times = (case.pixel_shape[2] - 1) // (case.latent_shape[2] - 1)
    z, side = case.latent_shape[1], case.pixel_shape[-1] // case.latent_shape[-1]
    return [case.decode(vae, clip(1, z, 5, 2, 3)), case.encode(vae, clip(1, 3, 4 * times + 1, 2 * side, 2 * side))]


def by_frames(case: Tiny, vae: Any) -> list[Tensor]:
    """Six latents in blended steps, as HunyuanVideo decodes by default."""
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 8, 4
    return [case.decode(vae, clip(1, 4, 6, 2, 3)), case.encode(vae, clip(1, 3, 13, 16, 16))]


RUNS = (plain, single, pair, odd, sliced, tiled, long, by_frames)


def reason_not_to(run: Any, case: Tiny) -> str | None:
    """Why stock itself cannot."""
    if run in (pair, sliced) and not case.batch:
        return "several at once"
    if run is tiled and not case.tiling:
        return "tiles"
    if run is long and case.pixel_shape[2] == 1:
        return "a clip"
    if run is single and not case.single_frame:
        return "a single frame"
    return "steps of frames" if run is by_frames and case.vae_class != "AutoencoderKLHunyuanVideo" else None


@each_case
@pytest.mark.parametrize("steps", [ALONE, NORMS, BESIDE], ids=["alone", "norms", "beside"])
@pytest.mark.parametrize(
    "run", [plain, single, pair, odd, sliced, tiled, long, by_frames], ids=lambda run: run.__name__
)
@torch.inference_mode()
def test_whole_clips_are_those_of_stock(case: Tiny, steps: base.Platform, run: Any) -> None:
    if (reason := reason_not_to(run, case)) is not None:
        pytest.skip(f"stock cannot: {reason}")
    stock, ours = (case.build(dtype=torch.float64) for _ in range(2))
    for actual, expected in zip(run(case, optimized(ours, steps)), run(case, stock), strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype == torch.float64
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@each_case
@torch.inference_mode()
def test_no_further_from_the_truth_than_stock_in_bf16(case: Tiny) -> None:
    """RMS error beside stock's, the mean over seeds, decoder and encoder."""
    ratios = []
    for seed in range(3):
        vae = case.build(seed, torch.bfloat16)
        given = case.latent("picture", seed=seed).bfloat16(), case.pixels("picture", seed=seed).bfloat16()

        def both(vae: Any, dtype: torch.dtype, given: Any = given) -> list[Tensor]:
            return [case.decode(vae, given[0].to(dtype)), case.encode(vae, given[1].to(dtype))]

        golden = both(copy.deepcopy(vae).double(), torch.float64)
        stock, ours = both(vae, torch.bfloat16), both(optimized(vae, NORMS), torch.bfloat16)
        ratios += [rms_error(a, g) / rms_error(s, g) for a, s, g in zip(ours, stock, golden, strict=True)]
    assert statistics.mean(ratios) <= 1.0, ratios


@each_case
def test_nothing_is_refused(case: Tiny) -> None:
    outcome = outcome_of(optimized(case.build(dtype=torch.bfloat16)))
    assert outcome.taken and not outcome.refused


@each_case
@torch.inference_mode()
def test_copied_offloaded_and_taken_back(case: Tiny) -> None:
    vae = case.build(dtype=torch.bfloat16)
    before, latent = snapshot(vae), case.latent("picture").bfloat16()
    stock = case.decode(vae, latent)
    ours = case.decode(optimized(vae, NORMS), latent)
    copied = copy.deepcopy(vae)
    assert torch.equal(case.decode(copied, latent), ours)
    cpu_offload(copied, execution_device="cpu")
    assert torch.equal(case.decode(copied, latent), ours)
    api.restore(vae)
    assert_identical(vae, before)
    assert torch.equal(case.decode(vae, latent), stock)


def test_the_plan_takes_no_family_that_no_card_has_proved() -> None:
    """Unless it is asked for by name."""
    for name in ("hunyuan-video-1.5", "hunyuan-image-refiner"):
        vae = TINY[name].build(dtype=torch.bfloat16)
        Cuda().optimize_vae(vae)
        assert not outcome_of(vae).taken, name
        assert any("on no card yet: fused_blocks=1 takes it" in reason for reason in outcome_of(vae).refused.values())
        Cuda().optimize_vae(vae, fused_blocks="1")
        assert len(outcome_of(vae).taken) > 3, name
    for name in ("wan2.1", "hunyuan-video", "mochi", "cogvideox"):
        vae = TINY[name].build(dtype=torch.bfloat16)
        Cuda().optimize_vae(vae)
        assert outcome_of(vae).taken and not any("on no card" in r for r in outcome_of(vae).refused.values()), name
