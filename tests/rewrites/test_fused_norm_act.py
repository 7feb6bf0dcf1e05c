"""A norm and the SiLU after it as one op: the same function, no further from the truth, and a block whole or not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.vaes import TABLE, Tiny
from vae_accel.edits import Ledger, ledger_of
from vae_accel.families import norms
from vae_accel.platforms import Cpu, base
from vae_accel.rewrites.fused_norm_act import FusedNormAct

NORMLESS = {"ltx-2-audio", "vidtok", "tiny", "rae", "paella", "dc-ae-shuffle"}
FP32_ONLY = {"asymmetric-masked"}  # its mask encoder takes fp32 pictures whatever the model's dtype
CASES = [case for case in TABLE if case.id not in NORMLESS | FP32_ONLY]


def optimized(model: nn.Module) -> nn.Module:
    base.run(model, Cpu(), [base.Step(FusedNormAct(), "on", "test")], "vae", {"only": "fused_norm_act"})
    return model


def relative(x: Tensor, golden: Tensor) -> float:
    return ((x.double() - golden).norm() / golden.norm()).item()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@torch.inference_mode()
def test_the_same_function_in_fp64(case: Tiny) -> None:
    vae = case.build(dtype=torch.float64)
    latent, pixels = case.latent("picture").double(), case.pixels("picture").double()
    decoded, encoded = case.decode(vae, latent), case.encode(vae, pixels)
    optimized(vae)
    assert ledger_of(vae).outcomes[0].taken and not ledger_of(vae).outcomes[0].refused
    assert relative(case.decode(vae, latent), decoded) < 1e-9
    assert relative(case.encode(vae, pixels), encoded) < 1e-9


@pytest.mark.parametrize("name", ["flux.1", "wan2.1", "hunyuan-video", "mochi", "cosmos", "ltx-2.3", "kandinsky6-sr"])
@torch.inference_mode()
def test_no_further_from_the_truth_in_bf16(name: str) -> None:
    case = next(c for c in CASES if c.id == name)
    stock, ours = 0.0, 0.0
    for seed in range(4):  # one model of a few channels is a toss of a coin
        vae = case.build(seed=seed, dtype=torch.bfloat16)
        latent = case.latent("noise", seed=seed).bfloat16()
        golden = case.decode(case.build(seed=seed, dtype=torch.bfloat16).double(), latent.double())
        stock += relative(case.decode(vae, latent), golden)
        ours += relative(case.decode(optimized(vae), latent), golden)
    assert ours <= 1.05 * stock


# Which of the activations that are modules fall silent.
SILENT = {"flux.1": "all", "wan2.1": "all", "hunyuan-video": "all", "hunyuan-video-1.5": "all", "ltx-0.9.0": "all",
          "ltx-2.3": "all", "easyanimate": "all", "allegro": "all", "svd": "all", "qwen-image-2.1": "all", "vq": "all",
          "cogvideox": "all", "mochi": "all but the decoder's last", "consistency": "all but the UNet's"}  # fmt: skip


@pytest.mark.parametrize("name", SILENT)
def test_every_silu_that_follows_a_norm_falls_silent(name: str) -> None:
    vae = optimized(next(c for c in CASES if c.id == name).build())
    kept = {p for p, m in vae.named_modules() if type(m) is nn.SiLU and ledger_of(vae).owner(p, "forward") is None}
    if SILENT[name] == "all":
        assert not kept
    elif name == "mochi":
        assert kept == {"decoder.nonlinearity"}
    else:
        assert kept and all(p.startswith("decoder_unet.") for p in kept)


def test_a_conditioned_block_keeps_its_activation() -> None:
    vae = optimized(next(c for c in CASES if c.id == "ltx-0.9.1").build())
    owner = ledger_of(vae).owner
    conditioned = {p for p, m in vae.named_modules() if getattr(m, "scale_shift_table", None) is not None}
    acts = {p for p, m in vae.named_modules() if type(m) is nn.SiLU and p.rpartition(".")[0] in conditioned}
    assert acts and all(owner(p, "forward") is None for p in acts)
    assert all(owner(f"{p}.norm1", "forward") for p in conditioned if p.count(".") > 1)


def block(**more: object) -> nn.Module:
    from diffusers.models.resnet import ResnetBlock2D

    return ResnetBlock2D(in_channels=32, temb_channels=None, **more).requires_grad_(False).eval()


def test_a_block_is_taken_whole_or_not_at_all() -> None:
    resnet = block()
    resnet.nonlinearity.forward = lambda x: F.relu(x)  # somebody's patch
    sites = {site.path: site.refused for site in FusedNormAct().sites(resnet, Ledger())}
    assert set(sites) == {"norm1", "norm2"} and all("was replaced on the instance" in r for r in sites.values())


def test_a_shared_activation_is_refused() -> None:
    pair = nn.Sequential(block(), block())
    pair[1].nonlinearity = pair[0].nonlinearity
    sites = list(FusedNormAct().sites(pair, Ledger()))
    assert len(sites) == 4 and {s.refused for s in sites} == {"its norm or its activation is shared with another block"}


def test_another_activation_stays_and_the_norms_are_taken_alone() -> None:
    resnet, x = block(non_linearity="gelu").double(), torch.randn(2, 32, 5, 6, dtype=torch.float64)
    expected = resnet(x, None)
    torch.testing.assert_close(optimized(resnet)(x, None), expected)
    assert {e.path for e in ledger_of(resnet).edits} == {"norm1", "norm2"}


def test_a_copy_of_the_class_from_elsewhere_is_not_believed() -> None:
    copy = type("ResnetBlock2D", (nn.Module,), {"forward": lambda self, x: self.nonlinearity(x), "__module__": "mine"})
    module = copy()
    module.norm1, module.norm2, module.nonlinearity = nn.GroupNorm(2, 4), nn.GroupNorm(2, 4), nn.SiLU()
    assert not list(norms.pairs(module))


def test_a_gradient_runs_stock_and_keeps_the_activation() -> None:
    resnet, x = block().double(), torch.randn(2, 32, 5, 6, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(resnet(x, None).square().sum(), x)[0]
    ours = torch.autograd.grad(optimized(resnet)(x, None).square().sum(), x)[0]
    assert torch.equal(ours, expected)


def test_autocast_runs_stock_and_keeps_the_activation() -> None:
    resnet, x = block(), torch.randn(2, 32, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = resnet(x, None)
        assert torch.equal(optimized(resnet)(x, None), expected)


def _wan(dim: int, **more: object) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    return WanRMS_norm(dim, images=False, **more).requires_grad_(False)


def _ltx2(dim: int) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import PerChannelRMSNorm

    return PerChannelRMSNorm()


def _mochi(dim: int) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl_mochi import MochiChunkedGroupNorm3D

    return MochiChunkedGroupNorm3D(dim, num_groups=4).requires_grad_(False)


def _cosmos(dim: int, groups: int = 1) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl_cosmos import CosmosCausalGroupNorm

    return CosmosCausalGroupNorm(dim, groups).requires_grad_(False)


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "group": lambda dim: nn.GroupNorm(4, dim).requires_grad_(False),
    "group without weights": lambda dim: nn.GroupNorm(4, dim, affine=False),
    "wan": _wan,
    "wan with bias": lambda dim: _wan(dim, bias=True),
    "ltx-2": _ltx2,
    "mochi": _mochi,
    "cosmos": _cosmos,
    "cosmos in groups": lambda dim: _cosmos(dim, 4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [1, 11])
def test_each_norm_alone_in_both_layouts(kind: str, frames: int) -> None:
    norm = KINDS[kind](16).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    ramp = torch.linspace(-3, 40, frames).reshape(1, 1, frames, 1, 1)
    x = torch.randn(2, 16, frames, 4, 5, dtype=torch.float64) + ramp
    expected = norm(x)
    optimized(norm)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        given = x.contiguous(memory_format=layout)
        torch.testing.assert_close(norm(given), expected, rtol=0, atol=1e-10)
        assert norm(given).is_contiguous(memory_format=layout)


def _spatial(dtype: torch.dtype = torch.float64) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D

    norm = CogVideoXSpatialNorm3D(32, 4).to(dtype).requires_grad_(False)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3), (8, 2), (9, 3), (6, 2)])
def test_cogvideox_convolves_the_latent_at_its_own_size(frames: int, latents: int) -> None:
    norm, f = _spatial(), torch.randn(2, 32, frames, 6, 8, dtype=torch.float64)
    zq = torch.randn(2, 4, latents, 3, 4, dtype=torch.float64)
    expected = norm(f, zq)[0]
    optimized(norm)
    seen: list[Tensor] = []
    norm.conv_y.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ours, cache = norm(f, zq)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    assert set(cache) == {"conv_y", "conv_b"}
    assert (seen[0].shape == zq.shape) == (frames != 6)  # thirds are left to stock


def test_cogvideox_gradients_and_autocast_run_stock() -> None:
    norm, f = _spatial(torch.float32), torch.randn(1, 32, 3, 6, 8, requires_grad=True)
    zq = torch.randn(1, 4, 3, 3, 4)
    expected = torch.autograd.grad(norm(f, zq)[0].square().sum(), f)[0]
    optimized(norm)
    assert torch.equal(torch.autograd.grad(norm(f, zq)[0].square().sum(), f)[0], expected)
    norm.norm_layer.weight.requires_grad_(True)
    norm(f.detach(), zq)[0].square().sum().backward()
    assert norm.norm_layer.weight.grad.isfinite().all()


def test_ltx2_does_not_overflow_in_fp16() -> None:
    x = torch.full((1, 4, 1, 1, 1), 300.0, dtype=torch.float16)
    assert optimized(_ltx2(4))(x).eq(1).all()


def test_channels_moved_to_the_end_are_not_copied() -> None:
    from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoResnetBlock3d

    resnet = optimized(LTXVideoResnetBlock3d(8).requires_grad_(False))
    x = torch.randn(1, 8, 3, 4, 5)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        given = x.contiguous(memory_format=layout)
        assert resnet.norm1(given.movedim(1, -1)).movedim(-1, 1).is_contiguous(memory_format=layout)


def test_mixed_dtypes_run_stock() -> None:
    norm, x = _wan(8), torch.randn(1, 8, 2, 3, 4).bfloat16()
    assert optimized(norm)(x).dtype == torch.float32  # stock promotes


def test_an_empty_batch() -> None:
    norm = optimized(_wan(8))
    assert norm(torch.empty(0, 8, 2, 3, 4)).shape == (0, 8, 2, 3, 4)


def test_compiles_as_one_graph() -> None:
    resnet, x = optimized(block()), torch.randn(1, 32, 4, 5)
    torch.testing.assert_close(torch.compile(resnet, fullgraph=True, backend="eager")(x, None), resnet(x, None))


def test_a_parametrized_weight_is_refused() -> None:
    norm = _wan(8)
    torch.nn.utils.parametrize.register_parametrization(norm, "gamma", nn.Identity())
    site = next(s for s in FusedNormAct().sites(norm, Ledger()) if s.path == "")
    assert site.refused is not None and math.isfinite(norm(torch.ones(1, 8, 1, 1, 1)).sum())
