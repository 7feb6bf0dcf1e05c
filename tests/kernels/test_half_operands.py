"""fp32 models on fp16 operands: nearer to fp64 than TF32 (`tests/tf32.py`), whatever the size of the numbers."""

import pytest
import torch
from torch import nn

from tests.kernels.clips import SMALL, assert_bordered, normal, weights
from tests.tf32 import Simulated, tf32
from tests.tolerances import assert_close
from vae_accel import optimize_vae, settings
from vae_accel.families.half import LOST, NORMAL, peaks
from vae_accel.kernels import bordered, half_operands
from vae_accel.kernels.conv import _launch, conv, reference
from vae_accel.kernels.eligible import unsupported, wants_fp16
from vae_accel.kernels.half_operands import in_terms, scaled, stock_is_tf32
from vae_accel.kernels.thin_conv import thin_conv
from vae_accel.kernels.upsample_conv import reference as upsample_reference
from vae_accel.kernels.upsample_conv import upsample_conv
from vae_accel.tuning.search import error

FP32 = torch.float32
TWO = SMALL._replace(cols=32, more=16)
# Of two roundings alike the weights' is gone: 0.71 of stock's error, from some thousand values.
NEARER = 0.76


def given(device, channels=40, size=1.0, kernel=(3, 3, 3), out=24):
    x = normal(1, channels, 3, 6, 7, device=device, dtype=FP32) * size
    weight, bias = weights(out, channels, *kernel, device=device, dtype=FP32)
    return x, weight, bias


def of_clip(tile=None, **more):
    def ours(x, weight, bias):
        return _launch(x, weight, bias, 2, None, None, 1, tile=tile) if tile else conv(x, weight, bias, **place)

    place = {"padding": (1, 1), "before": 2}
    return ours, lambda *all_of_it: reference(*all_of_it, **place), more


FORMS = {
    "conv": of_clip(),
    "two products": of_clip(TWO, out=48),
    "pairs of pixels": of_clip(out=96),
    "thin": (lambda *a: thin_conv(*a, before=2), lambda *a: reference(*a, padding=(1, 1), before=2), {"out": 3}),
    "1x1": (conv, reference, {"kernel": (1, 1, 1), "channels": 200, "out": 200}),
    "upsampling": (upsample_conv, upsample_reference, {"kernel": (3, 3)}),
    "upsampling in time": (
        lambda *a: bordered.dense(upsample_conv(*a, double=True, space="replicate")),  # whose border is open
        lambda *a: upsample_reference(*a, double=True, space="replicate"),
        {},
    ),
}
each_form = pytest.mark.parametrize("form", FORMS)


