"""Blocks of Wan and Qwen-Image on the fused convolution: stock's clips and caches, fp16 where nothing overflows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import Tensor, nn

from tests.rewrites.fused import ALONE, BESIDE, NORMS, optimized, outcome_of
from tests.subjects import plan
from tests.vaes import TABLE, Tiny
from vae_accel.families import image_conv, wan_conv
from vae_accel.metrics import rms_error
from vae_accel.platforms import base
from vae_accel.rewrites.fused_blocks import FusedBlocks
from vae_accel.rewrites.latent_chunks import LatentChunks
from vae_accel.workloads.weights import randomise

NAMES = ("wan2.1", "wan2.2-5b", "qwen-image", "qwen-image-2.1")
CASES = [case for case in TABLE if case.id in NAMES]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def tiny(name: str) -> Tiny:
    return next(case for case in CASES if case.id == name)


def assert_close(ours: Tensor, stock: Tensor) -> None:
    assert ours.shape == stock.shape and ours.dtype == stock.dtype == torch.float64
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-12 * float(stock.abs().max()))


def randomised(module: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    return randomise(module, dtype=dtype, device="cpu").requires_grad_(False)


def clip(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain(case: Tiny, vae: Any) -> list[Tensor]:
    return [case.decode(vae, case.latent("ramp").double()), case.encode(vae, case.pixels("ramp").double())]


def single(case: Tiny, vae: Any) -> list[Tensor]:
    pixels = case.pixels()[:, :, :1].double()
    return [case.decode(vae, case.single_frame_latent().double()), case.encode(vae, pixels)]


def pair(case: Tiny, vae: Any) -> list[Tensor]:
    latent, pixels = case.latent(batch=2).double(), case.pixels(batch=2).double()
    return [case.decode(vae, latent), case.encode(vae, pixels)]


def odd(case: Tiny, vae: Any) -> list[Tensor]:
    ratio = case.pixel_shape[-1] // case.latent_shape[-1]
    n, z, t, _, _ = case.latent_shape
    pixels = clip(n, case.pixel_shape[1], case.pixel_shape[2], 3 * ratio, ratio)
    return [case.decode(vae, clip(n, z, t, 5, 1)), case.encode(vae, pixels)]


def sliced(case: Tiny, vae: Any) -> list[Tensor]:
    vae.enable_slicing()
    return pair(case, vae)


def tiled(case: Tiny, vae: Any) -> list[Tensor]:
    return plain(case, case.tile(vae))


@each_case
@pytest.mark.parametrize("steps", [ALONE, BESIDE], ids=["alone", "beside the others"])
@pytest.mark.parametrize("run", [plain, single, pair, odd, sliced, tiled], ids=lambda run: run.__name__)
@torch.no_grad()
def test_whole_clips_are_those_of_stock(case: Tiny, steps: base.Platform, run: Any) -> None:
    stock, ours = (case.build(dtype=torch.float64) for _ in range(2))
    for actual, expected in zip(run(case, optimized(ours, steps)), run(case, stock), strict=True):
        assert_close(actual, expected)


@each_case
def test_every_block_is_taken(case: Tiny) -> None:
    outcome = outcome_of(optimized(case.build(dtype=torch.bfloat16)))
    assert not outcome.refused
    vae = case.build()
    blocks = {path for path, m in vae.named_modules() if type(m).__name__.endswith(("ResidualBlock", "AttentionBlock"))}
    assert blocks < set(outcome.taken) and {"encoder", "decoder"} < set(outcome.taken)


@each_case
@torch.no_grad()
def test_closer_to_the_truth_than_stock_in_bf16(case: Tiny) -> None:
    stock, ours = 0.0, 0.0
    for seed in range(3):
        vae, latent = case.build(seed, torch.bfloat16), case.latent(seed=seed).bfloat16()
        golden = case.decode(case.build(seed, torch.bfloat16).double(), latent.double())
        stock += rms_error(case.decode(vae, latent), golden)
        ours += rms_error(case.decode(optimized(vae), latent), golden)
    assert ours <= 0.95 * stock  # fp16 operands: 0.71 to 0.87 on these


@each_case
@torch.no_grad()
def test_no_further_from_the_truth_in_fp32(case: Tiny) -> None:
    vae, latent = case.build(), case.latent()
    golden = case.decode(case.build().double(), latent.double())
    stock = rms_error(case.decode(vae, latent), golden)
    assert rms_error(case.decode(optimized(vae, ALONE), latent), golden) <= 1.1 * stock  # one model, one latent


@each_case
@torch.no_grad()
def test_convolutions_asked_for_in_bf16_are_left_to_what_lowers_them(case: Tiny) -> None:
    """A single frame, whose convolutions are all rewritten where they are not these blocks'."""
    latent, results = case.single_frame_latent(), []
    lower = [step for step in BESIDE.vae if step.rewrite.name not in ("fused_blocks", "half_decode")]
    for steps in (plan(tuple(lower)), plan((*lower, base.Step(FusedBlocks(), "on", "test")))):
        vae = case.build()
        base.run(vae, steps, steps.vae, "vae", {"strict": True, "bf16": True})
        results.append(case.decode(vae, latent))
    outcome = outcome_of(vae)
    assert torch.equal(*results) and not outcome.taken
    reason = "its convolutions are to run in torch.bfloat16, which is what the rewrites beneath it do"
    assert set(outcome.refused.values()) == {reason}
    vae = case.build(dtype=torch.bfloat16)
    base.run(vae, steps, steps.vae, "vae", {"strict": True, "bf16": True})
    assert outcome_of(vae).taken and not outcome_of(vae).refused


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2-5b", "qwen-image"])
@torch.no_grad()
def test_chunks_of_several_latents_hand_on_the_caches_of_stock(name: str) -> None:
    stock, ours = tiny(name).build(dtype=torch.float64), optimized(tiny(name).build(dtype=torch.float64), ALONE)
    latent = clip(1, stock.config.z_dim, 6, 2, 3)
    caches: list[list[Any]] = [[None] * 64, [None] * 64]
    for start, frames in ((0, 1), (1, 2), (3, 1), (4, 2)):
        outputs = []
        for vae, cache in zip((stock, ours), caches, strict=True):
            more = {"first_chunk": start == 0} if name.startswith("wan") else {}
            outputs.append(vae.decoder(latent[:, :, start : start + frames], feat_cache=cache, feat_idx=[0], **more))
        assert_close(outputs[1], outputs[0])
        for theirs, kept in zip(*caches, strict=True):
            assert type(kept) is type(theirs)
            if isinstance(kept, Tensor):  # frames of zeros in front need not be kept
                assert_close(kept, theirs[:, :, -kept.shape[2] :])
                assert not theirs[:, :, : -kept.shape[2]].any()
                assert kept.untyped_storage().nbytes() == kept.nbytes, "a longer clip is kept alive"


