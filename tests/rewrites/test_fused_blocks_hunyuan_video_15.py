"""Blocks of HunyuanVideo 1.5, and of HunyuanImage's refiner, on the fused convolution: stock's clips and shuffles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders import autoencoder_kl_hunyuanvideo15 as hv
from torch import nn

from tests.rewrites.fused import ALONE, TINY, clip, optimized, outcome_of
from tests.tiny import Tiny
from vae_accel.families.blocks import block_of
from vae_accel.kernels import bordered
from vae_accel.workloads.weights import randomise

CASES = [TINY[name] for name in ("hunyuan-video-1.5", "hunyuan-image-refiner")]
VIDEO = CASES[0]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def randomised(module: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    return randomise(module, dtype=dtype, device="cpu").requires_grad_(False)


@each_case
def test_every_block_is_taken(case: Tiny) -> None:
    vae: Any = optimized(case.build(dtype=torch.bfloat16))
    outcome = outcome_of(vae)
    assert not outcome.refused
    for path, module in vae.named_modules():
        if type(module).__name__.endswith(("ResnetBlock", "Upsample", "Downsample", "DCAE", "15AttnBlock")):
            assert path in outcome.taken
        if type(module).__name__.endswith("ResnetBlock"):
            (hand,) = (h for h in block_of(module).hands if h.path == "")
            assert hand.facts == (True,)  # fp16, with weights like these


@torch.no_grad()
def test_several_clips_are_refused_in_stocks_words() -> None:
    """Its mask has the batch where the heads go."""
    messages = []
    for block in (
        randomised(hv.HunyuanVideo15AttnBlock(16)),
        optimized(randomised(hv.HunyuanVideo15AttnBlock(16)), ALONE),
    ):
        with pytest.raises(RuntimeError) as caught:
            block(clip(2, 16, 3, 2, 5))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "bordered": lambda x: bordered.bordered(x, border="replicate"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("temporal", [True, False])
@pytest.mark.parametrize("channels", [(16, 16), (16, 8), (32, 8), (8, 8)], ids=str)
@pytest.mark.parametrize("frames", [1, 3])
@torch.no_grad()
def test_channels_become_pixels_bit_for_bit(
    layout: str, temporal: bool, channels: tuple[int, int], frames: int
) -> None:
    """The shuffle and the shortcut alone: the convolution is stock's, in the layout that it would have."""
    inner, outer = channels
    stock = randomised(hv.HunyuanVideo15Upsample(inner, outer, temporal), torch.float32)
    ours = optimized(randomised(hv.HunyuanVideo15Upsample(inner, outer, temporal), torch.float32), ALONE)
    x = clip(2, inner, frames, 3, 5, dtype=torch.float32)
    packed = stock.conv(x)
    stock.conv.forward = lambda x: packed
    ours.conv.forward = lambda x: LAYOUTS[layout](packed)
    expected = stock(x)
    y = ours(LAYOUTS[layout](x))
    assert torch.equal(y, expected)
    assert bordered.is_bordered(y) == (layout == "bordered")
    if layout == "bordered":
        assert bordered.geometry(y).border == "replicate" and not bordered.is_filled(y)


def test_a_shortcut_that_does_not_fit_is_refused() -> None:
    assert block_of(hv.HunyuanVideo15Upsample(16, 6, True)) == "its shortcut repeats 16 channels 3 times"
    block = hv.HunyuanVideo15ResnetBlock(8, 16)
    block.conv_shortcut = nn.Conv3d(8, 16, 3, padding=1)
    assert block_of(block) == "conv_shortcut: a kernel of (3, 3, 3) with a padding of (1, 1, 1)"
    block.conv_shortcut = nn.Conv3d(8, 16, 1, groups=2)
    assert block_of(block) == "conv_shortcut: stride, dilation or groups"
    block.conv_shortcut = nn.Linear(8, 16)
    assert block_of(block) == "conv_shortcut: Linear is no Conv3d"


@pytest.mark.parametrize("trained", ["conv.conv", "input"])
def test_gradients_are_stocks(trained: str) -> None:
    results = []
    for block in (randomised(hv.HunyuanVideo15Upsample(16, 8)), randomised(hv.HunyuanVideo15Upsample(16, 8))):
        block = block if not results else optimized(block, ALONE)
        x = clip(1, 16, 3, 3, 5).requires_grad_(trained == "input")
        parameter = x if trained == "input" else block.conv.conv.weight.requires_grad_()
        results.append(torch.autograd.grad(block(x).square().sum(), parameter)[0])
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)
