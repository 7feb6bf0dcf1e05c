"""Convolutions of e4m3 operands: on a CPU by the law and by a card of Python, with Triton interpreted; on a Hopper card
the kernels themselves."""

import pytest
import torch
import torch.nn.functional as F

from tests import interpreter
from tests.kernels.clips import assert_bordered, normal, weights
from tests.kernels.hopper import Card
from vae_accel.kernels import bordered, fp8_conv, group_statistics
from vae_accel.kernels._dispatch import E4M3
from vae_accel.kernels.group_norm_act import group_norm_act
from vae_accel.kernels.group_norm_act import reference as group_norm_act_reference

SHAPES = [(1, 1, 1), (1, 7, 6), (1, 9, 31), (2, 5, 4)]
CHANNELS = [(128, 128), (256, 128), (128, 192), (384, 256)]
RESULTS = [torch.bfloat16, torch.float16]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """A card of Python beside Triton's interpreter, or a Hopper card. What a kernel does not write is NaN."""
    if request.param == "cuda" and not HOPPER:
        pytest.skip("no Hopper card")
    if request.param == "cpu":
        Card().install(monkeypatch)
    interpreter.poison(monkeypatch)
    with interpreter.kernels(monkeypatch, request.param == "cpu"):
        yield request.param


def operands(channels, shape, device, result=torch.bfloat16):
    """Activations as a norm writes them, times 8, and what stands beside them."""
    (i, o), (n, h, w) = channels, shape
    x = (8 * F.silu(normal(n, i, h, w, device=device, dtype=torch.float32))).to(E4M3)
    weight, bias = weights(o, i, 3, 3, device=device, dtype=result)
    return x, weight, bias, normal(n, o, h, w, device=device, dtype=result)


def exact(x, weight, bias, gain, residual):
    """In fp64, of the numbers that are multiplied: `x` and the quantized weight."""
    taps, scales = fp8_conv.quantized_reference(weight, gain)
    taps = taps.double().view(weight.shape[0], 3, 3, -1).movedim(-1, 1)
    y = F.conv2d(x.double(), taps, padding=1) * scales.double()[:, None, None]
    y = y if bias is None else y + bias.double()[:, None, None]
    return y if residual is None else y + residual.double()


