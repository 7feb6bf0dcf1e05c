"""Blocks of the KL image autoencoders on the fused convolution: stock's pictures, fp16 where nothing overflows."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.downsampling import Downsample2D
from torch import Tensor, nn

from tests.rewrites.fused import ALONE, BESIDE, NORMS, optimized, outcome_of
from tests.snapshots import assert_identical, snapshot
from tests.subjects import WIDE
from tests.tiny import Tiny, image
from tests.vaes import TABLE
from vae_accel import api
from vae_accel.families import image_conv, kl
from vae_accel.families.blocks import block_of
from vae_accel.kernels._dispatch import FP16_MAX
from vae_accel.kernels.bordered import bordered
from vae_accel.metrics import rms_error
from vae_accel.platforms import base

HUNYUAN_WIDE = image(
    "hunyuan-image-wide", "AutoencoderKLHunyuanImage", 8, (4, 6), 2,
    config={"in_channels": 3, "out_channels": 3, "latent_channels": 8, "block_out_channels": (288, 288),
            "layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 16},
)  # fmt: skip
# A decoder narrower than its encoder, as FLUX.2's small one.
SMALL = image(
    "flux.2-small", "AutoencoderKLFlux2", 8, (4, 6), 2,
    config={**next(t for t in TABLE if t.id == "flux.2").config, "block_out_channels": (64, 64),
            "decoder_block_out_channels": (32, 64)},
)  # fmt: skip
NAMES = ("sd", "flux.1", "flux.2", "svd", "hunyuan-image")
CASES = [*(case for case in TABLE if case.id in NAMES), SMALL, WIDE, HUNYUAN_WIDE]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def tiny(name: str) -> Tiny:
    return next(case for case in CASES if case.id == name)


def plain(case: Tiny, vae: Any) -> list[Tensor]:
    return [case.decode(vae, case.latent("ramp").double()), case.encode(vae, case.pixels("ramp").double())]


def pair(case: Tiny, vae: Any) -> list[Tensor]:
    batch = 2 * case.latent_shape[0]
    return [
        case.decode(vae, case.latent(batch=batch).double()),
        case.encode(vae, case.pixels(batch=batch).double()),
    ]


def odd(case: Tiny, vae: Any) -> list[Tensor]:
    ratio = case.pixel_shape[-1] // case.latent_shape[-1]
    latent = torch.randn(*case.latent_shape[:2], 5, 3, dtype=torch.float64)
    return [case.decode(vae, latent), case.encode(vae, torch.randn(1, 3, 3 * ratio, 7 * ratio).double())]


def tiled(case: Tiny, vae: Any) -> list[Tensor]:
    return [case.decode(case.tile(vae), case.latent("ramp").double())]  # encoding tiles fails in stock for HunyuanImage


@each_case
@pytest.mark.parametrize("steps", [ALONE, NORMS, BESIDE], ids=["alone", "norms", "beside"])
@pytest.mark.parametrize("run", [plain, pair, odd, tiled])
@torch.inference_mode()
def test_is_stock_in_fp64(case: Tiny, run: Any, steps: base.Platform) -> None:
    if run is tiled and not case.tiling:
        pytest.skip("its tiling is not stock diffusers'")
    vae = case.build(dtype=torch.float64)
    torch.manual_seed(0)
    stock = run(case, vae)
    torch.manual_seed(0)
    for ours, theirs in zip(run(case, optimized(vae, steps)), stock, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max()))


@each_case
def test_every_block_of_these_families_is_taken(case: Tiny) -> None:
    vae = optimized(case.build(dtype=torch.bfloat16))
    outcome = outcome_of(vae)
    assert not outcome.refused
    for path, module in vae.named_modules():
        if type(module).__name__.endswith(("ResnetBlock2D", "ImageResnetBlock")):
            assert path in outcome.taken
            (hand,) = (h for h in block_of(module).hands if h.path == "")
            assert min(hand.facts[0]) > 1e6  # fp16: groups of a million elements are safe with weights like these


def operands(vae: nn.Module, run: Any) -> dict[str, torch.dtype]:
    """What the convolutions of the blocks are given."""
    seen: dict[str, torch.dtype] = {}
    for path, module in vae.named_modules():
        if path.endswith(("conv1", "conv2")):
            module.register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0].dtype}))
    run()
    return seen


@torch.inference_mode()
def test_a_bf16_model_multiplies_in_fp16_and_others_in_their_own() -> None:
    case = tiny("sd")
    for dtype, expected in ((torch.bfloat16, torch.float16), (torch.float16, torch.float16), (torch.float32,) * 2):
        vae = optimized(case.build(dtype=dtype))
        seen = operands(vae, lambda vae=vae, dtype=dtype: case.decode(vae, case.latent().to(dtype)))
        assert seen and set(seen.values()) == {expected}
    vae = optimized(case.build(dtype=torch.bfloat16)).float()
    seen = operands(vae, lambda: case.decode(vae, case.latent()))
    assert set(seen.values()) == {torch.float32}


@torch.inference_mode()
def test_bf16_where_the_bound_does_not_hold() -> None:
    """The largest picture, and the largest weights, for which nothing can come within a factor 4 of fp16's end."""
    norm, conv = nn.GroupNorm(2, 8).to(torch.bfloat16), nn.Conv2d(8, 8, 3).to(torch.bfloat16)
    norm.weight.fill_(-2.0), norm.bias.fill_(1.0)
    reach = kl.reach(norm, conv)
    assert reach == pytest.approx(((FP16_MAX / 4 - 1) / 2) ** 2)
    seen: list[Any] = []

    class Norm:
        num_groups = 2

        def __call__(self, x: Tensor, dtype: Any = None) -> None:
            seen.append(dtype)

    for elements in (int(reach), int(reach) + 2):
        kl.normed(Norm(), reach, torch.empty(1, 2, elements, dtype=torch.bfloat16, device="meta"))
    assert seen == [torch.float16, None]
    norm.bias.fill_(FP16_MAX / 4)
    assert kl.reach(norm, conv) == 0
    norm.bias.zero_(), conv.weight.fill_(FP16_MAX / 2)
    assert kl.reach(norm, conv) == 0
    assert kl.reach(norm.float(), conv) == 0 and kl.reach(norm.to("meta"), conv) == 0
    norm = nn.GroupNorm(2, 8, dtype=torch.bfloat16)
    norm.weight.zero_(), conv.weight.zero_()
    assert kl.reach(norm, conv) == float("inf")


