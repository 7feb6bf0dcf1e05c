"""Real convolutions in Triton's interpreter: each kernel proved against the law by the tuner's own check."""

from __future__ import annotations

import pytest
import torch

from tests import interpreter
from tests.kernels.clips import SMALL
from vae_accel.kernels import tile_choice
from vae_accel.kernels.tiles import Key, Tile
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
    "thin_conv": Key("thin_conv", 8, 3, 27, "float16", "float16", 5),
}


@pytest.fixture
def interpreted(monkeypatch):
    with interpreter.kernels(monkeypatch):
        yield


@pytest.mark.parametrize("what", KEYS)
def test_each_kernel_is_right_with_everything_it_can_have(interpreted, what):
    key = KEYS[what]
    tile = SMALL._replace(cols=32) if key.kernel == "thin_conv" else SMALL
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
