"""The tiles of a workload: what its optimized model asks for in one decode and encode, each tuned and written down."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vae_accel import api, settings, verify, workloads
from vae_accel.kernels import tile_choice
from vae_accel.kernels.tiles import Key, Tile, candidates
from vae_accel.rewrites import NAMES

from .problems import problem
from .search import Tuned, seconds_of, tune


@dataclass(frozen=True)
class Tuning:
    """What was tuned, the keys for which there was no time, and the file that remembers."""

    title: str
    tuned: tuple[Tuned, ...]
    left: tuple[Key, ...]
    path: Path

    def table(self) -> Table:
        """A row a key: the tile, its time and rate beside the vendor's, and what was dropped and why."""
        table = Table(box=SIMPLE_HEAD, title=self.title)
        for column in ("convolution", "tile", "us", "TFLOP/s", "vendor's", "tried", "dropped"):
            table.add_column(column, justify="right" if column in ("us", "TFLOP/s", "vendor's", "tried") else "left")
        for found in self.tuned:
            ours = found.seconds[found.tile] if found.tile else min(found.seconds.values(), default=None)
            name = "the vendor's" if found.key.has_vendor else "[red]none is right"
            table.add_row(
                str(found.key),
                str(found.tile or name),
                "" if ours is None else f"{1e6 * ours:.1f}",
                _rate(found.flop, ours),
                _rate(found.flop, found.vendor),
                str(len(found.seconds) + len(found.dropped)),
                "\n".join(f"{tile}: {why}" for tile, why in found.dropped.items()),
            )
        return table


def tune_workload(
    workload: workloads.Workload | workloads.Tower,
    size: Any = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    platform: str | None = None,
    only: str | None = None,
    model: str | None = None,
    seconds: float = 2.0,
    total: float = 600.0,
    progress: verify.Progress = lambda text: None,
) -> Tuning:
    """Tunes what `workload` asks for, the most work first, and writes each choice as soon as it is made.

    Args:
        seconds: for the candidates of one convolution, see `tune`.
        total: after so many no further convolution is begun.

    Raises:
        ValueError: a vision tower, or a model that meets none of our convolutions, on this device or with this plan.
    """
    if isinstance(workload, workloads.Tower):
        raise ValueError(f"{workload.name} is a vision tower: it has no convolution to tune")
    size = size or workload.size()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = str(dtype).removeprefix("torch.")
    path = settings.read(NAMES).tiles
    progress("looking for convolutions")
    vae = workload.build(dtype, device, model=model)
    api.optimize_vae(vae, platform=platform, only=only)
    met = _met(workload, vae, size, device, dtype)
    del vae
    if not met:
        raise ValueError(f"{workload.name} meets none of our convolutions on {verify.device_name(device)} in {name}")
    start = time.perf_counter()
    tuned: list[Tuned] = []
    left: list[Key] = []
    for key, tile in met.items():
        if time.perf_counter() - start >= total:
            left.append(key)
            continue
        progress(f"{len(tuned) + 1} of {len(met)}: {key}")
        with torch.inference_mode():
            found = tune(
                key,
                candidates(key, tile),
                partial(problem, key, device=_indexed(device)),
                timer=partial(seconds_of, device=device),
                seconds=seconds,
            )
        tuned.append(found)
        if found.is_choice:
            tile_choice.write(path, _indexed(device), {key: found.tile})
    tile_choice.use(path)
    title = f"{workload.name} {size} {name} on {verify.device_name(device)}"
    return Tuning(title, tuple(tuned), tuple(left), path)


def _met(
    workload: workloads.Workload, vae: Any, size: Any, device: torch.device, dtype: torch.dtype
) -> dict[Key, Tile]:
    """What one decode and one encode ask for, with the present tile, by falling work."""
    present: dict[Key, Tile] = {}
    calls: Counter[Key] = Counter()

    def record(key: Key, tile: Tile) -> Tile:
        calls[key] += 1
        return present.setdefault(key, tile)

    for direction in workload.directions(vae):
        x = verify.moved(workload.inputs("noise", direction, size), device, dtype)
        with tile_choice.answering(record):
            verify.run(workload, vae, direction, x)
    work = {key: calls[key] * key.channels_in * key.channels_out * key.taps << key.size for key in present}
    return {key: present[key] for key in sorted(present, key=work.__getitem__, reverse=True)}


def _indexed(device: torch.device) -> torch.device:
    return torch.empty((), device=device).device


def _rate(flop: int, seconds: float | None) -> str:
    return "" if seconds is None else f"{flop / seconds / 1e12:.0f}"
