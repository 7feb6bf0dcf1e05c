"""The embedded demo VAE and the clip it is shown on: a first run that needs no hub and no GPU."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_accel import api, metrics, verify, workloads
from vae_accel.workloads import inputs

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from rich.console import Console

DEMO_VAE = Path(__file__).parent / "data"
HELD_OUT = ("coffee", "chelsea")
"""Photographs of scikit-image that the demo VAE was never trained on."""
PROVED_FRAMES = 5  # two causal chunks; a golden of 17 frames in fp64 takes 30 s of one core


def load_demo_vae(dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """The embedded VAE in evaluation mode: Wan2.1's architecture at reduced width, see `data/MODEL_CARD.md`."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(DEMO_VAE, torch_dtype=dtype, local_files_only=True).eval()


def camera_crop(photo: Tensor, x: Tensor, y: Tensor, zoom: Tensor, angle: Tensor, size: int) -> Tensor:
    """Clips a camera sees while it moves over one photograph.

    Args:
        photo: `[3, H, W]` in [-1, 1]; beyond its edges it is mirrored.
        x, y: the camera's centre in pixels of the photograph, `[N, T]`: N clips of T frames.
        zoom: pixels of the clip per pixel of the photograph, `[N, T]`.
        angle: the camera's roll in radians, `[N, T]`.
        size: height and width of the clip.

    Returns:
        `[N, 3, T, size, size]` in [-1, 1], sampled bicubically.
    """
    clips, frames = x.shape
    height, width = photo.shape[1:]
    offset = torch.arange(size, device=photo.device, dtype=photo.dtype) - (size - 1) / 2
    x, y, zoom, angle = (path[..., None, None] for path in (x, y, zoom, angle))
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    source_x = x + cos * offset - sin * offset[:, None]
    source_y = y + sin * offset + cos * offset[:, None]
    grid = torch.stack([(2 * source_x + 1) / width - 1, (2 * source_y + 1) / height - 1], dim=-1).flatten(0, 1)
    sampled = F.grid_sample(
        photo.expand(len(grid), -1, -1, -1), grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )
    return sampled.unflatten(0, (clips, frames)).transpose(1, 2).clamp(-1, 1)


def demo_clip(frames: int = 17, size: int = 256, name: str = HELD_OUT[0]) -> Tensor:
    """A deterministic hand-held pan over a held-out photograph, `[1, 3, frames, size, size]` in [-1, 1]."""
    photo = inputs.photograph(name)
    t = torch.arange(frames, dtype=torch.float32)[None]
    x = photo.shape[2] / 2 - 20 + 2.5 * t
    y = photo.shape[1] / 2 + 6 * torch.sin(0.4 * t)
    return camera_crop(photo, x, y, 1 + 0.006 * t, 0.03 * torch.sin(0.25 * t), size)


@dataclass(frozen=True)
class _Showing:
    """One dtype: the proof, and, only where it is green, the times by direction and both reconstructions."""

    proof: verify.Proof
    milliseconds: dict[str, dict[str, float]]
    stock: Tensor
    ours: Tensor


def run_demo(
    platform: str | None = None,
    out: Path = Path("vae_accel_demo.png"),
    console: Console | None = None,
    frames: int = 17,
    size: int = 256,
) -> int:
    """Encodes and decodes `demo_clip`, stock and optimized, in fp32 and bf16: a table, and a picture at `out`.

    Returns:
        0 when every promise held, 1 when a proof is red; a dtype whose proof is red shows neither speed nor picture.
    """
    from diffusers.utils import logging
    from rich.console import Console

    logging.set_verbosity_error()  # it warns of an empty list of fp32 modules at every cast
    console = console or Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clip = demo_clip(frames, size).to(device)
    shown = []
    for dtype in (torch.float32, torch.bfloat16):
        with console.status(f"encoding and decoding {frames} frames of {size}x{size} in {_name(dtype)}"):
            shown.append(_show(clip, dtype, platform))
    _print_table(clip, shown, console)
    green = [showing for showing in shown if showing.proof.green]
    if green:
        _draw(clip, green, out)
        console.print(f"wrote {out}")
    return 0 if len(green) == len(shown) else 1


