"""The embedded VAE is what its card says it is, and the demo shows it, red when a promise is broken."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vae_accel import demo, metrics

ROOT = Path(__file__).parent.parent
METRICS = json.loads((demo.DEMO_VAE / "metrics.json").read_text())
WEIGHTS = demo.DEMO_VAE / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def vae():
    return demo.load_demo_vae()


def run(tmp_path) -> tuple[int, str, Path]:
    """The demo on a clip that takes seconds: exit code, text, picture."""
    console = Console(record=True, width=200)
    picture = tmp_path / "demo.png"
    code = demo.run_demo("cpu", picture, console, frames=5, size=32)
    return code, console.export_text(), picture


def test_weights_are_16_bit_fit_the_package_and_load_strictly(vae):
    from diffusers import AutoencoderKLWan
    from safetensors.torch import load_file

    assert WEIGHTS.stat().st_size <= 4_000_000
    weights = load_file(WEIGHTS)
    assert {w.dtype for w in weights.values()} == {getattr(torch, METRICS["storage"])}
    fresh = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(demo.DEMO_VAE))
    fresh.load_state_dict(weights, strict=True)
    assert sum(p.numel() for p in fresh.parameters()) == METRICS["parameters"]
    assert not vae.training
    assert demo.load_demo_vae(torch.bfloat16).dtype == torch.bfloat16


def test_the_vae_has_every_part_of_wan(vae):
    kinds = {type(module).__name__ for module in vae.modules()}
    assert {"WanCausalConv3d", "WanAttentionBlock", "WanRMS_norm", "WanUpsample", "WanMidBlock"} <= kinds
    modes = [module.mode for module in vae.modules() if type(module).__name__ == "WanResample"]
    assert modes == ["downsample2d", "downsample3d", "downsample3d", "upsample3d", "upsample3d", "upsample2d"]
    assert list(vae.config.dim_mult) == [1, 2, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_recorded_psnr_is_reproduced_on_a_short_clip(dtype):
    name = demo.HELD_OUT[0]
    clip = demo.demo_clip(5, 128, name)
    vae = demo.load_demo_vae(dtype)
    with torch.inference_mode():
        out = vae.decode(vae.encode(clip.to(dtype)).latent_dist.mode()).sample
    frames = [metrics.psnr(out[:, :, t].float(), clip[:, :, t], peak=METRICS["psnr_peak"]) for t in range(5)]
    recorded = METRICS["psnr_db"]["5x128x128"][name][str(dtype).removeprefix("torch.")]
    assert sum(frames) / 5 == pytest.approx(recorded["mean"], abs=0.2)
    assert min(frames) == pytest.approx(recorded["worst_frame"], abs=0.2)


def test_the_latent_statistics_are_those_of_real_clips(vae):
    """Normalised latents of a photograph the VAE never saw are about standard normal."""
    with torch.inference_mode():
        latent = vae.encode(demo.demo_clip(5, 128, "chelsea")).latent_dist.mode()
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    normalised = (latent - mean) / std
    assert normalised.mean().abs() < 0.5
    assert 0.5 < normalised.std() < 2


@pytest.mark.parametrize("name", demo.HELD_OUT)
def test_the_clip_is_deterministic_moves_and_fills_the_range(name):
    clip = demo.demo_clip(5, 64, name)
    assert clip.shape == (1, 3, 5, 64, 64)
    assert torch.equal(clip, demo.demo_clip(5, 64, name))
    assert clip.min() >= -1 and clip.max() <= 1 and clip.std() > 0.1
    assert all((clip[:, :, t] - clip[:, :, t + 1]).abs().mean() > 0.01 for t in range(4))
    assert torch.allclose(clip[:, :, :3], demo.demo_clip(3, 64, name), atol=1e-6)


def test_a_still_camera_sees_the_photograph_itself():
    photo = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    still = [torch.full((1, 2), value) for value in (9.5, 7.5, 1.0, 0.0)]
    seen = demo.camera_crop(photo, *still, size=8)
    assert torch.allclose(seen[0, :, 0], photo[:, 4:12, 6:14], atol=1e-4)
    assert torch.equal(seen[:, :, 0], seen[:, :, 1])


def test_held_out_photographs_were_held_out():
    assert METRICS["photographs"]["held_out"] == list(demo.HELD_OUT)
    assert not set(METRICS["photographs"]["trained_on"]) & set(demo.HELD_OUT)


def test_the_card_states_the_recorded_figures():
    spec = importlib.util.spec_from_file_location("demo_vae_card", ROOT / "scripts" / "demo_vae_card.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    card = (demo.DEMO_VAE / "MODEL_CARD.md").read_text()
    assert script.figures(METRICS) in card
    assert f"{METRICS['parameters']:,}".replace(",", " ") in card
    assert f"stored in\n{METRICS['storage']}" in card or f"stored in {METRICS['storage']}" in card


def test_the_demo_prints_a_table_draws_a_picture_and_exits_0(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE_ACCEL_LATENT_CHUNKS", "1")
    # fp32 sums of so small a picture depend on the processor (platforms/cpu/README.md).
    monkeypatch.setenv("VAE_ACCEL_SINGLE_FRAME_CONV", "0")
    code, text, picture = run(tmp_path)
    assert code == 0
    assert "latent_chunks" in text
    assert text.count("holds") == 2 and "float32" in text and "bfloat16" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_red_proof_exits_1_and_shows_no_speed(tmp_path, monkeypatch):
    prove = demo.verify.prove

    def broken(*args, **kwargs):
        proof = prove(*args, **kwargs)
        proof.lines = [dataclasses.replace(line, holds=False, why="made up") for line in proof.lines]
        return proof

    monkeypatch.setattr(demo.verify, "prove", broken)
    code, text, picture = run(tmp_path)
    assert code == 1
    assert "BROKEN" in text and "made up" in text and "->" not in text
    assert not picture.exists()
