"""Blocks of Mochi on the fused convolution: the way up, and what goes to stock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders import autoencoder_kl_mochi as mochi
from torch import nn

from tests.rewrites.fused import ALONE, TINY, clip, optimized, outcome_of
from vae_accel.families.blocks import block_of
from vae_accel.kernels import bordered
from vae_accel.workloads.weights import randomise

CASE = TINY["mochi"]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "bordered": lambda x: bordered.bordered(x, border="replicate"),
}


def up_block(channels: int, times: int, sides: int, dtype: torch.dtype = torch.float64) -> Any:
    block = mochi.MochiUpBlock3D(32, channels, num_layers=1, temporal_expansion=times, spatial_expansion=sides)
    return randomise(block, dtype=dtype, device="cpu").requires_grad_(False)


def test_every_block_of_convolutions_is_taken() -> None:
    vae: Any = optimized(CASE.build(dtype=torch.bfloat16))
    names = ("MochiResnetBlock3D", "MochiUpBlock3D")
    blocks = [path for path, module in vae.named_modules() if type(module).__name__ in names]
    assert len(blocks) == 13 and set(blocks) <= set(outcome_of(vae).taken)
    for path in blocks:
        block: Any = block_of(vae.get_submodule(path))
        if len(block.hands) == 5:
            assert min(block.hands[0].facts[0]) > 1e6  # fp16: groups of so many elements are safe with such weights


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels, times, sides", [(16, 3, 2), (8, 2, 2), (8, 1, 2), (16, 1, 1)])
@torch.no_grad()
def test_channels_become_frames_and_pixels(layout: str, channels: int, times: int, sides: int) -> None:
    """The linear layer and what becomes of its channels alone: nothing is left of the residual blocks."""
    stock, ours = up_block(channels, times, sides), up_block(channels, times, sides)
    stock.resnets = ours.resnets = nn.ModuleList()
    x = clip(2, 32, 3, 3, 5)
    y, caches = optimized(ours, ALONE)(LAYOUTS[layout](x))
    expected, given = stock(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert caches == given == {}
    assert bordered.is_bordered(y) == (layout == "bordered")
    if layout == "bordered":
        assert bordered.geometry(y).border == "replicate" and not bordered.is_filled(y)


@torch.no_grad()
def test_a_border_that_is_open_reaches_no_pixel() -> None:
    """The linear layer runs over it."""
    ours = optimized(up_block(16, 3, 2), ALONE)
    ours.resnets = nn.ModuleList()
    open_ = bordered.empty((1, 32, 2, 3, 5), torch.float64, torch.device("cpu"), "replicate")
    bordered.pixels_of(open_).fill_(float("nan"))
    assert ours(open_.copy_(clip(1, 32, 2, 3, 5)))[0].isfinite().all()


@pytest.mark.parametrize("trained", ["proj", "resnets.0.conv1.conv", "input"])
def test_gradients_are_stocks(trained: str) -> None:
    results = []
    for block in (up_block(16, 3, 2), optimized(up_block(16, 3, 2), ALONE)):
        x = clip(1, 32, 2, 3, 5).requires_grad_(trained == "input")
        parameter = x if trained == "input" else block.get_submodule(trained).weight.requires_grad_()
        results.append(torch.autograd.grad(block(x)[0].square().sum(), parameter)[0])
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)


class Adapter(nn.Module):
    """What adds to a linear layer, as LoRA's layers do."""

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + x.mean(-1, keepdim=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_an_adapter_put_on_later_is_stocks(layout: str) -> None:
    stock, ours = up_block(16, 3, 2), optimized(up_block(16, 3, 2), ALONE)
    stock.proj, ours.proj = Adapter(stock.proj), Adapter(ours.proj)
    x = clip(1, 32, 2, 3, 5)
    torch.testing.assert_close(ours(LAYOUTS[layout](x))[0], stock(x)[0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_what_hands_frames_from_call_to_call_fails_as_stock_does() -> None:
    """`_enable_framewise_decoding` turns every convolution into one that keeps frames, of an unpadded picture."""
    messages = []
    for vae in (CASE.build(dtype=torch.float64), optimized(CASE.build(dtype=torch.float64), ALONE)):
        vae._enable_framewise_decoding()
        with pytest.raises(RuntimeError) as caught:
            CASE.decode(vae, clip(1, 4, 2, 4, 5))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_what_is_no_such_block_is_refused_with_the_reason() -> None:
    block = up_block(16, 3, 2)
    block.proj = Adapter(block.proj)
    assert block_of(block) == "proj: Adapter is no Linear"
    resnet = mochi.MochiResnetBlock3D(32)
    resnet.conv2.conv = nn.Conv3d(32, 32, 3, stride=2)
    assert block_of(resnet) == "conv2: stride, dilation or groups"
