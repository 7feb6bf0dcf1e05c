"""Bad input gets an error that names the argument and the remedy, and leaves the model as it was."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import vae_accel
from tests.snapshots import Snapshot, assert_identical, snapshot
from tests.vaes import TABLE
from vae_accel.edits import ledger_of
from vae_accel.platforms import ALL, Cpu, NoSite
from vae_accel.rewrites import NAMES

TINY = {tiny.id: tiny for tiny in TABLE}


@pytest.fixture
def vae() -> nn.Module:
    return TINY["wan2.1"].build()


@pytest.fixture
def before(vae) -> Snapshot:
    return snapshot(vae)


@pytest.mark.parametrize(
    "target", [None, 3, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", {"vae": 1}, [nn.Linear(1, 1)], nn.Linear]
)
@pytest.mark.parametrize("call", ["optimize", "restore", "report", "optimize_vae", "optimize_encoder"])
def test_no_module_and_no_pipeline(call, target):
    remedy = "torch module" if "_" in call else "target must be a diffusers pipeline or a torch module"
    with pytest.raises(TypeError, match=f"{remedy}.*{type(target).__name__}"):
        getattr(vae_accel, call)(target)


def test_no_module_to_pause():
    with pytest.raises(TypeError, match="target must be"), vae_accel.paused(None):
        pass


def test_a_pipeline_handed_to_optimize_vae(vae):
    with pytest.raises(TypeError, match=r"a whole pipeline goes to optimize\(\)"):
        vae_accel.optimize_vae(SimpleNamespace(components={"vae": vae}))


@pytest.mark.parametrize("components", [{}, {"vae": None}, {"unet": nn.Conv2d(1, 1, 1), "scheduler": object()}])
def test_a_pipeline_without_a_vae(components):
    pipe = SimpleNamespace(components=components)
    with pytest.raises(ValueError, match="SimpleNamespace has no VAE and no vision encoder among its components; pass"):
        vae_accel.optimize(pipe)


def test_an_unknown_rewrite(vae, before):
    for options in ({"only": "conv3d"}, {"only": ["conv3d_as_conv2d", "conv3d"]}):
        with pytest.raises(ValueError, match=f"only='conv3d' is no rewrite; there are: .*{NAMES[0]}"):
            vae_accel.optimize(vae, **options)
        assert_identical(vae, before)
    with pytest.raises(ValueError, match=r"conv3d is not a setting; there are: .*conv3d_as_conv2d"):
        vae_accel.optimize(vae, conv3d=1)
    assert_identical(vae, before)


@pytest.mark.parametrize("only", [3, True, nn.Linear])
def test_only_that_is_no_name(vae, before, only):
    with pytest.raises(TypeError, match="only must be the name of a rewrite, or several"):
        vae_accel.optimize(vae, only=only)
    assert_identical(vae, before)


def test_an_unknown_platform(vae, before, monkeypatch):
    with pytest.raises(ValueError, match=f"platform='tpu': choose one of .*{', '.join(ALL)}"):
        vae_accel.optimize(vae, platform="tpu")
    for wrong in (3, nn.Linear, torch.device("cpu")):
        with pytest.raises(TypeError, match="platform must be a name or a Platform"):
            vae_accel.optimize(vae, platform=wrong)
    with pytest.raises(ValueError, match="platform='tpu' is unknown; there are: cuda, rocm, npu, cpu"):
        vae_accel.platforms.by_name("tpu")
    monkeypatch.setenv("VAE_ACCEL_PLATFORM", "tpu")
    with pytest.raises(ValueError, match="VAE_ACCEL_PLATFORM='tpu': choose one of"):
        vae_accel.optimize(vae)
    assert_identical(vae, before)


@pytest.mark.parametrize("options", [{"only": "conv3d_as_conv2d"}, {"conv3d_as_conv2d": "1"}])
def test_a_rewrite_asked_for_by_name_that_takes_no_site(options):
    vae = TINY["sd"].build()
    before = snapshot(vae)
    for call in (vae_accel.optimize, vae_accel.optimize_vae, Cpu().optimize_vae):
        with pytest.raises(
            NoSite, match=r"conv3d_as_conv2d was asked for by name but takes nothing in .*AutoencoderKL"
        ):
            call(vae, **options)
        assert_identical(vae, before)


def test_the_reasons_of_what_was_refused_are_in_the_error(vae):
    for conv in [m for m in vae.modules() if isinstance(m, nn.Conv3d)]:
        nn.utils.parametrizations.weight_norm(conv)
    before = snapshot(vae)
    with pytest.raises(NoSite, match="weight is computed by a parametrization"):
        vae_accel.optimize(vae, only="conv3d_as_conv2d")
    assert_identical(vae, before)


def test_a_failure_in_one_component_leaves_the_others_as_they_were():
    good, bad = TINY["wan2.1"].build(), TINY["sd"].build().to("meta")
    before = snapshot(good)
    with pytest.raises(ValueError, match="meta device"):
        vae_accel.optimize(SimpleNamespace(components={"vae": good, "vae_2": bad}), only="conv3d_as_conv2d")
    assert_identical(good, before)
    vae_accel.optimize(good, only="conv3d_as_conv2d")
    ledger = ledger_of(good)
    with pytest.raises(ValueError, match="meta device"):
        vae_accel.optimize(SimpleNamespace(components={"vae": good, "vae_2": bad}))
    assert ledger_of(good) is ledger and ledger.active
    vae_accel.restore(good)
    assert_identical(good, before)


def test_meta_tensors(vae):
    vae.to("meta")
    before = snapshot(vae)
    with pytest.raises(
        ValueError, match=r"AutoencoderKLWan has parameters on the meta device.*load its weights before"
    ):
        vae_accel.optimize(vae)
    assert_identical(vae, before)


def test_a_half_loaded_model(vae):
    """Some weights never arrived, as after a checkpoint with missing shards was loaded on meta."""
    vae.decoder.to("meta")
    before = snapshot(vae)
    with pytest.raises(ValueError, match="meta device"):
        vae_accel.optimize(vae)
    assert_identical(vae, before)


def test_a_half_written_checkpoint(tmp_path):
    from vae_accel import workloads

    vae = TINY["sd"].build()
    vae.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="half-written"):
        workloads.get("sdxl").build(model=str(tmp_path / "vae"), dtype=torch.float32, device="cpu")


class Packed(torch.Tensor):
    """Stands for the tensor subclasses of torchao and others."""


def quantize(conv: nn.Module) -> None:
    conv.weight = nn.Parameter(conv.weight.detach().mul(50).to(torch.int8), requires_grad=False)


def wrap(conv: nn.Module) -> None:
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Packed), requires_grad=False)


@pytest.mark.parametrize("change", [quantize, wrap])
def test_quantized_weights_are_refused_one_by_one_and_by_name(vae, change):
    convolutions = [m for m in vae.modules() if isinstance(m, nn.Conv3d)]
    change(convolutions[0])
    vae_accel.optimize(vae, only="conv3d_as_conv2d")
    (outcome,) = [o for o in ledger_of(vae).outcomes if o.name == "conv3d_as_conv2d"]
    assert len(outcome.taken) == len(convolutions) - 1
    assert list(outcome.refused) == ["encoder.conv_in"] and "quantized" in outcome.refused["encoder.conv_in"]
    assert "1 refused" in str(vae_accel.report(vae)) and "quantized" in str(vae_accel.report(vae))
    vae_accel.restore(vae)
    for conv in convolutions[1:]:
        change(conv)
    before = snapshot(vae)
    with pytest.raises(NoSite, match="weight is quantized"):
        vae_accel.optimize(vae, only="conv3d_as_conv2d")
    assert snapshot(vae).instances == before.instances and ledger_of(vae) is None


def test_triton_missing_where_it_is_forced(monkeypatch):
    """The torch forms run without Triton; nothing else may need it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a))
    from vae_accel.kernels import _dispatch

    _dispatch._has_triton.cache_clear()
    try:
        tiny = TINY["wan2.1"]
        vae = tiny.build(dtype=torch.float64)
        latent = tiny.latent().double()
        with torch.no_grad():
            stock = tiny.decode(vae, latent)
            vae_accel.optimize(vae, platform="cuda")
            torch.testing.assert_close(tiny.decode(vae, latent), stock, rtol=0, atol=1e-9)
    finally:
        _dispatch._has_triton.cache_clear()


def test_part_of_an_optimized_model_and_a_model_with_an_optimized_part(vae, before):
    vae_accel.optimize_vae(vae.decoder, only="conv3d_as_conv2d")
    part = snapshot(vae)
    with pytest.raises(
        ValueError, match=r"'decoder' inside this AutoencoderKLWan is optimized by itself: restore\(\) it"
    ):
        vae_accel.optimize(vae)
    assert snapshot(vae).instances == part.instances
    vae_accel.restore(vae.decoder)
    assert_identical(vae, before)


def test_a_method_that_somebody_else_patched_is_refused_and_kept(vae):
    conv = vae.decoder.conv_in
    conv._conv_forward = patched = lambda x, weight, bias: nn.Conv3d._conv_forward(conv, x, weight, bias) * 2
    vae_accel.optimize(vae, only="conv3d_as_conv2d")
    (outcome,) = [o for o in ledger_of(vae).outcomes if o.name == "conv3d_as_conv2d"]
    assert "was replaced on the instance" in outcome.refused["decoder.conv_in"]
    vae_accel.restore(vae)
    assert conv._conv_forward is patched
