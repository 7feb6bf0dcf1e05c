import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.clips import SMALL, assert_bordered, normal, weights
from tests.tolerances import assert_close
from vae_accel.kernels import bordered
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.conv import Tile, _launch, conv, reference, tile_of
from vae_accel.kernels.eligible import unsupported

CASES = {  # x, channels out, kernel, frames in front, frames of history
    "picture": ((2, 24, 5, 6), 40, (3, 3), 0, None),
    "one pixel": ((1, 8, 1, 1), 8, (3, 3), 0, None),
    "1x1 of a picture": ((2, 40, 3, 5), 24, (1, 1), 0, None),
    "frames apart": ((2, 8, 2, 4, 5), 24, (1, 3, 3), 0, None),
    "behind zeros": ((2, 24, 3, 5, 4), 40, (3, 3, 3), 2, None),
    "behind a frame": ((2, 24, 2, 5, 4), 16, (3, 3, 3), 2, 1),
    "behind two": ((2, 8, 2, 3, 7), 24, (3, 3, 3), 2, 2),
    "one frame behind two": ((1, 8, 1, 3, 4), 8, (3, 3, 3), 2, 2),
    "one frame and pixel": ((2, 8, 1, 1, 1), 8, (3, 3, 3), 2, 1),
    "fewer frames than there were": ((2, 8, 4, 3, 4), 8, (3, 3, 3), 1, None),
    "nothing in front": ((2, 8, 3, 4, 4), 8, (3, 3, 3), 0, None),
    "along time": ((2, 24, 2, 3, 4), 24, (3, 1, 1), 2, 1),
    "a long run": ((1, 288, 3, 4), 16, (3, 3), 0, None),
    "a picture's colours": ((2, 3, 5, 6), 24, (3, 3), 0, None),
    "colours behind two frames": ((2, 3, 2, 5, 4), 16, (3, 3, 3), 2, 2),
    "twelve channels behind zeros": ((1, 12, 3, 4, 3), 16, (3, 3, 3), 2, None),
}
TWO = Tile(32, 32, 16, 32, 2, 4)  # as of 192 channels: two products


