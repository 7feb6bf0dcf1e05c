"""One call's images through buckets: cut apart, packed, replayed, and put together in their own order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from vae_accel.graphs.bucket import Bucket, size_of
from vae_accel.graphs.buckets import pack
from vae_accel.graphs.call import Call
from vae_accel.graphs.captured import distinct


def replay_packed(
    tower: nn.Module,
    below: Callable[..., Any],
    buckets: Sequence[Bucket],
    call: Call,
    grid: str,
    count: Callable[[str], None],
) -> Any:
    """What the tower returns for a call of patches [rows, width] and `grid`; None where no bucket holds any image."""
    ((name, patches),) = call.data.items()
    grids = tuple(map(tuple, call.steering[grid].tolist()))
    lengths = list(map(math.prod, grids))
    batches = pack([size_of(tower, g) for g in grids], [bucket.room for bucket in buckets])
    if sum(lengths) != len(patches) or all(batch.room is None for batch in batches):
        return None
    images = patches.split(lengths)
    by_room = {bucket.room: bucket for bucket in buckets}
    pieces: list[list[Tensor]] = [[] for _ in grids]  # the outputs of each image
    for batch in batches:
        own, rows = tuple(grids[i] for i in batch.images), [images[i] for i in batch.images]
        bucket = None if batch.room is None else by_room[batch.room]
        if bucket is None:
            count("run as before: an image that no bucket holds, beside others")
            where = call.steering[grid][list(batch.images)].to(call.device)
            outputs = distinct(tree_flatten(below(**{name: torch.cat(rows), grid: where}, **call.options))[0])
        else:
            count(f"replayed in a bucket of {bucket.room.tokens}")
            outputs = bucket.run(own, rows)
            if len(batches) == 1:
                return bucket.captured.rebuild(outputs)
        for i, parts in zip(batch.images, _per_image(outputs, list(map(math.prod, own))), strict=True):
            pieces[i] = parts
    whole = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*pieces, strict=True)]
    return buckets[0].captured.rebuild(whole)


def _per_image(outputs: Sequence[Tensor], lengths: Sequence[int]) -> list[list[Tensor]]:
    """Each output cut at the images: as many rows as patches, or the same fraction of them (a row a token)."""
    total, cut = sum(lengths), []
    for out in outputs:
        cut.append(out.split([length * len(out) // total for length in lengths]))
    return [list(parts) for parts in zip(*cut, strict=True)]
