import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.layouts import DTYPES, LAYOUTS, is_channels_last
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.causal_pad import MODES, causal_pad, reference

PAD = (1, 2, 3, 0, 2, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("frames", [0, 1, 2], ids="history{}".format)
@pytest.mark.parametrize("space", MODES)
@pytest.mark.parametrize("time", MODES[:2])
def test_equals_cat_and_pad(device, time, space, frames, layout):
    x = LAYOUTS[layout](torch.randn(2, 3, 2, 5, 7, device=device))
    history = torch.randn(2, 3, frames, 5, 7, device=device) if frames else None
    out = causal_pad(x, PAD, time=time, space=space, history=history)
    assert LazyKernel.bound and torch.equal(out, reference(x, PAD, time=time, space=space, history=history))
    assert is_channels_last(out) if x.stride(1) == 1 else out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_frame_of_many_channels(device, dtype):
    x = LAYOUTS["channels_last"](torch.randn(1, 200, 1, 6, 5, device=device).to(dtype))
    history = LAYOUTS["channels_last"](torch.randn(1, 200, 2, 6, 5, device=device).to(dtype))
    pad = (1, 1, 1, 1, 2, 0)
    assert torch.equal(causal_pad(x, pad, history=history), reference(x, pad, history=history))


def test_history_alone_is_a_concatenation(device):
    x, history = torch.randn(1, 4, 2, 3, 3, device=device), torch.randn(1, 4, 2, 3, 3, device=device)
    out = causal_pad(x, (0, 0, 0, 0, 2, 0), time="zeros", history=history)
    assert torch.equal(out, torch.cat([history, x], 2))


def test_nothing_to_pad_is_a_copy(device):
    x = torch.randn(1, 4, 2, 3, 3, device=device)
    out = causal_pad(x, (0,) * 6)
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(device, data):
    shape = [data.draw(st.integers(1, high)) for high in (2, 9, 4, 12, 12)]
    space = data.draw(st.sampled_from(MODES))
    limits = [3, 3, 3, 3] if space != "reflect" else [shape[4] - 1, shape[4] - 1, shape[3] - 1, shape[3] - 1]
    pad = [data.draw(st.integers(0, min(limit, 3))) for limit in (*limits, 3, 3)]
    layout, time = data.draw(st.sampled_from(sorted(LAYOUTS))), data.draw(st.sampled_from(MODES[:2]))
    frames = data.draw(st.integers(0, pad[4]))
    x = LAYOUTS[layout](torch.randn(shape, device=device))
    history = torch.randn(*shape[:2], frames, *shape[3:], device=device) if frames else None
    out = causal_pad(x, pad, time=time, space=space, history=history)
    assert torch.equal(out, reference(x, pad, time=time, space=space, history=history))


def test_empty_batch(device):
    assert causal_pad(torch.empty(0, 4, 2, 3, 3, device=device), PAD).shape == (0, 4, 5, 6, 6)


def test_gradients_are_the_references(device):
    x = torch.ones(1, 1, 1, 2, 2, device=device, requires_grad=True)
    causal_pad(x, (0, 0, 0, 0, 2, 0)).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_traces_whole_with_the_real_strides(device, layout):
    x = LAYOUTS[layout](torch.randn(2, 8, 3, 6, 5, device=device))
    history = torch.randn(2, 8, 1, 6, 5, device=device)
    torch.library.opcheck(
        torch.ops.vae_accel.causal_pad.default,
        (x, PAD, "replicate", "reflect", history),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(lambda x: causal_pad(x, PAD, history=history), fullgraph=True, backend="eager")
    eager = causal_pad(x, PAD, history=history)
    assert torch.equal(compiled(x), eager) and compiled(x).stride() == eager.stride()


def test_without_triton_the_layout_is_kept():
    x = LAYOUTS["channels_last"](torch.randn(2, 8, 3, 6, 5))
    assert is_channels_last(causal_pad(x, PAD, space="replicate"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"time": "reflect"}, "time must be"),
        ({"pad": (0, 0, 0, -1, 0, 0)}, "six sides >= 0"),
        ({"pad": (3, 0, 0, 0, 0, 0), "space": "reflect"}, "reflect"),
        ({"history": torch.zeros(1, 2, 3, 3, 3)}, "history"),
        ({"history": torch.zeros(1, 2, 1, 3, 4)}, "history"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        causal_pad(torch.zeros(1, 2, 2, 3, 3), **{"pad": (0, 0, 0, 0, 2, 0), **arguments})