@each_form
@pytest.mark.parametrize("size", [1.0, 1e-7, 3e5, 1e20])
def test_nearer_to_fp64_than_tf32(device, form, size):
    ours, law, more = FORMS[form]
    x, weight, bias = given(device, size=size, **more)
    assert unsupported(x, weight, tuple(k // 2 for k in weight.shape[-2:])) is None or form == "thin"
    golden = law(x.double(), weight.double(), None)
    out, stock = ours(x, weight, None), law(tf32(x).double(), tf32(weight).double(), None)
    assert out.dtype == FP32 and out.shape == golden.shape
    assert 2e-4 < error(stock, golden) < 4e-4
    assert error(out, golden) <= NEARER * error(stock, golden)
    with_bias = ours(x, weight, bias)
    assert_close(with_bias / size, (out.double() + bias.double().view(-1, *[1] * (out.dim() - 2))) / size)


@each_form
def test_the_second_term_takes_the_rounding_of_weights_away(device, form, monkeypatch):
    """Of output channels 1e-3 to 1e1 in size, each by itself; what a norm wrote in fp16 is then multiplied exactly."""
    ours, law, more = FORMS[form]
    x, weight, _ = given(device, **more)
    weight *= torch.logspace(-3, 1, weight.shape[0], device=device).view(-1, *[1] * (weight.dim() - 1))

    def off(x, weight):
        golden = law(x.double(), weight.double(), None)
        size = golden.std([d for d in range(golden.dim()) if d != 1], keepdim=True)
        return error(ours(x, weight, None).double() / size, golden / size)

    two, exact = off(x, weight), off(x.half(), weight)
    # 1e-6 to 1e3 beside each other. A card cuts its sums off: 2.03e-6 on an H200, 1e-6 in the interpreter.
    assert off(x.half(), weight * 10 ** (torch.rand_like(weight) * 9 - 6)) < 4e-6
    monkeypatch.setattr(half_operands, "TERMS", 1)
    assert two < 0.8 * off(x, weight)
    assert exact < 4e-6 < 1e-4 < off(x.half(), weight)


def test_two_terms_hold_a_weight():
    """To 2^-22 of itself, or 2^-36 of the largest."""
    weight = torch.cat((torch.logspace(-12, 3, 100_000) * torch.randn(100_000), torch.zeros(8))).view(8, -1)
    scale = scaled(torch.zeros(1, 8, 1, 1).half(), None, weight)
    terms = in_terms(scale[2], torch.float16, 2).double() * float(scale[3])
    first, second = terms.chunk(2, 1)
    off = (first + second - weight.double()).abs()
    assert torch.equal(first.float(), scale[2].half() * scale[3])
    assert (off <= (2.0**-22 * weight.double().abs()).clamp_min(2.0**-36 * float(weight.abs().max()))).all()


@each_form
def test_a_power_of_two_goes_through_exactly(device, form):
    """Operands, their units and sums: nothing depends on where in fp32's range a clip or a weight lies."""
    ours, _, more = FORMS[form]
    x, weight, _ = given(device, **more)
    out = ours(x, weight, None)
    for clip, taps in ((2.0**40, 1.0), (2.0**-12, 2.0**-8), (1.0, 2.0**30)):
        assert torch.equal(ours(x * clip, weight * taps, None), out * (clip * taps))


def test_a_residual_and_frames_of_another_size(device):
    """The frames in front decide the unit with the clip: whichever is larger."""
    x, weight, bias = given(device, out=40)
    for history in (x[:, :, :2] * 1e5, x[:, :, :2] * 1e-5):
        for y, residual in ((x, x * 1e3), (bordered.bordered(x), bordered.bordered(x))):
            options = {"padding": (1, 1), "before": 2, "history": history, "residual": residual}
            out = conv(y, weight, bias, **options)
            golden = reference(x.double(), weight.double(), bias.double(), **options)
            assert_bordered(out)
            with Simulated():
                stock = reference(x, weight, bias, **options)
            assert error(out, golden) <= NEARER * error(stock, golden)


@pytest.mark.parametrize("tile", [SMALL, TWO], ids=["one", "two"])
def test_fp16_of_a_norm_beside_an_fp32_weight(device, tile):
    """What is rounded is the activations; weights, products, bias, residual and result are fp32."""
    x, weight, bias = given(device, out=48)
    half, residual = x.half(), normal(1, 48, 3, 6, 7, device=device, dtype=FP32)
    history = normal(1, 40, 2, 6, 7, device=device)
    options = {"padding": (1, 1), "before": 2, "history": history, "residual": residual}
    out = _launch(half, weight, bias, 2, history, residual, 1, tile=tile)
    assert out.dtype == FP32
    assert_bordered(out)
    assert_close(out, reference(half.double(), weight.double(), bias.double(), **options), case="cut sums")


def test_channels_that_are_frames(device):
    x, weight, bias = given(device, kernel=(3, 1, 1), out=80)
    out = conv(x, weight, bias, before=2, split=2)
    golden = reference(x.double(), weight.double(), bias.double(), before=2, split=2)
    with Simulated():
        stock = reference(x, weight, bias, before=2, split=2)
    assert out.shape == golden.shape and error(out, golden) <= NEARER * error(stock, golden)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d, "bordered"])
def test_operands_are_brought_into_the_middle_of_fp16(layout):
    x = torch.randn(2, 8, 3, 4, 5) * torch.logspace(-9, 9, 8).view(1, -1, 1, 1, 1)
    y = bordered.bordered(x) if layout == "bordered" else x.contiguous(memory_format=layout)
    clip, none, weight, unit = scaled(y, None, torch.full((8, 8, 1, 1, 1), -3e-9))
    assert none is None and clip.dtype == torch.float16 and weight.dtype == FP32
    assert_bordered(clip)
    assert 2**11 <= float(clip.abs().max()) < 2**12
    taps = 2.0**-29 / 2**11
    assert torch.equal(weight, torch.full_like(weight, -3e-9 / taps)) and 2**11 <= -float(weight[0, 0]) < 2**12
    own = float(x.abs().max() / clip.abs().max())
    own = 2.0 ** round(torch.log2(torch.tensor(own)).item())
    assert torch.equal(clip, (x / own).half()) and float(unit) == own * taps


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(device, value):
    x, weight, bias = given(device)
    x[0, 3, 1, 2, 2] = value
    assert not conv(x, weight, bias, padding=(1, 1), before=2).isfinite().all()


def test_nothing_gives_the_bias(device):
    x, weight, bias = given(device)
    out = conv(x.zero_(), weight, bias, padding=(1, 1), before=2)
    assert torch.equal(out, bias.view(-1, 1, 1, 1).expand_as(out[0])[None])
    assert not conv(x + 1, weight.zero_(), None, padding=(1, 1), before=2).any()


@pytest.fixture
def switches():
    """torch's switches as they were: the newer one, once set, has the older raise."""
    cudnn = torch.backends.cudnn
    yield cudnn
    cudnn.enabled = True
    if hasattr(cudnn, "conv"):
        cudnn.conv.fp32_precision = "tf32"
    cudnn.allow_tf32 = True


def off_by_tf32(cudnn, monkeypatch):
    cudnn.allow_tf32 = False


