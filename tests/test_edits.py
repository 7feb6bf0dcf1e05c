"""The pen and the ledger, on modules small enough to see through."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers.hooks.hooks import HookRegistry
from diffusers.hooks.hooks import ModelHook as DiffusersHook
from torch import nn

from tests.snapshots import assert_identical, snapshot
from vae_accel.edits import Ledger, Pen, SlotTaken, unusable_weight
from vae_accel.storage import are_joined, is_part, joint, padded


def doubled(module, below, *args):
    return below(*args) * 2


def plus(module, below, amount, x):
    return below(x) + amount


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Linear(5, 5), nn.ReLU())).requires_grad_(False)


def edited(root: nn.Module, path: str = "1.0", name: str = "forward") -> Ledger:
    ledger = Ledger()
    Pen(root, ledger, "doubles").method(path, name, doubled)
    return ledger


X = torch.arange(5.0)


def test_a_method_gets_the_module_what_was_there_and_its_facts():
    root = model()
    before = snapshot(root)
    stock = root[1][0](X)
    ledger = Ledger()
    Pen(root, ledger, "adds").method("1.0", "forward", plus, 3)
    assert torch.equal(root[1][0](X), stock + 3) and ledger.owner("1.0", "forward") == "adds"
    ledger.undo(root)
    assert_identical(root, before)
    ledger.undo(root)  # already undone
    ledger.redo(root)
    ledger.redo(root)
    assert torch.equal(root[1][0](X), stock + 3)


def test_a_slot_has_one_owner_unless_a_rewrite_goes_over_it():
    root = model()
    before = snapshot(root)
    ledger = edited(root)
    with pytest.raises(SlotTaken, match=r"adds cannot write '1\.0': forward is owned by doubles"):
        Pen(root, ledger, "adds").method("1.0", "forward", plus, 3)
    assert len(ledger.edits) == 1
    stock = type(root[1][0]).forward(root[1][0], X)
    Pen(root, ledger, "adds", over=("doubles",)).method("1.0", "forward", plus, 3)
    assert torch.equal(root[1][0](X), stock * 2 + 3)
    with pytest.raises(SlotTaken, match="owned by adds"):
        Pen(root, ledger, "third", over=("doubles",)).method("1.0", "forward", doubled)
    ledger.undo(root)
    assert_identical(root, before)


def test_one_module_has_many_slots():
    root = model()
    ledger = edited(root, "0", "_conv_forward")
    pen = Pen(root, ledger, "lays out")
    pen.layout("0", "weight", (0, 2, 3, 1))
    pen.method("0", "forward", doubled)
    assert [e.slot for e in ledger.edits] == ["_conv_forward", "weight", "forward"]


def test_rollback_takes_back_what_its_own_pen_wrote():
    root = model()
    ledger = edited(root)
    pen = Pen(root, ledger, "adds")
    pen.method("1.1", "forward", plus, 3)
    pen.layout("0", "weight", (0, 2, 3, 1))
    pen.rollback()
    assert [e.by for e in ledger.edits] == ["doubles"]
    assert "forward" not in vars(root[1][1]) and root[0].weight.is_contiguous()
    assert "forward" in vars(root[1][0])


def test_a_patch_made_by_others_is_not_written_over():
    root = model()
    root[1][0].forward = lambda x: x
    with pytest.raises(SlotTaken, match=r"was replaced on the instance by .*<lambda>: undo that patch"):
        edited(root)


def test_a_patch_made_by_others_on_top_stops_the_undo_before_it_changes_anything():
    root = model()
    before = snapshot(root)
    ledger = edited(root, "0")
    Pen(root, ledger, "adds").method("1.0", "forward", plus, 3)
    ours = root[0].forward
    root[0].forward = lambda x: ours(x)
    during = snapshot(root)
    with pytest.raises(SlotTaken, match=r"'0': forward was replaced by .*<lambda> after doubles wrote it"):
        ledger.undo(root)
    assert_identical(root, during)
    root[0].forward = ours
    ledger.undo(root)
    assert_identical(root, before)


def test_undo_passes_over_modules_that_were_dropped_or_exchanged():
    root = model()
    ledger = edited(root, "1.0")
    Pen(root, ledger, "adds").method("1.1", "forward", plus, 3)
    Pen(root, ledger, "adds").layout("0", "weight", (0, 2, 3, 1))
    Pen(root, ledger, "adds").method("0", "forward", plus, 3)
    root[0] = nn.Conv2d(3, 4, 1)
    root[1][0] = None
    exchanged = snapshot(root[0])
    ledger.undo(root)
    assert_identical(root[0], exchanged)
    assert "forward" not in vars(root[1][1])


def test_layouts_keep_values_and_come_back_with_their_strides():
    root = model()
    before = snapshot(root)
    ledger = Ledger()
    Pen(root, ledger, "lays out").layout("0", "weight", (0, 2, 3, 1))
    assert root[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(root[0].weight, before.tensors["0.weight"])
    root.half().float()
    ledger.undo(root)
    assert snapshot(root).strides == before.strides


def test_a_layout_counts_sizes_of_one():
    root = nn.Conv3d(1, 1, (3, 1, 1))
    strides = root.weight.stride()
    ledger = Ledger()
    Pen(root, ledger, "lays out").layout("", "weight", (2, 0, 3, 4, 1))
    root.half().float()
    ledger.undo(root)
    assert root.weight.stride() == strides


def test_the_layout_of_a_parameter_that_was_exchanged_is_left_alone():
    root = model()
    ledger = Ledger()
    Pen(root, ledger, "lays out").layout("0", "weight", (0, 2, 3, 1))
    root[0].weight = nn.Parameter(torch.randn(7, 2, 1, 5))
    mine = root[0].weight.clone()
    ledger.undo(root)
    assert torch.equal(root[0].weight, mine) and root[0].weight.stride() == mine.stride()


def linear(rows=3, columns=5):
    return nn.Linear(columns, rows).requires_grad_(False)


@pytest.mark.parametrize("shape", [(8, 5), (3, 8), (8, 8)], ids=str)
def test_a_padded_parameter_keeps_its_values_and_what_is_written_to_it(shape):
    root = linear()
    before, weight = snapshot(root), root.weight.clone()
    ledger = Ledger()
    Pen(root, ledger, "pads").pad("", "weight", shape)
    whole = padded(root, "weight", shape)
    assert whole.shape == shape and whole.sum() == root.weight.sum() and torch.equal(whole[:3, :5], weight)
    assert whole.data_ptr() == root.weight.data_ptr() == padded(root, "weight", shape).data_ptr()
    root.weight.data += 1  # how adapters are merged: no version, no pointer moves
    assert torch.equal(whole[:3, :5], weight + 1) and whole.count_nonzero() == 15
    root.load_state_dict({**root.state_dict(), "weight": weight})
    assert root.state_dict()["weight"].shape == (3, 5) and torch.equal(whole[:3, :5], weight)
    ledger.undo(root)
    assert root.weight.is_contiguous() and root.weight.untyped_storage().nbytes() == 3 * 5 * 4
    assert_identical(root, before)
    ledger.redo(root)
    assert torch.equal(padded(root, "weight", shape)[:3, :5], weight)


def test_a_copy_of_a_padded_parameter_is_padded_when_it_is_asked_for():
    root, shape = linear(), (8, 5)
    Pen(root, Ledger(), "pads").pad("", "weight", shape)
    for other in (copy.deepcopy(root), pickle.loads(pickle.dumps(root)), copy.deepcopy(root).double().float()):
        assert torch.equal(padded(other, "weight", shape)[:3], root.weight)
        assert other.weight.untyped_storage().nbytes() == 8 * 5 * 4
    flat = torch.randn(8 * 5 + 1)  # weights that a loader cut out of one buffer: what is beyond them is no zeros
    for storage in (flat, flat[1:]):
        root.weight = nn.Parameter(storage[:15].view(3, 5), requires_grad=False)
        assert padded(root, "weight", shape).count_nonzero() == 15
    with torch.inference_mode():
        for module in (linear(),):
            assert torch.equal(padded(module, "weight", shape)[:3], module.weight)
    root.weight = nn.Parameter(torch.randn(3, 5), requires_grad=False)
    with torch.inference_mode():
        padded(root, "weight", shape)
    assert not root.weight.is_inference() and root.weight.detach().clone().requires_grad_().sum().requires_grad


def test_what_cannot_be_padded():
    root = linear().to("meta")
    assert padded(root, "weight", (8, 5)) is None and padded(root, "nothing", (8, 5)) is None
    ledger = Ledger()
    Pen(root, ledger, "pads").pad("", "weight", (8, 5))
    assert not ledger.edits


def test_a_parameter_on_meta_has_no_layout_to_write():
    root = nn.Conv2d(3, 4, 3, device="meta")
    ledger = Ledger()
    Pen(root, ledger, "lays out").layout("", "weight", (0, 2, 3, 1))
    assert not ledger.edits and root.weight.is_contiguous()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda root: pickle.loads(pickle.dumps(root))])
def test_copies_carry_the_edits_and_undo_them_alone(clone):
    root = model()
    root.ledger = edited(root)
    Pen(root, root.ledger, "adds", over=("doubles",)).method("1.0", "forward", plus, 3)
    other = clone(root)
    assert vars(other[1][0])["forward"].func is plus and vars(other[1][0])["forward"].args[0] is other[1][0]
    assert torch.equal(other[1][0](X), root[1][0](X))
    other[1][0].weight.zero_()
    assert not torch.equal(other[1][0](X), root[1][0](X))
    other.ledger.undo(other)
    assert "forward" not in vars(other[1][0]) and "forward" in vars(root[1][0])


def test_an_edited_model_is_collected():
    root = model()
    root.ledger = edited(root, "")
    Pen(root, root.ledger, "adds").method("0", "forward", plus, 3)
    gone = weakref.ref(root)
    del root
    gc.collect()
    assert gone() is None


class Shouts(AccelerateHook):
    def post_forward(self, module, output):
        return output + 100


class Whispers(DiffusersHook):
    def post_forward(self, module, output):
        return output - 0.5


def add(kind: str, module: nn.Module) -> None:
    if kind == "accelerate":
        add_hook_to_module(module, Shouts())
    else:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(Whispers(), "whispers")


def remove(kind: str, module: nn.Module) -> None:
    if kind == "accelerate":
        remove_hook_from_module(module)
    else:
        module._diffusers_hook.remove_hook("whispers")


EFFECT = {"accelerate": 100, "diffusers": -0.5}


@pytest.mark.parametrize("kind", EFFECT)
@pytest.mark.parametrize("hooked", ["before", "after", "removed before"])
@pytest.mark.parametrize("undone", ["first", "last"])
def test_hooks_and_edits_in_any_order(kind, hooked, undone):
    root = model()
    layer = root[1][0]
    stock = layer(X)
    if hooked != "after":
        add(kind, layer)
    if hooked == "removed before":
        remove(kind, layer)
    ledger = edited(root)
    if hooked != "before":
        add(kind, layer)
    assert torch.equal(layer(X), stock * 2 + EFFECT[kind])
    if undone == "first":
        ledger.undo(root)
        assert torch.equal(layer(X), stock + EFFECT[kind])
        ledger.redo(root)
        assert torch.equal(layer(X), stock * 2 + EFFECT[kind])
        ledger.undo(root)
        remove(kind, layer)
    else:
        remove(kind, layer)
        assert torch.equal(layer(X), stock * 2)
        ledger.undo(root)
    assert torch.equal(layer(X), stock)
    edited(root)  # what a hook leaves behind does not count as somebody's patch
    assert torch.equal(layer(X), stock * 2)


@pytest.mark.parametrize("first, second", [("accelerate", "diffusers"), ("diffusers", "accelerate")])
def test_hooks_on_hooks(first, second):
    root = model()
    layer = root[1][0]
    stock = layer(X)
    add(first, layer)
    add(second, layer)
    ledger = edited(root)
    assert torch.equal(layer(X), stock * 2 + 99.5)
    ledger.undo(root)
    assert torch.equal(layer(X), stock + 99.5)


def counted(module, below, ledger, x):
    return below(x) * 2


def test_pickled_methods_that_hold_their_ledger_call_the_class():
    """Which leads to the other modules that it lists, before pickle has come to these."""
    root = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    ledger = root.__dict__["_vae_accel"] = Ledger()
    pen = Pen(root, ledger, "counts")
    for path in ("0", "1"):
        pen.method(path, "forward", counted, ledger)
    want = root(X)
    for other in (pickle.loads(pickle.dumps(root)), copy.deepcopy(root)):
        assert torch.equal(other(X), want)


def test_parameters_side_by_side():
    root = nn.Sequential(nn.Linear(5, 3), nn.Linear(5, 4)).requires_grad_(False)
    before, ledger = snapshot(root), Ledger()
    weights = [root[0].weight, root[1].weight]
    whole = torch.cat(weights)
    Pen(root, ledger, "joins").join(("0", "1"), "weight")
    assert are_joined(weights) and torch.equal(joint(root, "weight"), whole)
    assert joint(root, "weight").data_ptr() == weights[0].data_ptr()
    with pytest.raises(SlotTaken, match="weight is owned by joins"):
        Pen(root, ledger, "other").join(("1", "0"), "weight")
    weights[1].data *= 2
    assert torch.equal(joint(root, "weight")[3:], whole[3:] * 2)
    weights[1].data *= 0.5
    apart = copy.deepcopy(root)
    assert not are_joined([apart[0].weight, apart[1].weight]) and torch.equal(joint(apart, "weight"), whole)
    assert joint(root.double(), "weight").dtype == torch.float64
    ledger.undo(root.float())
    ledger.redo(root)
    assert are_joined(weights)
    ledger.undo(root)
    assert not any(map(is_part, weights))
    assert_identical(root, before)
    root[0].to("meta")
    assert joint(root, "weight") is None


def test_weights_that_cannot_be_read_are_named():
    assert unusable_weight(nn.Conv2d(2, 2, 3)) is None
    assert "parametrization" in unusable_weight(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3)))
    quantized = nn.Conv2d(2, 2, 3)
    quantized.weight = nn.Parameter(torch.ones(2, 2, 3, 3, dtype=torch.int8), requires_grad=False)
    assert "quantized (torch.int8)" in unusable_weight(quantized)

    class Packed(torch.Tensor):
        pass

    wrapped = nn.Conv2d(2, 2, 3)
    wrapped.weight = nn.Parameter(torch.ones(2, 2, 3, 3).as_subclass(Packed), requires_grad=False)
    assert "quantized or wrapped (Packed)" in unusable_weight(wrapped)
