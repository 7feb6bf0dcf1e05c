"""What a rewrite replaces, timed by itself where it is small beside its model, whose launches hide it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel import metrics, timing, verify
from vae_accel.edits import ledger_of
from vae_accel.families import position_embeddings
from vae_accel.families.position_embeddings import Resampling
from vae_accel.kernels import bilinear_pos_embed as kernel
from vae_accel.results import Call
from vae_accel.rewrites import native_reshape

SQUARES = (32, 48, 64, 96, 128)  # sides in patches, to which a table of positions is resampled
BURST = 10  # calls between two synchronisations


def of(workload: Any, stock: nn.Module, ours: nn.Module, direction: str, size: Any) -> list[Call]:
    """Einops patterns, patch embeddings and tables of positions, as far as `ours`, rewritten, has taken any.

    Raises:
        ValueError: resampled positions are further from fp64 than transformers' are: no time is reported.
    """
    return [*_patterns(), *_patch_embeddings(workload, stock, ours, direction, size), *_positions(stock, ours)]


def _patterns() -> list[Call]:
    """einops patterns against the views they compile to; nothing where einops is not installed."""
    if importlib.util.find_spec("einops") is None:
        return []
    times = native_reshape.per_call_time()
    return [Call(rewrite="native_reshape", what=p, stock_us=a, ours_us=b) for p, (a, b) in times.items()]


def _patch_embeddings(workload: Any, stock: nn.Module, ours: nn.Module, direction: str, size: Any) -> list[Call]:
    """Each patch embedding that was taken, on what reaches it: small beside its tower, whose launches hide it."""
    calls = []
    parameter = next(stock.parameters())
    x = verify.moved(workload.inputs("noise", direction, size), parameter.device, parameter.dtype)
    for path in _taken(ours, "patch_embed_as_linear"):
        seen: list[Any] = []
        hook = stock.get_submodule(path).register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args))
        verify.run(workload, stock, direction, x)
        hook.remove()
        if not seen:  # it belongs to the other direction
            continue
        both = {n: partial(m.get_submodule(path), *seen[0]) for n, m in (("stock", stock), ("ours", ours))}
        shape = "x".join(map(str, seen[0][0].shape))
        calls.append(_call("patch_embed_as_linear", f"{path} on {shape}", both, parameter.device))
    return calls


def _positions(stock: nn.Module, ours: nn.Module) -> list[Call]:
    """A table of positions resampled to `SQUARES`, by transformers' helper and by ours, each proved against fp64."""
    calls = []
    for path in _taken(ours, "bilinear_pos_embed"):
        holder = stock.get_submodule(path)
        row = position_embeddings.table_of(holder)
        if row is None or position_embeddings.method_of(holder) != "forward":
            continue
        table: Any = holder.get_submodule(row.table)
        how = position_embeddings.read(row, holder)
        for side in SQUARES:
            both = _resamplings(table, how, side)
            exact = _resampled(kernel.reference, table.weight.double(), how, side)
            with torch.inference_mode():
                off = {name: metrics.rms_error(call(), exact) for name, call in both.items()}
            if not off["ours"] <= metrics.ROUNDING_RMS_RATIO * off["stock"]:
                raise ValueError(f"positions of {side}x{side} are {off['ours']:.2e} off, stock's {off['stock']:.2e}")
            calls.append(_call("bilinear_pos_embed", f"{row.table} to {side}x{side}", both, table.weight.device))
    return calls


def _resamplings(table: Any, how: Resampling, side: int) -> dict[str, Callable[[], Tensor]]:
    """Positions [side * side, D] in the table's dtype, as transformers' towers make them and as ours."""
    derive = importlib.import_module("transformers.vision_utils").get_vision_interpolation_indices_and_weights
    grid = torch.tensor([[1, side, side]], device=table.weight.device)

    def stock() -> Tensor:
        taps, weights = derive(
            grid, how.side, "bilinear", how.align_corners, spatial_merge_size=how.merge, padding=how.padding
        )
        return (table(taps) * weights[:, :, None]).sum(1).to(table.weight.dtype)

    return {"stock": stock, "ours": partial(_resampled, kernel.bilinear_pos_embed, table.weight, how, side)}


def _resampled(resample: Callable[..., Tensor], weight: Tensor, how: Resampling, side: int) -> Tensor:
    grids = [(1, side, side)]
    return resample(weight, grids, how.side, how.merge, align_corners=how.align_corners, padding=how.padding)


def _taken(ours: nn.Module, rewrite: str) -> list[str]:
    ledger = ledger_of(ours)
    return [path for o in (ledger.outcomes if ledger else ()) if o.name == rewrite for path in o.taken]


def _call(rewrite: str, what: str, both: Mapping[str, Callable[[], Any]], device: torch.device) -> Call:
    """Microseconds of each, from `BURST` calls between two synchronisations: by itself one call is all waiting."""
    bursts = {name: lambda call=call: [call() for _ in range(BURST)] for name, call in both.items()}
    with torch.inference_mode():
        times = {name: 1e3 * t.median_ms / BURST for name, t in timing.alternate(bursts, 20, device).items()}
    return Call(rewrite=rewrite, what=what, stock_us=times["stock"], ours_us=times["ours"])
