"""Real convolutions in Triton's interpreter: each kernel proved against the law by the tuner's own check."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from typer.testing import CliRunner

from tests import interpreter
from tests.kernels.clips import SMALL
from tests.tf32 import Simulated
from vae_accel import optimize_vae
from vae_accel.cli import app
from vae_accel.kernels import tile_choice
from vae_accel.kernels.tiles import Key, Tile, candidates
from vae_accel.tuning import problem, tune
from vae_accel.tuning import workload as of_workload
from vae_accel.tuning.problems import _sides
from vae_accel.tuning.search import error
from vae_accel.workloads import TOWERS, WORKLOADS

CPU = torch.device("cpu")
KEYS = {  # of fp16 alone: the interpreter cuts bf16 off instead of rounding it
    "conv": Key("conv", 8, 16, 27, "float16", "float16", 6),
    "conv of an image": Key("conv", 8, 16, 9, "float16", "float16", 5),
    "conv along time": Key("conv", 8, 16, 3, "float16", "float16", 5),
    "conv of single pixels": Key("conv", 8, 96, 1, "float16", "float16", 4),
    "conv of 96 channels": Key("conv", 8, 96, 9, "float16", "float16", 4),
    "pairs of pixels": Key("conv_pixel_pairs", 8, 96, 9, "float16", "float16", 4),
    "winograd": Key("winograd", 192, 128, 27, "float16", "float16", 5),
    "upsample_conv": Key("upsample_conv", 8, 16, 9, "float16", "float16", 4),
    "downsample_conv": Key("downsample_conv", 8, 16, 9, "float16", "float16", 5),
    "thin_conv": Key("thin_conv", 8, 3, 27, "float16", "float16", 5),
    "conv of an fp32 model": Key("conv", 8, 16, 27, "float16", "float32", 6),
    "conv without a norm": Key("conv", 8, 16, 27, "float32", "float32", 6),
    "upsample_conv of fp32": Key("upsample_conv", 8, 16, 9, "float32", "float32", 4),
    "thin_conv of fp32": Key("thin_conv", 8, 3, 27, "float32", "float32", 5),
}


@pytest.fixture
def interpreted(monkeypatch):
    with interpreter.kernels(monkeypatch):
        yield


@pytest.mark.parametrize("what", KEYS)
def test_each_kernel_is_right_with_everything_it_can_have(interpreted, what):
    key = KEYS[what]
    tile = SMALL._replace(cols=32) if key.kernel == "thin_conv" else SMALL
    with Simulated():  # the vendor's fp32, as a card multiplies it
        found = tune(key, [tile], lambda seed: problem(key, seed, CPU), timer=lambda call: 1.0)
    assert found.tile == tile, found.dropped
    assert (found.vendor is None) == (key.kernel == "winograd")
    out = problem(key, 0, CPU).golden().numel()
    assert found.flop == 2 * out * key.channels_in * key.taps


def test_a_wrong_kernel_is_found_out(interpreted, monkeypatch):
    """`more` beside a `cols` that leaves a gap, and a sum cut short: the fastest there are."""
    from vae_accel.kernels import conv

    key, cut = KEYS["conv"], SMALL._replace(stages=3)
    launch = conv._launch

    def cutting(x, weight, *args, tile, **options):
        if tile == cut:
            weight = weight.clone()
            weight[:, -1] = 0
        return launch(x, weight, *args, tile=tile, **options)

    monkeypatch.setattr(conv, "_launch", cutting)
    found = tune(key, [SMALL, cut], lambda seed: problem(key, seed, CPU), timer=lambda call: 1.0)
    assert found.tile == SMALL and "allowed" in found.dropped[cut]


def test_seeds_are_different_numbers_and_one_seed_the_same():
    first, again, other = (problem(KEYS["conv"], seed, CPU).golden() for seed in (1, 1, 2))
    assert torch.equal(first, again) and error(other, first) > 1


def test_what_is_not_ours_cannot_be_tuned():
    """Without Triton the operation is the vendor's, whatever is answered: no time of it may stand for a tile's."""
    with pytest.raises(ValueError, match="nothing of ours"):
        problem(KEYS["conv"], 0, CPU).ours(SMALL)


def test_a_workload_is_tuned_written_and_used(interpreted, monkeypatch, tmp_path):
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("VAE_ACCEL_TILES", str(path))
    met = {KEYS["conv along time"]: SMALL, KEYS["conv of an image"]: SMALL}
    monkeypatch.setattr(of_workload, "_met", lambda *args: met)
    monkeypatch.setattr(of_workload, "candidates", lambda key, tile: [tile, Tile(16, 16, 0, 16, 2, 4)])
    monkeypatch.setattr(of_workload, "seconds_of", lambda call, device: 1.0)
    workload = WORKLOADS["wan2.1"]
    try:
        done = of_workload.tune_workload(workload, workload.tiny(), dtype=torch.float16, device="cpu")
        assert [found.key for found in done.tuned] == list(met) and not done.left and done.path == path
        assert done.table().row_count == 2
        assert tile_choice.choose(KEYS["conv along time"], Tile(32, 32, 0, 32, 2, 4), CPU) == SMALL
        none = of_workload.tune_workload(workload, workload.tiny(), dtype=torch.float16, device="cpu", total=0.0)
        assert list(none.left) == list(met) and not none.tuned
    finally:
        tile_choice.use(tmp_path / "none")


@pytest.mark.parametrize("size", [5, 8, 11, 14, 17, 20])
def test_the_numbers_are_of_the_size_they_stand_for(size):
    for key in KEYS.values():
        height, width = _sides(key._replace(size=size), 4)
        clip = 8 if key.kernel == "winograd" else 4
        assert clip * height * width >> size == 1 and height <= width + 1
        assert key.channels_out != 96 or width % 2 == (key.kernel == "conv")


def test_what_cannot_be_tuned_is_told():
    with pytest.raises(ValueError, match="vision tower"):
        of_workload.tune_workload(next(iter(TOWERS.values())))


def small():
    """Wan's workload of a few channels: two levels, one upsampling."""
    config = {"base_dim": 8, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False], "z_dim": 16}
    return dataclasses.replace(WORKLOADS["wan2.1"], config=config, spatial=2, temporal=1)


