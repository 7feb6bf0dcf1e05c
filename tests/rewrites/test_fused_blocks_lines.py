"""Residual blocks of pictures by pairs of lines, on a card of Python in the place of a Hopper's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as qwen
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tests import interpreter
from tests.kernels.hopper import Card
from tests.rewrites.test_fused_blocks_kernels import adapted, hooked, noise, optimized_block, trained
from vae_accel.kernels import line_pairs
from vae_accel.metrics import rms_error
from vae_accel.workloads.weights import randomise


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with interpreter.kernels(monkeypatch), torch.no_grad():
        interpreter.poison(monkeypatch)
        Card().install(monkeypatch)
        yield


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of each picture convolved by pairs of lines."""
    shapes: list[tuple[int, ...]] = []

    def conv_lines(x: Tensor, *args: Any, **more: Any) -> Tensor:
        y = line_pairs.conv_lines(x, *args, **more)
        shapes.append(tuple(y.shape))
        return y

    for family in ("image_conv", "wan_conv"):
        monkeypatch.setattr(f"vae_accel.families.{family}.conv_lines", conv_lines)
    return shapes


def of_stable_diffusion() -> Any:
    return ResnetBlock2D(in_channels=128, out_channels=128, temb_channels=None, eps=1e-6, groups=32)


def of_qwen_image() -> Any:
    return qwen.QwenImageResidualBlock(128, 128)


class Pictures(nn.Module):
    """A block of clips, given a picture."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.block, ResnetBlock2D):
            return self.block(x, None)
        return self.block(x.unsqueeze(2)).squeeze(2)


def built(make: Callable[[], Any], dtype: torch.dtype = torch.bfloat16) -> Pictures:
    return randomise(Pictures(make()), dtype=torch.bfloat16, device="cpu", seed=1).to(dtype)


each_family = pytest.mark.parametrize("make", [of_stable_diffusion, of_qwen_image], ids=lambda make: make.__name__)


@each_family
@pytest.mark.parametrize("shape", [(1, 4, 64), (2, 2, 55)], ids=str)
def test_closer_to_the_truth_than_stock(make: Any, shape: tuple[int, ...], seen: list[Any]) -> None:
    ours, (n, h, w) = optimized_block(built(make)), shape
    x = noise(n, 128, h, w).bfloat16() + 1
    golden = built(make, torch.float64)(x.double())
    assert rms_error(ours(x), golden) <= 0.9 * rms_error(built(make)(x), golden)
    assert seen == [(n, 128, h, w)] * 2


@each_family
@pytest.mark.parametrize("change", [hooked, adapted, trained])
def test_nobody_else_sees_transformed_lines(make: Any, change: Any, seen: list[Any]) -> None:
    model, x = optimized_block(built(make)), noise(1, 128, 2, 64).bfloat16()
    expected = model(x)
    assert len(seen) == 2
    change(model.block)
    with torch.set_grad_enabled(change is trained):
        y = model(x)
    assert len(seen) == 2 and y.requires_grad == (change is trained)
    assert rms_error(y.detach(), expected.double()) <= 0.02 * float(expected.float().std())


@each_family
@pytest.mark.parametrize("shape", [(3, 64), (2, 54)], ids=["an odd line", "tiles half empty"])
def test_other_pictures_are_convolved_directly(make: Any, shape: tuple[int, int], seen: list[Any]) -> None:
    x = noise(1, 128, *shape).bfloat16()
    y, golden = optimized_block(built(make))(x), built(make, torch.float64)(x.double())
    assert not seen and rms_error(y, golden) <= rms_error(built(make)(x), golden)


def test_frames_of_a_clip_are_not_transformed(seen: list[Any]) -> None:
    """The convolution of a single frame with a cache is asked for its frames by the next."""
    block, cache = optimized_block(built(of_qwen_image)).block, [None, None]
    block(noise(1, 128, 1, 2, 64).bfloat16(), cache, [0])
    assert not seen and all(kept is not None for kept in cache)


def test_textures_patched_to_be_seamless_are_convolved_directly(seen: list[Any]) -> None:
    model, x = optimized_block(built(of_stable_diffusion)), noise(1, 128, 2, 64).bfloat16()
    before = model(x)
    for conv in (model.block.conv1, model.block.conv2):
        conv.padding_mode = "circular"
        conv._reversed_padding_repeated_twice = (1, 1, 1, 1)
    assert len(seen) == 2 and not torch.equal(model(x), before) and len(seen) == 2
