"""Exact graphs: bit for bit the forward, each call's outputs its own, one key a call, bounds kept."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch

import vae_accel
from tests.graphs.towers import FIRST, PACKED, ROWS, counts, equal, flat, images, optimized, outcome, run
from tests.recorder import Recorder
from tests.towers import HOLDER, TABLE, Tower
from vae_accel.platforms import Step
from vae_accel.rewrites.bilinear_pos_embed import BilinearPosEmbed
from vae_accel.rewrites.cuda_graph import graphs_of

SETTINGS = ({}, {"output_hidden_states": True}, {"return_dict": False})
each_tower = pytest.mark.parametrize("tower", (*TABLE, HOLDER), ids=lambda t: t.id)


def poisoned(feed: dict) -> dict:
    """A feed whose tensors can be ruined after the call without touching the next."""
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in feed.items()}


@each_tower
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_replay_is_the_forward(tower: Tower, options: dict) -> None:
    stock, ours = tower.build(), optimized(tower.build())
    kept = []
    for kind in ("picture", "ramp", "noise", "picture"):
        feed = poisoned({**tower.inputs(kind), **options})
        want, got = run(stock, feed), run(ours, feed)
        assert equal(got, want)
        kept.append((got, want))
        for tensor in feed.values():  # a graph has inputs of its own
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.fill_(float("nan"))
    assert all(equal(got, want) for got, want in kept)  # and no output is written again
    assert counts(ours) == {FIRST: 1, "captured": 1, "replayed": 3}


def test_hidden_states_have_a_key_of_their_own_and_hit() -> None:
    stock, ours, feed = PACKED[1].build(), optimized(PACKED[1].build()), images((1, 4, 6))
    for options in ({}, {"output_hidden_states": True}) * 3:
        got = run(ours, {**feed, **options})
        assert equal(got, run(stock, {**feed, **options}))
        assert (got.hidden_states is not None) == bool(options)
    assert counts(ours) == {FIRST: 2, "captured": 2, "replayed": 4}


def test_one_call_has_one_key_however_it_is_spelled() -> None:
    ours = optimized(PACKED[0].build())
    feed = images((1, 4, 6))
    with torch.no_grad():
        ours(**feed)
        ours(feed["hidden_states"], feed["grid_thw"])
        ours(feed["hidden_states"], grid_thw=feed["grid_thw"], return_dict=True, output_hidden_states=None)
        ours(**feed, output_attentions=False)
    assert counts(ours) == {FIRST: 1, "captured": 1, "replayed": 3}
    with torch.no_grad():
        ours(**feed, output_hidden_states=True)
        if hasattr(ours, "_output_capturing_hooks_installed"):  # transformers 5.2x selects hidden states by number
            ours(**feed, output_hidden_states=1)
    assert counts(ours)[FIRST] >= 2 and counts(ours)["captured"] == 1


def test_grids_of_as_many_patches_are_not_confused() -> None:
    stock, ours = PACKED[2].build(), optimized(PACKED[2].build())
    for grids in (((1, 4, 6),), ((1, 6, 4),), ((1, 2, 6), (1, 2, 6)), ((2, 2, 6),)) * 3:
        assert equal(run(ours, images(*grids)), run(stock, images(*grids)))
    assert counts(ours) == {FIRST: 4, "captured": 4, "replayed": 8}


def test_beside_the_kernel_of_positions_a_graph_is_still_what_runs_without_it() -> None:
    step = Step(BilinearPosEmbed(), "on", "test")
    ours, feed = optimized(PACKED[2].build(), step), images((1, 4, 6))
    first, second, third = (run(ours, feed) for _ in range(3))
    assert equal(second, first) and equal(third, first) and counts(ours)["replayed"] == 2


def test_a_mask_of_ones_is_no_mask_and_another_is_part_of_the_key() -> None:
    stock, ours = ROWS["siglip2"].build(), optimized(ROWS["siglip2"].build())
    feed = ROWS["siglip2"].inputs()
    holed = {**feed, "pixel_attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    for each in (feed, holed) * 3:
        assert equal(run(ours, each), run(stock, each))
    assert counts(ours) == {FIRST: 2, "captured": 2, "replayed": 4}


def test_as_many_as_are_kept_and_the_least_recently_used_goes() -> None:
    ours = optimized(PACKED[0].build(), graph_keep=2)
    a, b, c = (images((1, 2, 2 * n)) for n in (1, 2, 3))
    for feed in (a, a, b, b, a, c, c, a, b):
        run(ours, feed)
    assert counts(ours)["dropped: the least recently used"] == 1  # b, when c came
    assert counts(ours)["captured"] == 3 and counts(ours)[FIRST] == 4


def test_a_graph_that_is_larger_than_the_pool_may_be_is_not_kept() -> None:
    ours = optimized(PACKED[0].build(), graph_pool_mib=1)
    small, large = images((1, 4, 6)), images((1, 60, 60))  # 1.4 MB of patches in fp32
    stock = run(PACKED[0].build(), large)
    for _ in range(2):
        run(ours, small)
    for _ in range(4):
        assert equal(run(ours, large), stock)
    met = counts(ours)
    assert met["dropped: together more than the pool may hold"] == 1 and outcome(ours).bytes == 0
    assert met["run as before: its graph is larger than VAE_ACCEL_GRAPH_POOL_MIB=1"] == 3 and met["captured"] == 3
    for _ in range(2):  # what fits is captured again
        run(ours, small)
    assert counts(ours)["captured"] == 4 and 0 < outcome(ours).bytes <= 2**20


def test_what_cannot_be_captured_runs_as_before_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, ours, feed = PACKED[0].build(), optimized(PACKED[0].build()), images((1, 4, 6))
    monkeypatch.setattr(Recorder, "fails", "its forward waits for the device")
    for _ in range(4):
        assert equal(run(ours, feed), run(stock, feed))
    assert counts(ours) == {FIRST: 1, "run as before: its forward waits for the device": 3}
    with pytest.raises(ValueError, match=r"Qwen2Vision.* cannot be captured: its forward waits for the device"):
        vae_accel.warmup(ours, [(1, 4, 6)])


def test_a_forward_that_is_not_the_same_twice_is_not_captured() -> None:
    ours, feed = optimized(PACKED[0].build()), images((1, 4, 6))
    norm = ours.get_submodule("blocks.0.norm1")
    below = norm.forward
    norm.forward = lambda x: below(x) + torch.rand(())
    for _ in range(3):
        run(ours, feed)
    assert counts(ours)["run as before: its replay is not what it computes"] == 2


def test_nothing_is_replayed_where_python_has_more_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, feed = optimized(PACKED[0].build()), images((1, 4, 6))
    for _ in range(2):
        run(ours, feed)
    pixels = feed["hidden_states"].clone().requires_grad_()
    ours(pixels, feed["grid_thw"]).pooler_output.sum().backward()
    assert pixels.grad is not None
    assert counts(ours)["run as before: a gradient is wanted, or autocast is on"] == 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ours(**feed).pooler_output.dtype == torch.bfloat16
    assert counts(ours)["run as before: a gradient is wanted, or autocast is on"] == 2
    monkeypatch.setattr(Recorder, "capturing", True)
    run(ours, feed)
    assert counts(ours)["run as before: inside another capture"] == 1
    monkeypatch.undo()
    run(ours, feed)
    ours.requires_grad_(False)
    assert not ours(**feed).pooler_output.requires_grad  # gradients are enabled, and nothing asks for one
    assert counts(ours)["replayed"] == 3


def test_a_compiler_sees_the_forward_alone() -> None:
    ours, feed = optimized(PACKED[0].build()), images((1, 4, 6))
    compiled = torch.compile(ours, backend="eager")
    for _ in range(3):
        run(compiled, feed)
    assert counts(ours) == {}


@pytest.mark.parametrize(
    "first, second", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)]
)
def test_inference_mode_may_come_and_go(first, second) -> None:
    ours, feed = optimized(PACKED[0].build()), images((1, 4, 6))
    want = run(PACKED[0].build(), feed)
    for mode in (first, first, second, first):
        with mode():
            got = ours(**feed)
        assert equal(got, want)
        assert got.pooler_output.is_inference() == (mode is torch.inference_mode)
    assert counts(ours)["replayed"] == 3


def test_other_switches_of_torch_are_another_call() -> None:
    ours, feed = optimized(PACKED[0].build()), images((1, 4, 6))
    for _ in range(2):
        run(ours, feed)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        run(ours, feed)
    run(ours, feed)
    assert counts(ours) == {FIRST: 2, "captured": 1, "replayed": 2}


def test_a_copy_and_a_pickle_start_empty() -> None:
    ours, feed = optimized(PACKED[0].build()), images((1, 4, 6))
    fresh = pickle.loads(pickle.dumps(ours))
    for _ in range(2):
        run(ours, feed)
    held = outcome(ours).bytes
    other = copy.deepcopy(ours)
    for model in (fresh, other):
        ((tower, _, graphs),) = graphs_of(model)
        assert tower is model and not graphs._exact and graphs._pool is None and outcome(model).bytes == 0
        want = run(model, feed)
        run(model, feed)
        assert outcome(model).bytes == held and outcome(model) is not outcome(ours)
        with torch.no_grad():
            model.get_parameter("merger.ln_q.weight").mul_(0.5)
        assert not equal(run(model, feed), want)
    assert equal(run(ours, feed), run(PACKED[0].build(), feed))


def test_restore_and_pause() -> None:
    ours, feed = optimized(PACKED[0].build()), images((1, 4, 6))
    for _ in range(2):
        run(ours, feed)
    with vae_accel.paused(ours):
        run(ours, feed)
        assert counts(ours)["replayed"] == 1
    run(ours, feed)
    assert counts(ours)["replayed"] == 2
    ((_, _, graphs),) = graphs_of(ours)
    gone = weakref.ref(graphs)
    del graphs
    gc.disable()
    try:  # the memory of a card is not to wait for the collector
        vae_accel.restore(ours)
        assert gone() is None
    finally:
        gc.enable()


def test_threads_take_turns() -> None:
    stock, ours = PACKED[1].build(), optimized(PACKED[1].build())
    feeds = [images((1, 4, 2 * n), seed=n) for n in (1, 2, 3)]
    wants = [run(stock, feed) for feed in feeds]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not equal(run(ours, feeds[i]), wants[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i % 3,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and counts(ours) == {FIRST: 3, "captured": 3, "replayed": 117}


def test_the_report_says_what_is_held() -> None:
    ours = optimized(PACKED[0].build())
    for _ in range(2):
        run(ours, images((1, 24, 24)))
    text = str(vae_accel.report(ours))
    assert "1 x captured" in text and "MiB held beside the model" in text
    assert vae_accel.report(ours).as_dict()[type(ours).__name__]["rewrites"][0]["bytes"] == outcome(ours).bytes > 2**18
    assert flat(run(ours, images((1, 24, 24))))
