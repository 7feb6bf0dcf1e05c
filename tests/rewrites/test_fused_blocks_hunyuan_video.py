"""HunyuanVideo's blocks on the fused convolution: stock's clips, fp16 where nothing overflows, frames without a mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from tests.rewrites.fused import ALONE, BESIDE, NORMS, optimized
from tests.snapshots import assert_identical, snapshot
from tests.subjects import plan
from tests.tiny import Tiny, video
from tests.vaes import TABLE
from vae_accel import api
from vae_accel.edits import ledger_of
from vae_accel.families import clip_conv, hunyuan_video
from vae_accel.families.blocks import block_of
from vae_accel.kernels import bordered
from vae_accel.metrics import rms_error
from vae_accel.platforms import base

CASE = next(case for case in TABLE if case.id == "hunyuan-video")
# A head that is wider than every fused attention, and a channel more.
WIDE = video(
    "wide", "AutoencoderKLHunyuanVideo", 4, (3, 2, 3), (4, 8),
    config={**CASE.config, "block_out_channels": (32, 32, 64, 288)},
)  # fmt: skip
each_case = pytest.mark.parametrize("case", [CASE, WIDE], ids=lambda case: case.id)


def clip(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain(case: Tiny, vae: Any) -> list[Tensor]:
    return [case.decode(vae, case.latent("ramp").double()), case.encode(vae, case.pixels("ramp").double())]


def single(case: Tiny, vae: Any) -> list[Tensor]:
    pixels = case.pixels()[:, :, :1].double()
    return [case.decode(vae, case.single_frame_latent().double()), case.encode(vae, pixels)]


def pair(case: Tiny, vae: Any) -> list[Tensor]:
    return [case.decode(vae, case.latent(batch=2).double()), case.encode(vae, case.pixels(batch=2).double())]


def odd(case: Tiny, vae: Any) -> list[Tensor]:
    return [case.decode(vae, clip(1, 4, 2, 3, 1)), case.encode(vae, clip(1, 3, 5, 24, 8))]


def sliced(case: Tiny, vae: Any) -> list[Tensor]:
    vae.enable_slicing()
    return pair(case, vae)


def tiled(case: Tiny, vae: Any) -> list[Tensor]:
    return plain(case, case.tile(vae))


def by_frames(case: Tiny, vae: Any) -> list[Tensor]:
    """Six latents in blended steps of three, as the class decodes by default."""
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 8, 4
    return [case.decode(vae, clip(1, 4, 6, 2, 3)), case.encode(vae, clip(1, 3, 13, 16, 16))]


@each_case
@pytest.mark.parametrize("steps", [ALONE, NORMS, BESIDE], ids=["alone", "norms", "beside"])
@pytest.mark.parametrize("run", [plain, single, pair, odd, sliced, tiled, by_frames], ids=lambda run: run.__name__)
@torch.inference_mode()
def test_whole_clips_are_those_of_stock(case: Tiny, steps: base.Platform, run: Any) -> None:
    stock, ours = (case.build(dtype=torch.float64) for _ in range(2))
    for actual, expected in zip(run(case, optimized(ours, steps)), run(case, stock), strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype == torch.float64
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
