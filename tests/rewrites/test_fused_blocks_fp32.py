"""fp32 models on the fused convolution, in Triton's interpreter: fp16 operands where stock's own are TF32.

A CPU multiplies fp32 in full. Stock's convolutions, and the vendor's beside ours, are therefore simulated
(`tests/tf32.py`): what is compared with fp64 is the error of TF32 to nearest, the least that a card can have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tests import interpreter
from tests.rewrites.fused import NORMS, outcome_of
from tests.rewrites.test_fused_blocks_kernels import CLIPS, IMAGES, noise, optimized, optimized_block, transformed
from tests.subjects import plan
from tests.tf32 import Simulated
from tests.tiny import Tiny
from vae_accel.families import image_conv, wan_conv
from vae_accel.kernels import conv, eligible, thin_conv, upsample_conv
from vae_accel.metrics import rms_error
from vae_accel.platforms import base
from vae_accel.rewrites.fused_norm_act import FusedNormAct
from vae_accel.workloads.inputs import Kind
from vae_accel.workloads.weights import randomise

MODELS = pytest.mark.parametrize("case", [*CLIPS, *IMAGES], ids=lambda case: case.id)
FUSED_NORMS = plan((base.Step(FusedNormAct(), "on", "test"),))


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with interpreter.kernels(monkeypatch), torch.no_grad():
        interpreter.poison(monkeypatch)
        yield


@pytest.fixture
def tf32_off() -> Iterator[None]:
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


def randomised(module: nn.Module) -> Any:
    return randomise(module, dtype=torch.float32, device="cpu").requires_grad_(False)


def operands(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.dtype]]:
    """What our kernels multiply and what they return, by kernel."""
    seen: dict[str, list[torch.dtype]] = {}

    def watch(module: Any, name: str, launch: str) -> None:
        run = getattr(module, launch)

        def watched(x: Tensor, *args: Any, **more: Any) -> Any:
            y = run(x, *args, **more)
            seen.setdefault(name, []).extend((x.dtype, y.dtype))
            return y

        monkeypatch.setattr(module, launch, watched)

    watch(conv, "conv", "_launch")
    watch(upsample_conv, "upsample_conv", "_launch")
    return seen


@pytest.mark.parametrize("case", [CLIPS[0], CLIPS[3], IMAGES[0]], ids=lambda case: case.id)
def test_whole_models_are_nearer_to_fp64_than_tf32(case: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode and encode of three models and kinds of input, mean over them: of so few numbers and channels 0.75 to 0.96
    of stock's error, on a card with real widths 0.66 to 0.96 (platforms/cuda/README.md)."""
    seen, errors = operands(monkeypatch), [0.0, 0.0]
    for seed, kind in enumerate(get_args(Kind)):
        latent, pixels = case.latent(kind, seed=seed), case.pixels(kind, seed=seed)
        golden, stock = case.build(seed).double(), case.build(seed)
        ours = optimized(case.build(seed))
        for call, x in ((case.decode, latent), (case.encode, pixels)):
            truth = call(golden, x.double())
            with Simulated():
                results = [call(model, x) for model in (ours, stock)]
            for i, y in enumerate(results):
                assert y.dtype == torch.float32 and y.shape == truth.shape
                errors[i] += rms_error(y, truth) / float(truth.std())
    assert errors[1] > 6e-4  # TF32, not fp32
    assert errors[0] < errors[1], errors
    assert torch.float16 in seen["conv"] and set(seen["conv"][1::2]) == {torch.float32}


@MODELS
def test_every_block_is_taken(case: Tiny) -> None:
    outcome = outcome_of(optimized(case.build()))
    assert outcome.taken and not outcome.refused


