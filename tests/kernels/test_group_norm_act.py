import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.layouts import DTYPES, LAYOUTS, is_channels_last
from tests.tolerances import assert_close
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.group_norm_act import group_norm_act, reference

SHAPES = [  # shape, groups
    ((1, 48, 1, 5, 7), 16),
    ((2, 12, 3, 9, 6), 4),
    ((1, 18, 33, 70), 6),
    ((3, 8, 11), 1),
]


def affine(channels, device, dtype=torch.float32):
    return [torch.randn(channels, device=device).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_matches_fp64(device, shape, groups, layout, dtype):
    x = LAYOUTS[layout]((torch.randn(shape, device=device) * 3 + 1).to(dtype))
    weight, bias = affine(shape[1], device)
    out = group_norm_act(x, groups, weight, bias, 1e-6, act=True)
    assert LazyKernel.bound and out.dtype == dtype
    assert is_channels_last(out) if x.stride(1) == 1 else out.is_contiguous()
    assert_close(out, reference(x.double(), groups, weight, bias, 1e-6, act=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 4])
def test_per_frame_is_a_norm_of_each_frame(device, groups, layout):
    x = LAYOUTS[layout](torch.randn(2, 8, 3, 6, 5, device=device) * torch.arange(1, 4, device=device).view(3, 1, 1))
    weight, bias = affine(8, device)
    out = group_norm_act(x, groups, weight, bias, 1e-5, act=False, per_frame=True)
    for t in range(3):
        assert_close(out[:, :, t], F.group_norm(x[:, :, t].double(), groups, weight.double(), bias.double(), 1e-5))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("per_frame", [False, True])
def test_a_ramp_far_from_zero(device, layout, per_frame):
    """A mean 1000 times the deviation: fp32 E[x²] - E[x]² is off by the whole variance here."""
    ramp = torch.linspace(-1.7, 1.7, 2 * 48 * 40, device=device).view(1, 1, 2, 48, 40)
    x = LAYOUTS[layout]((1000 + ramp).expand(1, 8, 2, 48, 40).contiguous())
    out = group_norm_act(x, 2, None, None, 1e-6, act=False, per_frame=per_frame)
    assert_close(out, reference(x.double(), 2, None, None, 1e-6, act=False, per_frame=per_frame), "ramp")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bands_of_different_brightness(device, layout):
    """The deviation between the blocks a group is split into counts too."""
    bands = torch.arange(64, device=device).div(8, rounding_mode="floor").view(1, 1, 64, 1) * 10.0
    x = LAYOUTS[layout](bands + torch.randn(1, 8, 64, 64, device=device) * 0.1)
    out = group_norm_act(x, 4, None, None, 1e-6, act=True)
    assert_close(out, reference(x.double(), 4, None, None, 1e-6, act=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_may_have_another_dtype_or_be_missing(device, dtype):
    x = torch.randn(1, 8, 9, 5, device=device)
    weight, bias = affine(8, device, dtype)
    for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
        assert_close(
            group_norm_act(x, 4, w, b, 1e-6, act=False), reference(x.double(), 4, w, b, 1e-6, act=False)
        )  # fmt: skip


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(device, data):
    groups = data.draw(st.integers(1, 4))
    shape = [data.draw(st.integers(1, 2)), groups * data.draw(st.integers(1, 5))]
    shape += data.draw(st.lists(st.integers(2, 40), min_size=1, max_size=3))
    layout = data.draw(st.sampled_from(sorted(LAYOUTS))) if len(shape) > 3 else "channels_last"
    x = LAYOUTS[layout](torch.randn(shape, device=device) - 0.5)
    # eps as large as the variance: a group of one or two elements is otherwise a division by rounding
    assert_close(
        group_norm_act(x, groups, None, None, 1.0, act=True), reference(x.double(), groups, None, None, 1.0, act=True)
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (0, 8, 2, 4, 4)])
def test_empty_batch(device, shape):
    assert group_norm_act(torch.empty(shape, device=device), 4, None, None, 1e-6, act=True).shape == shape


def test_extreme_values_saturate_like_silu(device):
    x = torch.tensor([-1.0, 1.0] * 8, device=device).view(1, 1, 16)
    weight = torch.tensor([1e4], device=device)
    out = group_norm_act(x, 1, weight, None, 1e-6, act=True)
    assert_close(out, reference(x.double(), 1, weight, None, 1e-6, act=True))


def test_gradients_are_the_references(device):
    x = torch.randn(1, 8, 6, 5, device=device, requires_grad=True)
    weight = torch.randn(8, device=device, requires_grad=True)
    group_norm_act(x, 4, weight, None, 1e-6, act=True).square().sum().backward()
    stock = x.detach().clone().requires_grad_()
    F.silu(F.group_norm(stock, 4, weight.detach(), None, 1e-6)).square().sum().backward()
    torch.testing.assert_close(x.grad, stock.grad)
    assert weight.grad is not None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_traces_whole_with_the_real_strides(device, layout):
    x = LAYOUTS[layout](torch.randn(2, 8, 3, 6, 5, device=device))
    weight, bias = affine(8, device)
    torch.library.opcheck(
        torch.ops.vae_accel.group_norm_act.default,
        (x, 4, weight, bias, 1e-6, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(
        lambda x: group_norm_act(x, 4, weight, bias, 1e-6, act=True), fullgraph=True, backend="eager"
    )  # fmt: skip
    eager = group_norm_act(x, 4, weight, bias, 1e-6, act=True)
    assert torch.equal(compiled(x), eager) and compiled(x).stride() == eager.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_without_triton_the_reference_runs_in_the_same_layout(layout):
    x = LAYOUTS[layout](torch.randn(2, 8, 3, 6, 5))
    out = group_norm_act(x, 4, None, None, 1e-6, act=True)
    assert torch.equal(out, reference(x, 4, None, None, 1e-6, act=True)) and out.stride() == x.stride()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="3 groups"):
        group_norm_act(torch.zeros(1, 8, 4, 4), 3, None, None, 1e-6, act=True)
    with pytest.raises(ValueError, match="per_frame"):
        group_norm_act(torch.zeros(1, 8, 4, 4), 4, None, None, 1e-6, act=True, per_frame=True)


@pytest.mark.parametrize("act", [False, True])
def test_what_is_not_a_number_is_none_in_fp16(device, act):
    """Finite values are held at 65504; an overflow upstream must still be seen in the picture."""
    x = torch.randn(1, 8, 6, 5, device=device)
    x[:, :, 2, 3] = float("inf")
    out = group_norm_act(x, 2, None, None, 1e-6, act=act, dtype=torch.float16)
    assert out.isnan().any()
