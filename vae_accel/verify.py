"""The proof: stock and rewritten, each against a golden in higher precision, per rewrite and for the whole plan.

The golden is the stock model with the same stored weights in fp64 (fp32 with TF32 off where fp64 would take minutes),
so that what is compared is arithmetic, not weights. Inputs are pictures, ramps and noise: a normalisation that forgets
the mean of a band passes on noise and is far off on a ramp.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel import api, metrics, workloads
from vae_accel.edits import Ledger, ledger_of
from vae_accel.metrics import Comparison
from vae_accel.platforms import NoSite
from vae_accel.rewrite import Tier

PEAK = 2.0  # frames are in [-1, 1]
KINDS = ("picture", "ramp", "noise")
WHOLE_PLAN = "whole plan"

Progress = Callable[[str], None]
Case = tuple[str, str]  # direction, kind of input


@dataclass(frozen=True)
class Line:
    """One measurement. `holds` is whether the promise of `tier` was kept, `why` the reason when it was not."""

    subject: str
    direction: str
    kind: str
    tier: str
    holds: bool
    why: str
    identical: bool
    ours: Comparison
    stock: Comparison


@dataclass
class Proof:
    """What was measured for one model. `alone` names rewrites that take nothing without another, and their reason."""

    workload: str
    size: str
    dtype: str
    golden: str
    device: str
    platform: str
    weights: str
    rewrites: dict[str, int] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    alone: dict[str, str] = field(default_factory=dict)

    @property
    def green(self) -> bool:
        """Whether every promise was kept. A proof without a line proves nothing."""
        return bool(self.lines) and all(line.holds for line in self.lines)

    @property
    def red(self) -> list[Line]:
        return [line for line in self.lines if not line.holds]

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "green": self.green}


def verify(
    workload: workloads.Workload | workloads.Tower,
    size: Any = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    platform: str | None = None,
    only: str | None = None,
    model: str | None = None,
    kinds: Sequence[str] = KINDS,
    directions: Sequence[str] | None = None,
    each: bool = True,
    progress: Progress = lambda text: None,
    **settings: Any,
) -> Proof:
    """Builds the workload's VAE and proves the platform's plan on it; `each` also proves every rewrite by itself.

    Raises:
        ValueError: as `vae_accel.optimize` does, e.g. `only` names a rewrite that takes nothing here; or stock itself
            has no kernel for the dtype on this device.
    """
    size = size or workload.size()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    progress(f"building {workload.name} on {device}")
    vae = workload.build(dtype, device, model=model)
    golden_dtype = torch.float64 if dtype == torch.float32 else workload.golden_dtype(size)
    able = workload.directions(vae)
    wanted = [d for d in directions or able if d in able]
    inputs = {(d, kind): workload.inputs(kind, d, size) for d in wanted for kind in kinds}  # type: ignore[arg-type]
    return prove(
        workload,
        vae,
        inputs,
        Proof(workload.name, str(size), _name(dtype), _name(golden_dtype), device_name(device), "", weights_of(model)),
        golden_dtype=golden_dtype,
        platform=platform,
        only=only,
        each=each,
        progress=progress,
        **settings,
    )


def prove(
    workload: workloads.Workload | workloads.Tower,
    vae: nn.Module,
    inputs: dict[Case, Any],
    proof: Proof,
    *,
    golden_dtype: torch.dtype,
    platform: str | None = None,
    only: str | None = None,
    each: bool = True,
    progress: Progress = lambda text: None,
    **settings: Any,
) -> Proof:
    """Fills `proof` for a stock `vae` on `inputs` {(direction, kind): tensor}. The model is stock again afterwards."""
    parameter = next(vae.parameters())
    device, dtype = parameter.device, parameter.dtype
    optimize = api.optimize_encoder if isinstance(workload, workloads.Tower) else api.optimize_vae

    def rewritten(name: str | None) -> Any:
        optimize(vae, platform=platform, only=name, **settings)
        return ledger_of(vae)

    inputs = {case: moved(x, device, dtype) for case, x in inputs.items()}
    progress(f"golden in {_name(golden_dtype)}")
    golden_vae = copy.deepcopy(vae).to(golden_dtype)
    with full_precision():
        goldens = {c: run(workload, golden_vae, c[0], moved(x, device, golden_dtype)) for c, x in inputs.items()}
    del golden_vae
    progress("stock")
    try:
        stock = {case: run(workload, vae, case[0], x) for case, x in inputs.items()}
    except NotImplementedError as error:  # Cosmos' encoder pools, and torch 2.13 does not pool bf16 on a CPU
        raise ValueError(
            f"stock cannot run in {_name(dtype)} on {device.type}, choose another dtype: {error}"
        ) from error
    against = {case: _compare(stock[case], goldens[case], case) for case in inputs}
    plan = rewritten(only)
    proof.platform, proof.rewrites = plan.platform, {o.name: len(o.taken) for o in plan.outcomes if o.taken}
    subjects: list[tuple[str, str | None]] = [(WHOLE_PLAN, only)]
    if each and len(proof.rewrites) > 1:
        subjects += [(name, name) for name in proof.rewrites]
    for subject, name in subjects:
        progress(subject)
        try:
            plan = rewritten(name)
        except NoSite as error:
            proof.alone[subject] = str(error)
            continue
        for case, x in inputs.items():
            tier = _tier(plan, case[0])
            out = run(workload, vae, case[0], x)
            identical = torch.equal(out, stock[case])
            ours = against[case] if identical else _compare(out, goldens[case], case)
            holds, why = _promise(tier, identical, ours, against[case])
            proof.lines.append(Line(subject, *case, tier.value, holds, why, identical, ours, against[case]))
    api.restore(vae)
    return proof


def run(workload: workloads.Workload | workloads.Tower, model: nn.Module, direction: str, x: Any) -> Tensor:
    """Decodes, encodes or embeds without gradients."""
    with torch.inference_mode():
        return workload.run(model, direction, x)  # type: ignore[arg-type]


def moved(x: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A tensor, or a dict of them, on `device`; what is floating-point in `dtype`."""
    if isinstance(x, dict):
        return {name: moved(value, device, dtype) for name, value in x.items()}
    return x.to(device, dtype) if x.is_floating_point() else x.to(device)


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 means fp32 inside: no TF32 in matrix products or convolutions, no benchmark mode picking another kernel."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    import platform

    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def weights_of(model: str | None) -> str:
    return model or "seeded random weights in the real configuration"


