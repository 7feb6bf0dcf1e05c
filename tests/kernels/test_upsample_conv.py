import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.clips import SMALL, assert_bordered, normal, weights
from tests.tolerances import assert_close
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.upsample_conv import _launch, folded_taps, reference, upsample_conv

CASES = {  # x, channels out
    "picture": ((2, 24, 5, 6), 40),
    "odd": ((1, 40, 3, 5), 24),
    "one pixel": ((1, 8, 1, 1), 8),
    "clip": ((2, 8, 3, 3, 4), 16),
    "one frame": ((2, 8, 1, 2, 3), 8),
    "many channels": ((1, 144, 3, 4), 96),
    "a long run": ((1, 288, 2, 3), 32),
}


def folded(weight, dtype):
    """[4 phases, O, 2, 2 I] of [O, I, 3, 3]: even pixels see (w0, w1 + w2), odd ones (w0 + w1, w2)."""
    groups = (([0], [1, 2]), ([0, 1], [2]))
    taps = weight.double().movedim(1, -1)
    rows = [
        [torch.cat([taps[:, i][:, :, j].sum((1, 2)) for j in groups[b]], -1) for i in groups[a]]
        for a in range(2)
        for b in range(2)
    ]
    return torch.stack([torch.stack(pair, 1) for pair in rows]).to(dtype)


def law(x, weight, bias):
    """In fp64, by the folded taps as they are rounded: the kernel's own rounding is then its result's alone."""
    taps = folded(weight, x.dtype).double()
    frames = torch.nn.functional.pad((x.transpose(1, 2).flatten(0, 1) if x.dim() == 5 else x).double(), (1, 1, 1, 1))
    out = frames.new_empty(frames.shape[0], weight.shape[0], *(2 * size for size in x.shape[-2:]))
    height, width = x.shape[-2:]
    for phase in range(4):
        a, b = divmod(phase, 2)
        kernel = taps[phase].unflatten(-1, (2, -1)).movedim(-1, 1)
        seen = frames[:, :, a : a + height + 1, b : b + width + 1]
        out[:, :, a::2, b::2] = torch.nn.functional.conv2d(seen, kernel, None if bias is None else bias.double())
    return out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2) if x.dim() == 5 else out


def compare(device, shape, channels_out, *, tile=SMALL, dtype=torch.float16, operands=torch.float16):
    x = normal(*shape, device=device, dtype=operands)
    weight, bias = weights(channels_out, shape[1], 3, 3, device=device, dtype=dtype)
    for b in (None, bias):
        out = _launch(x, weight, b, tile)
        oracle = reference(x.double(), weight.double(), None if b is None else b.double())
        assert out.shape == oracle.shape and out.dtype == dtype
        assert_bordered(out)
        assert_close(out, law(x, weight, b))
        # Sums of up to four taps, rounded: as much again as rounding the result, on average over the sum.
        error = (out.double() - oracle).square().mean().sqrt() / oracle.square().mean().sqrt()
        assert error < max(torch.finfo(d).eps for d in (dtype, operands)), float(error)


@pytest.mark.parametrize("case", CASES)
def test_matches_fp64(device, case):
    compare(device, *CASES[case])
    assert LazyKernel.bound


def test_a_bf16_model(device):
    compare(device, (1, 24, 3, 4), 16, dtype=torch.bfloat16)


def test_bf16_operands(device):
    if device == "cpu":
        pytest.skip("Triton's interpreter multiplies bf16 as integers")
    compare(device, (2, 24, 3, 4), 16, dtype=torch.bfloat16, operands=torch.bfloat16)


@pytest.mark.parametrize("channels", [(192, 96), (8, 24)])
def test_with_the_tile_it_ships_with(device, channels):
    compare(device, (1, channels[0], 3, 4), channels[1], tile=None)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [8, 40, 96])
def test_taps_are_summed_in_fp32_and_rounded_once(device, channels, layout):
    weight, _ = weights(16, channels, 3, 3, device=device, dtype=torch.bfloat16)
    weight = weight if layout == "channels_last" else weight.contiguous()
    found = folded_taps(weight, torch.float16, 32).view(4, 16, 2, -1)
    assert found.shape[-1] % 32 == 0 and not found[..., 2 * channels :].any()
    assert_close(found[..., : 2 * channels], folded(weight, torch.float64))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 2), st.sampled_from([8, 24]), st.sampled_from([(), (1,), (3,)]),
    st.integers(1, 6), st.integers(1, 9), st.sampled_from([8, 40]),
)  # fmt: skip
def test_any_shape(device, batch, channels, frames, height, width, channels_out):
    compare(device, (batch, channels, *frames, height, width), channels_out)


@pytest.mark.parametrize("frames", [(), (3,)])
def test_elsewhere_it_is_stocks(frames):
    x = torch.randn(2, 8, *frames, 3, 5)
    weight, bias = weights(8, 8, 3, 3, device="cpu", dtype=torch.float32)
    out = upsample_conv(x, weight, bias)
    pictures = x.transpose(1, 2).flatten(0, 1) if frames else x
    stock = torch.nn.functional.conv2d(torch.nn.Upsample(scale_factor=2.0)(pictures), weight, bias, padding=1)
    assert torch.equal(out.transpose(1, 2).flatten(0, 1) if frames else out, stock)


def test_elsewhere_fp16_beside_a_bf16_weight_is_a_bf16_result():
    x = normal(1, 8, 3, 4, device="cpu")
    weight, bias = weights(8, 8, 3, 3, device="cpu", dtype=torch.bfloat16)
    out = upsample_conv(x, weight, bias)
    assert out.dtype == torch.bfloat16
    assert_close(out, reference(x.double(), weight.double(), bias.double()))


def test_gradients_are_the_references(device):
    x = normal(1, 8, 3, 4, device=device).requires_grad_()
    weight, bias = weights(8, 8, 3, 3, device=device)
    (ours,) = torch.autograd.grad(upsample_conv(x, weight, bias).sum(), x)
    (theirs,) = torch.autograd.grad(reference(x, weight, bias).sum(), x)
    assert torch.equal(ours, theirs)
