"""Patch embeddings as a matrix product: stock's values, shapes, strides and errors, on packed patches and on images."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vae_accel
from tests.towers import HOLDER, TABLE, Tower
from vae_accel.edits import Ledger, ledger_of
from vae_accel.platforms import Cpu, base
from vae_accel.rewrites.patch_embed_as_linear import PatchEmbedAsLinear

CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def optimized(model: nn.Module, **fields) -> nn.Module:
    step = base.Step(PatchEmbedAsLinear(**fields), "on", "test")
    base.run(model, Cpu(), [step], "vae", {"only": "patch_embed_as_linear"})
    return model


def twins(conv: nn.Module, **fields) -> tuple[nn.Module, nn.Module]:
    stock = nn.Sequential(conv).requires_grad_(False)
    return stock, optimized(copy.deepcopy(stock), **fields)


def refusals(model: nn.Module, **fields) -> dict[str, str | None]:
    return {site.path: site.refused for site in PatchEmbedAsLinear(**fields).sites(model, Ledger())}


def error(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    return (actual.double() - oracle).square().mean().sqrt().item()


def strides(x: torch.Tensor) -> list[int]:
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]


# (dimensions, input, out channels, kernel, bias): vLLM's acceptance cases with fewer channels, and images whose sizes
# the kernel does not divide (384 / 14 leaves 6 pixels).
CASES = [
    (2, (256, 3, 14, 14), 48, (14, 14), False),
    (2, (2, 3, 28, 28), 40, (14, 14), True),
    (2, (1, 3, 384, 384), 8, (14, 14), True),
    (2, (2, 4, 9, 13), 6, (2, 3), True),
    (3, (4, 3, 2, 14, 14), 40, (2, 14, 14), True),
    (3, (4, 3, 2, 14, 14), 40, (2, 14, 14), False),
    (3, (4, 3, 1, 14, 14), 48, (1, 14, 14), False),
    (3, (1, 3, 4, 28, 28), 32, (2, 14, 14), True),
    (3, (2, 5, 5, 6, 7), 4, (3, 2, 2), True),
]


@pytest.mark.parametrize("dims, shape, out, kernel, bias", CASES)
def test_values_are_stocks(dims, shape, out, kernel, bias):
    for padding, last_weight, last_input in itertools.product((0, "valid"), (False, True), (False, True)):
        conv = CONVOLUTIONS[dims](shape[1], out, kernel, stride=kernel, padding=padding, bias=bias)
        stock, ours = twins(conv.to(memory_format=CHANNELS_LAST[dims]) if last_weight else conv)
        x = torch.randn(shape)
        x = x.contiguous(memory_format=CHANNELS_LAST[dims]) if last_input else x
        want, got = stock(x), ours(x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert strides(got) == strides(want)
        oracle = stock.double()(x.double())
        torch.testing.assert_close(ours.double()(x.double()), oracle, rtol=0, atol=1e-12)
        for dtype in (torch.bfloat16, torch.float16):
            low = x.to(dtype)
            exact = copy.deepcopy(stock).to(dtype).double()(low.double())
            want, got = copy.deepcopy(stock).to(dtype)(low), copy.deepcopy(ours).to(dtype)(low)
            assert got.dtype == dtype and error(got, exact) <= 1.05 * error(want, exact)
            assert strides(got) == strides(want) or (dims, dtype) == (3, torch.float16)  # no oneDNN: always contiguous


def test_packed_patches_copy_nothing():
    class Operations(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(function.overloadpacket._qualified_op_name)
            return function(*args, **(kwargs or {}))

    patches = torch.randn(6, 3, 2, 4, 4)
    for last in (False, True):
        conv = nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4), bias=False)
        model = optimized(nn.Sequential(conv.to(memory_format=torch.channels_last_3d) if last else conv))
        x = patches.contiguous(memory_format=torch.channels_last_3d) if last else patches
        with torch.no_grad(), Operations() as seen:
            model(x)
        assert "aten::mm" in seen.names or "aten::linear" in seen.names
        assert not {"aten::clone", "aten::copy_", "aten::contiguous", "aten::convolution"} & set(seen.names)


def test_sites_and_reasons():
    class Causal(nn.Conv2d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (1, 0, 1, 0)))

    model = nn.ModuleDict(
        {
            "taken": nn.Conv2d(3, 4, 2, stride=2),
            "valid": nn.Conv3d(3, 4, (1, 2, 2), stride=(1, 2, 2), padding="valid"),
            "dilated": nn.Conv2d(3, 4, 2, stride=2, dilation=2),
            "grouped": nn.Conv2d(4, 4, 2, stride=2, groups=2),
            "reflecting": nn.Conv2d(3, 4, 2, stride=2, padding_mode="reflect"),
            "causal": Causal(3, 4, 2, stride=2),
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 2, stride=2)),
            "one": nn.Conv2d(3, 4, 1),
            "padded": nn.Conv2d(3, 4, 2, stride=2, padding=1),
            "same": nn.Conv2d(3, 4, 1, padding="same"),
            "overlapping": nn.Conv2d(3, 4, 3, stride=2),
            "linear": nn.Linear(3, 4),
        }
    )
    found = refusals(model)
    assert {path for path, reason in found.items() if reason is None} == {"taken", "valid"}
    words = {"dilated": "dilation", "grouped": "groups", "reflecting": "reflect", "causal": "Causal"}
    words["parametrized"] = "parametrization"
    assert all(words[path] in str(found[path]) for path in words)
    assert not {"one", "padded", "same", "overlapping", "linear"} & set(found)


def test_conv2d_by_platform():
    model = nn.ModuleDict({"image": nn.Conv2d(3, 4, 2, stride=2), "video": nn.Conv3d(3, 4, 2, stride=2)})
    assert refusals(model, conv2d="16bit") == {
        "image": "fp32 Conv2d is faster as it is on this platform",
        "video": None,
    }
    assert refusals(model, conv2d=False)["image"] == "Conv2d is faster as it is on this platform"
    assert refusals(model, conv2d="16bit", compute_dtype=torch.bfloat16)["image"] is None
    assert refusals(model.to(torch.bfloat16), conv2d="16bit") == {"image": None, "video": None}


def test_compute_dtype_runs_in_fewer_bits_and_returns_the_models():
    stock, ours = twins(nn.Conv3d(3, 32, (2, 4, 4), stride=(2, 4, 4)), compute_dtype=torch.bfloat16)
    x = torch.randn(5, 3, 2, 4, 4)
    got = ours(x)
    assert got.dtype == torch.float32 and torch.equal(got, got.bfloat16().float())
    torch.testing.assert_close(got, stock(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 4, 4, 4),  # channels
        torch.zeros(2, 3, 1, 8),  # smaller than the kernel
        torch.zeros(3, 3, 8, 8, dtype=torch.bfloat16),
        torch.zeros(8, 8),
        torch.zeros(1, 1, 3, 8, 8),
    ],
    ids=["channels", "too small", "dtype", "matrix", "five dimensions"],
)
def test_bad_input_gets_stocks_words(x):
    stock, ours = twins(nn.Conv2d(3, 4, 4, stride=4))
    with pytest.raises(RuntimeError) as want:
        stock(x)
    with pytest.raises(RuntimeError) as got:
        ours(x)
    assert str(got.value) == str(want.value)


def test_empty_and_unbatched():
    stock, ours = twins(nn.Conv2d(3, 4, 4, stride=4))
    assert ours(torch.zeros(0, 3, 8, 8)).shape == stock(torch.zeros(0, 3, 8, 8)).shape == (0, 4, 2, 2)
    x = torch.randn(3, 9, 8)
    assert ours(x).shape == (4, 2, 2)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-5, atol=1e-6)


def test_gradients_and_autocast_run_stock():
    stock, ours = twins(nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4)))
    x = torch.randn(4, 3, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), stock(x))
    x.requires_grad_()
    assert torch.equal(ours(x), stock(x))
    got, want = (torch.autograd.grad(model(x).square().sum(), x)[0] for model in (ours, stock))
    assert torch.equal(got, want)


def test_a_merge_into_the_weight_is_seen():
    for change in (lambda w: setattr(w, "data", w.data + 1), lambda w: w.data.add_(1), lambda w: w.data.mul_(-1)):
        stock, ours = twins(nn.Conv2d(3, 4, 4, stride=4))
        x = torch.randn(2, 3, 8, 8)
        ours(x)
        change(stock[0].weight), change(ours[0].weight)
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-5, atol=1e-5)


def test_state_dict_restore_deepcopy_pickle():
    model = nn.Sequential(nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4))).requires_grad_(False)
    x, state = torch.randn(4, 3, 2, 4, 4), {k: (v.clone(), v.stride()) for k, v in model.state_dict().items()}
    want = model(x)
    got = optimized(model)(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), got) and twin[0].__dict__["_conv_forward"].args[0] is twin[0]
    vae_accel.restore(model)
    assert "_conv_forward" not in model[0].__dict__ and torch.equal(model(x), want)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], v) and after[k].stride() == step for k, (v, step) in state.items())


def test_compiles_in_one_graph():
    torch._dynamo.reset()  # the function is one for all convolutions, and other tests have compiled it before
    _, ours = twins(nn.Conv2d(3, 4, 4, stride=4))
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    for shape in ((2, 3, 8, 9), (1, 3, 4, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), ours(x))


@pytest.mark.parametrize("tower", [t for t in (*TABLE, HOLDER) if t.convolution], ids=lambda t: t.id)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_towers(tower: Tower, last: bool):
    def build(dtype):
        model = tower.build(dtype=dtype)
        if last:
            conv = model.get_submodule(tower.convolution)
            conv.to(memory_format=CHANNELS_LAST[conv.weight.dim() - 2])
        return model

    feed = tower.inputs("picture")
    stock = build(torch.float32)
    ours = optimized(copy.deepcopy(stock))
    assert ledger_of(ours).outcomes[0].taken == [tower.convolution]
    assert list(ours.state_dict()) == list(stock.state_dict())
    for got, want in zip(tower.outputs(ours, feed), tower.outputs(stock, feed), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    feed = tower.inputs("picture", dtype=torch.bfloat16)
    golden = tower.outputs(build(torch.bfloat16).double(), {k: _double(v) for k, v in feed.items()})
    low = build(torch.bfloat16)
    stocks = tower.outputs(low, feed)
    for got, want, exact in zip(tower.outputs(optimized(low), feed), stocks, golden, strict=True):
        # A tiny tower is few values: a tenth more is within what one other rounding does to their mean.
        assert error(got, exact) <= 1.1 * error(want, exact)


def _double(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x