def _show(clip: Tensor, dtype: torch.dtype, platform: str | None) -> _Showing:
    workload = workloads.get("wan2.1")
    stock: Any = load_demo_vae(dtype)
    stock.to(clip.device)
    pixels = clip.to(dtype)
    latent = verify.run(workload, stock, "encode", pixels[:, :, :PROVED_FRAMES])
    golden = torch.float64 if dtype == torch.float32 else torch.float32
    size = f"{clip.shape[3]}x{clip.shape[4]}x{min(PROVED_FRAMES, clip.shape[2])}"
    proof = verify.prove(
        workload,
        stock,
        {("encode", "picture"): pixels[:, :, :PROVED_FRAMES], ("decode", "picture"): latent},
        verify.Proof("demo", size, _name(dtype), _name(golden), verify.device_name(clip.device), "", "demo VAE"),
        golden_dtype=golden,
        platform=platform,
        each=False,
    )
    if not proof.green:
        return _Showing(proof, {}, clip, clip)
    models = {"stock": stock, "ours": api.optimize_vae(copy.deepcopy(stock), platform=platform)}
    given = dict.fromkeys(models, pixels)
    milliseconds: dict[str, dict[str, float]] = {}
    for direction in ("encode", "decode"):  # the proof, in chunks of the same shapes, has warmed both up
        milliseconds[direction] = {}
        for name, model in models.items():
            start = _now(clip.device)
            given[name] = verify.run(workload, model, direction, given[name])
            milliseconds[direction][name] = 1e3 * (_now(clip.device) - start)
    return _Showing(proof, milliseconds, given["stock"].float(), given["ours"].float())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _print_table(clip: Tensor, shown: list[_Showing], console: Console) -> None:
    from rich.table import Table

    shape = f"{clip.shape[3]}x{clip.shape[4]}x{clip.shape[2]}"
    first = shown[0].proof
    table = Table(title=f"demo VAE, {shape} clip of a held-out photograph, plan {first.platform}, {first.device}")
    table.add_column("dtype")
    for column in ("encode ms", "decode ms", "speed-up", "PSNR to source", "ours to stock", "promise"):
        table.add_column(column, justify="right")
    for showing in shown:
        proof = showing.proof
        verdict = f"{proof.lines[0].tier}: " + ("[green]holds" if proof.green else "[red]BROKEN")
        if not proof.green:
            table.add_row(proof.dtype, *[""] * 5, verdict)
            continue
        rows = showing.milliseconds.values()
        times = [f"{row['stock']:.0f} -> {row['ours']:.0f}" for row in rows]
        total = [sum(row[name] for row in rows) for name in ("stock", "ours")]
        to_source = [f"{metrics.psnr(x, clip, peak=verify.PEAK):.2f}" for x in (showing.stock, showing.ours)]
        apart = metrics.psnr(showing.ours, showing.stock, peak=verify.PEAK)
        table.add_row(
            proof.dtype,
            *times,
            f"{total[0] / total[1]:.2f}x",
            " -> ".join(to_source) + " dB",
            "identical" if math.isinf(apart) else f"{apart:.1f} dB",
            verdict,
        )
    console.print(table)
    rewrites = ", ".join(f"{name} ({sites} sites)" for name, sites in first.rewrites.items()) or "none is on here"
    console.print(f"rewrites: {rewrites}; proved on {first.size} against fp64 (fp32 for bfloat16)", highlight=False)
    for line in (line for showing in shown for line in showing.proof.red):
        console.print(f"[red]{line.direction} at {line.tier}: {line.why}")


def _draw(clip: Tensor, shown: list[_Showing], out: Path) -> None:
    """One row a dtype, of the last frame: source, stock, optimized, and their difference made visible."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.5 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 4, squeeze=False)
    for row, showing in zip(axes, shown, strict=True):
        source, stock, ours = (x[0, :, -1].permute(1, 2, 0).cpu() for x in (clip, showing.stock, showing.ours))
        difference = (ours - stock).abs()
        largest = difference.max().item()
        amplified = difference / largest if largest else difference
        gain = f"difference x {2 / largest:.0f}" if largest else "difference: none"
        titles = ("source", f"stock {showing.proof.dtype}", "optimized", gain)
        for axis, title, image in zip(
            row, titles, ((source + 1) / 2, (stock + 1) / 2, (ours + 1) / 2, amplified), strict=True
        ):
            axis.imshow(image.clamp(0, 1).numpy())
            axis.set_title(title)
            axis.axis("off")
    figure.savefig(out, dpi=110)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
