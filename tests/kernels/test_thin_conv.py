import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.clips import normal, weights
from tests.tolerances import assert_close
from vae_accel.kernels import bordered
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.conv import reference
from vae_accel.kernels.thin_conv import MOST, thin_conv

CASES = {  # x, channels out, kernel, frames in front, frames of history
    "picture": ((2, 24, 5, 6), 3, (3, 3), 0, None),
    "several tiles": ((1, 96, 19, 17), 3, (3, 3), 0, None),
    "one pixel": ((1, 8, 1, 1), 1, (3, 3), 0, None),
    "frames apart": ((2, 40, 3, 4, 5), 4, (1, 3, 3), 0, None),
    "behind zeros": ((2, 144, 3, 5, 4), 3, (3, 3, 3), 2, None),
    "behind a frame": ((2, 24, 2, 5, 4), 3, (3, 3, 3), 2, 1),
    "behind two": ((2, 192, 2, 3, 7), 3, (3, 3, 3), 2, 2),
    "one frame behind two": ((2, 8, 1, 1, 1), 2, (3, 3, 3), 2, 2),
    "fewer frames than there were": ((2, 8, 4, 3, 4), 7, (3, 3, 3), 1, None),
    "more columns": ((1, 16, 3, 3, 5), 12, (3, 3, 3), 2, 2),
    "nothing in front": ((2, 288, 3, 4, 4), 7, (3, 3, 3), 0, None),
}


def compare(device, shape, channels_out, kernel, before=0, kept=None, *, dtype=torch.float16, operands=torch.float16):
    x = normal(*shape, device=device, dtype=operands)
    weight, bias = weights(channels_out, shape[1], *kernel, device=device, dtype=dtype)
    history = None if kept is None else normal(*shape[:2], kept, *shape[3:], device=device, dtype=operands)
    options = {"before": before, "history": history}
    for b in (None, bias):
        oracle = reference(
            x.double(), weight.double(), None if b is None else b.double(), padding=(1, 1), **options
        )  # fmt: skip
        out = thin_conv(x, weight, b, **options)
        assert out.shape == oracle.shape and out.dtype == dtype and out.is_contiguous()
        assert_close(out, oracle)


@pytest.mark.parametrize("case", CASES)
def test_matches_fp64(device, case):
    compare(device, *CASES[case])
    assert LazyKernel.bound


def test_a_bf16_model(device):
    compare(device, (1, 96, 3, 3, 4), 3, (3, 3, 3), 2, 2, dtype=torch.bfloat16)


def test_bf16_operands(device):
    if device == "cpu":
        pytest.skip("Triton's interpreter multiplies bf16 as integers")
    compare(device, (1, 96, 3, 3, 4), 3, (3, 3, 3), 2, 2, dtype=torch.bfloat16, operands=torch.bfloat16)


def test_a_bordered_clip_is_read_in_place(device):
    """Whatever lies around its memory: the border alone is what is read beside the picture."""
    x = bordered.bordered(normal(2, 24, 2, 3, 5, device=device))
    weight, bias = weights(3, 24, 3, 3, 3, device=device)
    memory = torch.full((x.untyped_storage().nbytes() // 2 + 2000,), float("nan"), dtype=x.dtype, device=device)
    pixels = memory[800:-1200].view(-1, 24).copy_(bordered.pixels_of(x))
    inside = bordered.view(pixels, x.shape)
    assert torch.equal(
        thin_conv(inside, weight, bias, before=2, history=inside), thin_conv(x, weight, bias, before=2, history=x)
    )


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(device, data):
    batch, frames, height, width = (data.draw(st.integers(1, most)) for most in (2, 4, 20, 20))
    channels_in, channels_out = data.draw(st.sampled_from([8, 40])), data.draw(st.integers(1, MOST))
    before = data.draw(st.integers(max(0, 3 - frames), 2))
    kept = data.draw(st.one_of(st.none(), st.integers(1, before))) if before else None
    compare(device, (batch, channels_in, frames, height, width), channels_out, (3, 3, 3), before, kept)


@pytest.mark.parametrize("recorded", ["x", "history"])
def test_gradients_are_the_references(device, recorded):
    given = {name: normal(1, 8, 2, 3, 4, device=device) for name in ("x", "history")}
    given[recorded].requires_grad_()
    weight, bias = weights(3, 8, 3, 3, 3, device=device)
    ours = thin_conv(given["x"], weight, bias, before=2, history=given["history"])
    theirs = reference(given["x"], weight, bias, padding=(1, 1), before=2, history=given["history"])
    assert all(
        map(torch.equal, *(torch.autograd.grad(out.float().square().sum(), given[recorded]) for out in (ours, theirs)))
    )


def test_without_triton_the_law_runs():
    x = torch.randn(2, 6, 2, 3, 5)
    weight, bias = weights(3, 6, 3, 3, 3, device="cpu", dtype=torch.float32)
    oracle = reference(x, weight, bias, padding=(1, 1), before=2)
    assert torch.equal(thin_conv(x, weight, bias, before=2), oracle)


def test_more_channels_are_refused():
    with pytest.raises(ValueError, match="at most 14 channels, and was asked for 15"):
        thin_conv(torch.zeros(1, 8, 3, 3), torch.zeros(15, 8, 3, 3), None)
