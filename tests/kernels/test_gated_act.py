import pytest
import torch
import torch.nn.functional as F

from tests.tolerances import assert_close
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.gated_act import BLOCK, gated_act, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slope", [1.0, 1.702])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, BLOCK), (BLOCK + 1,)], ids=str)
def test_matches_fp64(device, shape, slope, dtype):
    x, other = (torch.randn(shape, device=device).mul_(4).to(dtype) for _ in range(2))
    for factor in (None, other):
        out = gated_act(x, factor, slope)
        assert LazyKernel.bound and out.dtype == dtype and out.shape == x.shape and out.is_contiguous()
        assert_close(out, reference(x.double(), None if factor is None else factor.double(), slope))


@pytest.mark.filterwarnings("ignore:overflow")  # numpy, which interprets; exp(60000) is to be infinite
def test_ends_of_the_range(device):
    x = torch.tensor([-60000.0, -100.0, -0.0, 0.0, 100.0, 60000.0], device=device)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        out = gated_act(x.to(dtype))
        assert torch.equal(out, torch.relu(x).to(dtype))
        assert torch.equal(gated_act(x.to(dtype), torch.zeros_like(x, dtype=dtype)).abs(), torch.zeros_like(out))


def test_reference_is_stocks():
    from transformers.activations import QuickGELUActivation

    x, other = torch.randn(2, 64, dtype=torch.float64)
    torch.testing.assert_close(reference(x), F.silu(x))
    torch.testing.assert_close(reference(x, other, 1.702), QuickGELUActivation()(x) * other)


def test_views_gradients_and_shapes(device):
    x = torch.randn(6, 8, device=device)
    assert torch.equal(gated_act(x.t(), x.t()), gated_act(x.t().contiguous(), x.t().contiguous()))
    x.requires_grad_(True)
    assert gated_act(x).requires_grad and gated_act(x[:0].detach()).shape == (0, 8)
    for other in (x[:1], x.double()):
        with pytest.raises(ValueError, match="one shape and dtype"):
            gated_act(x, other)
