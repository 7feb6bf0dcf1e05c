"""How fast: stock against rewritten in one run, alternating, after a green proof, stamped into schema-checked JSON."""

from __future__ import annotations

import copy
import datetime
import importlib.metadata
import json
import platform as host
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from vae_accel import api, verify, workloads

SCHEMA = 1
_PACKAGES = ("diffusers", "transformers", "triton", "accelerate", "vae-accel")


class RedProof(RuntimeError):
    """The rewritten model broke a promise: no speed is reported for it. `proof` holds the measurements."""

    def __init__(self, proof: verify.Proof):
        first = proof.red[0] if proof.red else None
        what = f"{first.subject}, {first.direction} of {first.kind}: {first.why}" if first else "nothing was measured"
        super().__init__(
            f"{proof.workload} {proof.size} {proof.dtype}: the proof is red ({what}); no speed is reported"
        )
        self.proof = proof


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Timing(_Row):
    """One column: wall milliseconds per call (synchronized), peak activation memory in GiB, kernel launches a call."""

    median_ms: float
    min_ms: float
    max_ms: float
    runs: int
    peak_gib: float | None
    launches: int | None


class Speed(_Row):
    """One direction of one workload. `compiled` is torch.compile of the stock encoder or decoder, when asked for."""

    direction: Literal["decode", "encode", "embed"]
    stock: Timing
    ours: Timing
    speedup: float
    compiled: Timing | None = None
    compile_seconds: float | None = None


class ProofRow(_Row):
    """The whole plan's worst line over the kinds of input, in dB against the golden, stock's own beside it."""

    direction: str
    size: str
    golden: str
    tier: str
    ours_psnr: float
    stock_psnr: float
    ours_worst_frame_psnr: float
    stock_worst_frame_psnr: float
    ours_ssim: float | None
    ours_min_cosine: float | None
    rms_ratio: float
    identical: bool


class Result(_Row):
    """One file under platforms/<name>/results: what was measured, on what, with which versions."""

    schema_version: Literal[1] = SCHEMA
    workload: str
    size: str
    dtype: str
    weights: str
    platform: str
    device: str
    commit: str
    date: str
    versions: dict[str, str]
    rewrites: dict[str, int]
    proof: list[ProofRow]
    speed: list[Speed]


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
    commit: str | None = None,
    progress: verify.Progress = lambda text: None,
    **settings: Any,
) -> Result:
    """Proves the plan, then times stock and rewritten alternately (A B A B), `runs` times each after a warm-up.

    `proof_size` proves on another size where the golden at full size does not fit; the result names it.

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
    speed = []
    for direction in directions:
        x = verify.moved(workload.inputs("noise", direction, size), device, dtype)  # type: ignore[arg-type]
        progress(f"{direction}: {runs} runs each")
        calls: dict[str, Callable[[], Tensor]] = {
            "stock": lambda x=x, d=direction: verify.run(workload, stock, d, x),
            "ours": lambda x=x, d=direction: verify.run(workload, ours, d, x),
        }
        timings = alternate(calls, runs, device)
        extra = _compiled(stock, calls["stock"], direction, runs, device) if compiled else {}
        ratio = timings["stock"].median_ms / timings["ours"].median_ms
        speed.append(Speed(direction=direction, **timings, speedup=ratio, **extra))  # type: ignore[arg-type]
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
    )


def write(result: Result, folder: str | Path) -> Path:
    """Writes a result where the platform's evidence lives; one file a workload, size and dtype."""
    path = Path(folder) / f"{result.workload}_{result.size}_{result.dtype}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(json.loads(result.model_dump_json()), indent=1) + "\n")
    return path


def load(folder: str | Path) -> list[Result]:
    """Every result of a folder, checked against the schema."""
    return [Result.model_validate_json(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def alternate(calls: dict[str, Callable[[], Any]], runs: int, device: torch.device) -> dict[str, Timing]:
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


def versions() -> dict[str, str]:
    """Of everything that decides a timing."""
    found = {"python": host.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    if torch.version.hip:
        found["hip"] = torch.version.hip
    return found


def commit_of() -> str:
    """The commit this package runs from, `-dirty` with local changes, or unknown outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        revision = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


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
