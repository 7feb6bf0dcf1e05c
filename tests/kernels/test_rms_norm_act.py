import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.layouts import DTYPES, LAYOUTS, is_channels_last
from tests.tolerances import assert_close
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.rms_norm_act import MODES, reference, rms_norm_act

SHAPES = [(1, 96, 1, 5, 7), (2, 12, 3, 9, 6), (1, 18, 33, 40), (3, 300, 4, 5)]


def affine(shape, device):
    per_channel = (shape[1], *[1] * (len(shape) - 2))  # as Wan keeps them
    return torch.randn(per_channel, device=device), torch.randn(per_channel, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(device, shape, mode, layout, dtype):
    x = LAYOUTS[layout]((torch.randn(shape, device=device) * 3 + 1).to(dtype))
    weight, bias = affine(shape, device)
    out = rms_norm_act(x, weight, bias, 1e-8, act=True, mode=mode)
    assert LazyKernel.bound and out.dtype == dtype
    assert is_channels_last(out) if x.stride(1) == 1 else out.is_contiguous()
    assert_close(out, reference(x.double(), weight, bias, 1e-8, act=True, mode=mode))


def test_reference_is_wans_norm():
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    stock = WanRMS_norm(12, images=False)
    torch.nn.init.normal_(stock.gamma)
    x = torch.randn(2, 12, 3, 4, 5)
    torch.testing.assert_close(reference(x, stock.gamma, None, 1e-12, act=True), F.silu(stock(x)))


def test_reference_is_ltxs_norms():
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import PerChannelRMSNorm
    from diffusers.models.normalization import RMSNorm

    x = torch.randn(2, 12, 3, 4, 5)
    moved = RMSNorm(12, eps=1e-8, elementwise_affine=False)(x.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(reference(x, None, None, 1e-8, act=False, mode="mean"), moved)
    torch.testing.assert_close(moved, PerChannelRMSNorm()(x))


@pytest.mark.parametrize("mode", MODES)
def test_zero_and_tiny_positions(device, mode):
    """A position of zeros stays zero; one shorter than eps is divided by eps, as `F.normalize` does."""
    x = torch.randn(1, 8, 3, 4, device=device)
    x[:, :, 0], x[:, :, 1] = 0, 1e-14
    out = rms_norm_act(x, None, None, 1e-12, act=False, mode=mode)
    assert_close(out, reference(x.double(), None, None, 1e-12, act=False, mode=mode))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_ramp_far_from_zero(device, layout):
    x = LAYOUTS[layout](1000 + torch.linspace(-1.7, 1.7, 8 * 40, device=device).view(1, 8, 5, 8))
    assert_close(
        rms_norm_act(x, None, None, 1e-12, act=True), reference(x.double(), None, None, 1e-12, act=True)
    )  # fmt: skip


@pytest.mark.parametrize("parameters", [(True, False), (False, True), (False, False)])
def test_parameters_may_be_missing(device, parameters):
    x = torch.randn(1, 8, 4, 5, device=device)
    weight, bias = (p if there else None for p, there in zip(affine(x.shape, device), parameters, strict=True))
    assert_close(
        rms_norm_act(x, weight, bias, 1e-12, act=False), reference(x.double(), weight, bias, 1e-12, act=False)
    )  # fmt: skip


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(device, data):
    shape = [data.draw(st.integers(1, 3)), data.draw(st.integers(1, 150))]
    shape += data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
    x = LAYOUTS[layout](torch.randn(shape, device=device))
    assert_close(
        rms_norm_act(x, None, None, 1e-6, act=True, mode="mean"),
        reference(x.double(), None, None, 1e-6, act=True, mode="mean"),
    )


def test_empty_batch(device):
    assert rms_norm_act(torch.empty(0, 8, 2, 4, 4, device=device), None, None, 1e-12, act=True).shape == (0, 8, 2, 4, 4)


def test_gradients_are_the_references(device):
    x = torch.randn(1, 8, 6, 5, device=device, requires_grad=True)
    rms_norm_act(x, None, None, 1e-12, act=True).square().sum().backward()
    stock = x.detach().clone().requires_grad_()
    F.silu(F.normalize(stock, dim=1) * 8**0.5).square().sum().backward()
    torch.testing.assert_close(x.grad, stock.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_traces_whole_with_the_real_strides(device, layout):
    x = LAYOUTS[layout](torch.randn(2, 8, 3, 6, 5, device=device))
    weight, bias = affine(x.shape, device)
    torch.library.opcheck(
        torch.ops.vae_accel.rms_norm_act.default,
        (x, weight, bias, 1e-12, True, "l2"),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(
        lambda x: rms_norm_act(x, weight, bias, 1e-12, act=True), fullgraph=True, backend="eager"
    )  # fmt: skip
    eager = rms_norm_act(x, weight, bias, 1e-12, act=True)
    assert torch.equal(compiled(x), eager) and compiled(x).stride() == eager.stride()


def test_bad_arguments_are_named():
    x = torch.zeros(1, 8, 4, 4)
    with pytest.raises(ValueError, match="mode"):
        rms_norm_act(x, None, None, 1e-12, act=True, mode="max")
    with pytest.raises(ValueError, match="weight must have 8 elements"):
        rms_norm_act(x, torch.ones(7), None, 1e-12, act=True)


@pytest.mark.parametrize("act", [False, True])
def test_what_is_not_a_number_is_none_in_fp16(device, act):
    """Finite values are held at 65504; an overflow upstream must still be seen in the picture."""
    x = torch.randn(1, 8, 6, 5, device=device)
    x[:, :, 2, 3] = float("inf")
    out = rms_norm_act(x, None, None, 1e-6, act=act, mode="mean", dtype=torch.float16)
    assert out.isnan().any()
