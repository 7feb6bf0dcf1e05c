import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.clips import assert_bordered, normal
from vae_accel.kernels import bordered, duplicate
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.duplicate import add_duplicates, reference

CASES = {  # small clip, channels out, times, sides, frames dropped
    "each channel its block": ((2, 16, 2, 3, 5), 16, 2, 2, 0),
    "runs across rows": ((1, 16, 2, 3, 4), 8, 2, 2, 0),
    "runs across columns": ((2, 24, 1, 3, 5), 6, 2, 2, 0),
    "every value once": ((1, 16, 2, 2, 3), 2, 2, 2, 0),
    "space alone": ((2, 8, 3, 3, 4), 4, 1, 2, 0),
    "the first latent": ((2, 16, 1, 3, 5), 16, 2, 2, 1),
    "a first step of several": ((1, 8, 3, 2, 2), 8, 2, 2, 1),
    "one pixel": ((1, 300, 1, 1, 1), 300, 1, 2, 0),
    "several tiles": ((1, 40, 2, 17, 19), 20, 2, 2, 0),
}


def compare(device, shape, channels, times, sides, drop, dtype=torch.float16):
    n, c, t, h, w = shape
    repeats = channels * times * sides**2 // c
    x = normal(*shape, device=device, dtype=dtype)
    y = normal(n, channels, t * times - drop, h * sides, w * sides, device=device, dtype=dtype)
    expected = reference(y, x, times, sides, repeats, drop)
    for small in (x, bordered.bordered(x), x.contiguous(memory_format=torch.channels_last_3d)):
        LazyKernel.unbind_all()
        out = add_duplicates(bordered.bordered(y), small, times, sides, repeats, drop)
        assert LazyKernel.bound
        assert torch.equal(out, expected)
        assert_bordered(out)


@pytest.mark.parametrize("case", CASES)
def test_is_stocks_addition(device, case):
    compare(device, *CASES[case])


def test_bf16(device):
    if device == "cpu":
        pytest.skip("Triton's interpreter truncates to bf16")
    compare(device, (1, 512, 2, 20, 30), 256, 1, 2, 0, torch.bfloat16)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(device, data):
    batch, frames, height, width, channels = (data.draw(st.integers(1, most)) for most in (2, 3, 9, 9, 9))
    times = data.draw(st.sampled_from([1, 2]))
    together = data.draw(st.sampled_from([1, 2, 4]))
    shape = (batch, channels * 4 * times // together, frames, height, width)
    compare(device, shape, channels, times, 2, data.draw(st.integers(0, times - 1)))


def test_a_dense_clip_is_the_references(device):
    x, y = normal(1, 8, 2, 3, 3, device=device), normal(1, 8, 4, 6, 6, device=device)
    LazyKernel.unbind_all()
    assert torch.equal(duplicate.add_duplicates(y, x, 2, 2, 8), reference(y, x, 2, 2, 8))
    assert not LazyKernel.bound
