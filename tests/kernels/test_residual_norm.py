import pytest
import torch
from torch import nn

from tests.tolerances import assert_close
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.residual_norm import MODES, WIDEST, reference, residual_norm, row_norm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Rows, and channels that are no power of two, odd, one, and as many as a program holds.
SHAPES = [(1, 1152), (2, 3, 1280), (5, 77), (7, 1), (1, WIDEST), (3420,)]


def operands(shape, dtype, device):
    x, y = (torch.randn(shape, device=device).mul_(2).to(dtype) for _ in range(2))
    return x, y, *(torch.randn(shape[-1], device=device).to(dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(device, shape, mode, dtype):
    x, y, weight, bias = operands(shape, dtype, device)
    for shift in (bias, None):
        total, normed = residual_norm(x, y, weight, shift, 1e-6, mode)
        alone = row_norm(x, weight, shift, 1e-6, mode)
        assert LazyKernel.bound and all(out.dtype == dtype and out.is_contiguous() for out in (total, normed, alone))
        if device == "cpu" and dtype == torch.bfloat16:  # which the interpreter truncates to
            assert_close(total, x.double() + y.double())
        else:
            assert torch.equal(total, x + y)
        wide = weight.double(), None if shift is None else shift.double(), 1e-6, mode
        assert_close(normed, reference(total.double(), None, *wide)[0])
        assert_close(alone, reference(x.double(), None, *wide)[0])


@pytest.mark.parametrize("mode", MODES)
def test_far_from_zero(device, mode):
    """A ramp 1000 deviations from zero, whose squares less the square of their mean would be all rounding."""
    x = 1000 + torch.linspace(-2, 2, 1280, device=device).expand(3, -1)
    weight, bias = torch.ones(1280, device=device), torch.zeros(1280, device=device)
    total, normed = residual_norm(x, torch.ones_like(x), weight, bias, 1e-6, mode)
    want = reference(total.double(), None, weight.double(), bias.double(), 1e-6, mode)[0]
    assert_close(normed, want, "ramp")


def test_strides(device):
    """Rows with NaN beside them, in another order, and none."""
    x, y, weight, bias = operands((4, 6, 40), torch.float32, device)
    want = residual_norm(x, y, weight, bias, 1e-5)
    beside = lambda t: torch.cat((t, torch.full_like(t, float("nan"))), -1)[..., : t.shape[-1]]  # noqa: E731
    for given in (beside, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), lambda t: t.mT.contiguous().mT):
        assert all(map(torch.equal, residual_norm(given(x), given(y), weight, bias, 1e-5), want))
        assert torch.equal(residual_norm(given(x), y, weight, bias, 1e-5)[1], want[1])
    spread = torch.stack((weight, weight * 0), 1)[:, 0]
    assert_close(
        row_norm(x, spread, bias, 1e-5), reference(x.double(), None, weight.double(), bias.double(), 1e-5, "layer")[0]
    )
    assert [out.shape for out in residual_norm(x[:0], y[:0], weight, bias, 1e-5)] == [(0, 6, 40)] * 2


def test_parameters_of_another_dtype_and_wider_rows(device):
    x, y, weight, bias = operands((2, 30), torch.float16, device)
    got = residual_norm(x, y, weight.float(), bias.float(), 1e-5)[1]
    assert_close(got, reference((x + y).double(), None, weight.double(), bias.double(), 1e-5, "layer")[0])
    x, y, weight, bias = operands((2, WIDEST + 1), torch.float32, device)
    assert_close(
        row_norm(x, weight, bias, 1e-5),
        nn.functional.layer_norm(x.double(), x.shape[1:], weight.double(), bias.double()),
    )


def test_what_stays_in_autograd_and_counts_versions(device):
    x, y, weight, bias = operands((2, 30), torch.float32, device)
    with torch.inference_mode():
        total, _ = residual_norm(x, y, weight, bias, 1e-5)
    assert not total.is_inference()
    x, y, weight, bias = operands((2, 30), torch.float64, device)
    given = [t.requires_grad_() for t in (x, y, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: residual_norm(*t, 1e-5), given)


def test_reference_is_stocks():
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

    x, y, weight, bias = operands((3, 32), torch.float32, "cpu")
    layer, rms = nn.LayerNorm(32, eps=1e-6), Qwen2_5_VLRMSNorm(32, eps=1e-6)
    with torch.no_grad():
        for norm in (layer, rms):
            norm.weight.copy_(weight)
        layer.bias.copy_(bias)
        total, normed = residual_norm(x, y, weight, bias, 1e-6)
        assert torch.equal(total, x + y)
        torch.testing.assert_close(normed, layer(x + y))
        torch.testing.assert_close(row_norm(x, weight, None, 1e-6, "rms"), rms(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_traces_whole(mode, both):
    x, y, weight, bias = operands((2, 3, 8), torch.float32, "cpu")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.vae_accel.residual_norm.default, (x, y if both else None, weight, bias, 1e-5, mode), test_utils=tests
    )


def test_bad_input():
    x, y, weight, bias = operands((2, 8), torch.float32, "cpu")
    for y_given, weight_given, bias_given, mode, message in (
        (y[:1], weight, bias, "layer", "x and y must be of one shape"),
        (y.half(), weight, bias, "layer", "x and y must be of one shape and dtype"),
        (y, weight[:3], bias, "layer", r"weight must be \[8\]"),
        (y, weight, bias[None], "rms", r"bias must be \[8\]"),
        (y, weight, bias, "l2", "mode must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            residual_norm(x, y_given, weight_given, bias_given, 1e-5, mode)
