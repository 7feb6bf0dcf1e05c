"""The command line: `vae-accel demo | verify | bench | tune | list | env`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from vae_accel import settings as env
from vae_accel.rewrites import NAMES

if TYPE_CHECKING:
    from vae_accel.results import ProfileRow
    from vae_accel.verify import Proof

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
# Tables need about 140 columns; a pipe or a log reports 80.
console = Console(width=None if sys.stdout.isatty() else 150)

WorkloadArg = Annotated[str, typer.Argument(help="a workload, as `vae-accel list` names them")]
SizeOption = Annotated[str | None, typer.Option(help="HEIGHTxWIDTH[xFRAMES], or `tiny`; default: the workload's")]
DtypeOption = Annotated[str, typer.Option(help="bf16, fp16 or fp32")]
PlatformOption = Annotated[str | None, typer.Option(help="cuda, rocm, npu or cpu; default: the device's own")]
OnlyOption = Annotated[str | None, typer.Option(help="one rewrite by name instead of the platform's plan")]
ModelOption = Annotated[str | None, typer.Option(help="a checkpoint: local folder or hub id (its `vae` subfolder)")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="also write the measurements here")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where the picture goes")] = Path("vae_accel_demo.png"),
    platform: PlatformOption = None,
) -> None:
    """Encode and decode a real clip with the embedded VAE, stock and optimized: table, picture, exit code."""
    from vae_accel.demo import run_demo

    with _speaking():
        raise typer.Exit(run_demo(platform=platform, out=out, console=console))


@app.command()
def verify(
    workload: WorkloadArg,
    size: SizeOption = None,
    dtype: DtypeOption = "bf16",
    only: OnlyOption = None,
    platform: PlatformOption = None,
    model: ModelOption = None,
    json_file: JsonOption = None,
) -> None:
    """Prove that the rewrites keep their promise, each and all together, against a golden in higher precision."""
    from vae_accel import verify as proofs
    from vae_accel import workloads

    with _speaking():
        chosen = workloads.get(workload)
        options = {"dtype": _dtype(dtype), "platform": platform, "only": only, "model": model}
        with _progress() as progress:
            proof = proofs.verify(chosen, _size(chosen, size), progress=progress, **options)
        print_proof(proof)
        if json_file is not None:
            json_file.write_text(json.dumps(proof.as_dict(), indent=1) + "\n")
        raise typer.Exit(0 if proof.green else 1)


@app.command()
def bench(
    workload: WorkloadArg,
    size: SizeOption = None,
    dtype: DtypeOption = "bf16",
    only: OnlyOption = None,
    platform: PlatformOption = None,
    model: ModelOption = None,
    encode: Annotated[bool, typer.Option(help="time encode as well as decode")] = False,
    runs: Annotated[int, typer.Option(min=1, help="counted runs of each")] = 5,
    proof_size: Annotated[str | None, typer.Option(help="prove at another size than the one timed")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="a torch.compile column as well")] = False,
    profile: Annotated[bool, typer.Option(help="where the time goes, by kernel and by operation")] = False,
    write: Annotated[Path | None, typer.Option(help="folder for the result file")] = None,
    commit: Annotated[str | None, typer.Option(help="the commit to stamp; default: asked of git")] = None,
) -> None:
    """Time stock against optimized, alternating, after a green proof."""
    from vae_accel import bench as benches
    from vae_accel import results, workloads

    with _speaking():
        chosen = workloads.get(workload)
        try:
            with _progress() as progress:
                result = benches.bench(
                    chosen,
                    _size(chosen, size),
                    dtype=_dtype(dtype),
                    platform=platform,
                    only=only,
                    model=model,
                    directions=("decode", "encode") if encode else None,
                    runs=runs,
                    proof_size=_size(chosen, proof_size) if proof_size else None,
                    compiled=compiled,
                    profile=profile,
                    commit=commit,
                    progress=progress,
                )
        except benches.RedProof as red:
            print_proof(red.proof)
            raise
        table = Table(
            box=SIMPLE_HEAD, title=f"{result.workload} {result.size} {result.dtype}, {result.device}; {result.weights}"
        )
        for column in ("", "stock ms", "ours ms", "speed-up", "stock GiB", "ours GiB", "launches", "torch.compile ms"):
            table.add_column(column, justify="right" if column else "left")
        for row in result.speed:
            table.add_row(
                row.direction,
                _spread(row.stock),
                _spread(row.ours),
                f"{row.speedup:.2f}x",
                _number(row.stock.peak_gib),
                _number(row.ours.peak_gib),
                f"{row.stock.launches} -> {row.ours.launches}" if row.stock.launches else "",
                f"{row.compiled.median_ms:.1f} ({row.compile_seconds:.0f} s)" if row.compiled else "",
            )
        console.print(table)
        for proof_row in result.proof:
            console.print(
                f"proof ({proof_row.direction} at {proof_row.size}, {proof_row.golden} golden, {proof_row.tier}): "
                f"{proof_row.ours_psnr:.2f} dB, stock {proof_row.stock_psnr:.2f} dB"
            )
        print_profile(result.profile)
        if write is not None:
            console.print(f"wrote {results.write(result, write)}")


@app.command()
def tune(
    workload: WorkloadArg,
    size: SizeOption = None,
    dtype: DtypeOption = "bf16",
    only: OnlyOption = None,
    platform: PlatformOption = None,
    model: ModelOption = None,
    seconds: Annotated[float, typer.Option(help="for each convolution, compiling apart")] = 2.0,
    total: Annotated[float, typer.Option(help="seconds after which no further convolution is begun")] = 600.0,
) -> None:
    """Choose the tile of each convolution a workload meets on this card, and remember it for every later run."""
    from vae_accel import tuning, workloads

    with _speaking():
        chosen = workloads.get(workload)
        options = {"dtype": _dtype(dtype), "platform": platform, "only": only, "model": model}
        with _progress() as progress:
            done = tuning.tune_workload(
                chosen, _size(chosen, size), seconds=seconds, total=total, progress=progress, **options
            )
        console.print(done.table())
        console.print(f"wrote {done.path}" + (f"; no time for {len(done.left)}: run again" if done.left else ""))


@app.command("list")
def list_(platform: PlatformOption = None) -> None:
    """The workloads, and each platform's plan: which rewrite, its tier, on or off, and on what evidence."""
    from vae_accel import platforms, workloads

    with _speaking():
        chosen = [platforms.by_name(platform)] if platform else [p() for p in platforms.ALL.values()]
        for each in chosen:
            table = Table(box=SIMPLE_HEAD, title=each.name + (f" ({each.note})" if each.note else ""))
            for column in ("for", "rewrite", "tier", "default", "why"):
                table.add_column(column)
            for role, steps in (("vae", each.vae), ("encoder", each.encoder)):
                for step in steps:
                    table.add_row(role, step.rewrite.name, step.rewrite.tier.value, step.default, step.why)
            console.print(table)
        table = Table(box=SIMPLE_HEAD, title="workloads")
        for column in ("name", "class", "default size"):
            table.add_column(column)
        for workload in workloads.WORKLOADS.values():
            table.add_row(workload.name, workload.vae_class, workload.default_size)
        for tower in workloads.TOWERS.values():
            table.add_row(tower.name, tower.model_class.rpartition(".")[2], tower.default_size)
        console.print(table)


