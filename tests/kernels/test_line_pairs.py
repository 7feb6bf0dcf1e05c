"""Winograd along height: its transform, the norms that write it, the convolution on a card of Python or a real one."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.clips import assert_bordered, assert_noted, normal, weights
from tests.kernels.hopper import Card
from tests.kernels.test_conv3x3 import HOPPER
from vae_accel.kernels import bordered, conv3x3, line_pairs
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.group_norm_act import reference as group_reference
from vae_accel.kernels.line_pairs import conv_lines, norm_lines, reference, suits
from vae_accel.kernels.rms_norm_act import reference as rms_reference
from vae_accel.kernels.winograd import transformed_taps

SHAPES = [(1, 2, 1), (2, 4, 6), (1, 6, 70), (2, 2, 31), (1, 8, 128)]  # batch, height, width
CHANNELS = [(96, 96), (64, 128), (128, 256), (64, 192), (192, 96)]


@pytest.fixture
def card(device, monkeypatch):
    """Where the convolution of a test runs."""
    if device == "cpu":
        Card().install(monkeypatch)
    elif not HOPPER:
        pytest.skip("no Hopper card")
    return device


def relative(ours, oracle):
    return float((ours.double() - oracle).square().mean().sqrt() / oracle.square().mean().sqrt())


def test_the_transform_is_a_convolution_along_height():
    x, (weight, _) = torch.randn(2, 6, 8, 5).double(), weights(7, 6, 3, 3, device="cpu", dtype=torch.float64)
    g = weight.unbind(2)
    taps = (g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2])
    v = reference(x).unbind(2)
    m = [F.conv2d(part, tap.unsqueeze(2), padding=(0, 1)) for part, tap in zip(v, taps, strict=True)]
    lines = torch.stack((m[0] + m[1] + m[2], m[1] - m[2] - m[3]), 3).flatten(2, 3)
    torch.testing.assert_close(lines, F.conv2d(x, weight, padding=1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("norm", ["group", "rms"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_match_fp64(device, monkeypatch, shape, norm, act):
    monkeypatch.setattr(line_pairs, "PROGRAMS", 1)  # long strips
    n, h, w = shape
    for c in (24, 96):
        x = bordered.bordered(normal(n, c, h, w, device=device, dtype=torch.bfloat16) + 3)
        weight, bias = (torch.randn(c, device=device).bfloat16() for _ in range(2))
        if norm == "group":
            out = norm_lines(x, weight, bias, 1e-6, groups=8, act=act)
            golden = group_reference(x.double(), 8, weight, bias, 1e-6, act=act)
        else:
            out = norm_lines(x, weight, None, 1e-12, act=act)
            golden = rms_reference(x.double(), weight, None, 1e-12, act=act)
        assert LazyKernel.bound and out.dtype == torch.float16 and out.shape == (n, c, 4, h // 2, w)
        # A sum of two values, rounded once: half an ulp of at most twice the larger of them.
        assert (out.double() - reference(golden)).abs().max() <= 2**-11 * 2 * golden.abs().max()
        row = bordered.geometry(out).row
        sides = bordered.pixels_of(out)[row:].unfold(0, w + 2, row)[: 4 * n * (h // 2 + 1)].movedim(-1, 1)
        sides = sides.unflatten(0, (4 * n, -1))[:, : h // 2]  # the lines and the pixels left and right of them
        assert not sides[:, :, 0].count_nonzero() and not sides[:, :, -1].count_nonzero()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_convolution_matches_fp64(card, channels, shape, residual):
    n, h, w = shape
    x = normal(n, channels[0], h, w, device=card)
    weight, bias = weights(channels[1], channels[0], 3, 3, device=card, dtype=torch.bfloat16)
    more = bordered.bordered(normal(n, channels[1], h, w, device=card, dtype=torch.bfloat16)) if residual else None
    v = bordered.bordered(reference(x.double()).half())
    golden = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    ours = conv_lines(v, weight, bias, residual=more)
    assert relative(ours, golden if more is None else golden + more.double()) < 2.2e-3
    assert_bordered(ours)


@pytest.mark.parametrize("channels", [(64, 128), (96, 96), (96, 192)], ids=str)
def test_statistics_of_the_next_norm(card, channels):
    x = normal(2, channels[0], 10, 70, device=card)
    weight, bias = weights(channels[1], channels[0], 3, 3, device=card, dtype=torch.bfloat16)
    y = conv_lines(bordered.bordered(reference(x.double()).half()), weight, bias + 30, statistics=True)
    assert_noted(y)


def test_norm_and_convolution_together_are_no_further_from_fp32_than_stock(card):
    x = normal(1, 128, 16, 64, device=card, dtype=torch.bfloat16)
    weight, bias = weights(128, 128, 3, 3, device=card, dtype=torch.bfloat16)
    gamma, beta = (torch.randn(128, device=card).bfloat16() for _ in range(2))
    ours = conv_lines(norm_lines(x, gamma, beta, 1e-6, groups=32), weight, bias)
    normed = group_reference(x.double(), 32, gamma, beta, 1e-6, act=True)
    golden = F.conv2d(normed, weight.double(), bias.double(), padding=1)
    stock = F.conv2d(normed.bfloat16().double(), weight.double(), bias.double(), padding=1).bfloat16()
    assert relative(ours, golden) < 0.85 * relative(stock, golden)


def test_what_suits(card, monkeypatch):
    monkeypatch.setattr(line_pairs, "triton_available", lambda x: True)
    x = torch.empty(1, 128, 4, 64, dtype=torch.bfloat16, device=card)
    assert suits(x, 128) and suits(x[..., :55], 128)
    assert not suits(x[..., :54], 128)  # 54 of 64 pixels
    assert not suits(x[..., :3, :], 128) and not suits(x.half(), 128) and not suits(x[:, :40], 128)
    assert not suits(x.unsqueeze(2), 128) and not suits(x, 100)
    assert not suits(x[:, :96], 96)
    monkeypatch.setattr(conv3x3, "is_ready", lambda device: False)
    assert not suits(x, 128)


def test_taps_of_a_picture_are_those_of_a_clip_of_lines(device):
    weight, _ = weights(5, 16, 3, 3, device=device, dtype=torch.bfloat16)
    g = weight.float().permute(0, 2, 3, 1).flatten(2).unbind(1)
    expected = torch.stack(((g[0] + g[2] + g[1]) / 2, (g[0] + g[2] - g[1]) / 2, g[0], -g[2]), 1).half()
    assert torch.equal(transformed_taps(weight.unsqueeze(3), 1).unflatten(1, (4, -1)), expected)
