"""fused_blocks through the kernels themselves, in Triton's interpreter: whole tiny VAEs, blocks by pairs of frames."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import Tensor, nn

from tests import interpreter
from tests.subjects import WIDE, plan
from tests.tiny import Tiny, image, video
from tests.vaes import TABLE
from vae_accel.kernels import conv, group_norm_act, group_norm_modulate_act, group_statistics, winograd
from vae_accel.kernels.bordered import bordered, is_bordered
from vae_accel.metrics import rms_error
from vae_accel.platforms import base
from vae_accel.rewrites.fused_blocks import FusedBlocks
from vae_accel.rewrites.fused_norm_act import FusedNormAct
from vae_accel.rewrites.latent_chunks import LatentChunks
from vae_accel.streaming import decode_stream
from vae_accel.workloads.weights import randomise

Z4: dict[str, Any] = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
CAUSAL: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, **Z4}
CAUSAL["temperal_downsample"] = [True, True]
PATCHED: dict[str, Any] = {"decoder_base_dim": 8, "is_residual": True, "in_channels": 12, "out_channels": 12}
PATCHED |= {"patch_size": 2, "scale_factor_spatial": 8}
WAN = {**CAUSAL, "scale_factor_spatial": 4}
REPLICATED: dict[str, Any] = {"latent_channels": 8, "block_out_channels": (8, 8, 16), "layers_per_block": 1}
REPLICATED |= {"down_block_types": ("HunyuanVideoDownBlock3D",) * 3, "up_block_types": ("HunyuanVideoUpBlock3D",) * 3}
REPLICATED |= {"spatial_compression_ratio": 4, "norm_num_groups": 4}
SHUFFLED: dict[str, Any] = {"latent_channels": 8, "block_out_channels": (8, 16, 16), "layers_per_block": 1}
SHUFFLED |= {"spatial_compression_ratio": 4}
# Of 32 groups in the middle, as of 32 channels, some have two pixels: two numbers are normalised to their sign.
LINEAR: dict[str, Any] = {"latent_channels": 8, "layers_per_block": (1, 1, 1, 1), "temporal_expansions": (1, 3)}
LINEAR |= dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (32, 32, 128))
LINEAR |= {"spatial_expansions": (2, 2), "add_attention_block": (False, True, False, True)}
MODULATED: dict[str, Any] = {"latent_channels": 8, "block_out_channels": (16, 16, 24), "layers_per_block": 1}
MODULATED |= {"down_block_types": ("CogVideoXDownBlock3D",) * 3, "up_block_types": ("CogVideoXUpBlock3D",) * 3}
MODULATED |= {"norm_num_groups": 4}
CLIPS = [
    video("wan2.1", "AutoencoderKLWan", 4, (3, 3, 2), (4, 4), config=WAN, causal=True),
    video("wan2.2", "AutoencoderKLWan", 4, (3, 3, 2), (4, 8), config={**WAN, **PATCHED}, causal=True),
    video("qwen-image", "AutoencoderKLQwenImage", 4, (3, 3, 2), (4, 4), config=CAUSAL, causal=True),
    video("hunyuan-video", "AutoencoderKLHunyuanVideo", 8, (3, 2, 3), (4, 4), config=REPLICATED),
    video("hunyuan-video-1.5", "AutoencoderKLHunyuanVideo15", 8, (3, 2, 3), (4, 4), config=SHUFFLED, batch=False),
    video("mochi", "AutoencoderKLMochi", 8, (2, 2, 3), (4, 4), config=LINEAR),
    video("cogvideox", "AutoencoderKLCogVideoX", 8, (3, 2, 3), (4, 4), config=MODULATED),
]
KL = {**next(case for case in TABLE if case.id == "flux.1").config, "block_out_channels": (32, 32)}
HUNYUAN = {**next(case for case in TABLE if case.id == "hunyuan-image").config, "block_out_channels": (32, 32)}
HUNYUAN["spatial_compression_ratio"] = 2
IMAGES = [
    image("flux.1", "AutoencoderKL", 16, (2, 3), 2, config=KL),
    image("flux.2", "AutoencoderKLFlux2", 8, (2, 3), 2, config={**KL, "latent_channels": 8, "use_quant_conv": True}),
    image("hunyuan-image", "AutoencoderKLHunyuanImage", 8, (2, 3), 2, config=HUNYUAN),
]
each_clip = pytest.mark.parametrize("case", CLIPS, ids=lambda case: case.id)
each_image = pytest.mark.parametrize("case", IMAGES, ids=lambda case: case.id)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with interpreter.kernels(monkeypatch), torch.no_grad():
        interpreter.poison(monkeypatch)
        yield


def optimized(model: Any, most: int = 2) -> Any:
    rewrites = (FusedNormAct(), LatentChunks(most=most), FusedBlocks())
    steps = plan(tuple(base.Step(rewrite, "on", "test") for rewrite in rewrites))
    base.run(model, steps, steps.vae, "vae", {"strict": True})
    return model


def assert_no_further(ours: Tensor, stock: Tensor, golden: Tensor) -> None:
    """From the truth than stock in the same precision; of few values the error is itself uncertain."""
    assert ours.shape == stock.shape and ours.dtype == stock.dtype and ours.isfinite().all()
    assert rms_error(ours, golden) <= (1.05 + 2 / math.sqrt(ours.numel())) * rms_error(stock, golden)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


class Compared:
    """What several calls of `ours`, in fp16, give beside stock's and the truth."""

    def __init__(self) -> None:
        self.results: list[list[Tensor]] = [[], [], []]

    def __call__(self, case: Tiny, ours: Any, call: Any, x: Tensor) -> None:
        models = [ours, case.build(dtype=torch.float16), case.build(dtype=torch.float16).double()]
        if getattr(ours, "use_tiling", False):
            models[1:] = map(case.tile, models[1:])
        for model, kept, given in zip(models, self.results, (x, x, x.double()), strict=True):
            kept.append(call(model, given))
        assert self.results[0][-1].shape == self.results[1][-1].shape

    def check(self) -> None:
        assert_no_further(*(torch.cat([y.flatten() for y in kept]) for kept in self.results))


