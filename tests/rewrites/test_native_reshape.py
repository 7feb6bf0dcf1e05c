"""einops layers and methods that call einops: the same bits, strides, errors and neighbours, without einops running."""

import copy
import pickle
import sys
from contextlib import contextmanager

import einops
import einops.layers.torch
import pytest
import torch
from einops import rearrange as fold
from einops import reduce, repeat
from torch import nn

import vae_accel
from tests import remote
from vae_accel.edits import ledger_of
from vae_accel.platforms import base, cpu
from vae_accel.rewrites import native_reshape
from vae_accel.rewrites.native_reshape import NativeReshape

scale = 2.0
assigned = 0


class Attention(nn.Module):
    """einops by an alias, as an attribute of its module, in a helper, a comprehension and a closure."""

    def __init__(self, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(16, 48)

    def split(self, x, *, sign=1.0):
        return [sign * fold(part, "b n (h d) -> b h n d", h=self.heads) for part in x.chunk(3, -1)]

    def forward(self, x, mask=None):
        q, k, v = self.split(self.qkv(x), sign=scale)
        w = einops.reduce(q @ k.mT, "b h n m -> b h n m", "sum").softmax(-1)
        out = (lambda y: einops.rearrange(y, "... h n d -> ... n (h d)"))(w @ v)
        return out if mask is None else out * repeat(mask, "n -> b n 1", b=x.shape[0])


class Base(nn.Module):
    def forward(self, x):
        return fold(x, "b c -> c b") + 1


class Derived(Base):
    def forward(self, x):
        return super().forward(fold(x, "b c -> c b")) * 2


class Assigns(nn.Module):
    def forward(self, x):
        global assigned
        assigned += 1
        return fold(x, "b c -> c b")


class Looks(nn.Module):
    def forward(self, x):
        return globals()["fold"](fold(x, "b c -> c b"), "b c -> c b")


class Decorated(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return fold(x, "b c -> c b")


class Static(nn.Module):
    @staticmethod
    def forward(x):
        return fold(x, "b c -> c b")


class Repeats(nn.Module):
    """A method of tensors of the same name as a global that is einops."""

    def __init__(self):
        super().__init__()
        self.order = fold(torch.arange(4).reshape(2, 2), "a b -> b a")

    def forward(self, x):
        return x.repeat(2, 1)


class Counts(einops.layers.torch.Rearrange):
    def forward(self, x):
        return super().forward(x) + 1


def optimized(module):
    base.run(module, cpu.Cpu(), [base.Step(NativeReshape(), "on", "test")], "vae", {"only": "native_reshape"})
    return module


@contextmanager
def einops_raises():
    """Whatever runs inside was compiled."""

    def raises(*args, **kwargs):
        raise AssertionError("einops ran")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(einops.einops, "_apply_recipe", raises)
        patch.setattr(einops.layers.torch, "apply_for_scriptable_torch", raises)
        yield


def test_methods_give_the_same_bits_and_strides():
    torch.manual_seed(0)
    x, mask = torch.randn(2, 5, 16), torch.rand(5)
    model = nn.Sequential(Attention())
    want, masked = model(x), model[0](x, mask)
    optimized(model)
    assert ledger_of(model).outcomes[0].taken == ["0"]
    with einops_raises():
        got = model(x)
        assert torch.equal(model[0](x, mask=mask), masked)
    assert torch.equal(got, want) and got.stride() == want.stride()
    with einops_raises(), vae_accel.paused(model), pytest.raises(AssertionError, match="einops ran"):
        model(x)


def test_a_model_of_remote_code():
    model = remote.build()
    want = remote.run(model, "picture")
    optimized(model)
    assert ledger_of(model).outcomes[0].taken == ["patch", "attention", "unpatch", "still"]
    with einops_raises():
        got = remote.run(model, "picture")
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(got, want, strict=True))


def test_layers():
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(
        einops.layers.torch.Rearrange("b c (h p) (w q) -> b (c p q) h w", p=2, q=2),
        einops.layers.torch.Reduce("b c h w -> b c w", "mean"),
    )
    want = model(x)
    optimized(model)
    with einops_raises():
        got = model(x)
    assert torch.equal(got, want) and got.stride() == want.stride()
    assert ledger_of(model).outcomes[0].taken == ["0", "1"]


def test_super_and_gradients():
    x = torch.randn(3, 4, requires_grad=True)
    model = nn.Sequential(Derived())
    want = torch.autograd.grad(model(x).square().sum(), x)[0]
    optimized(model)
    assert torch.equal(torch.autograd.grad(model(x).square().sum(), x)[0], want)
    assert torch.equal(model(x), (x + 1) * 2)


def test_globals_are_live(monkeypatch):
    x = torch.randn(2, 5, 16)
    model = optimized(nn.Sequential(Attention()))
    monkeypatch.setitem(globals(), "scale", -1.0)
    assert torch.equal(model(x), Attention.forward(copy.deepcopy(model[0]), x))
    monkeypatch.setitem(globals(), "fold", lambda x, pattern, **axes: einops.rearrange(x, pattern, **axes) * 0)
    assert not model(x).any()
    monkeypatch.delitem(globals(), "repeat")
    with pytest.raises(NameError, match="repeat"):
        model[0](x, torch.rand(5))


@pytest.mark.parametrize(
    "module, why",
    [
        (Assigns, "assigns globals"),
        (Looks, "looks into its globals"),
        (Decorated, "beneath a decorator"),
        (Static, "decor"),
    ],
)
def test_unsound_sites_are_refused(module, why):
    with pytest.raises(ValueError, match=why):
        optimized(nn.Sequential(module()))


def test_a_method_that_only_shares_a_name_is_no_site():
    with pytest.raises(ValueError, match="no such site"):
        optimized(nn.Sequential(Repeats()))


def test_layers_that_are_refused():
    mean = einops.layers.torch.Reduce("b c -> b", lambda x, dims: x.mean(dims))
    for layer, why in ((mean, "Python function"), (Counts("b c -> c b"), "subclass")):
        with pytest.raises(ValueError, match=why):
            optimized(nn.Sequential(layer))


def test_errors_are_those_of_einops():
    class Wrong(nn.Module):
        def forward(self, x, pattern="b c d -> c b d", **axes):
            return fold(x, pattern, **axes)

    model = optimized(nn.Sequential(Wrong()))
    with pytest.raises(einops.EinopsError, match="Wrong shape"):
        model(torch.zeros(2, 3))
    with pytest.raises(einops.EinopsError):
        model[0](torch.zeros(6, 1, 1), "(b c) d e -> b c d e", b=4)


def test_what_is_not_compiled_goes_to_einops():
    x = torch.randn(2, 3)
    assert torch.equal(native_reshape.rearrange([x, x], "n a b -> a n b"), torch.stack([x, x], 1))
    assert native_reshape.rearrange(x.numpy(), "a b -> b a").shape == (3, 2)
    assert torch.equal(native_reshape.reduce(x, "a b -> a", lambda y, dims: y.sum(dims)), x.sum(1))
    with pytest.raises(NotImplementedError):
        native_reshape.reduce(x.long(), "a b -> a", "mean")
    assert native_reshape.Einops().asnumpy is einops.asnumpy


def test_restore_deepcopy_pickle_and_state_dict():
    x = torch.randn(2, 5, 16)
    model = nn.Sequential(Attention(), einops.layers.torch.Rearrange("b n d -> n b d"))
    keys, want = list(model.state_dict()), model(x)
    optimized(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), want) and ledger_of(twin) is not None
        assert all(layer.__dict__["forward"].args[0] is layer for layer in twin)
        with einops_raises():
            assert torch.equal(twin(x), want)
        vae_accel.restore(twin)
        assert "forward" not in {**vars(twin[0]), **vars(twin[1])} and torch.equal(twin(x), want)
    assert list(model.state_dict()) == keys
    vae_accel.restore(model)
    assert not {"forward", "split"} & {*model[0].__dict__, *model[1].__dict__}
    assert torch.equal(model(x), want)


def test_torch_compile_sees_the_stock_code():
    x = torch.randn(2, 5, 16)
    model = optimized(nn.Sequential(Attention(), einops.layers.torch.Rearrange("b n d -> n b d")))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x), rtol=0, atol=0)


def test_a_model_without_einops_has_no_site(monkeypatch):
    assert not list(NativeReshape().sites(nn.Sequential(nn.Linear(2, 2)), vae_accel.edits.Ledger()))
    monkeypatch.delitem(sys.modules, "einops")
    assert not list(NativeReshape().sites(nn.Sequential(Attention()), vae_accel.edits.Ledger()))


def test_per_call_time_reports_both():
    times = native_reshape.per_call_time(calls=50)
    assert "... h d -> ... (h d)" in times
    assert all(stock > 0 and native > 0 for stock, native in times.values())


assert reduce is einops.reduce  # an einops global that no method reads is no obstacle