@app.command("env")
def env_() -> None:
    """Every environment variable: name, value now, default, choices, meaning."""
    with _speaking():
        table = Table(box=SIMPLE_HEAD)
        for column in ("variable", "value", "default", "choices", "meaning"):
            table.add_column(column, overflow="fold")
        for row in env.table(NAMES):
            table.add_row(row.name, row.value, row.default, row.choices, row.meaning)
        console.print(table)


def print_proof(proof: Proof) -> None:
    """The table of a proof, and the verdict in words."""
    table = Table(
        box=SIMPLE_HEAD, title=f"{proof.workload} {proof.size} {proof.dtype} on {proof.platform} ({proof.device})"
    )
    columns = (
        "",
        "",
        "input",
        "tier",
        "PSNR dB",
        "stock",
        "worst frame",
        "stock",
        "SSIM / cosine (stock)",
        "SQNR dB (stock)",
        "max error",
        "",
    )
    for column in columns:
        table.add_column(column, no_wrap=column == "")
    for line in proof.lines:
        ours, stock = line.ours, line.stock
        table.add_row(
            line.subject,
            line.direction,
            line.kind,
            line.tier + (" (bit-equal)" if line.identical else ""),
            f"{ours.psnr:.2f}",
            f"{stock.psnr:.2f}",
            f"{ours.worst_frame_psnr:.2f} (#{ours.worst_frame})",
            f"{stock.worst_frame_psnr:.2f}",
            _likeness(ours, stock),
            f"{ours.sqnr:.2f} ({stock.sqnr:.2f})",
            f"{ours.max_abs:.1e}",
            "[green]holds" if line.holds else "[red]BROKEN",
        )
    console.print(table)
    console.print(f"golden: {proof.golden}; weights: {proof.weights}; sites: {proof.rewrites}")
    for name, why in proof.alone.items():
        console.print(f"{name} takes nothing by itself: {why}")
    for line in proof.red:
        console.print(f"[red]{line.subject}, {line.direction} of {line.kind}: {line.why}")
    console.print("[green]green" if proof.green else "[red]red: a promise is broken; no speed of this plan counts")


def print_profile(rows: list[ProfileRow]) -> None:
    """A table a direction, model and view, as `bench --profile` measured them."""
    for direction, model, by in dict.fromkeys((row.direction, row.model, row.by) for row in rows):
        chosen = [row for row in rows if (row.direction, row.model, row.by) == (direction, model, by)]
        table = Table(box=SIMPLE_HEAD, title=f"{direction}, {model}, {sum(row.ms for row in chosen):.2f} ms by {by}")
        for column in (by, "calls", "ms", "share", "TFLOP/s", "GB/s"):
            table.add_column(column, justify="left" if column == by else "right")
        for row in chosen:
            share = f"{row.share:.1%}"
            rates = _number(row.tflops), _number(row.gbps)
            table.add_row(escape(row.name), str(row.calls), f"{row.ms:.3f}", share, *rates)
        console.print(table)


@contextmanager
def _speaking() -> Iterator[None]:
    """User errors are one sentence and exit code 2 (1 for a red proof), not a traceback."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        console.print(f"[red]{text}", highlight=False)
        raise typer.Exit(2) from error
    except RuntimeError as error:
        if type(error).__name__ != "RedProof":
            raise
        console.print(f"[red]{error}", highlight=False)
        raise typer.Exit(1) from error


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda text: bar.update(task, description=text)


def _dtype(text: str) -> Any:
    import torch

    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if text not in names:
        raise ValueError(f"--dtype {text!r}: choose one of {', '.join(names)}")
    return names[text]


def _size(workload: Any, text: str | None) -> Any:
    return workload.tiny() if text == "tiny" else workload.size(text)


def _spread(timing: Any) -> str:
    return f"{timing.median_ms:.1f} ({timing.min_ms:.1f}-{timing.max_ms:.1f})"


def _likeness(*comparisons: Any) -> str:
    ours, stock = (c.ssim if c.min_cosine is None else c.min_cosine for c in comparisons)
    return "" if ours is None else f"{ours:.6f} ({stock:.6f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    app()
