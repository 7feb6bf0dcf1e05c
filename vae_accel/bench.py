"""How fast: stock against rewritten in one run, alternating, after a green proof, stamped into schema-checked JSON."""

from __future__ import annotations

import copy
import datetime
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from vae_accel import api, profiling, verify, workloads
from vae_accel.edits import ledger_of
from vae_accel.results import Call, ProfileRow, ProofRow, Result, Speed, Timing, commit_of, versions
from vae_accel.rewrites import native_reshape


class RedProof(RuntimeError):
    """The rewritten model broke a promise: no speed is reported for it. `proof` holds the measurements."""

    def __init__(self, proof: verify.Proof):
        first = proof.red[0] if proof.red else None
        what = f"{first.subject}, {first.direction} of {first.kind}: {first.why}" if first else "nothing was measured"
        super().__init__(
            f"{proof.workload} {proof.size} {proof.dtype}: the proof is red ({what}); no speed is reported"
        )
        self.proof = proof


def bench(
    workload: workloads.Workload | workloads.Tower,
    size: Any = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    platform: str | None = None,
    only: str | None = None,
    model: str | None = None,
    directions: tuple[str, ...] | None = None,
    runs: int = 5,
    proof_size: Any = None,
    compiled: bool = False,
    profile: bool = False,
    commit: str | None = None,
    progress: verify.Progress = lambda text: None,
    **settings: Any,
) -> Result:
    """Proves the plan, then times stock and rewritten alternately (A B A B), `runs` times each after a warm-up.

    `proof_size` proves on another size where the golden at full size does not fit; the result names it. `profile` adds
    where stock and rewritten spend their time, after the timings.

    Raises:
        RedProof: a promise was broken.
    """
    size = size or workload.size()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tower = isinstance(workload, workloads.Tower)
    directions = directions or (("embed",) if tower else ("decode",))
    options = {"platform": platform, "only": only, **settings}
    proof = verify.verify(
        workload,
        proof_size or size,
        dtype=dtype,
        device=device,
        model=model,
        directions=directions,
        each=False,
        progress=progress,
        **options,
    )
    if not proof.green:
        raise RedProof(proof)
    progress("building")
    stock = workload.build(dtype, device, model=model)
    ours = copy.deepcopy(stock)
    (api.optimize_encoder if tower else api.optimize_vae)(ours, **options)
    speed: list[Speed] = []
    profiles: list[ProfileRow] = []
    for direction in directions:
        x = verify.moved(workload.inputs("noise", direction, size), device, dtype)  # type: ignore[arg-type]
        progress(f"{direction}: {runs} runs each")
        calls = {n: partial(verify.run, workload, m, direction, x) for n, m in (("stock", stock), ("ours", ours))}
        timings = alternate(calls, runs, device)
        extra = _compiled(stock, calls["stock"], direction, runs, device) if compiled else {}
        ratio = timings["stock"].median_ms / timings["ours"].median_ms
        speed.append(Speed(direction=direction, **timings, speedup=ratio, **extra))  # type: ignore[arg-type]
        for name, call in calls.items() if profile else ():
            progress(f"{direction}: profile of {name}")
            profiles += profiling.profile(call, device, direction=direction, model=name)
    return Result(
        workload=workload.name,
        size=str(size),
        dtype=proof.dtype,
        weights=proof.weights,
        platform=proof.platform,
        device=proof.device,
        commit=commit or commit_of(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        versions=versions(),
        rewrites=proof.rewrites,
        proof=_rows(proof),
        speed=speed,
        calls=[*_pattern_calls(), *_module_calls(workload, stock, ours, directions[0], size)],
        profile=profiles,
    )


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
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
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


def _compiled(
    vae: nn.Module, call: Callable[[], Any], direction: str, runs: int, device: torch.device
) -> dict[str, Any]:
    """torch.compile of the stock encoder or decoder (compiling `vae` itself compiles nothing: decode is no forward)."""
    part = getattr(vae, f"{direction}r", None)
    if part is None:
        return {}
    setattr(vae, f"{direction}r", torch.compile(part, dynamic=False))
    start = time.perf_counter()
    call()
    _synchronize(device)
    seconds = time.perf_counter() - start
    timing = alternate({"compiled": call}, runs, device)["compiled"]
    setattr(vae, f"{direction}r", part)
    return {"compiled": timing, "compile_seconds": seconds}


def _pattern_calls() -> list[Call]:
    """einops patterns against the views they compile to; nothing where einops is not installed."""
    if importlib.util.find_spec("einops") is None:
        return []
    times = native_reshape.per_call_time()
    return [Call(rewrite="native_reshape", what=p, stock_us=a, ours_us=b) for p, (a, b) in times.items()]


def _module_calls(workload: Any, stock: nn.Module, ours: nn.Module, direction: str, size: Any) -> list[Call]:
    """Each patch embedding that was taken, on what reaches it: small beside its tower, whose launches hide it."""
    calls = []
    parameter = next(stock.parameters())
    x = verify.moved(workload.inputs("noise", direction, size), parameter.device, parameter.dtype)
    ledger = ledger_of(ours)
    for outcome in ledger.outcomes if ledger else ():
        for path in outcome.taken if outcome.name == "patch_embed_as_linear" else ():
            seen: list[Any] = []
            hook = stock.get_submodule(path).register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args))
            verify.run(workload, stock, direction, x)
            hook.remove()
            if not seen:  # it belongs to the other direction
                continue
            with torch.inference_mode():
                both = {n: partial(m.get_submodule(path), *seen[0]) for n, m in (("stock", stock), ("ours", ours))}
                times = {n: 1e3 * t.median_ms for n, t in alternate(both, 20, parameter.device).items()}
            shape = "x".join(map(str, seen[0][0].shape))
            calls.append(
                Call(rewrite=outcome.name, what=f"{path} on {shape}", stock_us=times["stock"], ours_us=times["ours"])
            )
    return calls


def _rows(proof: verify.Proof) -> list[ProofRow]:
    rows = []
    for direction in dict.fromkeys(line.direction for line in proof.lines):
        lines = [line for line in proof.lines if line.direction == direction and line.subject == verify.WHOLE_PLAN]
        worst = max(lines, key=lambda line: line.ours.rms / (line.stock.rms or 1.0))
        rows.append(
            ProofRow(
                direction=direction,
                size=proof.size,
                golden=proof.golden,
                tier=worst.tier,
                ours_psnr=worst.ours.psnr,
                stock_psnr=worst.stock.psnr,
                ours_worst_frame_psnr=worst.ours.worst_frame_psnr,
                stock_worst_frame_psnr=worst.stock.worst_frame_psnr,
                ours_ssim=worst.ours.ssim,
                ours_min_cosine=worst.ours.min_cosine,
                stock_min_cosine=worst.stock.min_cosine,
                ours_sqnr=worst.ours.sqnr,
                stock_sqnr=worst.stock.sqnr,
                ours_cosine_distance=worst.ours.cosine_distance,
                stock_cosine_distance=worst.stock.cosine_distance,
                rms_ratio=worst.ours.rms / worst.stock.rms if worst.stock.rms else 1.0,
                identical=all(line.identical for line in lines),
            )
        )
    return rows


def _peak(call: Callable[[], Any], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    _synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    _synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def _launches(call: Callable[[], Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        _synchronize(device)
    return sum(e.count for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