def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides on a card decides here."""
    for module in (wan_conv, image_conv):
        monkeypatch.setattr(module, "runs", lambda x: eligible._unable(x) is None)


@pytest.mark.parametrize("case", [CLIPS[0], CLIPS[2], *IMAGES[:2]], ids=lambda case: case.id)
def test_where_tf32_is_off_it_is_bit_for_bit_the_plan_without_these_blocks(
    case: Tiny, monkeypatch: pytest.MonkeyPatch, tf32_off: None
) -> None:
    on_a_card(monkeypatch)
    seen = operands(monkeypatch)
    ours, others = case.build(), case.build()
    base.run(ours, NORMS, NORMS.vae, "vae", {"strict": True})
    base.run(others, FUSED_NORMS, FUSED_NORMS.vae, "vae", {"strict": True})
    assert outcome_of(ours).taken
    for call, x in ((case.decode, case.latent()), (case.encode, case.pixels())):
        assert torch.equal(call(ours, x), call(others, x))
    assert not seen


def test_it_is_asked_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_card(monkeypatch)
    stock, ours, seen = randomised(wan.WanResidualBlock(8, 16)), randomised(wan.WanResidualBlock(8, 16)), []
    optimized_block(ours).conv2.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    x, exact = noise(1, 8, 3, 4, 5).float(), None
    for allowed in (True, False, True):
        torch.backends.cudnn.allow_tf32 = allowed
        try:
            y, cache = ours(x), [None, None]
            ours(x, cache, [0])
        finally:
            torch.backends.cudnn.allow_tf32 = True
        off = rms_error(y, stock.double()(x.double()))
        exact = off < 1e-6
        assert exact != allowed and off < 2e-3
        assert cache[1].dtype == (torch.float16 if allowed else torch.float32)  # frames are kept as they are read
    assert seen == [torch.float16] * 2 + [torch.float32] * 2 + [torch.float16] * 2


def test_frames_kept_before_the_switch_are_read_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_card(monkeypatch)
    block, golden = optimized_block(randomised(wan.WanResidualBlock(8, 8))), randomised(wan.WanResidualBlock(8, 8))
    caches: tuple[list[Any], list[Any]] = ([None, None], [None, None])
    golden.double()
    for i, allowed in enumerate((True, False, True)):
        torch.backends.cudnn.allow_tf32 = allowed
        try:
            x = noise(1, 8, 2, 4, 5, seed=i).float()
            y, truth = block(x, caches[0], [0]), golden(x.double(), caches[1], [0])
        finally:
            torch.backends.cudnn.allow_tf32 = True
        assert rms_error(y, truth) < 1e-3 * float(truth.std())


def test_pairs_of_frames_are_for_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Winograd's transformed operands are 1.5 times as far from fp32 as TF32's."""
    seen = transformed(monkeypatch)
    optimized_block(randomised(wan.WanResidualBlock(192, 128)))(noise(1, 192, 2, 2, 3).float())
    assert not seen


def large_weight(block: Any) -> None:
    block.conv1.weight[0, 0].fill_(1e5)


def small_weight(block: Any) -> None:
    block.conv1.weight.mul_(1e-6)
    block.conv1.bias.zero_()


def large_scale(block: Any) -> None:
    next(block.norm1.parameters()).mul_(1e5)


def small_scale(block: Any) -> None:
    for parameter in block.norm1.parameters():
        parameter.mul_(1e-6)
    block.conv1.bias.zero_()  # beside which fp32 itself would round what is compared


@pytest.mark.parametrize("change", [large_weight, small_weight, large_scale, small_scale])
@pytest.mark.parametrize("kind", ["wan", "kl"])
def test_where_no_norm_bounds_the_operands_they_are_scaled(kind: str, change: Any) -> None:
    """fp32 goes into the convolution, and what fp16 could not hold is as near as TF32 all the same."""

    def made() -> Any:
        block = wan.WanResidualBlock(16, 16) if kind == "wan" else ResnetBlock2D(in_channels=32, temb_channels=None)
        change(randomised(block))
        return block

    ours, stock, golden, seen = optimized_block(made()), made(), made().double(), []
    ours.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    x = noise(*((1, 16, 3, 8, 9) if kind == "wan" else (1, 32, 12, 12))).float()
    more = () if kind == "wan" else (None,)  # no time step
    y, truth = ours(x, *more), golden(x.double(), *more)
    with Simulated():
        theirs = stock(x, *more)
    assert seen == [torch.float32]
    assert rms_error(y, truth) <= 0.9 * rms_error(theirs, truth)


def test_the_last_convolution_reads_its_clip_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """96 to 3 of an fp32 clip that a norm wrote in fp32: scaled, and by the thin form, as all of so few channels."""
    launches, run = [], thin_conv.scaled
    monkeypatch.setattr(thin_conv, "scaled", lambda *args: launches.append(args[0].dtype) or run(*args))
    case = CLIPS[0]
    case.decode(optimized(case.build()), case.latent())
    assert launches[-1] == torch.float32
