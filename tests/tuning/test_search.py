"""The search, with fake timers: what is wrong never wins, what raises is told, time is kept."""

from __future__ import annotations

import pytest
import torch

from vae_accel.kernels.tiles import Key, Tile
from vae_accel.tuning import Problem, tune
from vae_accel.tuning.search import Poisoned, seconds_of

KEY = Key("conv", 8, 8, 9, "float16", "float16", 5)
TILES = [Tile(64, 16, 0, 32, stages, 4) for stages in range(2, 7)]


class Made:
    """Convolutions that are right within half of the vendor's error, apart from what `ours` does to a tile."""

    def __init__(self, ours=None, vendor=1.0):
        self.ours = ours or {}
        self.vendor = vendor
        self.seeds: list[int] = []
        self.running: object = None

    def __call__(self, seed):
        self.seeds.append(seed)
        golden = torch.randn(400, generator=torch.Generator().manual_seed(seed))

        def ours(tile):
            self.running = tile
            return self.ours.get(tile, lambda right: right)(golden * 1.005)

        def vendor():
            self.running = "vendor"
            return golden * 1.01

        return Problem(ours, vendor, lambda: golden, 1000)

    def tune(self, times, key=KEY, tiles=TILES, **options):
        """`times` of tiles, 1 where not given."""

        def timer(call):
            call()
            return self.vendor if self.running == "vendor" else times.get(self.running, 1.0)

        return tune(key, tiles, self, timer=timer, **options)


def test_the_fastest_right_tile_wins():
    made = Made()
    found = made.tune({TILES[3]: 0.5, TILES[1]: 0.7})
    assert found.tile == TILES[3] and found.is_choice and not found.dropped and found.vendor == 1.0
    assert list(found.seconds) == TILES
    assert made.seeds == [0, 1, 2, 3, 4, 5], "each candidate is proved on numbers of its own"


STALE: list[torch.Tensor] = []
WRONG = {
    "a scale": lambda y: y * 1.02,
    "one element in 400": lambda y: torch.cat((y[:1] + 3, y[1:])),
    "a NaN": lambda y: torch.cat((y[:1] * float("nan"), y[1:])),
    "not written": lambda y: torch.empty(400),
    "partly written": lambda y: torch.cat((y[:-1], y.new_empty(1))),
    "the last one's result": lambda y: STALE.append(y) or STALE[0] * -1,
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_tile_never_wins_even_if_it_is_the_fastest(how):
    found = Made({TILES[2]: WRONG[how]}).tune({TILES[2]: 0.01, TILES[4]: 0.9})
    assert found.tile == TILES[4]
    assert "error" in found.dropped[TILES[2]] and "allowed" in found.dropped[TILES[2]]
    assert TILES[2] not in found.seconds, "it was not even timed"


def test_another_shape_is_wrong():
    found = Made({TILES[0]: lambda y: y[:-1]}).tune({TILES[0]: 0.1})
    assert found.tile == TILES[1] and "not (400,)" in found.dropped[TILES[0]]


def test_one_that_raises_is_dropped_with_its_reason():
    def fail(y):
        raise RuntimeError("out of resource: shared memory\nand a long trace")

    found = Made({TILES[0]: fail}).tune({})
    assert found.tile == TILES[1]
    assert found.dropped == {TILES[0]: "RuntimeError: out of resource: shared memory"}


@pytest.mark.parametrize("vendor, wins", [(0.5, True), (0.96, True), (0.98, False), (2.0, False)])
def test_the_vendor_wins_by_more_than_three_percent(vendor, wins):
    found = Made(vendor=vendor).tune({})
    assert (found.tile is None) == wins and found.is_choice


def test_without_a_right_tile_the_vendor_runs_where_there_is_one():
    broken = dict.fromkeys(TILES, lambda y: y * 2)
    found = Made(broken).tune({})
    assert found.tile is None and found.is_choice and len(found.dropped) == len(TILES)
    found = Made(broken).tune({}, key=KEY._replace(kernel="winograd"))
    assert found.tile is None and not found.is_choice and found.vendor is None


def test_winograd_is_compared_with_no_vendor():
    found = Made(vendor=0.01).tune({TILES[1]: 0.5}, key=KEY._replace(kernel="winograd"))
    assert found.tile == TILES[1]


def test_the_time_is_kept():
    now = iter(range(100))  # a second passes in each candidate
    found = Made().tune({TILES[4]: 0.1}, seconds=2, clock=lambda: float(next(now)))
    assert list(found.seconds) == TILES[:2]
    assert found.dropped == dict.fromkeys(TILES[2:], "not reached in 2 s")
    assert list(Made().tune({}, seconds=0).seconds) == TILES[:1], "the present tile is always tried"


def test_poison_is_for_what_is_uninitialised():
    with Poisoned():
        x = torch.zeros(3)
        assert torch.empty(3).isnan().all() and x.new_empty(2).isnan().all() and torch.empty_like(x).isnan().all()
        assert not x.isnan().any() and torch.empty(2, dtype=torch.int64).dtype == torch.int64


def test_a_time_is_that_of_one_call():
    import time

    assert 0.01 <= seconds_of(lambda: time.sleep(0.01), torch.device("cpu")) < 0.1
