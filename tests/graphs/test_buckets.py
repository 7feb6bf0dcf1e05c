"""The packing of images and the padding of a bucket, as arithmetic."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vae_accel.graphs.buckets import PADS, Batch, Room, Size, ends, pack, smallest

ROOMS = tuple(Room(tokens, 4) for tokens in (64, 256, 1024))


def frames(*tokens: int) -> list[Size]:
    return [Size(n, 1) for n in tokens]


def test_nothing_to_pack():
    assert pack([], ROOMS) == [] and pack(frames(16), []) == [Batch(None, (0,))]


def test_the_smallest_room_that_holds_it():
    assert [smallest(size, ROOMS) for size in frames(1, 64, 65, 1024, 1025)] == [
        ROOMS[0], ROOMS[0], ROOMS[1], ROOMS[2], None,
    ]  # fmt: skip


def test_what_fits_together_runs_together():
    assert pack(frames(30, 4, 30), ROOMS) == [Batch(ROOMS[0], (0, 1, 2))]


def test_over_the_edge_of_a_budget_two_small_rooms_are_cheaper_than_the_next():
    assert pack(frames(60, 60), ROOMS) == [Batch(ROOMS[0], (0,)), Batch(ROOMS[0], (1,))]
    assert pack(frames(200, 200), ROOMS) == [Batch(ROOMS[1], (0,)), Batch(ROOMS[1], (1,))]


def test_the_next_room_is_cheaper_than_many_small_ones():
    rooms = (Room(64, 4), Room(100, 4))
    assert pack(frames(48, 48), rooms) == [Batch(rooms[1], (0, 1))]


def test_eight_images_of_which_four_fit():
    rooms = tuple(Room(tokens, 4, frames=4) for tokens in (64, 256))
    assert pack(frames(*[16] * 8), rooms) == [Batch(rooms[0], (0, 1, 2, 3)), Batch(rooms[0], (4, 5, 6, 7))]


def test_what_is_too_large_runs_without_a_room_and_the_others_in_one():
    sizes = [Size(h * w // 4, 1) for h, w in ((4, 4), (8, 8), (18, 18))]  # upstream's: 4, 16 and 81 tokens
    assert pack(sizes, ROOMS[:1]) == [Batch(ROOMS[0], (0, 1)), Batch(None, (2,))]
    assert pack([Size(64, 9)], ROOMS) == [Batch(None, (0,))]  # a clip of more frames than a room has segments


def test_windows_are_counted():
    (room,) = rooms = (Room(64, 4, window=16),)
    assert room.windows == 8
    assert pack([Size(32, 1, 8), Size(32, 1, 1)], rooms) == [Batch(room, (0,)), Batch(room, (1,))]
    assert pack([Size(9, 1, 9)], rooms) == [Batch(None, (0,))]


@given(st.lists(st.builds(Size, st.integers(1, 1200), st.integers(1, 10), st.integers(1, 60)), max_size=12))
def test_every_image_is_in_one_batch_that_holds_it(sizes):
    rooms = tuple(Room(tokens, 4, window=16) for tokens in (64, 256, 1024))
    batches = pack(sizes, rooms)
    assert sorted(i for batch in batches for i in batch.images) == list(range(len(sizes)))
    for batch in batches:
        assert batch.images == tuple(sorted(batch.images)) and batch.images
        if batch.room is not None:
            whole = sum((sizes[i] for i in batch.images), Size(0, 0))
            assert batch.room.holds(whole) and batch.room == smallest(whole, rooms)
        else:
            assert all(smallest(sizes[i], rooms) is None for i in batch.images)


@given(st.integers(1, 64).flatmap(lambda t: st.tuples(st.just(t), st.lists(st.integers(1, 4 * t), max_size=8))))
def test_every_row_of_a_room_is_in_one_segment(given):
    tokens, lengths = given
    room = Room(tokens, 4, window=16)
    if sum(lengths) > room.rows or len(lengths) > room.frames:
        with pytest.raises(ValueError, match="in a bucket of"):
            room.frame_ends(lengths)
        return
    found = room.frame_ends(lengths)
    steps = [b - a for a, b in pairwise(found)]
    assert found[0] == 0 and found[-1] == room.rows and min(steps) >= 0
    assert steps[: len(lengths)] == lengths
    assert max(steps[len(lengths) :], default=0) <= -(-room.rows // PADS)
    assert len(found) == len(room.frame_ends([]))  # one shape, whatever is in it


def test_padding_of_windows_is_no_longer_than_a_window():
    room = Room(64, 4, window=16)
    steps = [b - a for a, b in pairwise(room.window_ends([16, 64, 8]))]
    assert steps[:3] == [16, 64, 8] and max(steps) == 64 and sum(steps) == 256


def test_ends():
    assert ends([3, 2], rows=10, most=3, pad=4) == [0, 3, 5, 9, 10, 10, 10]
    assert ends([], rows=4, most=1, pad=4) == [0, 4, 4]
    with pytest.raises(ValueError, match="2 segments of 4 rows in a bucket of 1 and 10"):
        ends([2, 2], rows=10, most=1, pad=4)
