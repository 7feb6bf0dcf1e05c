"""What a convolution notes of its result for the GroupNorm behind it, against fp64 of that result."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.clips import SMALL, assert_bordered, normal, weights
from tests.tolerances import assert_close
from vae_accel.kernels import bordered, conv, group_norm_act, upsample_conv
from vae_accel.kernels.conv import Tile
from vae_accel.kernels.group_norm_act import reference
from vae_accel.kernels.group_statistics import combined, noted

EPS = 1e-6
TWO = Tile(32, 32, 16, 32, 2, 4)  # as of 192 channels: two products
UPSAMPLED = pytest.mark.parametrize("upsampled", [False, True], ids=["conv", "upsample_conv"])


def convolved(device, shape, channels, *, tile=SMALL, bias=0.0, residual=False, split=1, upsampled=False, x=None):
    x = normal(*shape, device=device) if x is None else x
    weight, offset = weights(split * channels, shape[1], *[3] * (x.dim() - 2), device=device)
    if upsampled:
        weight = weight.flatten(2, -3).movedim(2, 0)[0] if x.dim() == 5 else weight
        return upsample_conv._launch(x, weight, offset + bias, tile, statistics=True)
    before = 2 if x.dim() == 5 else 0
    like = (*shape[:1], channels, *([split * shape[2]] if x.dim() == 5 else []), *shape[-2:])
    added = normal(*like, device=device) if residual else None
    return conv._launch(x, weight, offset + bias, before, None, added, split, statistics=True, tile=tile)


def check(y, groups):
    """The mean within two units of its last place in fp32, the deviation to 3e-5, of every frame: as much as an
    ulp of a part's mean of 3000 is beside a deviation of one."""
    parts = noted(y, groups)
    assert parts is not None and parts.isfinite().all()
    mean, inverse = combined(parts, groups, EPS)
    frames = (y.transpose(1, 2).flatten(0, 1) if y.dim() == 5 else y).double()
    values = frames.reshape(frames.shape[0], groups, -1)
    truth = values.mean(2)
    torch.testing.assert_close(mean.double(), truth, rtol=2.4e-7, atol=1e-6 * float(values.std()))
    torch.testing.assert_close(inverse.double(), (values.var(2, unbiased=False) + EPS).rsqrt(), rtol=3e-5, atol=0)


CASES = {  # x, channels, groups, more
    "picture": ((2, 8, 5, 6), 64, 32, {}),
    "odd": ((1, 8, 7, 9), 24, 4, {}),
    "channels that do not fill a tile": ((1, 8, 3, 5), 40, 8, {}),
    "two products": ((2, 8, 4, 5), 192, 32, {"tile": TWO}),
    "pairs of pixels": ((2, 8, 5, 6), 96, 32, {"tile": TWO}),
    "two pixels": ((1, 8, 2, 1), 16, 2, {}),
    "with a residual": ((2, 8, 5, 6), 128, 32, {"residual": True}),
    "frames": ((2, 8, 3, 4, 5), 64, 8, {}),
    "channels that are frames": ((2, 8, 2, 3, 4), 40, 4, {"split": 2}),
    "tiles of border alone": ((3, 8, 31, 2), 64, 16, {"tile": SMALL._replace(rows=16)}),
}


@pytest.mark.parametrize("case", CASES)
def test_are_those_of_the_result(device, case):
    shape, channels, groups, more = CASES[case]
    y = convolved(device, shape, channels, **more)
    assert_bordered(y)
    check(y, groups)


@pytest.mark.parametrize("case", [name for name in CASES if "residual" not in CASES[name][3]])
def test_are_those_of_an_upsampled_result(device, case):
    shape, channels, groups, more = CASES[case]
    y = convolved(device, shape, channels, upsampled=True, **{k: v for k, v in more.items() if k != "split"})
    assert_bordered(y)
    check(y, groups)


@UPSAMPLED
@pytest.mark.parametrize("offset", [100.0, -3000.0])
def test_far_from_zero(device, upsampled, offset):
    """A mean of a thousand deviations: fp32 E[x²] - E[x]² is off by the whole variance here."""
    check(convolved(device, (2, 8, 6, 7), 64, bias=offset, upsampled=upsampled), 32)


@UPSAMPLED
def test_a_ramp(device, upsampled):
    """Means that differ between tiles make most of the deviation."""
    ramp = torch.linspace(-20, 20, 19 * 11, device=device).view(1, 1, 19, 11).expand(1, 8, 19, 11)
    check(convolved(device, ramp.shape, 64, upsampled=upsampled, x=ramp.half()), 16)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(device, data):
    batch, height, width = (data.draw(st.integers(low, most)) for low, most in ((1, 3), (2, 9), (1, 9)))
    groups = data.draw(st.sampled_from([1, 4, 8]))
    channels = data.draw(st.sampled_from([16, 64, 72, 128]))
    upsampled = data.draw(st.booleans())
    check(convolved(device, (batch, 8, height, width), channels, upsampled=upsampled), groups)


@UPSAMPLED
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_norm_reads_them_instead_of_the_picture(device, upsampled, dtype, monkeypatch):
    y = convolved(device, (2, 8, 5, 7), 64, upsampled=upsampled, bias=2.0)
    given = (32, *weights(64, 1, 1, device=device)[1:], None, EPS)
    plain = group_norm_act.group_norm_act(bordered.bordered(y.clone()), *given, act=True, dtype=dtype)
    monkeypatch.setattr("vae_accel.kernels.group_statistics.group_statistics", None)
    out = group_norm_act.group_norm_act(y, *given, act=True, dtype=dtype)
    assert_bordered(out)
    for result in (out, plain):
        assert_close(result, reference(y.double(), *given, act=True))


WRITES = {
    "add": lambda y: y.add_(1),
    "a view": lambda y: y[:, 2:4].mul_(2),
    "an assignment": lambda y: y.__setitem__((0, 1), 3),
    "out": lambda y: torch.sigmoid(y.clone(), out=y),
    "data": lambda y: setattr(y, "data", y.data.clone()),
    "the memory beneath": lambda y: bordered.pixels_of(y).mul_(2),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("write", WRITES)
def test_who_writes_into_the_result_loses_them(device, write, mode):
    with mode():
        y = convolved(device, (1, 8, 4, 5), 64)
        assert noted(y, 32) is not None
        WRITES[write](y)
        assert noted(y, 32) is None


@torch.inference_mode()
def test_nothing_else_has_them(device):
    y = convolved(device, (1, 8, 4, 5), 64)
    for other in (y[:], y.clone(), y + 1, y.detach(), copy.deepcopy(y), bordered.bordered(y, torch.float32)):
        assert noted(other, 32) is None
    assert noted(y, 64) is None  # two neighbours are two groups
    x, (weight, _) = normal(1, 8, 4, 5, device=device), weights(8, 8, 3, 3, device=device)
    assert noted(conv.conv(x, weight, None, padding=(1, 1)), 4) is None
    assert noted(conv.conv(x, weight, None, padding=(1, 1), statistics=True), 4) is not None
    assert noted(upsample_conv.upsample_conv(x, weight, None, statistics=True), 4) is not None
