import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.clips import SMALL, assert_bordered, normal, weights
from tests.tolerances import assert_close
from vae_accel.kernels import bordered, group_statistics
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.downsample_conv import _launch, downsample_conv, reference, tile_of

CASES = {  # x, channels out
    "even": ((1, 24, 6, 8), 16),
    "odd": ((1, 24, 7, 9), 16),
    "odd rows": ((2, 8, 5, 6), 24),
    "odd columns": ((2, 8, 4, 7), 8),
    "to one pixel": ((1, 8, 2, 2), 8),
    "to one pixel of two frames": ((2, 8, 3, 3), 8),
    "one row": ((3, 16, 2, 11), 40),
    "one column": ((3, 16, 11, 2), 40),
    "several tiles of a row": ((2, 8, 4, 150), 24),
    "a row of one tile": ((1, 8, 4, 64), 24),
    "a row and its border of one tile": ((1, 8, 4, 60), 24),
    "several tiles of channels": ((2, 40, 6, 10), 72),
}


def compare(device, shape, channels_out, *, tile=SMALL, dtype=torch.float16):
    """Without a bias and with one, from a dense picture and a bordered one, against fp64."""
    x = normal(*shape, device=device, dtype=dtype)
    weight, bias = weights(channels_out, shape[1], 3, 3, device=device, dtype=dtype)
    for given_x in (x, bordered.bordered(x)):
        for b in (None, bias):
            out = _launch(given_x, weight, b, tile)
            oracle = reference(x.double(), weight.double(), None if b is None else b.double())
            assert out.shape == oracle.shape and out.dtype == dtype
            assert_bordered(out)
            assert_close(out, oracle)


@pytest.mark.parametrize("case", CASES)
def test_matches_fp64(device, case):
    compare(device, *CASES[case])
    assert LazyKernel.bound


def test_bf16(device):
    if device == "cpu":
        pytest.skip("Triton's interpreter multiplies bf16 as integers")
    compare(device, (2, 24, 7, 10), 16, dtype=torch.bfloat16)


@pytest.mark.parametrize("channels", [64, 96, 128, 192])
def test_with_the_tile_it_ships_with(device, channels):
    compare(device, (1, channels, 4, 6), channels, tile=tile_of(channels, channels))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(device, data):
    frames, height, width = data.draw(st.integers(1, 3)), *(data.draw(st.integers(2, 12)) for _ in range(2))
    channels = [data.draw(st.sampled_from([8, 16, 40])) for _ in range(2)]
    compare(device, (frames, channels[0], height, width), channels[1])


def test_a_bordered_picture_is_read_in_place(device):
    """Whatever lies around its memory: the border alone is what is read beside the picture."""
    x = bordered.bordered(normal(2, 24, 6, 8, device=device))
    weight, bias = weights(16, 24, 3, 3, device=device)
    memory = torch.full((bordered.pixels_of(x).numel() + 2000,), float("nan"), dtype=x.dtype, device=device)
    inside = bordered.view(memory[800:-1200].view(-1, 24).copy_(bordered.pixels_of(x)), x.shape)
    assert torch.equal(_launch(inside, weight, bias, SMALL), _launch(x, weight, bias, SMALL))


@pytest.mark.parametrize("channels", [24, 64])
def test_statistics_are_those_of_the_result(device, channels):
    """Of an odd and an even width, with tiles that are border alone; of each frame by itself."""
    for width in (9, 64):
        x = normal(2, 8, 6, width, device=device) + 3
        weight, bias = weights(channels, 8, 3, 3, device=device)
        out = _launch(x, weight, bias, SMALL, statistics=True)
        noted = group_statistics.noted(out, 8)
        assert noted is not None
        groups = out.double().unflatten(1, (8, -1)).flatten(2)
        found = group_statistics.combined(noted, 8, 1e-6)
        assert_close(found[0], groups.mean(2))
        assert_close(found[1], (groups.var(2, correction=0) + 1e-6).rsqrt())


def test_what_is_left_to_the_vendor(device):
    """fp32 and wider, channels that the copy engine does not move, and gradients."""
    x, (weight, bias) = normal(1, 8, 4, 6, device=device), weights(8, 8, 3, 3, device=device)
    assert bordered.is_bordered(downsample_conv(x, weight, bias))
    for given_x, w, b in (
        (x.float(), weight.float(), bias.float()),
        (x.double(), weight.double(), bias.double()),
        (x[:, :4], weight[:, :4], bias),
        (x, weight[:4], bias[:4]),
        (x, weight.clone().requires_grad_(), bias),
    ):
        out = downsample_conv(given_x, w, b)
        assert not bordered.is_bordered(out) and torch.equal(out, reference(given_x, w, b))


@pytest.mark.parametrize("size", [(1, 6), (6, 1)])
def test_nothing_to_halve_is_refused_in_the_vendors_words(device, size):
    x, (weight, bias) = normal(1, 8, *size, device=device), weights(8, 8, 3, 3, device=device)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        downsample_conv(x, weight, bias)