@each_clip
def test_clips(case: Tiny) -> None:
    """Of 1, 5 and 9 frames, two at once, of odd sizes, one, two and four latents a step."""
    decoded, encoded = Compared(), Compared()
    for most, latents, batch, size in ((1, 2, 1, (1, 3)), (2, 3, 2, (2, 1)), (4, 3, 1, (1, 2)), (4, 1, 1, (3, 1))):
        vae, batch = optimized(case.build(dtype=torch.float16), most), batch if case.batch else 1
        decoded(case, vae, case.decode, noise(batch, case.latent_shape[1], latents, *size))
        side = case.pixel_shape[-1] // case.latent_shape[-1]
        encoded(case, vae, case.encode, noise(batch, 3, 4 * latents - 3, side * size[0], side * size[1]).clamp(-1, 1))
    decoded.check()
    encoded.check()


@pytest.mark.parametrize("case", CLIPS[-1:], ids=lambda case: case.id)
def test_steps_hand_on_their_frames(case: Tiny) -> None:
    """Two latents, or eight frames, a step, the first longer by one."""
    decoded, encoded, vae = Compared(), Compared(), optimized(case.build(dtype=torch.float16))
    for batch, latents, frames in ((1, 5, 17), (2, 4, 16)):
        decoded(case, vae, case.decode, noise(batch, case.latent_shape[1], latents, 1, 2))
        encoded(case, vae, case.encode, noise(batch, 3, frames, 8, 12).clamp(-1, 1))
    decoded.check()
    encoded.check()


