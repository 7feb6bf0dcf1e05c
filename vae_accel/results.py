"""Result files: what was measured, on what, with which versions. The schema, and how a file is written and read."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

_PACKAGES = ("diffusers", "transformers", "triton", "accelerate", "vae-accel")


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
    """The whole plan's worst line over the kinds of input, in dB against the golden, stock's own beside it.

    Of embeddings also their SQNR in dB, the lowest cosine of any, and the mean of 1 - cosine.
    """

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
    stock_min_cosine: float | None = None
    ours_sqnr: float | None = None
    stock_sqnr: float | None = None
    ours_cosine_distance: float | None = None
    stock_cosine_distance: float | None = None
    rms_ratio: float
    identical: bool


class Call(_Row):
    """What one rewrite replaces, by itself: microseconds a call, stock's way and ours."""

    rewrite: str
    what: str
    stock_us: float
    ours_us: float


class ProfileRow(_Row):
    """One line of the profile of one call: a kernel (on a CPU an operator by itself) or an operation and all in it.

    `share` is of the device's time, `tflops` TFLOP/s where the operations are known, `gbps` GB/s where the bytes are.
    """

    direction: Literal["decode", "encode", "embed"]
    model: Literal["stock", "ours"]
    by: Literal["kernel", "operation"]
    name: str
    calls: int
    ms: float
    share: float
    tflops: float | None = None
    gbps: float | None = None


class Result(_Row):
    """One file under platforms/<name>/results: what was measured, on what, with which versions."""

    schema_version: Literal[1] = 1
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
    calls: list[Call] = []
    profile: list[ProfileRow] = []


def write(result: Result, folder: str | Path) -> Path:
    """Writes a result where the platform's evidence lives; one file a workload, size and dtype."""
    size = result.size.replace("*", "of")  # no shell's wildcard: 20of1x24x24
    path = Path(folder) / f"{result.workload}_{size}_{result.dtype}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(json.loads(result.model_dump_json()), indent=1) + "\n")
    return path


def load(folder: str | Path) -> list[Result]:
    """Every result of a folder, checked against the schema."""
    return [Result.model_validate_json(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def versions() -> dict[str, str]:
    """Of everything that decides a timing."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
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