def test_a_decode_and_an_encode_ask_for_what_is_tuned(interpreted, tmp_path):
    workload = small()
    vae = workload.build(torch.float16, CPU)
    optimize_vae(vae, platform="cuda", only="fused_blocks", tiles=tmp_path / "none")
    met = of_workload._met(workload, vae, workload.size("8x12x2"), CPU, torch.float16)
    assert {key.kernel for key in met} >= {"conv"}
    work = [key.channels_in * key.channels_out * key.taps << key.size for key in met]
    assert work[0] > 2 * work[-1]
    for key, tile in met.items():
        assert candidates(key, tile)[0] == tile
    again = of_workload._met(workload, vae, workload.size("8x12x2"), CPU, torch.float16)
    assert again == met, "a decode is not changed by being listened to"


def test_a_model_without_our_convolutions_is_told(monkeypatch):
    """The CPU without Triton's interpreter."""
    monkeypatch.setitem(WORKLOADS, "small", small())
    arguments = ["tune", "small", "--size", "8x12x2", "--dtype", "fp16", "--platform", "cuda", "--only", "fused_blocks"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "meets none of our convolutions" in " ".join(result.output.split())


def test_the_command_prints_and_writes(interpreted, monkeypatch, tmp_path):
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("VAE_ACCEL_TILES", str(path))
    monkeypatch.setitem(WORKLOADS, "small", small())
    monkeypatch.setattr(of_workload, "_met", lambda *args: {KEYS["conv"]: SMALL})
    monkeypatch.setattr(of_workload, "candidates", lambda key, tile: [tile])
    arguments = ["tune", "small", "--size", "8x12x2", "--dtype", "fp16"]
    result = CliRunner().invoke(app, arguments)
    tile_choice.use(tmp_path / "none")
    assert result.exit_code == 0, result.output
    assert "conv 8 to 16, 27 taps, float16, 2^6" in result.output and path.exists()