@pytest.mark.parametrize("case", CLIPS[1:2], ids=lambda case: case.id)
def test_a_stream_is_the_decode(case: Tiny) -> None:
    vae, z = optimized(case.build(dtype=torch.float16)), noise(1, 4, 4, 1, 2)
    other = decode_stream(vae, z.flip(4))
    next(other)
    parts = list(decode_stream(vae, z))
    assert [part.shape[2] for part in parts] == [1, 8, 4]
    assert torch.equal(torch.cat(parts, 2), vae.decode(z).sample)
    next(other)  # neither saw the other's frames
    assert torch.equal(next(other), vae.decode(z.flip(4)).sample[:, :, -4:])


@each_image
def test_pictures(case: Tiny) -> None:
    vae, side = optimized(case.build(dtype=torch.float16)), case.pixel_shape[-1] // case.latent_shape[-1]
    decoded, encoded = Compared(), Compared()
    decoded(case, vae, case.decode, noise(2, case.latent_shape[1], 1, 3))
    encoded(case, vae, case.encode, noise(1, 3, 3 * side, side).clamp(-1, 1))
    decoded.check()
    encoded.check()


def passes(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What norms read once more for its statistics from now on."""
    seen: list[Tensor] = []
    gather = group_statistics.group_statistics
    for module in (group_statistics, group_norm_act, group_norm_modulate_act):
        monkeypatch.setattr(module, "group_statistics", lambda x, *a, **k: seen.append(x) or gather(x, *a, **k))
    return seen


@torch.inference_mode()
def test_norms_read_a_picture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for attention, stock's at this width, and the norm behind it."""
    case = IMAGES[0]
    vae, seen = optimized(case.build(dtype=torch.float16)), passes(monkeypatch)
    case.decode(vae, noise(2, case.latent_shape[1], 3, 4))
    assert len(seen) == 2 < sum(isinstance(module, nn.GroupNorm) for module in vae.decoder.modules())
    seen.clear()
    case.encode(vae, noise(1, 3, 8, 6))
    assert len(seen) == 2


@torch.inference_mode()
def test_norms_read_a_clip_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a latent modulates too, behind frames that were upsampled once and written twice."""
    case = CLIPS[-1]
    vae, seen = optimized(case.build(dtype=torch.float16)), passes(monkeypatch)
    case.decode(vae, noise(1, case.latent_shape[1], 3, 1, 2))
    assert not seen


@pytest.mark.parametrize("size", [(6, 8), (7, 9)], ids=str)
@pytest.mark.parametrize("mode", ["downsample2d", "downsample3d"])
def test_clips_are_halved_where_they_lie(mode: str, size: tuple[int, int]) -> None:
    """Bordered in, bordered out, but behind the convolution in time, which is the vendor's."""
    ours, stock, golden = (
        randomise(wan.WanResample(16, mode), dtype=torch.float16, device="cpu").requires_grad_(False) for _ in range(3)
    )
    models = (optimized_block(ours), stock, golden.double())
    caches: list[list[Any]] = [[None], [None], [None]]
    for frames in (1, 4, 2):
        x = noise(2, 16, frames, *size)
        given = (bordered(x), x, x.double())
        results = [model(clip) for model, clip in zip(models, given, strict=True)]
        assert is_bordered(results[0])
        assert_no_further(*results)
        assert_no_further(*(model(clip, cache, [0]) for model, clip, cache in zip(models, given, caches, strict=True)))


@torch.inference_mode()
def test_pictures_are_halved_where_they_lie() -> None:
    """With the statistics of the norm behind; a batch of two, of odd and even sizes."""
    from diffusers.models.downsampling import Downsample2D

    ours, stock, golden = (
        randomise(Downsample2D(32, True, 64, padding=0, name="op"), dtype=torch.float16, device="cpu") for _ in range(3)
    )
    models = (optimized_block(ours), stock, golden.double())
    for size in ((6, 8), (7, 9)):
        x = noise(2, 32, *size)
        results = [model(given) for model, given in zip(models, (bordered(x), x, x.double()), strict=True)]
        assert is_bordered(results[0]) and group_statistics.noted(results[0], 32) is not None
        assert_no_further(*results)


def brightened(module: Any, args: Any, y: Tensor) -> None:
    y[:, ::2].mul_(8).add_(3)


@torch.inference_mode()
def test_a_hook_that_writes_between_a_convolution_and_its_norm() -> None:
    case = IMAGES[0]
    z, results = noise(1, case.latent_shape[1], 2, 3), []
    ours, stock = optimized(case.build(dtype=torch.float16)), case.build(dtype=torch.float16)
    for model in (ours, stock, case.build(dtype=torch.float16).double()):
        for block in model.decoder.mid_block.resnets:
            block.conv1.register_forward_hook(brightened)
            block.register_forward_hook(brightened)
        results.append(case.decode(model, z.to(model.dtype)))
    assert_no_further(*results)


@pytest.mark.parametrize("case", [CLIPS[1], IMAGES[0]], ids=lambda case: case.id)
def test_tiles(case: Tiny) -> None:
    """Tiles are views of a latent, and their results are blended in place."""
    vae = case.tile(optimized(case.build(dtype=torch.float16)))
    time = (2,) if case.video else ()
    tiles = Compared()
    tiles(case, vae, case.decode, noise(2, case.latent_shape[1], *time, 1, 2))
    tiles.check()


@pytest.mark.parametrize("name", ["sd-wide", "sd"])
def test_attention_reads_bordered_pictures(name: str) -> None:
    case = {"sd": IMAGES[0], "sd-wide": WIDE}[name]
    stock, golden, ours = (case.build(dtype=torch.float16).decoder.mid_block.attentions[0] for _ in range(3))
    x = noise(2, stock.group_norm.num_channels, 3, 5)
    assert_no_further(optimized_block(ours)(bordered(x)), stock(x), golden.double()(x.double()))


def residual_block(wide: int, out: int) -> Any:
    return randomise(wan.WanResidualBlock(wide, out), dtype=torch.bfloat16, device="cpu").requires_grad_(False)


def transformed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The frames of every clip that is convolved by pairs from now on."""
    seen: list[int] = []
    monkeypatch.setattr(
        "vae_accel.families.wan_conv.conv_pairs",
        lambda x, *args, **more: seen.append(x.shape[2] // 2) or winograd.conv_pairs(x, *args, **more),
    )
    return seen


# The interpreter truncates to bf16: twice the error of rounding. A wrong tap or frame is hundreds of times that.
TRUNCATED = 2.5


@pytest.mark.parametrize("wide, out", [(192, 128), (384, 384)])
@pytest.mark.parametrize("batch", [1, 2])
def test_blocks_by_pairs_of_frames(wide: int, out: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no frames in front, one and two, left by one form and read by the other."""
    seen, lengths = transformed(monkeypatch), (1, 2, 4, 1) if batch == 1 else (2, 1)
    ours, stock, golden = (
        optimized_block(residual_block(wide, out)),
        residual_block(wide, out),
        residual_block(wide, out),
    )
    blocks: tuple[Any, ...] = (ours, stock, golden.double())
    caches: list[list[Any]] = [[None, None] for _ in blocks]
    for i, frames in enumerate(lengths):
        x = noise(batch, wide, frames, 3, 4 + batch, seed=i).bfloat16()
        given = (x, x, x.double())
        y, theirs, truth = (block(x, cache, [0]) for block, x, cache in zip(blocks, given, caches, strict=True))
        assert y.dtype == torch.bfloat16 and rms_error(y, truth) <= TRUNCATED * rms_error(theirs, truth)
        for kept, exact in zip(caches[0], caches[2], strict=True):
            assert kept.dtype == torch.float16
            exact = exact[:, :, -kept.shape[2] :]
            torch.testing.assert_close(kept.double(), exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))
    both = out >= 192  # what the second convolution is given is too narrow otherwise
    assert seen == [n for n in lengths if n % 2 == 0 for _ in range(1 + both)]