def _compare(out: Tensor, golden: Tensor, case: Case) -> Comparison:
    """Frames with peak 2 and SSIM; a latent has no fixed range, so its peak is the golden's own."""
    if case[0] == "embed":
        return metrics.compare_embeddings(out, golden)
    if case[0] == "decode":
        return metrics.compare(out, golden, peak=PEAK, ssim=min(out.shape[-2:]) >= metrics.SSIM_WINDOW)
    peak = float(golden.max() - golden.min()) or 1.0
    return metrics.compare(out, golden, peak=peak, ssim=False)


def _tier(plan: Ledger, direction: str) -> Tier:
    """The lowest promise of what took sites and changes that direction; a rewrite forced by its switch is among it."""
    tiers = (Tier(o.tier) for o in plan.outcomes if o.taken and o.direction in (None, direction))
    return max(tiers, key=list(Tier).index, default=Tier.EXACT)


def _promise(tier: Tier, identical: bool, ours: Comparison, stock: Comparison) -> tuple[bool, str]:
    if identical:
        return True, ""
    if tier is Tier.EXACT:
        return False, f"not bit for bit stock's output (max error {ours.max_abs:.2e} against {stock.max_abs:.2e})"
    return metrics.rounding_holds(ours, stock) if tier is Tier.ROUNDING else metrics.lowered_holds(ours)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
