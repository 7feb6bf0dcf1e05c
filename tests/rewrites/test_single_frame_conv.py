"""A causal convolution of one frame as a Conv2d: equal to stock in fp64, and stock's own wherever there is more."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.vaes import TABLE
from vae_accel.edits import ledger_of
from vae_accel.platforms import Cpu, NoSite, base
from vae_accel.rewrites.causal_padding import CausalPadding
from vae_accel.rewrites.conv3d_as_conv2d import Conv3dAsConv2d
from vae_accel.rewrites.single_frame_conv import SingleFrameConv

NAME = "single_frame_conv"
TINY = {tiny.id: tiny for tiny in TABLE}
TAKEN = [
    "wan2.1", "wan2.2-5b", "qwen-image", "hunyuan-video", "hunyuan-video-1.5", "hunyuan-image-refiner", "cogvideox",
    "mochi", "cosmos", "ltx-0.9.0", "ltx-0.9.1", "ltx-0.9.5", "ltx-2.0", "ltx-2.3",
]  # fmt: skip
SUMMED = ["hunyuan-video", "hunyuan-image-refiner", "cogvideox", "ltx-2.3"]


def run(module: nn.Module, *rewrites) -> nn.Module:
    base.run(module, Cpu(), [base.Step(r, "on", "test") for r in rewrites], "vae", {})
    return module


def rewrite(module: nn.Module, **options) -> nn.Module:
    base.run(module, Cpu(), [base.Step(SingleFrameConv(**options), "on", "test")], "vae", {"only": NAME})
    return module


def rewritten(module: nn.Module, **options) -> nn.Module:
    return rewrite(copy.deepcopy(module), **options)


def causal(kind: str) -> nn.Module:
    """One of each way a causal convolution pads and is called."""
    from diffusers.models.autoencoders import (
        autoencoder_kl_cogvideox,
        autoencoder_kl_cosmos,
        autoencoder_kl_hunyuan_video,
        autoencoder_kl_ltx,
        autoencoder_kl_ltx2,
        autoencoder_kl_minimax_h3,
        autoencoder_kl_wan,
    )

    wan = autoencoder_kl_wan.WanCausalConv3d
    hunyuan = autoencoder_kl_hunyuan_video.HunyuanVideoCausalConv3d
    cogvideox = autoencoder_kl_cogvideox.CogVideoXCausalConv3d
    ltx, ltx2 = autoencoder_kl_ltx.LTXVideoCausalConv3d, autoencoder_kl_ltx2.LTX2VideoCausalConv3d
    cosmos, minimax = autoencoder_kl_cosmos.CosmosCausalConv3d, autoencoder_kl_minimax_h3.MiniMaxH3VideoCausalConv3d
    made = {
        "wan": lambda: wan(4, 6, 3, padding=1),
        "wan time": lambda: wan(4, 6, (3, 1, 1), padding=(1, 0, 0)),
        "hunyuan": lambda: hunyuan(4, 6, 3),
        "hunyuan strided": lambda: hunyuan(4, 6, 3, stride=2),
        "hunyuan zeros": lambda: hunyuan(4, 6, 3, pad_mode="constant"),
        "cogvideox": lambda: cogvideox(4, 6, 3, pad_mode="first"),
        "mochi": lambda: cogvideox(4, 6, 3, pad_mode="replicate"),
        "ltx": lambda: ltx(4, 6, 3),
        "ltx on both sides": lambda: ltx(4, 6, 3, is_causal=False),
        "ltx2 reflect": lambda: ltx2(4, 6, 3, spatial_padding_mode="reflect"),
        "cosmos": lambda: cosmos(4, 6, (3, 1, 1), padding=0),
        "minimax": lambda: minimax(4, 6, 3, spatial_padding=1, temporal_padding=2),
        "minimax strided": lambda: minimax(4, 6, 3, stride=2, spatial_padding=1, temporal_padding=2),
    }
    return made[kind]().double().requires_grad_(False)


KINDS = (
    "wan", "wan time", "hunyuan", "hunyuan strided", "hunyuan zeros", "cogvideox", "mochi", "ltx", "ltx on both sides",
    "ltx2 reflect", "cosmos", "minimax", "minimax strided",
)  # fmt: skip


def output(y) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_each_kind(kind, last, frames):
    module = causal(kind)
    x = torch.randn(2, 4, frames, 5, 7, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last_3d) if last else x
    expected, actual = module(x), rewritten(module)(x)
    torch.testing.assert_close(output(actual), output(expected), rtol=0, atol=1e-14)
    if frames > 1:
        assert torch.equal(output(actual), output(expected))
    elif last:
        assert output(actual).is_contiguous(memory_format=torch.channels_last_3d)
    if isinstance(expected, tuple):
        assert type(actual) is tuple and (actual[1] is None) == (expected[1] is None)
        assert expected[1] is None or torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_one_frame_runs_no_conv3d(kind, monkeypatch):
    module = rewritten(causal(kind))
    monkeypatch.setattr(F, "conv3d", None)
    module(torch.randn(1, 4, 1, 5, 7, dtype=torch.float64))


def test_cached_frames_are_stocks():
    x, cache = torch.randn(2, 1, 4, 1, 5, 7, dtype=torch.float64)
    for kind in ("wan", "cogvideox"):
        module = causal(kind)
        cache = cache.expand(-1, -1, 2, -1, -1)
        expected, actual = module(x, cache), rewritten(module)(x, cache)
        assert torch.equal(output(actual), output(expected))


@pytest.mark.parametrize("sided", [True, False])
def test_ltx2_is_told_by_each_call(sided):
    module = causal("ltx2 reflect")
    x = torch.randn(1, 4, 1, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(rewritten(module)(x, causal=sided), module(x, causal=sided), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", TAKEN)
def test_whole_models_in_fp64(name):
    tiny = TINY[name]
    model = tiny.build(dtype=torch.float64).requires_grad_(False)
    latents = [tiny.latent().double(), tiny.single_frame_latent().double()]
    expected = [tiny.decode(model, z) for z in latents]
    rewrite(model)
    for z, y in zip(latents, expected, strict=True):
        torch.testing.assert_close(tiny.decode(model, z), y, rtol=0, atol=1e-12 * y.abs().max().item())


@pytest.mark.parametrize("name", [name for name in TAKEN if not TINY[name].stochastic])
def test_encoding_one_frame_in_fp64(name):
    tiny = TINY[name]
    model = tiny.build(dtype=torch.float64).requires_grad_(False)
    n, c, _, h, w = tiny.pixel_shape
    picture = torch.rand(n, c, 1, h, w, dtype=torch.float64)
    expected = model.encode(picture).latent_dist.parameters
    actual = rewrite(model).encode(picture).latent_dist.parameters
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("name", SUMMED)
def test_bf16_is_as_near_to_fp64_as_stock(name):
    tiny, ratios = TINY[name], []
    for seed, kind in enumerate(("noise", "picture", "ramp")):
        model = tiny.build(seed=seed, dtype=torch.bfloat16).requires_grad_(False)
        z = tiny.single_frame_latent(kind, seed=seed).bfloat16()
        golden = tiny.decode(copy.deepcopy(model).double(), z.double())
        stock = rms(tiny.decode(model, z) - golden)
        ratios.append(rms(tiny.decode(rewrite(model, pixels=0), z) - golden) / stock)
    assert max(ratios) < 1.1 and math.prod(ratios) ** (1 / 3) < 1.05


def rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sixteen_bit_sum_is_not_rounded_unless_lowered(dtype):
    """A single pixel through a 1x1 kernel of many channels: the weights' rounding is what is left."""
    from diffusers.models.autoencoders.autoencoder_kl_cosmos import CosmosCausalConv3d

    conv = CosmosCausalConv3d(1, 4096, (3, 1, 1), padding=0).to(dtype).requires_grad_(False)
    nn.init.zeros_(conv.bias)
    x = torch.full((1, 1, 1, 1, 1), 4 / 3).to(dtype)
    golden = copy.deepcopy(conv).double()(x.double())
    stock = rms(conv(x) - golden)
    assert rms(rewritten(conv, pixels=0)(x) - golden) <= 1.001 * stock
    assert rms(rewritten(conv, compute_dtype=dtype)(x) - golden) > 1.2 * stock