def optimized_block(block: Any) -> Any:
    steps = plan(tuple(base.Step(rewrite, "on", "test") for rewrite in (FusedNormAct(), FusedBlocks())))
    base.run(block, steps, steps.vae, "vae", {"strict": True})
    return block


class Adapter(nn.Module):
    """What adds to a convolution, as LoRA's layers do."""

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer(x, *args, **kwargs) + 0 * x[:, :1].to(torch.bfloat16)


def hooked(block: Any) -> None:
    block.conv1.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:]))
    block.norm2.register_forward_hook(lambda *_: _[2].clone())


def adapted(block: Any) -> None:
    block.conv1, block.conv2 = Adapter(block.conv1), Adapter(block.conv2)


def activated(block: Any) -> None:
    block.nonlinearity = nn.GELU()


def trained(block: Any) -> None:
    block.conv1.weight.requires_grad_()
    next(block.norm2.parameters()).requires_grad_()


@pytest.mark.parametrize("change", [hooked, adapted, trained])
def test_nobody_else_sees_transformed_frames(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    block, seen = optimized_block(residual_block(384, 384)), transformed(monkeypatch)
    x = noise(2, 384, 2, 3, 5).bfloat16()
    expected = block(x)
    assert seen == [2, 2]  # by both convolutions
    change(block)
    with torch.set_grad_enabled(change is trained):
        y = block(x)
    assert seen == [2, 2] and y.requires_grad == (change is trained)
    assert rms_error(y.detach(), expected.double()) <= 0.02 * float(expected.float().std())


def test_an_activation_that_no_norm_applies_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, ours = residual_block(192, 128), residual_block(192, 128)
    activated(stock), activated(ours)
    seen, x = transformed(monkeypatch), noise(1, 192, 2, 3, 5).bfloat16()
    y, expected = optimized_block(ours)(x), stock(x)
    assert not seen
    assert rms_error(y, expected.double()) <= 0.02 * float(expected.float().std())


def test_frames_of_another_size_are_refused_in_stocks_words() -> None:
    stock, block = residual_block(192, 128), optimized_block(residual_block(192, 128))
    x, cache = noise(1, 192, 2, 3, 5).bfloat16(), [noise(1, 192, 2, 3, 7).bfloat16(), None]
    messages = []
    for each in (stock, block):
        with pytest.raises(RuntimeError) as error:
            each(x, list(cache), [0])
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("channels", [16, 96])
@pytest.mark.parametrize("frames", [1, 3])
def test_channels_become_frames_whatever_the_tile(channels: int, frames: int) -> None:
    """96 channels of a tile of 128: the tile holds one frame's alone."""
    x, history = noise(2, channels, frames, 3, 4), noise(2, channels, 1, 3, 4)
    weight = noise(2 * channels, channels, 3, 1, 1) / 16
    more: dict[str, Any] = {"before": 2, "history": history, "split": 2}
    golden = conv.reference(x.double(), weight.double(), None, **more)
    assert_no_further(conv.conv(x, weight, None, **more), conv.reference(x, weight, None, **more), golden)


def test_a_mark_goes_with_the_zeros() -> None:
    x = bordered(noise(1, 8, 2, 3, 4))
    for y in (x.add_(1), x.mul_(2), copy.deepcopy(x)):
        weight = noise(16, 8, 3, 3, 3) / 8
        dense = conv.conv(y.clone(memory_format=torch.contiguous_format), weight, None, padding=(1, 1), before=2)
        assert is_bordered(y) and torch.equal(conv.conv(y, weight, None, padding=(1, 1), before=2), dense)
    for y in (x[:, :, :1], x * 1, x.clone(), x.transpose(3, 4), x.to(torch.bfloat16), torch.cat([x, x]), x.detach()):
        assert not is_bordered(y)