def residual_block(dtype: torch.dtype, wider: int = 6) -> Any:
    return randomised(wan.WanResidualBlock(4, wider), dtype)


@pytest.mark.parametrize("wider", [4, 6])
def test_a_block_is_the_stock_one_with_and_without_a_cache(wider: int) -> None:
    stock, ours = residual_block(torch.float64, wider), optimized(residual_block(torch.float64, wider), ALONE)
    x = clip(2, 4, 3, 5, 7)
    assert torch.equal(ours(x), stock(x))
    caches: tuple[list[Any], list[Any]] = ([None, None], [None, None])
    for frames in (1, 1, 3, 1):
        places = ([0], [0])
        expected = stock(x[:, :, :frames], caches[0], places[0])
        assert_close(ours(x[:, :, :frames], caches[1], places[1]), expected)
        assert places == ([2], [2])
        for theirs, kept in zip(*caches, strict=True):
            assert_close(kept, theirs)


class Dtypes:
    """Of what a convolution is given."""

    def __init__(self, conv: nn.Module) -> None:
        self.seen: list[torch.dtype] = []
        conv.register_forward_pre_hook(lambda _, args: self.seen.append(args[0].dtype))


def fp16_expected(block: Any) -> bool:
    watch = Dtypes(block.conv1)
    y = optimized(block, NORMS)(clip(1, 4, 2, 5, 7, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    return watch.seen == [torch.float16]


@torch.no_grad()
def test_operands_are_fp16_only_in_bf16_and_where_nothing_can_overflow() -> None:
    assert fp16_expected(residual_block(torch.bfloat16))
    large_scale, large_weight = residual_block(torch.bfloat16), residual_block(torch.bfloat16)
    large_scale.norm2.gamma[1] = 65504 / 4 / 6**0.5
    large_weight.conv1.weight[0, 0, 0, 0, 0] = -65504 / 4
    assert not fp16_expected(large_scale) and not fp16_expected(large_weight)
    offloaded = residual_block(torch.bfloat16)
    cpu_offload(offloaded, torch.device("cpu"))
    assert not fp16_expected(offloaded)
    later = optimized(residual_block(torch.bfloat16), NORMS).float()  # cast after it was optimized
    watch = Dtypes(later.conv1)
    assert later(clip(1, 4, 2, 5, 7, dtype=torch.float32)).dtype == torch.float32 and watch.seen == [torch.float32]


@torch.no_grad()
def test_fp16_needs_the_norm_to_write_it() -> None:
    block = residual_block(torch.bfloat16)
    (site,) = FusedBlocks().sites(block, base.Ledger())
    assert site.refused == "norm1 is not taken by fused_norm_act"


@torch.no_grad()
def test_frames_kept_in_another_dtype_are_read() -> None:
    block, x = optimized(residual_block(torch.bfloat16), NORMS), clip(1, 4, 1, 5, 7, dtype=torch.bfloat16)
    cache: list[Any] = [None, None]
    block(x, cache, [0])
    assert cache[0].dtype == torch.float16
    other: list[Any] = [frames.float() for frames in cache]
    assert torch.equal(block(x, cache, [0]), block(x, other, [0]))
    assert other[0].dtype == torch.float16


@pytest.mark.parametrize("trained", ["", "conv1", "everything", "input"])
def test_a_call_that_runs_stock_is_given_the_dtype_of_the_model(trained: str) -> None:
    stock, ours = residual_block(torch.bfloat16), optimized(residual_block(torch.bfloat16), NORMS)
    gradients = []
    for block in (stock, ours):
        x = clip(1, 4, 2, 5, 7, dtype=torch.bfloat16).requires_grad_(trained == "input")
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(trained == "everything" or (trained != "" and name.startswith(trained)))
        y = block(x)
        assert y.dtype == torch.bfloat16 and y.requires_grad == (trained != "")
        if y.requires_grad:
            y.float().square().sum().backward()
        gradients.append([p.grad for p in (x, *block.parameters()) if p.grad is not None])
    for actual, expected in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ours(clip(1, 4, 2, 5, 7, dtype=torch.float32)).isfinite().all()


@pytest.mark.parametrize("frames", [1, 2, 5])
@torch.no_grad()
def test_time_is_doubled_frame_by_frame(frames: int) -> None:
    stock = randomised(wan.WanResample(4, "upsample3d"))
    ours = optimized(randomised(wan.WanResample(4, "upsample3d")), ALONE)
    x, caches = clip(2, 4, frames, 3, 5), ([None], [None])
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        x = x.contiguous(memory_format=layout)
        assert_close(ours(x), stock(x))
        for _ in range(3):
            assert_close(ours(x, caches[1], [0]), stock(x, caches[0], [0]))
    y = ours.time_conv(x, caches[1][0], interleave=True)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    with torch.enable_grad():
        tracked = ours.time_conv(x.requires_grad_(), caches[1][0], interleave=True)
    assert tracked.requires_grad
    assert_close(y, tracked.detach())


@pytest.mark.parametrize("mode", ["upsample2d", "downsample2d", "downsample3d"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@torch.no_grad()
def test_frames_are_resampled_and_kept_as_stock_does(mode: str, layout: torch.memory_format) -> None:
    stock, ours = randomised(wan.WanResample(4, mode)), optimized(randomised(wan.WanResample(4, mode)), ALONE)
    caches: tuple[list[Any], list[Any]] = ([None], [None])
    for frames in (1, 4, 2):
        x = clip(2, 4, frames, 6, 10).contiguous(memory_format=layout)
        assert_close(ours(x), stock(x))
        places = ([0], [0])
        assert_close(ours(x, caches[1], places[1]), stock(x, caches[0], places[0]))
        assert places[0] == places[1] == [int(mode == "downsample3d")]
        if mode == "downsample3d":
            assert_close(caches[1][0], caches[0][0])


@pytest.mark.parametrize("frames", [1, 3])
@torch.no_grad()
def test_a_single_frame_keeps_the_strides_of_its_memory_format(frames: int) -> None:
    """The stride of a dimension of size 1 decides whether `F.pad` and `torch.cat` answer channels-last."""
    module, seen = optimized(randomised(wan.WanResample(4, "downsample3d")), ALONE), []
    module.resample[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module.resample[1].register_forward_hook(lambda m, _, y: y.contiguous(memory_format=torch.channels_last))
    seen.append(module(clip(1, 4, frames, 6, 10).contiguous(memory_format=torch.channels_last_3d)))
    for x in seen:
        assert x.stride() == torch.empty(x.shape).to(memory_format=FORMATS[x.dim()]).stride()


@torch.no_grad()
def test_an_adapter_around_a_halving_adds_to_what_stock_gives_it() -> None:
    stock = randomised(wan.WanResample(4, "downsample2d"))
    ours = optimized(randomised(wan.WanResample(4, "downsample2d")), ALONE)
    for module in (stock, ours):
        module.resample[1] = nn.Sequential(module.resample[1])
    x = clip(2, 4, 3, 6, 10)
    assert_close(ours(x), stock(x))


def test_another_padding_or_stride_of_a_halving_is_refused() -> None:
    module = wan.WanResample(4, "downsample2d")
    changes: list[tuple[int, nn.Module, str]] = [
        (0, nn.ReflectionPad2d((0, 1, 0, 1)), "no pixel of zeros"),
        (0, nn.ZeroPad2d((1, 0, 1, 0)), "no pixel of zeros"),
        (1, nn.Conv2d(4, 4, 3, stride=3), "stride, dilation or groups"),
        (1, nn.Conv2d(4, 4, 3, stride=2, padding=1), "a padding of (1, 1)"),
    ]
    for place, other, reason in changes:
        known, module.resample[place] = module.resample[place], other
        (site,) = FusedBlocks().sites(module, base.Ledger())
        assert site.refused is not None and f"resample.{place}: " in site.refused and reason in site.refused
        module.resample[place] = known
    (site,) = FusedBlocks().sites(module, base.Ledger())
    assert site.refused is None


def test_a_resample_without_an_operation_is_not_taken() -> None:
    assert not list(FusedBlocks().sites(wan.WanResample(4, "none"), base.Ledger()))


@pytest.mark.parametrize("name", ["wan2.1", "qwen-image", "qwen-image-2.1"])
@torch.no_grad()
def test_every_convolution_is_given_channels_last(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a card returns them: oneDNN answers some channels-last clips in NCDHW."""
    case, seen = tiny(name), []

    def fused(x: Tensor, weight: Tensor, bias: Tensor | None, **more: Any) -> Tensor:
        seen.extend(y for y in (x, more.get("history"), more.get("residual")) if y is not None)
        return kernel(x, weight, bias, **more).contiguous(memory_format=FORMATS[x.dim()])

    kernel = wan_conv.fused
    monkeypatch.setattr(wan_conv, "fused", fused)
    vae: Any = optimized(case.build(dtype=torch.bfloat16))
    for m in vae.modules():
        if isinstance(m, nn.Conv2d | nn.Conv3d):
            m.register_forward_hook(lambda m, _, y: y.contiguous(memory_format=FORMATS[y.dim()]))
    for run in (lambda: case.encode(vae, case.pixels().bfloat16()), lambda: case.decode(vae, case.latent().bfloat16())):
        seen.clear()
        run()
        assert seen and all(x.is_contiguous(memory_format=FORMATS[x.dim()]) for x in seen)


@pytest.mark.parametrize("channels", [(16, 2), (8, 2), (4, 2), (2, 2)], ids=["1", "2", "4", "8"])
@pytest.mark.parametrize("first", [False, True])
@torch.no_grad()
def test_the_shortcut_of_wan_2_2_is_an_addition(channels: tuple[int, int], first: bool) -> None:
    inner, outer = channels
    block = wan.WanResidualUpBlock(inner, outer, 0, temperal_upsample=True, up_flag=True)
    assert block.avg_shortcut.repeats * inner == 8 * outer
    x = clip(2, inner, 1 if first else 2, 3, 5).contiguous(memory_format=torch.channels_last_3d)
    y = clip(2, outer, 1 if first else 4, 6, 10).contiguous(memory_format=torch.channels_last_3d)
    expected = y + block.avg_shortcut(x, first_chunk=first)
    optimized(block, ALONE)
    actual = block.avg_shortcut(x, first_chunk=first, residual=y)
    assert torch.equal(actual, expected) and actual.stride() == y.stride()
    assert torch.equal(block.avg_shortcut(x), wan.DupUp3D(inner, outer, 2, 2)(x))


@pytest.mark.parametrize("channels", [(2, 16), (2, 8), (2, 4), (2, 2)], ids=["1", "2", "4", "8"])
@pytest.mark.parametrize("frames", [1, 4])
@torch.no_grad()
def test_the_shortcut_of_a_wan_2_2_encoder_is_a_mean(channels: tuple[int, int], frames: int) -> None:
    block = wan.WanResidualDownBlock(*channels, 0.0, 0, temperal_downsample=True, down_flag=True)
    x = clip(2, channels[0], frames, 6, 10)
    expected = block.avg_shortcut(x)
    optimized(block, ALONE)
    assert_close(block.avg_shortcut(x), expected)
    with pytest.raises(RuntimeError, match="invalid for input of size"):  # stock's own words
        block.avg_shortcut(clip(1, channels[0], 2, 5, 6))


def test_a_shortcut_that_cuts_across_rows_is_refused() -> None:
    block = wan.WanResidualUpBlock(4, 3, 0, temperal_upsample=True, up_flag=True)
    refused = next(site.refused for site in FusedBlocks().sites(block, base.Ledger()) if site.path == "")
    assert refused == "its shortcut takes 6 values together, across frames, rows and columns"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@torch.no_grad()
def test_attention_is_bit_for_bit_the_stock_one(layout: torch.memory_format) -> None:
    stock = randomised(wan.WanAttentionBlock(8))
    ours = optimized(randomised(wan.WanAttentionBlock(8)), ALONE)
    x = clip(2, 8, 3, 5, 7).contiguous(memory_format=layout)
    assert torch.equal(ours(x), stock(x))


def test_a_wrong_input_is_told_what_stock_tells() -> None:
    block = optimized(residual_block(torch.float64), ALONE)
    for x in (clip(1, 5, 2, 4, 4), clip(1, 4, 2, 4, 4, dtype=torch.float32), clip(1, 4, 2, 4, 4, 4)):
        with pytest.raises(RuntimeError) as expected:
            residual_block(torch.float64)(x)
        with pytest.raises(RuntimeError) as actual:
            block(x)
        assert str(actual.value) == str(expected.value)


@torch.no_grad()
def test_compiles_as_one_graph() -> None:
    block = optimized(residual_block(torch.float32), NORMS)
    x, caches = clip(1, 4, 3, 5, 7, dtype=torch.float32), ([None, None], [None, None])
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x, caches[0], [0]), block(x, caches[1], [0]))


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2-5b"])
@torch.no_grad()
def test_where_ours_does_not_run_the_rewrites_beneath_it_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32, and cards other than Hopper: bit for bit the plan without these blocks, but for shortcuts and attention."""
    for module in (wan_conv, image_conv):
        monkeypatch.setattr(module, "runs", lambda x: False)
    without = plan(tuple(step for step in BESIDE.vae if step.rewrite.name != "fused_blocks"))
    case, calls = tiny(name), []
    kernel = wan_conv.fused
    monkeypatch.setattr(wan_conv, "fused", lambda *args, **more: calls.append(1) or kernel(*args, **more))
    ours, others = optimized(case.build()), case.build()
    base.run(others, without, without.vae, "vae", {"strict": True})
    for latent in (case.latent(), case.single_frame_latent()):
        torch.testing.assert_close(case.decode(ours, latent), case.decode(others, latent), rtol=0, atol=2e-6)
    assert not calls


@torch.no_grad()
def test_out_of_memory_half_way_begins_again() -> None:
    case, chunks = tiny("wan2.2-5b"), plan((base.Step(LatentChunks(), "on", "test"), *ALONE.vae))
    stock, ours = case.build(dtype=torch.float64), optimized(case.build(dtype=torch.float64), chunks)
    calls: list[int] = []

    def full(block: nn.Module, args: tuple[Any, ...]) -> None:
        calls.append(args[0].shape[2])
        if calls[-1] > 8:  # two latents
            raise torch.OutOfMemoryError("full")

    ours.decoder.up_blocks[-1].resnets[0].conv2.register_forward_pre_hook(full)
    latent = clip(1, 6, 6, 2, 3)
    with pytest.warns(RuntimeWarning, match="begun again at"):
        assert_close(case.decode(ours, latent), case.decode(stock, latent))
