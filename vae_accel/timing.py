"""Wall time of calls that take turns, the host included, with the memory and the launches of one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vae_accel.results import Timing


def alternate(calls: Mapping[str, Callable[[], Any]], runs: int, device: torch.device) -> dict[str, Timing]:
    """Times each call `runs` times in turn, after one warm-up round, so that a drift of the machine meets all alike."""
    peaks, launches = {}, {}
    for name, call in calls.items():
        call()
        peaks[name] = _peak(call, device)
        launches[name] = _launches(call, device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: Timing(
            median_ms=statistics.median(t),
            min_ms=min(t),
            max_ms=max(t),
            runs=runs,
            peak_gib=peaks[name],
            launches=launches[name],
        )
        for name, t in times.items()
    }


def _peak(call: Callable[[], Any], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def _launches(call: Callable[[], Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize(device)
    return sum(e.count for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
