import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.clips import assert_bordered, normal
from tests.tolerances import assert_close
from vae_accel.kernels import bordered, group_norm_act, rms_norm_act

SHAPES = [(1, 8, 1, 1, 1), (2, 24, 3, 5, 6), (1, 40, 2, 4, 7), (3, 8, 5, 4), (1, 8, 1, 1)]
NUMBERS = st.integers(1, 7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_holds_the_clip_and_zeros_around_it(shape):
    x = normal(*shape, device="cpu")
    y = bordered.bordered(x)
    assert torch.equal(x, y) and y.dtype == x.dtype
    assert_bordered(y)
    assert bordered.bordered(y) is y


@given(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS))
def test_every_tap_of_a_pixel_is_a_shift_away(shape):
    """The promise of the layout: pixel + kh * row + kw, minus the first one's place, holds the tap, zeros outside."""
    x = bordered.bordered(torch.randn(shape))
    place, frames = bordered.geometry(x), x.transpose(1, 2).flatten(0, 1)
    padded = torch.nn.functional.pad(frames, (1, 1, 1, 1))
    pixels = bordered.pixels_of(x)
    f, h, w = torch.meshgrid(*map(torch.arange, (place.frames, place.height, place.width)), indexing="ij")
    for kh in range(3):
        for kw in range(3):
            found = pixels[f * place.frame + (h + kh) * place.row + w + kw].movedim(-1, 1)
            assert torch.equal(found, padded[:, :, kh : kh + place.height, kw : kw + place.width])


def test_a_tap_never_leaves_the_memory():
    place = bordered.geometry(torch.empty(2, 8, 3, 4, 5))
    last = (place.frames - 1) * place.frame + place.height * place.row + place.width  # the picture's last pixel
    assert last + place.row + 1 < place.pixels
    assert place.row % 2 == place.frame % 2 == 0


def test_the_dtype_is_a_choice():
    x = normal(1, 8, 2, 3, 4, device="cpu")
    wide = bordered.bordered(bordered.bordered(x), torch.float32)
    assert wide.dtype == torch.float32 and torch.equal(wide, x.float())
    assert_bordered(wide)


@pytest.mark.parametrize(
    "other",
    [lambda x: x[:, :, :1], lambda x: x + 1, lambda x: x.clone(), lambda x: x.detach(), lambda x: x.transpose(0, 1)],
)
def test_the_mark_is_lost_by_every_other_tensor(other):
    x = bordered.bordered(torch.randn(2, 8, 3, 4, 5))
    assert bordered.is_bordered(x) and not bordered.is_bordered(other(x))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_last_frames_are_a_clip_of_their_own(batch, count):
    x = bordered.bordered(torch.randn(batch, 8, 3, 4, 5))
    last = bordered.last_frames(x, count)
    assert torch.equal(last, x[:, :, 3 - count :])
    assert_bordered(last)
    assert last.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("layout", ["bordered", "dense", "channels_last"])
@pytest.mark.parametrize("frames", [1, 3])
def test_pictures_and_back(layout, frames):
    x = torch.randn(2, 8, frames, 4, 5)
    x = bordered.bordered(x) if layout == "bordered" else x
    x = x.to(memory_format=torch.channels_last_3d) if layout == "channels_last" else x
    pictures = bordered.pictures(x)
    assert torch.equal(pictures, x.transpose(1, 2).flatten(0, 1))
    back = bordered.clip(pictures, frames)
    assert torch.equal(back, x)
    if layout == "dense":
        assert not bordered.is_bordered(back)
        return
    assert pictures.data_ptr() == back.data_ptr() == x.data_ptr()
    if layout == "bordered":
        assert_bordered(pictures)
        assert_bordered(back)


def test_dense_has_no_border():
    x = bordered.bordered(torch.randn(2, 8, 3, 4, 5))
    dense = bordered.dense(x)
    assert torch.equal(dense, x) and not bordered.is_bordered(dense)
    assert dense.is_contiguous(memory_format=torch.channels_last_3d)
    assert bordered.dense(dense) is dense


