"""Clips whose border repeats their pixels, and frames that repeat in time: norms, convolutions, upsampling."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.clips import SMALL, assert_bordered, normal, surrounded, weights
from tests.tolerances import assert_close
from vae_accel.kernels import bordered, conv, group_norm_act, rms_norm_act, thin_conv, upsample_conv
from vae_accel.metrics import rms_error

SHAPES = [(2, 24, 3, 5, 6), (1, 40, 2, 4, 7), (3, 8, 5, 4), (1, 8, 1, 2, 2)]
REPEATED = ["replicate", "reflect"]
AROUND = {"causal": (2, 0), "both sides": (1, 1), "two after": (0, 2)}
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("border", REPEATED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_holds_the_clip_and_its_pixels_around_it(shape, border):
    x = normal(*shape, device="cpu")
    open_ = bordered.laid_out(x, border=border)
    assert torch.equal(open_, x) and not bordered.is_filled(open_)
    for y in (bordered.bordered(x, border=border), bordered.bordered(open_, border=border)):
        assert torch.equal(y, x) and bordered.is_filled(y)
        assert_bordered(y, border)
    assert bordered.bordered(open_, border=border) is open_
    zeros = bordered.bordered(open_)
    assert torch.equal(zeros, x)
    assert_bordered(zeros)
    assert torch.equal(bordered.dense(open_), x) and not bordered.is_bordered(bordered.dense(open_))


@pytest.mark.parametrize("border", REPEATED)
@pytest.mark.parametrize("filled", [False, True])
def test_views_say_what_their_clip_says(border, filled):
    make = bordered.bordered if filled else bordered.laid_out
    x = make(normal(2, 8, 3, 4, 5, device="cpu"), border=border)
    for y in (bordered.pictures(x), bordered.clip(bordered.pictures(x), 3), bordered.last_frames(x, 2)):
        assert bordered.is_filled(y) == filled
        assert_bordered(y, border)
    one = make(normal(1, 8, 3, 4, 5, device="cpu"), border=border)
    assert torch.equal(bordered.last_frames(one, 2), one[:, :, 1:])
    assert_bordered(bordered.last_frames(one, 2), border)


def test_who_changes_a_picture_opens_its_border():
    x = bordered.bordered(normal(1, 8, 2, 3, 4, device="cpu"), border="replicate")
    x.add_(1)
    assert bordered.is_bordered(x) and not bordered.is_filled(x)
    assert bordered.bordered(x, border="replicate") is x
    assert_bordered(x, "replicate")
    with torch.inference_mode():
        assert bordered.is_filled(bordered.bordered(normal(1, 8, 3, 4, device="cpu"), border="replicate"))


@pytest.mark.parametrize("border", REPEATED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_repeat_pixels_as_they_read(device, shape, border):
    x = normal(*shape, device=device) + 3
    weight, bias = (torch.randn(shape[1], device=device) for _ in range(2))
    given = bordered.laid_out(x, border=border)
    for per_frame in {False, x.dim() == 5}:
        y = group_norm_act.group_norm_act(given, 4, weight, bias, 1e-2, act=True, per_frame=per_frame)
        assert bordered.is_filled(y)
        assert_bordered(y, border)
        law = group_norm_act.reference(x.double(), 4, weight, bias, 1e-2, act=True, per_frame=per_frame)
        assert_close(y, law)
    for shift in (None, bias):
        y = rms_norm_act.rms_norm_act(given, weight, shift, 1e-6, act=True)
        assert bordered.is_filled(y)
        assert_bordered(y, border)
        assert_close(y, rms_norm_act.reference(x.double(), weight, shift, 1e-6, act=True))
    half = group_norm_act.group_norm_act(given.float(), 4, weight, bias, 1e-2, act=False, dtype=torch.float16)
    assert half.dtype == torch.float16


def compare(device, shape, channels_out, kernel, around, time, space, kept=None):
    """With a residual and a bias, and by the thin form, against fp64."""
    x = normal(*shape, device=device)
    before, after = around
    history = None if kept is None else normal(*shape[:2], kept, *shape[3:], device=device)
    padding = (kernel[-2] // 2, kernel[-1] // 2)
    options = {"before": before, "after": after, "history": history, "time": time, "space": space}
    weight, bias = weights(channels_out, shape[1], *kernel, device=device)
    law = conv.reference(x.double(), weight.double(), bias.double(), padding=padding, **options)
    residual = normal(*law.shape, device=device)
    out = conv._launch(x, weight, bias, before, history, residual, 1, after, time, space, tile=SMALL)
    assert_bordered(out, space)
    assert bordered.is_filled(out) == (space == "zeros")
    assert_close(out, law + residual.double())
    if kernel[-2:] == (3, 3):
        weight, bias = weights(3, shape[1], *kernel, device=device)
        law = conv.reference(x.double(), weight.double(), bias.double(), padding=padding, **options)
        assert_close(thin_conv.thin_conv(x, weight, bias, **options), law)


@pytest.mark.parametrize("space", bordered.BORDERS)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("frames", [1, 3])
def test_frames_and_pixels_repeat(device, frames, around, space):
    compare(device, (2, 24, frames, 5, 7), 40, (3, 3, 3), AROUND[around], "replicate", space)


@pytest.mark.parametrize("kernel", [(3, 1, 1), (1, 3, 3), (1, 1, 1)], ids=str)
def test_other_kernels(device, kernel):
    compare(device, (2, 24, 2, 4, 6), 16, kernel, (kernel[0] - 1, 0), "replicate", "replicate")


def test_frames_kept_stand_where_the_first_would(device):
    compare(device, (2, 24, 2, 4, 6), 16, (3, 3, 3), (2, 0), "replicate", "replicate", kept=2)
    compare(device, (1, 8, 1, 4, 5), 16, (3, 3, 3), (2, 0), "replicate", "zeros", kept=2)


@pytest.mark.parametrize("around", AROUND)
def test_one_frame_is_multiplied_once_by_the_sum_of_its_taps(device, monkeypatch, around):
    """Rounded to fp16 once: no worse than its taps, each rounded."""
    shapes, matrix = [], conv.weight_matrix
    monkeypatch.setattr(conv, "weight_matrix", lambda w, *args: shapes.append(w.shape[2:]) or matrix(w, *args))
    x = normal(2, 24, 1, 5, 7, device=device)
    weight, bias = weights(40, 24, 3, 3, 3, device=device, dtype=torch.float32)
    before, after = AROUND[around]
    options = {"padding": (1, 1), "before": before, "after": after, "time": "replicate", "space": "replicate"}
    out = conv.conv(x, weight, bias, **options)
    law, taps = (conv.reference(x.double(), w.double(), bias.double(), **options) for w in (weight, weight.half()))
    assert out.dtype == torch.float32 and rms_error(out, law) < 1.2 * rms_error(taps, law)
    conv.conv(x, weight.half(), bias.half(), **options)
    conv.conv(x, weight, bias, **{**options, "time": "zeros", "before": 2, "after": 0})
    assert [tuple(shape) for shape in shapes] == [(1, 3, 3), (3, 3, 3), (3, 3, 3)]


@few
@given(data=st.data())
def test_any_shape(device, data):
    batch, frames = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4))
    height, width = (data.draw(st.integers(2, 7)) for _ in range(2))
    around = data.draw(st.sampled_from(list(AROUND.values())))
    space = data.draw(st.sampled_from(bordered.BORDERS))
    compare(device, (batch, 8, frames, height, width), 24, (3, 3, 3), around, "replicate", space)


def test_what_a_norm_wrote_is_read_in_place(device):
    """A chain as a block has it: nothing is copied, and nothing filled, between a convolution and the next."""
    x = normal(2, 8, 3, 4, 5, device=device)
    first, second = (weights(8, 8, 3, 3, 3, device=device)[0] for _ in range(2))
    middle = conv._launch(x, first, None, 2, None, None, 1, 0, "replicate", "replicate", tile=SMALL)
    y = group_norm_act.group_norm_act(middle, 2, None, None, 1e-6, act=True)
    assert bordered.bordered(y, border="replicate") is y and not bordered.is_filled(middle)
    out = conv._launch(y, second, None, 2, None, middle, 1, 0, "replicate", "replicate", tile=SMALL)
    around = {"padding": (1, 1), "before": 2, "time": "replicate", "space": "replicate"}
    assert_close(out, conv.reference(y.double(), second.double(), None, residual=middle.double(), **around))


@pytest.mark.parametrize("space", bordered.BORDERS)
@pytest.mark.parametrize("double", [None, False, True], ids=["conv", "upsampled", "doubled"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("level", [0, 100])
def test_the_statistics_of_a_whole_clip_come_with_it(device, monkeypatch, space, double, batch, level):
    """Of all frames of a sample and of no pixel of the border, whatever it holds."""
    if double is not None and space != "replicate":
        pytest.skip("upsampled clips are replicated")
    x, (weight, bias) = normal(batch, 8, 3, 5, 7, device=device), weights(64, 8, 3, 3, 3, device=device)
    bias = bias + level
    with torch.inference_mode():
        if double is None:
            y = conv.conv(x, weight, bias, padding=(1, 1), before=2, time="replicate", space=space, statistics=True)
        else:
            y = upsample_conv.upsample_conv(x, weight, bias, double=double, space=space, statistics=True)
        read = group_norm_act.group_norm_act(y.clone(), 8, None, None, 1e-6, act=True)
        monkeypatch.setattr("vae_accel.kernels.group_statistics.group_statistics", None)  # nothing is read for them
        found = group_norm_act.group_norm_act(y, 8, None, None, 1e-6, act=True)
    assert_bordered(found, space)
    assert_close(found, group_norm_act.reference(y.double(), 8, None, None, 1e-6, act=True))
    torch.testing.assert_close(found, read, rtol=0, atol=4e-3)


@pytest.mark.parametrize("given", bordered.BORDERS)
@pytest.mark.parametrize("space", bordered.BORDERS)
def test_a_clip_in_another_border_is_laid_out_anew(device, given, space):
    x = bordered.bordered(normal(1, 8, 2, 4, 5, device=device), border=given)
    weight, bias = weights(8, 8, 1, 3, 3, device=device)
    out = conv.conv(x, weight, bias, padding=(1, 1), residual=x, space=space)
    assert_bordered(out, space)
    assert_close(
        out,
        conv.reference(x.double(), weight.double(), bias.double(), padding=(1, 1), residual=x.double(), space=space),
    )


@pytest.mark.parametrize(
    "more",
    [
        {"after": 1, "before": 1},
        {"before": 2, "time": "replicate", "history": 1},
        {"before": 1, "after": 1, "time": "replicate", "history": 1},
    ],
    ids=["zeros behind it", "too few kept", "kept, and frames behind it"],
)
def test_what_has_no_form_is_the_vendors(device, more):
    x = normal(1, 8, 3, 4, 5, device=device)
    if "history" in more:
        more = {**more, "history": normal(1, 8, more["history"], 4, 5, device=device)}
    for channels, operation in ((8, conv.conv), (3, thin_conv.thin_conv)):
        weight, bias = weights(channels, 8, 3, 3, 3, device=device)
        place = {"padding": (1, 1)} if operation is conv.conv else {}
        out = operation(x, weight, bias, **place, **more)
        assert not bordered.is_bordered(out)
        assert_close(out, conv.reference(x.double(), weight.double(), bias.double(), padding=(1, 1), **more))


def test_reflection_of_a_single_row_is_refused_in_stocks_words(device):
    weight, _ = weights(8, 8, 1, 3, 3, device=device)
    with pytest.raises(ValueError, match="reflect needs pads below H and W"):
        conv.conv(normal(1, 8, 2, 1, 5, device=device), weight, None, padding=(1, 1), space="reflect")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(2, 24, 3, 3, 5), (1, 8, 1, 2, 3), (2, 8, 2, 1, 1)], ids=str)
def test_upsampled_in_time_too(device, shape, double):
    """Sums of up to eight taps, rounded: as much again as rounding the result, on average over the sum."""
    x = normal(*shape, device=device)
    weight, bias = weights(40, shape[1], 3, 3, 3, device=device)
    for b in (None, bias):
        out = upsample_conv._launch(x, weight, b, SMALL, double=double, space="replicate")
        law = upsample_conv.reference(
            x.double(), weight.double(), None if b is None else b.double(), double=double, space="replicate"
        )
        assert out.shape == law.shape and out.shape[2] == (2 * shape[2] - 1 if double else shape[2])
        assert_bordered(out, "replicate")
        error = (out.double() - law).square().mean().sqrt() / law.square().mean().sqrt()
        assert error < torch.finfo(torch.float16).eps, float(error)


@few
@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_upsampled_whatever_the_shape(device, batch, frames, height, width, double):
    x = normal(batch, 8, frames, height, width, device=device)
    weight, bias = weights(24, 8, 3, 3, 3, device=device)
    more = {"double": double, "space": "replicate"}
    out = upsample_conv._launch(x, weight, bias, SMALL, **more)
    law = upsample_conv.reference(x.double(), weight.double(), bias.double(), **more)
    assert out.shape == law.shape and float((out - law).abs().max()) < 0.02


def test_upsampling_in_time_is_what_stock_does():
    """The law against nearest upsampling written out, the first frame apart."""
    x = torch.randn(2, 4, 3, 3, 5, dtype=torch.float64)
    weight = torch.randn(6, 4, 3, 3, 3, dtype=torch.float64)
    rest = torch.nn.functional.interpolate(x[:, :, 1:], scale_factor=(2, 2, 2))
    wide = torch.cat([torch.nn.functional.interpolate(x[:, :, :1], scale_factor=(1, 2, 2)), rest], 2)
    wide = torch.nn.functional.pad(wide, (1, 1, 1, 1, 2, 0), mode="replicate")
    out = upsample_conv.upsample_conv(x, weight, None, double=True, space="replicate")
    torch.testing.assert_close(out, torch.nn.functional.conv3d(wide, weight))


def test_surrounded_reads_what_it_says():
    x = bordered.bordered(torch.arange(6.0).view(1, 1, 2, 3).expand(1, 8, 2, 3), border="reflect")
    assert surrounded(x)[0, 0].tolist() == [[4, 3, 4, 5, 4], [1, 0, 1, 2, 1], [4, 3, 4, 5, 4], [1, 0, 1, 2, 1]]