def off_by_precision(cudnn, monkeypatch):
    if not hasattr(cudnn, "conv"):
        pytest.skip("torch has no switch for convolutions alone before 2.9")
    cudnn.conv.fp32_precision = "ieee"
    with pytest.raises(RuntimeError):
        print(cudnn.allow_tf32)


def off_by_cudnn(cudnn, monkeypatch):
    cudnn.enabled = False


def off_by_nvidia(cudnn, monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setattr(half_operands, "_forbidden", settings.tf32_forbidden)


@pytest.mark.parametrize("turn_off", [off_by_tf32, off_by_precision, off_by_cudnn, off_by_nvidia])
def test_where_tf32_is_off_stock_runs_bit_for_bit(device, turn_off, switches, monkeypatch):
    """Asked at every call: a user may switch at any time."""
    x, weight, bias = given(device)
    assert stock_is_tf32(x) and wants_fp16(x)
    ours = conv(x, weight, bias, padding=(1, 1), before=2)
    turn_off(switches, monkeypatch)
    assert not stock_is_tf32(x) and not wants_fp16(x)
    assert "TF32 is off" in unsupported(x, weight, (1, 1))
    stock = reference(x, weight, bias, padding=(1, 1), before=2)
    assert torch.equal(conv(x, weight, bias, padding=(1, 1), before=2), stock) and not torch.equal(ours, stock)
    picture = x[:, :, 0], weight[:, :, 0], None
    assert torch.equal(upsample_conv(*picture), upsample_reference(*picture))
    assert wants_fp16(x.bfloat16())


def test_a_cpu_is_no_card():
    assert not stock_is_tf32(torch.zeros(1)) and not wants_fp16(torch.zeros(1, 8, 2, 2))


def test_the_rounding_of_fp16_is_that_of_tf32_and_below_its_range_a_known_error():
    x = torch.cat((torch.logspace(-12, 4.8, 200_000), torch.rand(1000) * 65504)) * torch.randn(201_000).sign()
    off, normal = (x.half().double() - x.double()).abs(), x.abs() >= NORMAL
    assert torch.equal(x.half().float()[normal], tf32(x)[normal])
    assert float(off[~normal].max()) <= LOST and (off[~normal] > 0.9 * LOST).any()


def norm_and_weight(scale, size, spread=0.0):
    """A norm's scale and a weight behind it, whose channels differ in size by e^±`spread`, each the other's inverse."""
    generator = torch.Generator().manual_seed(0)
    apart = torch.exp(spread * torch.randn(48, generator=generator))
    weight = torch.randn(32, 48, 3, 3, generator=generator) * size / apart.view(-1, 1, 1)
    return apart * scale, weight


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_where_numbers_are_too_small_fp16_is_not_used(spread):
    """Whatever is taken is as near as TF32; and what is refused is not refused for nothing."""
    x, taken, refused = torch.randn(4, 48, 16, 16), [], []
    for power in range(0, 24, 2):
        for small in (0, 1):
            scale, weight = norm_and_weight(*((2.0**-power, 0.05) if small else (1.0, 2.0**-power)), spread)
            values = nn.functional.silu(x * scale.view(-1, 1, 1))
            golden = nn.functional.conv2d(values.double(), weight.double())
            stock = nn.functional.conv2d(tf32(values).double(), tf32(weight).double())
            ours = nn.functional.conv2d(values.half().double(), weight.half().double())
            ratio = error(ours, golden) / error(stock, golden)
            (refused if peaks(scale, None, weight) is None else taken).append(ratio)
    assert taken and max(taken) <= 1.02, taken
    assert refused and max(refused) > 1.5, refused


def test_the_check_reads_what_it_can_read():
    scale, weight = norm_and_weight(1.0, 0.05)
    assert peaks(scale, scale, weight) == pytest.approx((1.0, 1.0, float(weight.abs().max())))
    assert peaks(scale.double(), None, weight.double()) is None
    assert peaks(scale, None, weight.bfloat16()) is None
    assert peaks(scale, None, weight.to("meta")) is None
    assert peaks(scale.bfloat16(), None, weight.bfloat16()) is not None
    weight[0, 0, 0, 0] = 65504 / 4
    assert peaks(scale, None, weight) is None


@pytest.mark.gpu
def test_on_a_card_not_where_it_is_turned_off(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setattr(half_operands, "_wanted", False)
    x = torch.zeros(1, 8, 4, 4, device="cuda")
    assert "VAE_ACCEL_HALF_OPERANDS=0" in unsupported(x, torch.zeros(8, 8, 3, 3, device="cuda"), (1, 1))


def test_the_setting_is_what_the_last_optimize_was_told(monkeypatch):
    monkeypatch.setattr(half_operands, "_wanted", False)
    for given in (True, False):
        optimize_vae(nn.Sequential(nn.Conv2d(3, 3, 3)), half_operands=given)
        assert half_operands._wanted is given