def norms(x, device, groups, **options):
    """GroupNorm of the dense and of the bordered clip, and the fp64 oracle."""
    weight, bias = (torch.randn(x.shape[1], device=device) for _ in range(2))
    norm = group_norm_act.group_norm_act
    dense = norm(x, groups, weight, bias, 1e-6, act=True, **options)
    ours = norm(bordered.bordered(x), groups, weight, bias, 1e-6, act=True, **options)
    assert_bordered(ours)
    assert ours.dtype == dense.dtype and ours.shape == dense.shape
    per_frame = options.get("per_frame", False)
    oracle = group_norm_act.reference(x.double(), groups, weight, bias, 1e-6, act=True, per_frame=per_frame)
    return dense, ours, oracle


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("shape", [(2, 24, 3, 5, 6), (1, 40, 2, 9, 7), (1, 8, 1, 1, 2)], ids=str)
def test_group_norm_of_a_clip(device, shape, per_frame):
    x = normal(*shape, device=device)
    dense, ours, oracle = norms(x, device, 4, per_frame=per_frame, dtype=torch.float16)
    assert_close(ours, oracle)
    assert_close(dense, oracle)


def test_group_norm_of_pictures(device):
    _, ours, oracle = norms(normal(3, 16, 5, 4, device=device), device, 2)
    assert_close(ours, oracle)


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("level", [1, 100, -1000])
def test_group_norm_takes_the_borders_zeros_out(device, level, per_frame):
    """A ramp far from zero, where zeros taken out of the sums afterwards leave their rounding: 0.35 at 1000."""
    ramp = torch.linspace(-1.7, 1.7, 3 * 30 * 25, device=device).view(1, 1, 3, 30, 25)
    x = (level + ramp).expand(1, 8, 3, 30, 25).contiguous()
    _, ours, oracle = norms(x, device, 2, per_frame=per_frame)
    assert_close(ours, oracle, "ramp")


@pytest.mark.parametrize("mode", rms_norm_act.MODES)
def test_rms_norm_of_a_clip(device, mode):
    x = normal(2, 24, 3, 5, 6, device=device)
    weight = torch.randn(24, 1, 1, 1, device=device)
    ours = rms_norm_act.rms_norm_act(bordered.bordered(x), weight, None, 1e-6, act=True, mode=mode)
    assert_bordered(ours)
    assert_close(ours, rms_norm_act.reference(x.double(), weight, None, 1e-6, act=True, mode=mode))


def test_rms_norm_with_a_bias_leaves_the_border(device):
    """A bias would fill it: the result is a clip like any other, and says so."""
    x = normal(1, 8, 2, 3, 4, device=device)
    bias = torch.ones(8, device=device)
    ours = rms_norm_act.rms_norm_act(bordered.bordered(x), None, bias, 1e-6, act=True)
    assert not bordered.is_bordered(ours)
    assert_close(ours, rms_norm_act.reference(x.double(), None, bias, 1e-6, act=True))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.tuples(st.integers(1, 2), st.sampled_from([8, 16]), NUMBERS, NUMBERS, NUMBERS), per_frame=st.booleans())
def test_norms_of_any_shape(device, shape, per_frame):
    x = normal(*shape, device=device) - 0.5
    # eps as large as the variance: a group of a few elements is otherwise a division by rounding
    ours = group_norm_act.group_norm_act(bordered.bordered(x), 4, None, None, 1.0, act=True, per_frame=per_frame)
    assert_bordered(ours)
    assert_close(ours, group_norm_act.reference(x.double(), 4, None, None, 1.0, act=True, per_frame=per_frame))
    ours = rms_norm_act.rms_norm_act(bordered.bordered(x), None, None, 1e-6, act=False)
    assert_bordered(ours)
    assert_close(ours, rms_norm_act.reference(x.double(), None, None, 1e-6, act=False))


def test_other_data_under_the_same_tensor_is_not_bordered():
    x = bordered.bordered(torch.randn(1, 8, 3, 4))
    assert bordered.is_bordered(x)
    x.data = torch.randn(1, 8, 3, 4)
    assert not bordered.is_bordered(x)
