import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tolerances import assert_close
from vae_accel.kernels import linear as module
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.linear import ACTS, MOST_ROWS, Tile, linear, reference, takes

HALF = [torch.float16, torch.bfloat16]
FORMS = {
    "plain": {},
    "residual": {"residual": True},
    **{act: {"act": act} for act in ACTS},
    "act and residual": {"act": "gelu", "residual": True},
    "gated": {"count": 2, "act": "silu", "gated": True},
    "gated and residual": {"count": 2, "act": "silu", "gated": True, "residual": True},
    "two": {"count": 2},
    "three": {"count": 3},
}
# (rows, K, N): less than a tile, beyond one in each direction, K that 16 and 64 do not divide, and a batch.
SHAPES = [((5,), 7, 3), ((70,), 68, 65), ((2, 33), 64, 80), ((65,), 130, 96)]


def operands(shape, K, N, dtype, device, count=1, bias=True) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    x = torch.randn(*shape, K, device=device).to(dtype)
    weights = [(torch.randn(N, K, device=device) * K**-0.5).to(dtype) for _ in range(count)]
    return x, weights, [torch.randn(N, device=device).to(dtype) if bias else None for _ in range(count)]


def doubled(values):
    return [None if v is None else v.double() for v in values]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape, K, N", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_matches_fp64(device, form, shape, K, N, dtype):
    if (device, dtype) == ("cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter multiplies bf16 as integers")
    options = dict(FORMS[form])
    x, weights, biases = operands(shape, K, N, dtype, device, options.pop("count", 1))
    residual = torch.randn(*shape, N, device=device).to(dtype) if options.pop("residual", False) else None
    out = linear(x, weights, biases, residual=residual, **options)
    wide = None if residual is None else residual.double()
    want = reference(x.double(), doubled(weights), doubled(biases), residual=wide, **options)
    assert LazyKernel.bound and out.dtype == dtype and out.shape == want.shape and out.is_contiguous()
    assert_close(out, want)


@pytest.mark.parametrize("tile", [Tile(32, 64, 32, 4, 3), Tile(64, 128, 128, 8, 3)], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_any_tile(device, gated, tile):
    x, weights, biases = operands((67,), 132, 131, torch.float32, device, 2 if gated else 1, bias=False)
    residual = torch.randn(67, 131, device=device)
    out = module._launch(x, weights, biases, None, gated, residual, tile)
    assert_close(out, reference(x.double(), doubled(weights), biases, None, gated, residual.double()))


def test_strides(device):
    """Rows with more behind them than the product reads, which is NaN here; an input and a residual in other orders."""
    dtype = torch.float16
    x, weights, biases = operands((40,), 60, 48, dtype, device, 3)
    beside = lambda t: torch.cat((t, torch.full_like(t, float("nan"))), 1)[:, : t.shape[1]]  # noqa: E731
    want = reference(x.double(), doubled(weights), doubled(biases))
    assert_close(linear(beside(x), [beside(w) for w in weights], biases), want)
    assert_close(linear(x.t().contiguous().t(), weights, biases), want)
    residual = torch.randn(40, 48, device=device).to(dtype)
    want = reference(x.double(), doubled(weights[:1]), doubled(biases[:1]), residual=residual.double())
    for given in (beside(residual), residual.t().contiguous().t()):
        assert_close(linear(x, weights[:1], biases[:1], residual=given), want)
    mixed = [weights[0], beside(weights[1])]  # two strides: torch's, as is a weight in another order
    assert torch.equal(linear(x, mixed, biases[:2]), reference(x, mixed, biases[:2]))
    other = weights[0].t().contiguous().t()
    assert torch.equal(linear(x, [other], biases[:1]), reference(x, [other], biases[:1]))


@pytest.mark.filterwarnings("ignore:overflow")  # numpy, which interprets; exp(1000) is to be infinite
def test_ends_of_the_range(device):
    x = torch.tensor([[-1000.0], [-100.0], [0.0], [100.0], [1000.0]], device=device).half()
    one = torch.ones(1, 1, device=device).half()
    for act in ACTS:
        assert torch.equal(linear(x, [one], [None], act=act), torch.relu(x))


def test_what_is_torchs(device):
    assert not takes(torch.randn(3, 4, device=device)) and not takes(torch.randn(0, 4, device=device).half())
    many = torch.randn(MOST_ROWS + 1, 4, device=device).half()
    assert takes(many[1:]) and not takes(many)
    weight = torch.randn(6, 4, device=device).half()
    assert torch.equal(linear(many, [weight], [None]), F.linear(many, weight))
    assert linear(many[:0], [weight], [None]).shape == (0, 6)
    assert linear(many[:2], [weight.requires_grad_()], [None]).requires_grad


def test_reference_is_stocks():
    from transformers.activations import ACT2FN

    x, weights, biases = operands((9,), 8, 6, torch.float64, "cpu")
    names = {"silu": "silu", "quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    for act in ACTS:
        want = ACT2FN[names[act]](F.linear(x, weights[0], biases[0]))
        torch.testing.assert_close(linear(x, weights, biases, act=act), want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count, gated, act", [(1, False, "gelu"), (2, True, "silu"), (3, False, None)])
def test_traces_whole(count, gated, act):
    x, weights, biases = operands((2, 3), 8, 6, torch.float32, "cpu", count)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    residual = torch.randn(2, 3, 6) if count == 1 else None
    torch.library.opcheck(
        torch.ops.vae_accel.linear.default, (x, weights, biases, act, gated, residual), test_utils=tests
    )


def test_bad_input():
    x, weights, biases = operands((4,), 8, 6, torch.float32, "cpu", 2)
    for given, message in (
        (([], []), "got none"),
        ((weights * 2, biases * 2), "one to three weights"),
        (([weights[0], weights[1][:3]], biases), "of one shape"),
        (([weights[0][:, :4]], biases[:1]), r"weights \[N, 8\]"),
        ((weights, biases[:1]), "for each of 2 weights"),
        ((weights[:1], [biases[0][:3]]), "one bias"),
        (([weights[0].double()], biases[:1]), "of one dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            linear(x, *given)
    for options, count, message in (
        ({"act": "relu"}, 1, "act='relu'"),
        ({"gated": True}, 1, "gated=True with 1 weights"),
        ({"act": "silu"}, 2, "neither activation nor residual"),
        ({"residual": torch.zeros(4, 6)}, 2, "neither activation nor residual"),
        ({"residual": torch.zeros(4, 5)}, 1, "residual must be"),
    ):
        with pytest.raises(ValueError, match=message):
            linear(x, weights[:count], biases[:count], **options)
