import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.clips import SMALL, assert_bordered, normal, weights
from tests.tolerances import assert_close
from vae_accel.kernels import bordered
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.conv import reference as conv_reference
from vae_accel.kernels.rms_norm_act import reference as norm_reference
from vae_accel.kernels.winograd import conv_pairs, reference, rms_norm_pairs, suits, tile_of, transformed_taps

SHAPES = [(1, 24, 2, 5, 6), (2, 40, 4, 3, 5), (1, 8, 2, 1, 1), (2, 8, 6, 2, 3)]


def transformed(frames):
    """The first transform of fp64 frames, as kept in fp16 before it."""
    return reference(frames.to(torch.float16).double())


def assert_near(ours, oracle):
    """Four sums of three taps and rounded sums of two frames in fp16: 1.67e-3 of the values with a bf16 result."""
    error = (ours.double() - oracle).square().mean().sqrt() / oracle.square().mean().sqrt()
    assert error < 1.2e-3 if ours.dtype == torch.float16 else error < 4e-3, float(error)


def test_the_transform_is_a_convolution_along_time():
    """In fp64 the two transforms around two-dimensional convolutions are the 3x3x3 convolution to the last digits."""
    x, (weight, _) = torch.randn(2, 6, 6, 4, 5).double(), weights(7, 6, 3, 3, 3, device="cpu", dtype=torch.float64)
    g = weight.unbind(2)
    taps = (g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2])
    v = reference(x).unflatten(2, (-1, 4))
    m = [
        torch.stack([F.conv2d(v[:, :, p, i], tap, padding=1) for p in range(v.shape[2])], 2)
        for i, tap in enumerate(taps)
    ]
    pairs = torch.stack((m[0] + m[1] + m[2], m[1] - m[2] - m[3]), 3).flatten(2, 3)
    torch.testing.assert_close(pairs, F.conv3d(x, weight, padding=(0, 1, 1)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kept", [None, 1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_matches_fp64(device, shape, kept):
    x = normal(*shape, device=device, dtype=torch.bfloat16)
    weight = torch.randn(shape[1], 1, 1, 1, device=device)
    history = None if kept is None else normal(*shape[:2], kept, *shape[3:], device=device)
    out, last = rms_norm_pairs(x, weight, 1e-12, history)
    assert LazyKernel.bound and out.dtype == last.dtype == torch.float16
    assert_bordered(out)
    assert_bordered(last)
    frames = norm_reference(x.double(), weight, None, 1e-12, act=True)
    before = torch.zeros_like(frames[:, :, :2])
    if history is not None:
        before[:, :, 2 - kept :] = history  # of two frames in front, those that are missing are zeros
    assert_close(last, frames[:, :, -2:])
    # The sum of two rounded frames, rounded: an ulp of the larger of them.
    frames = torch.cat((before, frames), 2)
    error = (out.double() - transformed(frames)).abs()
    assert float((error - 2**-10 * reference(frames).abs()).max()) <= 2**-10 * float(frames.abs().max())


def test_the_history_of_the_next_call_is_what_was_kept(device):
    """Two calls of two frames are one of four."""
    x = normal(1, 24, 4, 3, 4, device=device, dtype=torch.bfloat16)
    weight = torch.randn(24, device=device)
    whole, last = rms_norm_pairs(x, weight, 1e-12, None)
    first, kept = rms_norm_pairs(x[:, :, :2], weight, 1e-12, None)
    second, end = rms_norm_pairs(x[:, :, 2:], weight, 1e-12, kept)
    assert torch.equal(torch.cat((first, second), 2), whole) and torch.equal(end, last)


@pytest.mark.parametrize("act", [False, True])
def test_what_is_not_a_number_is_none_in_fp16(device, act):
    """Finite values are held at 65504; an overflow upstream must still be seen in the picture."""
    x = normal(1, 8, 2, 3, 4, device=device)
    x[:, :, 0, 1, 2] = float("inf")
    out, _ = rms_norm_pairs(x, torch.full((8,), 1e6, device=device), 1e-12, None, act=act)
    assert out[:, :, :, 1, 2].isnan().any() and not out[:, :, :, 0].isnan().any()


def test_without_triton_the_norm_is_the_same():
    x, history = torch.randn(2, 8, 4, 3, 5), torch.randn(2, 8, 1, 3, 5)
    out, last = rms_norm_pairs(x, torch.ones(8), 1e-12, history)
    frames = norm_reference(x, torch.ones(8), None, 1e-12, act=True, dtype=torch.float16)
    history = F.pad(history.half(), (0, 0, 0, 0, 1, 0))
    assert torch.equal(last, frames[:, :, -2:])
    assert_close(out, reference(torch.cat((history, frames), 2).double()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [8, 40, 96])
def test_taps_are_summed_in_fp32_and_rounded_once(device, channels, layout, dtype):
    weight, _ = weights(16, channels, 3, 3, 3, device=device, dtype=dtype)
    weight = weight if layout == "channels_last" else weight.contiguous()
    matrix = transformed_taps(weight, 32)
    g = weight.double().movedim(1, -1).flatten(3).unbind(1)  # [O, kh, run] of each tap in time
    taps = torch.stack(((g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[0], -g[2]), 1)
    run = taps.shape[-1]
    found = matrix.view(16, 4, 3, -1)
    assert found.shape[-1] % 32 == 0 and not found[..., run:].any()
    assert_close(found[..., :run], taps)


def compare(device, shape, channels_out, kept=None, *, tile=SMALL, dtype=torch.float16):
    """Norm and convolution with and without all there is; against fp64, and against what the kernel was given."""
    x = normal(*shape, device=device, dtype=torch.bfloat16)
    gamma = torch.randn(shape[1], device=device)
    weight, bias = weights(channels_out, shape[1], 3, 3, 3, device=device, dtype=dtype)
    history = None if kept is None else normal(*shape[:2], kept, *shape[3:], device=device)
    pairs, _ = rms_norm_pairs(x, gamma, 1e-12, history)
    residual = normal(shape[0], channels_out, *shape[2:], device=device, dtype=dtype)
    frames = norm_reference(x.double(), gamma, None, 1e-12, act=True)
    options = {"padding": (1, 1), "before": 2, "history": history}
    for b, r in ((None, None), (bias, residual)):
        out = conv_pairs(pairs, weight, b, residual=r, tile=tile)
        oracle = conv_reference(frames, weight.double(), None if b is None else b.double(), residual=r, **options)
        assert out.shape == oracle.shape and out.dtype == dtype
        assert_bordered(out)
        assert_near(out, oracle)


@pytest.mark.parametrize("kept", [None, 1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(device, shape, kept):
    compare(device, shape, 24, kept)


@pytest.mark.parametrize("channels", [40, 96, 144, 192, 288])
def test_channels_that_fill_no_tile(device, channels):
    compare(device, (1, 24, 2, 3, 5), channels)


def test_a_bf16_model(device):
    compare(device, (1, 40, 2, 3, 4), 16, 2, dtype=torch.bfloat16)


@pytest.mark.parametrize("channels", [(192, 128), (288, 384)])
def test_with_the_tile_it_ships_with(device, channels):
    compare(device, (1, channels[0], 2, 2, 3), channels[1], tile=None)


def test_what_the_norm_wrote_is_read_in_place(device):
    pairs, _ = rms_norm_pairs(normal(1, 8, 2, 3, 4, device=device), torch.ones(8, device=device), 1e-12, None)
    assert bordered.bordered(pairs) is pairs


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.tuples(
        st.integers(1, 2), st.sampled_from([8, 16, 40]), st.sampled_from([2, 4]), st.integers(1, 5), st.integers(1, 9)
    ),
    st.sampled_from([8, 24, 40]),
    st.sampled_from([None, 1, 2]),
)
def test_any_shape(device, shape, channels_out, kept):
    compare(device, shape, channels_out, kept)


def test_it_is_for_many_channels_of_pairs_of_frames(device):
    x = torch.zeros(1, 192, 2, 1, 1, dtype=torch.bfloat16, device=device)
    assert suits(x, 384, (3, 3, 3))
    assert not suits(x, 384, (3, 1, 1))
    assert not suits(x[:, :, :1], 384, (3, 3, 3))
    assert not suits(x[:, :, 0], 384, (3, 3, 3))
    assert not suits(x.float(), 384, (3, 3, 3))
    assert not suits(x[:, :96], 384, (3, 3, 3))
    assert not suits(x, 192, (3, 3, 3)) and tile_of(192, 192) is None
