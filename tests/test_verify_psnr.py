"""scripts/verify_psnr.py as somebody runs it: a folder in, a table per frame and an exit code out."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from vae_accel.workloads.weights import randomise

SCRIPT = Path(__file__).parents[1] / "scripts" / "verify_psnr.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    config = {"base_dim": 16, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae = randomise(AutoencoderKLWan(**config), dtype=torch.bfloat16, device="cpu")
    folder = tmp_path_factory.mktemp("pipeline")
    vae.save_pretrained(folder / "vae")
    return folder


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def test_prints_a_line_per_frame_and_passes(checkpoint):
    result = run(str(checkpoint), "--size", "32x48x5")
    assert result.returncode == 0, result.stderr
    assert "every frame holds" in result.stdout
    table = result.stdout.split("stock dB")[1].splitlines()[1:6]
    assert [line.split()[0] for line in table] == ["0", "1", "2", "3", "4"]


def test_a_floor_out_of_reach_fails(checkpoint):
    result = run(str(checkpoint / "vae"), "--size", "32x48x5", "--floor", "400")
    assert result.returncode == 1
    assert "5 frames below the floor" in result.stdout


def test_a_path_that_holds_nothing_is_told(tmp_path):
    result = run(str(tmp_path))
    assert result.returncode == 2
    assert str(tmp_path) in result.stderr
