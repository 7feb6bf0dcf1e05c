"""Causal padding moves data alone: every decode, every encode and every cache is bit for bit stock's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.vaes import TABLE, Tiny
from vae_accel.edits import ledger_of
from vae_accel.families import causal
from vae_accel.platforms import Cpu, base
from vae_accel.rewrites.causal_padding import CausalPadding

PADDED = [
    "wan2.1",
    "wan2.2-5b",
    "qwen-image",
    "hunyuan-video",
    "hunyuan-video-1.5",
    "hunyuan-image-refiner",
    "cogvideox",
    "mochi",
    "cosmos",
    "ltx-0.9.0",
    "ltx-0.9.1",
    "ltx-0.9.5",
    "ltx-2.0",
    "ltx-2.3",
    "minimax-h3",
]


def optimized(model: nn.Module) -> nn.Module:
    base.run(model, Cpu(), [base.Step(CausalPadding(), "on", "test")], "vae", {"only": "causal_padding"})
    return model


def tiny(name: str) -> Tiny:
    return next(t for t in TABLE if t.id == name)


def channels_last(conv: nn.Conv3d) -> None:
    conv.weight.data = conv.weight.data.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("name", PADDED)
@torch.inference_mode()
def test_decode_and_encode_are_bit_equal(name: str) -> None:
    case = tiny(name)
    vae = case.build()
    latent, pixels = case.latent("picture"), case.pixels("picture")
    decoded, encoded = case.decode(vae, latent), case.encode(vae, pixels)
    optimized(vae)
    assert ledger_of(vae).outcomes[0].taken
    assert torch.equal(case.decode(vae, latent), decoded)
    assert torch.equal(case.encode(vae, pixels), encoded)


def test_every_causal_convolution_that_pads_in_forward_is_taken_or_named() -> None:
    untaken = {"EasyAnimateCausalConv3d", "VidTokCausalConv3d", "KVAECachedCausalConv3d", "Kandinsky6SRCausalConv3d"}
    for case in TABLE:
        if case.id == "rae" or not case.video:
            continue
        classes = {type(m).__name__ for m in case.build().modules()}
        causal_3d = {c for c in classes if "Causal" in c and "Conv3d" in c} - {"QwenImage21CausalConv3d"}
        assert causal_3d <= untaken | set(causal.ROWS), case.id


def _convolution(name: str, *args: object, **kwargs: object) -> nn.Module:
    from diffusers.models.autoencoders import (
        autoencoder_kl_cogvideox,
        autoencoder_kl_ltx,
        autoencoder_kl_ltx2,
        autoencoder_kl_wan,
    )

    modules = (autoencoder_kl_cogvideox, autoencoder_kl_ltx, autoencoder_kl_ltx2, autoencoder_kl_wan)
    return next(getattr(m, name) for m in modules if hasattr(m, name))(*args, **kwargs).requires_grad_(False)


@pytest.mark.parametrize("kernel", [1, 3, (3, 1, 1)])
@pytest.mark.parametrize("cached", [0, 1, 2])
def test_wan_takes_cached_frames(kernel: int | tuple[int, int, int], cached: int) -> None:
    padding = (1, 1, 1) if kernel == 3 else (0, 0, 0) if kernel == 1 else (1, 0, 0)
    conv = _convolution("WanCausalConv3d", 3, 5, kernel, padding=padding)
    x, cache = torch.randn(2, 3, 3, 4, 5), torch.randn(2, 3, cached, 4, 5) if cached else None
    expected = conv(x, cache)
    assert torch.equal(optimized(conv)(x, cache), expected)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("mode", ["first", "replicate"])
@pytest.mark.parametrize("frames", [1, 4])
def test_cogvideox_returns_the_cache_of_stock(kernel: int, mode: str, frames: int) -> None:
    conv = _convolution("CogVideoXCausalConv3d", 3, 5, kernel, pad_mode=mode)
    first, second = torch.randn(1, 3, frames, 4, 5), torch.randn(1, 3, frames, 4, 5)
    y1, cache1 = conv(first)
    y2, cache2 = conv(second, conv_cache=cache1)
    optimized(conv)
    z1, ours1 = conv(first)
    z2, ours2 = conv(second, conv_cache=ours1)
    assert torch.equal(z1, y1) and torch.equal(z2, y2)
    if mode == "replicate":
        assert ours1 is None and cache1 is None
    else:
        assert torch.equal(ours1, cache1) and torch.equal(ours2, cache2)


def test_the_cache_of_a_1x1x1_kernel_is_no_copy() -> None:
    conv = optimized(_convolution("CogVideoXCausalConv3d", 3, 5, 1))
    x = torch.randn(1, 3, 2, 4, 5)
    assert conv(x)[1].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_ltx2_decides_at_each_call(mode: str, is_causal: bool) -> None:
    conv = _convolution("LTX2VideoCausalConv3d", 3, 5, 3, spatial_padding_mode=mode)
    x = torch.randn(1, 3, 2, 4, 5)
    expected = conv(x, causal=is_causal)
    assert torch.equal(optimized(conv)(x, causal=is_causal), expected)


class Watch:
    """Strides of what a convolution is given."""

    def __init__(self, conv: nn.Module) -> None:
        self.seen: list[Tensor] = []
        conv.register_forward_pre_hook(lambda _, args: self.seen.append(args[0]))


def test_layout_is_kept_before_a_channels_last_weight_and_is_stock_before_a_contiguous_one() -> None:
    x = torch.randn(1, 8, 3, 4, 5).to(memory_format=torch.channels_last_3d)
    conv = _convolution("LTXVideoCausalConv3d", 8, 5, 3)
    watch = Watch(conv.conv)
    expected = conv(x)
    optimized(conv)
    assert torch.equal(conv(x), expected)
    assert watch.seen[1].stride() == watch.seen[0].stride()
    channels_last(conv.conv)
    torch.testing.assert_close(conv(x), expected)
    assert watch.seen[2].is_contiguous(memory_format=torch.channels_last_3d)


def test_gradients_and_autocast_run_stock() -> None:
    conv = _convolution("WanCausalConv3d", 3, 5, 3, padding=1).requires_grad_(True)
    x = torch.randn(1, 3, 3, 4, 5, requires_grad=True)
    conv(x).square().sum().backward()
    expected = x.grad.clone(), conv.weight.grad.clone()
    x.grad = conv.weight.grad = None
    optimized(conv)
    conv(x).square().sum().backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(conv.weight.grad, expected[1])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert conv(x).dtype == torch.bfloat16


def test_a_subclass_with_a_forward_of_its_own_is_left_alone() -> None:
    stock = type(_convolution("WanCausalConv3d", 3, 5, 3))

    class Mine(stock):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return x

    site = next(iter(CausalPadding().sites(Mine(3, 5, 3), base.Ledger())))
    assert site.refused == "Mine has a forward of its own, unlike WanCausalConv3d"


@pytest.mark.parametrize(
    "name", ["WanCausalConv3d", "LTXVideoCausalConv3d", "CogVideoXCausalConv3d", "LTX2VideoCausalConv3d"]
)
def test_compiles_as_one_graph(name: str) -> None:
    conv = optimized(_convolution(name, 3, 5, 3))
    x = torch.randn(1, 3, 3, 4, 5)
    expected, compiled = conv(x), torch.compile(conv, fullgraph=True, backend="eager")(x)
    first = (lambda y: y[0]) if isinstance(expected, tuple) else (lambda y: y)
    torch.testing.assert_close(first(compiled), first(expected))
