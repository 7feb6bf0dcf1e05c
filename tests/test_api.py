"""What the public calls promise, with rewrites and a platform made for the test."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import vae_accel
from tests.snapshots import assert_identical, snapshot
from vae_accel.edits import Ledger, Pen, ledger_of, obstacle
from vae_accel.platforms import Cpu, Cuda, Npu, Platform, Rocm, Step, Unknown, of
from vae_accel.rewrite import Rewrite, Site, Tier


def scaled(module, below, factor, x):
    return below(x) * factor


@dataclass(frozen=True)
class Scale(Rewrite):
    """Multiplies what each linear layer returns: any effect can be seen in the output."""

    name = "channels_last"
    tier = Tier.ROUNDING

    factor: float = 2.0
    fails_at: int = -1

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        for path, module in root.named_modules():
            if isinstance(module, nn.Linear):
                narrow = "too narrow" if module.in_features < 3 else None
                yield Site(path, narrow or obstacle(root, ledger, path, "forward", self.over))

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        if len(pen._ledger.edits) == self.fails_at:
            raise RuntimeError("no room")
        pen.method(site.path, "forward", scaled, self.factor)


@dataclass(frozen=True)
class ScaleOver(Scale):
    name = "native_reshape"
    tier = Tier.EXACT
    over = ("channels_last",)


@dataclass(frozen=True)
class Lowers(Scale):
    name = "conv3d_as_conv2d"
    lowers = True
    compute_dtype: torch.dtype | None = None

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        pen.method(site.path, "forward", scaled, 1.0 if self.compute_dtype is None else 4.0)


def plan(*steps: Step) -> Platform:
    class Made(Platform):
        name = "cpu"
        vae = encoder = steps

    return Made()


def on(rewrite: Rewrite) -> Step:
    return Step(rewrite, "on", "made for the test")


SCALE = plan(on(Scale()))
X = torch.ones(4)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False), nn.Linear(2, 2, bias=False))


@pytest.fixture
def net() -> nn.Sequential:
    return model().requires_grad_(False)


def test_optimize_returns_its_target_and_report_says_what_was_done(net):
    stock = net(X)
    assert vae_accel.optimize(net, platform=SCALE) is net
    assert torch.equal(net(X), stock * 4)
    (section,) = vae_accel.report(net).sections
    (outcome,) = section.outcomes
    assert (section.component, section.platform, outcome.state) == ("Sequential", "cpu", "on")
    assert outcome.taken == ["0", "1"] and outcome.refused == {"2": "too narrow"}
    text = str(vae_accel.report(net))
    assert "channels_last" in text and "2 taken, 1 refused" in text and "1 x too narrow" in text
    assert vae_accel.report(net).as_dict()["Sequential"]["rewrites"][0]["taken"] == ["0", "1"]


def test_two_optimizes_equal_one(net):
    stock = net(X)
    vae_accel.optimize(net, platform=SCALE)
    ledger, once = ledger_of(net), snapshot(net)
    vae_accel.optimize(net, platform=SCALE)
    assert ledger_of(net) is ledger and snapshot(net).instances == once.instances
    assert torch.equal(net(X), stock * 4)


def test_another_request_replaces_the_first(net):
    stock = net(X)
    vae_accel.optimize(net, platform=SCALE)
    vae_accel.optimize(net, platform=plan(on(Scale(factor=4.0))))
    assert torch.equal(net(X), stock * 16)
    vae_accel.optimize(net, platform=SCALE, channels_last="0")
    assert torch.equal(net(X), stock)
    assert "VAE_ACCEL_CHANNELS_LAST=0" in str(vae_accel.report(net))


def test_restore_leaves_no_trace(net):
    before = snapshot(net)
    vae_accel.optimize(net, platform=SCALE)
    assert vae_accel.restore(net) is net
    assert_identical(net, before)
    vae_accel.restore(net)  # nothing left to take back
    assert "not optimized" in str(vae_accel.report(net))


def test_paused_is_stock_and_comes_back(net):
    before, stock = snapshot(net), net(X)
    vae_accel.optimize(net, platform=SCALE)
    with vae_accel.paused(net) as same:
        assert same is net and torch.equal(net(X), stock)
        assert "paused" in str(vae_accel.report(net))
        with vae_accel.paused(net):
            assert torch.equal(net(X), stock)
        assert torch.equal(net(X), stock)
    assert torch.equal(net(X), stock * 4) and "paused" not in str(vae_accel.report(net))
    with pytest.raises(KeyError), vae_accel.paused(net):
        raise KeyError
    assert torch.equal(net(X), stock * 4)
    vae_accel.restore(net)
    assert_identical(net, before)


def test_restore_and_optimize_inside_a_pause_have_the_last_word(net):
    before, stock = snapshot(net), net(X)
    vae_accel.optimize(net, platform=SCALE)
    with vae_accel.paused(net):
        vae_accel.restore(net)
    assert_identical(net, before)
    vae_accel.optimize(net, platform=SCALE)
    with vae_accel.paused(net):
        vae_accel.optimize(net, platform=plan(on(Scale(factor=4.0))))
    assert torch.equal(net(X), stock * 16)


def test_pausing_what_was_never_optimized_does_nothing(net):
    before = snapshot(net)
    with vae_accel.paused(net):
        assert_identical(net, before)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_optimized_too_and_restores_alone(net, clone):
    stock = net(X)
    other = clone(vae_accel.optimize(net, platform=SCALE))
    assert torch.equal(other(X), stock * 4)
    vae_accel.restore(other)
    assert torch.equal(other(X), stock) and torch.equal(net(X), stock * 4)


def test_a_rewrite_that_fails_is_rolled_back_alone_and_says_so(net):
    before, stock = snapshot(net), net(X)
    failing = plan(on(Scale(fails_at=1)), on(ScaleOver(factor=4.0)))
    vae_accel.optimize(net, platform=failing)
    first, second = ledger_of(net).outcomes
    assert (first.state, first.why) == ("failed", "rolled back: RuntimeError: no room") and not first.taken
    assert second.state == "on" and torch.equal(net(X), stock * 16)
    assert "no room" in str(vae_accel.report(net))
    vae_accel.restore(net)
    assert_identical(net, before)


@pytest.mark.parametrize("options", [{"strict": True}, {"channels_last": "1"}, {"only": "channels_last"}])
def test_strict_and_a_request_by_name_raise_what_failed(net, options):
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="no room"):
        vae_accel.optimize(net, platform=plan(on(Scale(fails_at=1))), **options)
    assert_identical(net, before)


def test_a_failing_request_leaves_what_was_there_before(net):
    stock = net(X)
    vae_accel.optimize(net, platform=SCALE)
    ledger = ledger_of(net)
    with pytest.raises(RuntimeError, match="no room"):
        vae_accel.optimize(net, platform=plan(on(Scale(fails_at=1))), strict=True)
    assert ledger_of(net) is ledger and torch.equal(net(X), stock * 4)
    vae_accel.restore(net)
    assert torch.equal(net(X), stock)


def test_the_default_of_a_step_and_the_switches(net, monkeypatch):
    stock = net(X)
    table = plan(Step(Scale(), "off", "slower here"))
    assert torch.equal(vae_accel.optimize(net, platform=table)(X), stock)
    assert "slower here" in str(vae_accel.report(net))
    assert torch.equal(vae_accel.optimize(net, platform=table, channels_last="1")(X), stock * 4)
    assert torch.equal(vae_accel.optimize(net, platform=table, only="channels_last")(X), stock * 4)
    assert torch.equal(vae_accel.optimize(net, platform=table)(X), stock)
    monkeypatch.setenv("VAE_ACCEL_CHANNELS_LAST", "1")
    assert torch.equal(vae_accel.optimize(net, platform=table)(X), stock * 4)
    assert torch.equal(vae_accel.optimize(net, platform=table, channels_last="0")(X), stock)


def test_only_leaves_out_the_rest(net):
    stock = net(X)
    table = plan(on(Scale()), on(ScaleOver(factor=4.0)))
    assert torch.equal(vae_accel.optimize(net, platform=table)(X), stock * 64)
    assert torch.equal(vae_accel.optimize(net, platform=table, only="native_reshape")(X), stock * 16)
    assert "not among the rewrites asked for" in str(vae_accel.report(net))
    assert torch.equal(vae_accel.optimize(net, platform=table, only=["native_reshape", "channels_last"])(X), stock * 64)


def test_the_tier_decides_what_may_run(net):
    stock = net(X)
    table = plan(on(Scale()), on(ScaleOver(factor=4.0)))
    assert torch.equal(vae_accel.optimize(net, platform=table, tier="exact")(X), stock * 16)
    assert "its tier is rounding, above VAE_ACCEL_TIER=exact" in str(vae_accel.report(net))
    assert torch.equal(vae_accel.optimize(net, platform=table, tier=vae_accel.Tier.EXACT)(X), stock * 16)
    assert torch.equal(vae_accel.optimize(net, platform=table, tier="lowered")(X), stock * 64)


def test_bf16_lowers_the_convolutions_and_says_so(net):
    stock = net(X)
    table = plan(on(Lowers()))
    assert torch.equal(vae_accel.optimize(net, platform=table)(X), stock)
    assert ledger_of(net).outcomes[0].tier == "rounding"
    assert torch.equal(vae_accel.optimize(net, platform=table, bf16=True)(X), stock * 16)
    assert ledger_of(net).outcomes[0].tier == "lowered"


def test_platforms_are_picked_by_device_by_name_or_given(net, monkeypatch):
    platforms = {"cuda": Cuda, "rocm": Rocm, "npu": Npu, "cpu": Cpu}
    assert type(of(net)) is Cpu
    for name, cls in platforms.items():
        for chosen in (name, cls, cls()):
            vae_accel.optimize(net, platform=chosen)
            assert ledger_of(net).platform == name
        assert cls().optimize_vae(net) is net and cls().optimize_encoder(net) is net
    monkeypatch.setenv("VAE_ACCEL_PLATFORM", "rocm")
    vae_accel.optimize(net)
    assert ledger_of(net).platform == "rocm"
    vae_accel.optimize(net, platform="npu")
    assert ledger_of(net).platform == "npu"


def test_an_unknown_accelerator_gets_an_empty_plan_and_a_sentence(net):
    net.to("meta")
    assert isinstance(of(net), Unknown)
    fresh = model().requires_grad_(False)
    before = snapshot(fresh)
    vae_accel.optimize(fresh, platform=Unknown("xla"))
    assert "no plan for 'xla' yet: nothing was rewritten" in str(vae_accel.report(fresh))
    vae_accel.restore(fresh)
    assert_identical(fresh, before)


class OnCuda(nn.Module):
    """Stands for a model on a device that this machine may lack."""

    def parameters(self, recurse=True):
        yield SimpleNamespace(device=torch.device("cuda"))


@pytest.mark.parametrize("hip, expected", [("7.0", Rocm), (None, Cuda)])
def test_hip_is_asked_before_cuda(hip, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    assert type(of(OnCuda())) is expected


def test_two_components_share_a_request_by_name(net):
    """In a pipeline a rewrite asked for by name must find a site in some component, not in each."""

    pipe = SimpleNamespace(components={"vae": Vae(nn.Linear(4, 4)), "vae_2": Vae(nn.Linear(2, 2))})
    vae_accel.optimize(pipe, platform=SCALE, only="channels_last")
    first, second = vae_accel.report(pipe).sections
    assert (first.component, second.component) == ("vae", "vae_2")
    assert first.outcomes[0].taken == ["linear"] and second.outcomes[0].refused == {"linear": "too narrow"}
    vae_accel.restore(pipe)
    assert "forward" not in vars(pipe.components["vae"].linear)


class Vae(nn.Module):
    """What counts as an autoencoder: the name, a `decode`, a convolution."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.conv = linear, nn.Conv2d(1, 1, 1)

    def decode(self, x):
        return self.linear(x)


Vae.__name__ = "AutoencoderOfTheTest"