def off(ours, truth):
    return float((ours.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt())


@pytest.mark.parametrize("result", RESULTS, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_is_the_convolution_of_the_quantized_operands(device, channels, shape, residual, result):
    x, weight, bias, more = operands(channels, shape, device, result)
    bias, more = (bias, more) if residual else (None, None)
    ours = fp8_conv.fp8_conv(x, weight, bias, 8.0, residual=more)
    truth = exact(x, weight, bias, 8.0, more)
    assert ours.dtype == result and ours.shape == truth.shape
    assert_bordered(ours)
    assert off(ours, truth) < ROUNDING[result] + (5e-3 if x.is_cuda else 0)  # a card keeps 14 bits of its sums
    law = fp8_conv.reference(x, weight, bias, 8.0, residual=more)
    assert off(law, truth) < ROUNDING[result]


def test_is_near_the_convolution_of_what_was_quantized(device):
    values = F.silu(normal(1, 256, 9, 31, device=device, dtype=torch.float32))
    weight, bias = weights(128, 256, 3, 3, device=device, dtype=torch.bfloat16)
    ours = fp8_conv.fp8_conv((8 * values).to(E4M3), weight, bias, 8.0)
    truth = F.conv2d(values.double(), weight.double(), bias.double(), padding=1)
    assert 0.01 < off(ours, truth) < 0.04


def test_a_law_without_a_card_keeps_the_layout():
    x, weight, bias, more = operands((128, 128), (1, 3, 5), "cpu")
    for given in (x.contiguous(), x.contiguous(memory_format=torch.channels_last)):
        ours = fp8_conv.fp8_conv(given, weight, bias, 8.0, residual=more)
        assert ours.stride() == given.stride() and off(ours, exact(x, weight, bias, 8.0, more)) < 2.0**-8


@pytest.mark.parametrize("channels", [(128, 128), (128, 192)], ids=str)
def test_statistics_of_the_next_norm(device, channels):
    x, weight, bias, more = operands(channels, (2, 11, 14), device)
    y = fp8_conv.fp8_conv(x, weight, bias + 3, 8.0, residual=more, statistics=True)
    assert group_statistics.noted(y, 32) is not None
    found = group_statistics.bordered_statistics(y, 32, 1e-6, samples=2)
    groups = y.double().unflatten(1, (32, -1)).flatten(2)
    torch.testing.assert_close(found[0].double(), groups.mean(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), groups.var(-1, unbiased=False).add(1e-6).rsqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_weights_are_quantized_by_rows(device, dtype, last):
    weight, _ = weights(24, 128, 3, 3, device=device, dtype=dtype)
    weight = weight if last else weight.contiguous()
    weight *= torch.logspace(-6, 4, 24, 2, device=device, dtype=dtype)[:, None, None, None]
    weight[3] = 0
    taps, scales = fp8_conv.quantized(weight, 4.0)
    law, factors = fp8_conv.quantized_reference(weight, 4.0)
    assert taps.dtype == E4M3 and taps.shape == (24, 9 * 128) and scales.shape == (24,)
    torch.testing.assert_close(scales, factors, rtol=1e-6, atol=0)
    # Of a tie either side, where the division was rounded otherwise.
    assert (taps.float() != law.float()).float().mean() < 1e-3
    restored = taps.float() * (4 * scales)[:, None]
    rows = weight.movedim(1, -1).flatten(1).float()
    assert ((restored - rows).abs() <= rows.abs() / 16 + rows.abs().amax(1, keepdim=True) / 448 * 2.0**-10).all()
    largest = taps.float().abs().amax(1)
    assert (largest == torch.where(torch.arange(24, device=device) == 3, 0.0, 448.0)).all()


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_weight_that_is_no_number_shows(device, value):
    weight, _ = weights(16, 128, 3, 3, device=device, dtype=torch.bfloat16)
    weight[5, 7, 1, 1] = float(value)
    taps, scales = fp8_conv.quantized(weight, 1.0)
    assert (taps.float() * scales[:, None])[5].isnan().any() and taps[:5].float().isfinite().all()


@pytest.mark.parametrize("shape", [(1, 128, 7, 6), (2, 128, 9, 31)], ids=str)
def test_a_norm_writes_e4m3_with_a_border_of_zeros(device, shape):
    x = bordered.bordered(normal(*shape, device=device, dtype=torch.float16))
    weight, bias = (normal(128, device=device, dtype=torch.float16) for _ in range(2))
    given = {"act": True, "dtype": E4M3, "gain": 4.0}
    ours = group_norm_act(x, 32, weight, bias, 1e-6, **given)
    assert ours.dtype == E4M3 and bordered.is_bordered(ours)
    pixels = bordered.pixels_of(ours).float()
    bordered.view(pixels, x.shape).zero_()
    assert not pixels.count_nonzero() and not pixels.isnan().any()
    exactly = 4 * group_norm_act_reference(x.double(), 32, weight, bias, 1e-6, act=True)
    assert ((ours.double() - exactly).abs() <= exactly.abs() / 15.9 + 2.0**-10).all()


@pytest.mark.parametrize("plain", [False, True])
def test_what_is_too_large_saturates_and_what_is_no_number_stays_none(device, plain):
    x = normal(1, 128, 4, 6, device=device, dtype=torch.float16)
    weight = torch.full((128,), 1000.0, device=device, dtype=torch.float16)
    given = {"act": False, "dtype": E4M3, "gain": 1024.0}
    ours = group_norm_act(x if plain else bordered.bordered(x), 32, weight, None, 1e-6, **given).float()
    assert ours.abs().max() == 448 and not ours.isnan().any()
    x[0, 0, 1, 1] = float("nan")
    ours = group_norm_act(x if plain else bordered.bordered(x), 32, weight, None, 1e-6, **given).float()
    assert ours[0, :4].isnan().all() and not ours[0, 4:].isnan().any()


def test_a_gain_lets_16_to_32_deviations_fit():
    for gamma, beta in ((1.0, 0.0), (0.02, 0.5), (7.0, -3.0), (-300.0, 0.0)):
        gain = fp8_conv.gain_of(torch.tensor([gamma, gamma / 3]), torch.tensor([beta, 0.0]))
        assert 224 < gain * (16 * abs(gamma) + abs(beta)) <= 448
    assert fp8_conv.gain_of(None, None) == 16.0
    assert fp8_conv.gain_of(torch.zeros(2), torch.zeros(2)) == 1.0
    assert fp8_conv.gain_of(torch.tensor([float("inf")]), None) == 1.0


def test_what_has_no_form_is_told(monkeypatch):
    assert fp8_conv.unfit((128, 256, 128)) is None and fp8_conv.unfit((128, 192)) is None
    assert fp8_conv.unfit((96, 128)) == "96 input channels are no multiple of 128"
    assert fp8_conv.unfit((128, 128, 96)) == "96 output channels are no multiple of 128 or 192"
    assert fp8_conv.unfit((128, 192, 192)) == "192 input channels are no multiple of 128"
    pictures = torch.empty(1, 128, 4, 4, dtype=torch.bfloat16)
    assert fp8_conv.refusal(pictures, (128, 128)) is None
    assert "torch.float32" in fp8_conv.refusal(pictures.float(), (128, 128))
    assert "96 input" in fp8_conv.refusal(pictures, (96, 128))
