"""The fastest right tile for one key: a candidate is proved on numbers it never saw before it may be timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vae_accel.kernels import bordered
from vae_accel.kernels.tiles import Key, Tile

from .problems import Problem

TOLERANCE = 1.05  # of the vendor's own error, as a rewrite of tier "rounding" has
TINY = 1e-6
MARGIN = 1.03  # by so much the vendor's must win: ours gives the next norm the clip it reads
ROUNDS, ROUND = 3, 0.02  # a time is the median of so many rounds of so many seconds


@dataclass(frozen=True)
class Tuned:
    """What was found for one key: `tile` is None where the vendor's is faster, or nothing of ours is right.

    `seconds` of each tile that was right, `dropped` the reasons of the others, `vendor` the vendor's seconds.
    """

    key: Key
    tile: Tile | None
    flop: int
    vendor: float | None
    seconds: dict[Tile, float] = field(default_factory=dict)
    dropped: dict[Tile, str] = field(default_factory=dict)

    @property
    def is_choice(self) -> bool:
        """Whether there is something to remember: a tile, or a vendor's convolution that can run instead."""
        return self.tile is not None or self.key.has_vendor


def tune(
    key: Key,
    tiles: Sequence[Tile],
    make: Callable[[int], Problem],
    *,
    timer: Callable[[Callable[[], Any]], float],
    seconds: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuned:
    """Proves and times `tiles`, the present one first, on `make(seed)`.

    Args:
        timer: seconds of a call that was compiled before.
        seconds: of proofs and timings; candidates left when they are over are dropped. Compiling does not count, which
            takes a candidate longer than all else, and Triton keeps what it compiled. The first is always tried.
    """
    sample = make(0)
    vendor = timer(sample.vendor) if key.has_vendor else None
    times: dict[Tile, float] = {}
    dropped: dict[Tile, str] = {}
    spent = 0.0
    for seed, tile in enumerate(tiles, 1):
        if seed > 1 and spent >= seconds:
            dropped[tile] = f"not reached in {seconds:g} s"
            continue
        fresh = make(seed)
        try:
            with Poisoned():
                y = fresh.ours(tile)
            begin = clock()
            golden = fresh.golden()  # of fp32 results both errors move by a tenth from one draw of weights to another
            limit = error(fresh.vendor(), golden) * TOLERANCE * fresh.slack + TINY
            wrong = error(y, golden)
            if wrong <= limit:  # false of a NaN
                times[tile] = timer(partial(fresh.ours, tile))
            else:
                dropped[tile] = f"error {wrong:.1e}, {limit:.1e} allowed"
            spent += clock() - begin
        except Exception as failure:  # Triton's own classes, a driver's RuntimeError: each costs one candidate
            dropped[tile] = f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
    best = min(times, key=times.__getitem__, default=None)
    if best is not None and vendor is not None and times[best] > MARGIN * vendor:
        best = None
    return Tuned(key, best, sample.flop, vendor, times, dropped)


def error(y: Tensor, golden: Tensor) -> float:
    """Relative RMS; of a bordered clip over all of its memory, since the next convolution reads the border too."""
    if y.shape != golden.shape:
        raise ValueError(f"a result of {tuple(y.shape)}, not {tuple(golden.shape)}")
    if bordered.is_bordered(y):
        y, golden = bordered.pixels_of(y), bordered.pixels_of(bordered.bordered(golden))
    return float((y.float() - golden).square().mean().sqrt() / golden.square().mean().sqrt())


class Poisoned(TorchFunctionMode):
    """Inside, uninitialised memory is NaN: what a kernel does not write shows, also over a right result of the last."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like, Tensor.new_empty) and out.is_floating_point():
            out.fill_(float("nan"))
        return out


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Wall seconds of one of many calls in a row."""

    def rounds(calls: int) -> float:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        _synchronize(device)
        return (time.perf_counter() - start) / calls

    rounds(1)
    calls = min(max(int(ROUND / rounds(1)), 1), 200)
    return statistics.median(rounds(calls) for _ in range(ROUNDS))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
