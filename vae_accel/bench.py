"""How fast: stock against rewritten in one run, alternating, after a green proof, stamped into schema-checked JSON."""

from __future__ import annotations

import copy
import datetime
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from vae_accel import api, calls, profiling, timing, verify, workloads
from vae_accel.results import ProfileRow, ProofRow, Result, Speed, commit_of, versions


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
        both = {n: partial(verify.run, workload, m, direction, x) for n, m in (("stock", stock), ("ours", ours))}
        timings = timing.alternate(both, runs, device)
        extra = _compiled(stock, both["stock"], direction, runs, device) if compiled else {}
        ratio = timings["stock"].median_ms / timings["ours"].median_ms
        speed.append(Speed(direction=direction, **timings, speedup=ratio, **extra))  # type: ignore[arg-type]
        for name, call in both.items() if profile else ():
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
        calls=calls.of(workload, stock, ours, directions[0], size),
        profile=profiles,
    )


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
    timing.synchronize(device)
    seconds = time.perf_counter() - start
    times = timing.alternate({"compiled": call}, runs, device)["compiled"]
    setattr(vae, f"{direction}r", part)
    return {"compiled": times, "compile_seconds": seconds}


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
