"""Half a VAE captured: images and tiles are replayed bit for bit, clips whose steps hand frames on run as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import vae_accel
from tests.graphs.towers import FIRST, counts
from tests.recorder import Recorder
from tests.subjects import plan
from tests.vaes import TABLE
from vae_accel.platforms import Step
from vae_accel.rewrites.channels_last import ChannelsLast
from vae_accel.rewrites.cuda_graph import HALVES, CudaGraph
from vae_accel.rewrites.latent_chunks import LatentChunks

ROWS = {tiny.id: tiny for tiny in TABLE}
GRAPH = Step(CudaGraph(names=HALVES, capture=Recorder()), "on", "test")


BEFORE = (Step(ChannelsLast(), "on", "test"), Step(LatentChunks(), "on", "test"))  # the first owns the same slot


def optimized(vae: Any, *more: Step) -> Any:
    return vae_accel.optimize_vae(vae, platform=plan((*BEFORE, *more)), strict=True)


def equals_eager(stock: Any, ours: Any, direction: str, x: torch.Tensor, times: int) -> None:
    with torch.no_grad():
        for i in range(times):
            part = x + 0.1 * i
            want, got = (getattr(v, direction)(part) for v in (stock, ours))
            pick = (lambda out: out.sample) if direction == "decode" else (lambda out: out.latent_dist.mode())
            assert torch.equal(pick(got), pick(want))


@pytest.mark.parametrize("name", ["sd", "flux.1", "hunyuan-image"])
def test_images_are_replayed(name: str) -> None:
    tiny = ROWS[name]
    stock, ours = optimized(tiny.build()), optimized(tiny.build(), GRAPH)
    for half, direction, x in ((ours.decoder, "decode", tiny.latent()), (ours.encoder, "encode", tiny.pixels())):
        before = counts(ours).get("replayed", 0)
        equals_eager(stock, ours, direction, x, 4)
        assert isinstance(half, nn.Module) and counts(ours)["replayed"] == before + 3
    assert counts(ours) == {FIRST: 2, "captured": 2, "replayed": 6}


@pytest.mark.parametrize("name", ["qwen-image", "wan2.1"])
def test_one_latent_is_an_image_and_a_clip_is_none(name: str) -> None:
    tiny = ROWS[name]
    stock, ours = optimized(tiny.build()), optimized(tiny.build(), GRAPH)
    z = torch.randn(1, tiny.latent_shape[1], 2, *tiny.latent_shape[3:])
    equals_eager(stock, ours, "decode", z[:, :, :1], 3)
    assert counts(ours)["replayed"] == 2
    with torch.no_grad():
        got, want = (vae.decode(z).sample for vae in (ours, stock))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert counts(ours)["replayed"] == 2
    assert sum(n for what, n in counts(ours).items() if "feat_cache" in what) == 2, counts(ours)


def test_tiles_of_one_size_are_one_graph() -> None:
    tiny = ROWS["flux.1"]
    stock, ours = optimized(tiny.build()), optimized(tiny.build(), GRAPH)
    for vae in (stock, ours):
        vae.enable_tiling()
        vae.tile_latent_min_size, vae.tile_sample_min_size = 4, 4 * 2 ** (len(vae.config.block_out_channels) - 1)
    equals_eager(stock, ours, "decode", torch.randn(1, tiny.latent_shape[1], 7, 7), 2)
    assert counts(ours)["replayed"] > counts(ours)["captured"]


def test_warmup_is_for_towers() -> None:
    with pytest.raises(ValueError, match="no vision tower in this AutoencoderKL has cuda_graph on"):
        vae_accel.warmup(optimized(ROWS["sd"].build(), GRAPH))