@torch.inference_mode()
def test_bf16_is_no_further_from_fp64_than_stock() -> None:
    """RMS error beside stock's, the mean over models, seeds, decoder and encoder."""
    ratios = []
    for case in CASES:
        for seed in range(2):
            vae = case.build(seed=seed, dtype=torch.bfloat16)
            given = case.latent("picture", seed=seed).bfloat16(), case.pixels("picture", seed=seed).bfloat16()

            def both(vae: nn.Module, dtype: torch.dtype, case=case, given=given) -> list[Tensor]:
                return [case.decode(vae, given[0].to(dtype)), case.encode(vae, given[1].to(dtype))]

            golden = both(copy.deepcopy(vae).double(), torch.float64)
            stock = both(vae, torch.bfloat16)
            ours = both(optimized(vae, NORMS), torch.bfloat16)
            ratios += [rms_error(a, g) / rms_error(s, g) for a, s, g in zip(ours, stock, golden, strict=True)]
    assert statistics.mean(ratios) <= 1.05, ratios


class Calls:
    """How often the wide attention is run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        run = kl.wide_head_attention

        def counted(*args: Any) -> Tensor:
            self.number += 1
            assert all(t.is_contiguous() for t in args)  # views of channels-last: no transposes
            return run(*args)

        monkeypatch.setattr(kl, "wide_head_attention", counted)


@pytest.mark.parametrize("name", ["sd-wide", "hunyuan-image-wide"])
@torch.inference_mode()
def test_attention_runs_ours_on_channels_last_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls = tiny(name), Calls(monkeypatch)
    vae = case.build()
    optimized(vae, NORMS)
    case.decode(vae, case.latent())
    assert calls.number == 0
    case.decode(vae, case.latent().to(memory_format=torch.channels_last))
    assert calls.number == 1


@torch.inference_mode()
def test_another_processor_a_mask_or_another_sequence_is_stocks(monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls = tiny("sd-wide"), Calls(monkeypatch)
    stock, ours = case.build(dtype=torch.float64), optimized(case.build(dtype=torch.float64), ALONE)
    theirs, attn = stock.decoder.mid_block.attentions[0], ours.decoder.mid_block.attentions[0]
    x = torch.randn(2, 288, 3, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    pixels = x.flatten(2).transpose(1, 2)
    mask = torch.randn(2, 1, 15, dtype=torch.float64)
    for args in ((pixels,), (x, pixels[:, :4]), (x, None, mask)):
        assert torch.equal(attn(*args), theirs(*args))
    for each in (theirs, attn):
        each.set_processor(AttnProcessor())
    assert torch.equal(attn(x), theirs(x)) and calls.number == 0
    assert torch.equal(attn(bordered(x)), theirs(x)) and calls.number == 0


def test_what_is_no_such_block_is_refused_with_the_reason() -> None:
    from diffusers.models.resnet import ResnetBlock2D

    make = {"in_channels": 32, "temb_channels": None}
    assert "resamples" in block_of(ResnetBlock2D(**make, down=True))
    assert "time step" in block_of(ResnetBlock2D(in_channels=32, temb_channels=8))
    assert "divides" in block_of(ResnetBlock2D(**make, output_scale_factor=2.0))
    block = ResnetBlock2D(**make)
    block.conv2 = nn.Conv2d(32, 32, 3, padding=1, groups=2)
    assert block_of(block) == "conv2: stride, dilation or groups"
    block.conv2 = nn.Conv2d(32, 32, 3, padding="same")
    assert "a padding of same" in block_of(block)
    block.conv2 = nn.Linear(32, 32)
    assert block_of(block) == "conv2: Linear is no Conv2d"


def halving(**more: Any) -> Any:
    return Downsample2D(4, True, 6, **{"padding": 0, "name": "op", **more}).double().requires_grad_(False)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_pictures_are_halved_as_stock_does(layout: torch.memory_format) -> None:
    """Of odd and even sizes, bordered and not; also through a layer that wraps the convolution."""
    stock = halving()
    ours = optimized(copy.deepcopy(stock), ALONE)
    for size in ((6, 8), (7, 9), (2, 3)):
        x = torch.randn(2, 4, *size, dtype=torch.float64).contiguous(memory_format=layout)
        for given in (x, bordered(x)):
            torch.testing.assert_close(ours(given), stock(x), rtol=0, atol=1e-12)
    with torch.enable_grad():
        assert ours(torch.randn(1, 4, 6, 8).double().requires_grad_()).requires_grad
    expected = stock(x)
    ours.conv = nn.Sequential(ours.conv)
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-12)


@torch.inference_mode()
def test_nothing_to_halve_is_told_as_stock_tells() -> None:
    for x in (torch.randn(1, 4, 1, 6).double(), torch.randn(1, 4, 6, 1).double()):
        messages = []
        for block in (halving(), optimized(halving(), ALONE)):
            with pytest.raises(RuntimeError) as error:
                block(x)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_another_halving_is_refused_with_the_reason() -> None:
    assert block_of(halving(padding=1)) is None  # nothing is padded beside the convolution
    assert block_of(Downsample2D(4)) is None  # a mean
    assert "a kernel of (5, 5)" in block_of(halving(kernel_size=5))
    block = halving()
    for change in ({"stride": 3}, {"stride": 2, "dilation": 2}, {"stride": 2, "groups": 2}):
        block.conv = nn.Conv2d(4, 6, 3, **change)
        assert block_of(block) == "conv: stride, dilation or groups"
    block.conv = nn.Conv2d(4, 6, 3, 2, padding=(0, 1))
    assert "a padding of (0, 1)" in block_of(block)


@torch.inference_mode()
def test_a_time_embedding_and_training_are_stocks() -> None:
    from diffusers.models.resnet import ResnetBlock2D

    stock = ResnetBlock2D(in_channels=32, temb_channels=None, dropout=0.5).eval()
    ours = optimized(copy.deepcopy(stock), NORMS)
    x, embedding = torch.randn(1, 32, 4, 4), torch.randn(1, 32, 1, 1)
    assert torch.equal(ours(x, embedding), stock(x, embedding))
    results = []
    for module in (stock.train(), ours.train()):
        torch.manual_seed(0)
        results.append(module(x, None))
    assert torch.equal(*results)


@torch.inference_mode()
def test_seamless_textures_patched_on_later_are_honoured() -> None:
    """By the padding mode, or as the tiling extensions of Stable Diffusion do it."""
    case = tiny("sd")
    stock, ours = case.build(dtype=torch.float64), optimized(case.build(dtype=torch.float64), NORMS)
    for vae in (stock, ours):
        for module in vae.decoder.modules():
            if isinstance(module, nn.Conv2d):
                module.padding_mode = "circular"
    latent = case.latent("picture").double()
    torch.testing.assert_close(case.decode(ours, latent), case.decode(stock, latent), rtol=0, atol=1e-11)
    conv = optimized(case.build(dtype=torch.float64), NORMS).decoder.conv_in
    conv._conv_forward = lambda input, weight, bias: input * 2
    assert torch.equal(conv(latent), latent * 2)


@torch.inference_mode()
def test_the_residual_is_added_whoever_convolves() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1).bfloat16()
    x, residual = torch.randn(2, 4, 5, 3).bfloat16(), torch.randn(2, 6, 5, 3).bfloat16()
    expected = conv(x) + residual
    for given in (x, x.half()):
        torch.testing.assert_close(
            image_conv.image_conv(conv, conv, True, given, residual), expected, atol=0.05, rtol=0
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(image_conv.image_conv(conv, conv, True, x.half(), residual), expected)


@each_case
@torch.inference_mode()
def test_copied_offloaded_and_taken_back(case: Tiny) -> None:
    vae = case.build(dtype=torch.bfloat16)
    before = snapshot(vae)
    latent = case.latent("picture").bfloat16()
    stock = case.decode(vae, latent)
    ours = case.decode(optimized(vae, NORMS), latent)
    copied = copy.deepcopy(vae)
    assert torch.equal(case.decode(copied, latent), ours)
    cpu_offload(copied, execution_device="cpu")
    assert torch.equal(case.decode(copied, latent), ours)
    api.restore(vae)
    assert_identical(vae, before)
    assert torch.equal(case.decode(vae, latent), stock)