def compare(
    device,
    shape,
    channels_out,
    kernel,
    before=0,
    kept=None,
    *,
    split=1,
    tile=SMALL,
    dtype=torch.float16,
    operands=torch.float16,
):
    """One call with everything and one with as little as can be, against fp64."""
    x = normal(*shape, device=device, dtype=operands)
    weight, bias = weights(channels_out, shape[1], *kernel, device=device, dtype=dtype)
    history = None if kept is None else normal(*shape[:2], kept, *shape[3:], device=device, dtype=operands)
    padding = (kernel[-2] // 2, kernel[-1] // 2)
    options = {"before": before, "history": history, "split": split}
    law = reference(x.double(), weight.double(), None, padding=padding, **options)
    residual = normal(*law.shape, device=device, dtype=dtype)
    out = _launch(x, weight, None, before, history, None, split, tile=tile)
    full = _launch(x, weight, bias, before, history, residual, split, tile=tile)
    oracle = reference(x.double(), weight.double(), bias.double(), padding=padding, residual=residual, **options)
    for ours, theirs in ((out, law), (full, oracle)):
        assert ours.shape == theirs.shape and ours.dtype == dtype
        assert_bordered(ours)
        assert_close(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_matches_fp64(device, case):
    compare(device, *CASES[case])
    assert LazyKernel.bound


@pytest.mark.parametrize("channels", [96, 144, 192, 288])
@pytest.mark.parametrize("width", [4, 5])
def test_two_products_and_pairs_of_pixels(device, channels, width):
    """96 channels of an even width are pixels of 192; the second product of a tile is narrower than the first."""
    compare(device, (1, 24, 3, width), channels, (3, 3), tile=TWO)


@pytest.mark.parametrize("tile", [SMALL, TWO], ids=["one", "two"])
@pytest.mark.parametrize("channels", [24, 48, 96])
@pytest.mark.parametrize("kernel", [(3, 1, 1), (3, 3, 3)], ids=str)
def test_channels_that_are_frames(device, kernel, channels, tile):
    """Also where a tile reaches over the channels of the first frame into those of the second."""
    compare(device, (2, 8, 2, 3, 4), 2 * channels, kernel, 2, 1, split=2, tile=tile)


def test_fp16_operands_beside_a_bf16_weight(device):
    compare(device, (1, 24, 3, 4), 16, (3, 3), dtype=torch.bfloat16)


def test_bf16_operands(device):
    if device == "cpu":
        pytest.skip("Triton's interpreter multiplies bf16 as integers")
    compare(device, (2, 24, 2, 5, 4), 16, (3, 3, 3), 2, 1, dtype=torch.bfloat16, operands=torch.bfloat16)


@pytest.mark.parametrize("channels", [(96, 96), (192, 192), (288, 96), (8, 16)])
def test_with_the_tile_it_ships_with(device, channels):
    x = normal(1, channels[0], 3, 4, device=device)
    weight, bias = weights(channels[1], channels[0], 3, 3, device=device)
    out = conv(x, weight, bias, padding=(1, 1))
    assert_bordered(out)
    assert_close(out, reference(x.double(), weight.double(), bias.double(), padding=(1, 1)))


def test_colours_of_an_fp32_model_stay_the_vendors(device):
    x, (weight, bias) = normal(1, 3, 4, 6, device=device), weights(16, 3, 3, 3, device=device)
    assert bordered.is_bordered(conv(x, weight, bias, padding=(1, 1)))
    given = x.float(), weight.float(), bias.float()
    out = conv(*given, padding=(1, 1))
    assert not bordered.is_bordered(out) and torch.equal(out, reference(*given, padding=(1, 1)))


def test_a_bordered_clip_is_read_in_place(device):
    """A chain of two: what the first writes is what the second reads, border and all."""
    x = normal(2, 8, 2, 3, 5, device=device)
    first, second = (weights(8, 8, 3, 3, 3, device=device)[0] for _ in range(2))
    middle = _launch(x, first, None, 2, None, None, 1, tile=SMALL)
    assert bordered.bordered(middle) is middle
    out = _launch(middle, second, None, 2, bordered.last_frames(middle, 2), middle, 1, tile=SMALL)
    oracle = reference(
        middle.double(), second.double(), None, padding=(1, 1), before=2, history=middle[:, :, -2:], residual=middle
    )
    assert_close(out, oracle)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(device, data):
    batch, frames, height, width = (data.draw(st.integers(1, most)) for most in (2, 4, 6, 9))
    channels = [data.draw(st.sampled_from([8, 16, 40])) for _ in range(2)]
    kernel = data.draw(st.sampled_from([(3, 3, 3), (3, 1, 1), (1, 3, 3), (1, 1, 1)]))
    before = data.draw(st.integers(max(0, kernel[0] - frames), 2)) if kernel[0] == 3 else 0
    kept = data.draw(st.one_of(st.none(), st.integers(1, before))) if before else None
    split = data.draw(st.sampled_from([1, 2]))
    compare(device, (batch, channels[0], frames, height, width), split * channels[1], kernel, before, kept, split=split)


def test_gradients_are_the_references(device):
    x = normal(1, 8, 3, 4, device=device).requires_grad_()
    weight, bias = weights(8, 8, 3, 3, device=device)
    (ours,) = torch.autograd.grad(conv(x, weight, bias, padding=(1, 1)).sum(), x)
    (theirs,) = torch.autograd.grad(reference(x, weight, bias, padding=(1, 1)).sum(), x)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kept", [None, 1, 2])
@pytest.mark.parametrize("frames", [1, 3])
def test_the_vendors_has_the_same_law(frames, kept):
    x = normal(2, 12, frames, 3, 5, device="cpu", dtype=torch.float32)
    weight, bias = weights(12, 12, 3, 3, 3, device="cpu", dtype=torch.float32)
    history = None if kept is None else normal(2, 12, kept, 3, 5, device="cpu", dtype=torch.float32)
    options = {"padding": (1, 1), "before": 2, "history": history, "residual": x}
    assert_close(conv(x, weight, bias, **options), reference(x.double(), weight.double(), bias.double(), **options))


def test_what_is_left_to_the_vendor_has_a_reason(device, monkeypatch):
    x = normal(1, 8, 3, 4, device=device)
    weight, _ = weights(8, 8, 3, 3, device=device)
    assert unsupported(x, weight, (1, 1)) is None
    assert "has no form" in unsupported(x, weight.double(), (1, 1))
    assert "16 bytes" in unsupported(x[:, :4], weight[:, :4], (1, 1))
    assert "16 bytes" in unsupported(x, weight[:4], (1, 1))
    assert "has no form" in unsupported(x, weight, (0, 0))
    assert "has no form" in unsupported(x, weight[..., :1], (1, 0))
    if device == "cpu":
        assert "as integers" in unsupported(x.bfloat16(), weight, (1, 1))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "a compiler sees through" in unsupported(x, weight, (1, 1))


def test_without_triton_there_is_a_reason_too():
    x = normal(1, 8, 3, 4, device="cpu")
    assert "no Triton" in unsupported(x, weights(8, 8, 3, 3, device="cpu")[0], (1, 1))


@pytest.mark.parametrize("channels_out", [8, 24, 96, 128, 192, 256, 320, 384, 512])
@pytest.mark.parametrize("channels_in", [8, 24, 96, 128, 192, 512])
def test_a_tile_is_no_wider_than_the_channels_need(channels_in, channels_out):
    tile = tile_of(channels_in, channels_out, 27)
    width = tile.cols + tile.more
    assert -(-channels_out // width) * width < max(2 * channels_out, 17)
    # What is in flight must fit the 227 KiB of shared memory of a Hopper's SM.
    assert 2 * tile.stages * tile.depth * (tile.rows + width) <= 227 << 10