def test_small_frames_are_not_worth_a_pair(monkeypatch):
    module = rewrite(causal("hunyuan").bfloat16(), pixels=36)
    small, large = (torch.randn(1, 4, 1, 5, w).bfloat16() for w in (7, 8))
    monkeypatch.setattr(F, "conv2d", None)
    module(small)
    with pytest.raises(TypeError):
        module(large)


def test_a_smaller_dtype_inside():
    for kind in ("wan", "hunyuan"):
        module = causal(kind)
        x = torch.randn(1, 4, 1, 9, 9)
        golden = module(x.double())
        y = rewrite(module.float(), compute_dtype=torch.bfloat16)(x)
        assert y.dtype == torch.float32
        assert 1e-4 < rms(y - golden) / rms(golden) < 1e-2


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_a_weight_changed_behind_its_version(kind):
    module = rewrite(causal(kind))
    conv = getattr(module, "conv", module)
    x = torch.randn(1, 4, 1, 5, 7, dtype=torch.float64)
    before = module(x)
    conv.weight.data += 0.1
    after = module(x)
    assert not torch.allclose(after, before)
    base.replace(module, None)
    torch.testing.assert_close(after, module(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["wan", "hunyuan", "cogvideox"])
def test_gradients_are_stocks(kind):
    module = causal(kind).requires_grad_(True)
    conv = getattr(module, "conv", module)
    x = torch.randn(1, 4, 1, 5, 7, dtype=torch.float64)
    expected = torch.autograd.grad(output(module(x)).square().sum(), conv.weight)[0]
    actual = torch.autograd.grad(output(rewrite(module)(x)).square().sum(), conv.weight)[0]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", ["wan", "hunyuan", "cogvideox"])
def test_over_the_passes_that_own_the_same_slots(kind):
    module, frames = causal(kind), (1, 3)
    inputs = [torch.randn(1, 4, t, 5, 7, dtype=torch.float64) for t in frames]
    expected = [output(module(x)) for x in inputs]
    run(module, CausalPadding(), Conv3dAsConv2d(), SingleFrameConv())
    assert [bool(o.taken) for o in ledger_of(module).outcomes] == [True] * 3
    for x, y in zip(inputs, expected, strict=True):
        torch.testing.assert_close(output(module(x)), y, rtol=0, atol=1e-13)
    base.replace(module, None)
    assert all(torch.equal(output(module(x)), y) for x, y in zip(inputs, expected, strict=True))


def test_hooks_of_the_inner_convolution_are_called():
    module, called = rewrite(causal("hunyuan")), []
    module.conv.register_forward_hook(lambda *_: called.append(True))
    module(torch.randn(1, 4, 1, 5, 7, dtype=torch.float64))
    assert called == [True]


@pytest.mark.parametrize("name", ["easyanimate", "vidtok", "kvae-video", "kandinsky6-sr"])
def test_what_keeps_frames_of_its_own_is_refused(name):
    with pytest.raises(NoSite, match="keeps frames of its own between calls"):
        rewrite(TINY[name].build())


def test_a_frame_that_is_not_padded_to_one_is_refused():
    model = rewrite(TINY["wan2.1"].build())
    refused = ledger_of(model).outcomes[0].refused
    assert refused and set(refused.values()) == {"one frame does not become one frame"}
    assert all(path.endswith("time_conv") for path in refused)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_in_one_graph(kind):
    module = rewrite(causal(kind).float())
    x = torch.randn(1, 4, 1, 5, 7)
    torch._dynamo.reset()
    actual = torch.compile(module, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(output(actual), output(module(x)))


def test_empty_and_unbatched_are_stocks():
    module = causal("wan")
    empty = torch.randn(0, 4, 1, 5, 7, dtype=torch.float64)
    assert torch.equal(rewritten(module)(empty), module(empty))
    with pytest.raises(RuntimeError):
        rewritten(module)(torch.randn(1, 3, 1, 5, 7, dtype=torch.float64))
