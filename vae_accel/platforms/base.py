"""What a platform is: ordered steps for VAEs and for encoders, and the engine that runs them over a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from vae_accel import settings as env
from vae_accel.edits import LEDGER, Ledger, Outcome, Pen, ledger_of
from vae_accel.rewrite import Rewrite, Tier
from vae_accel.rewrites import NAMES


class NoSite(ValueError):
    """A rewrite was asked for by name and found nothing in the model that it can take."""


@dataclass(frozen=True)
class Step:
    """One row of a plan. `why` names the committed result that lets the rewrite be on, or says why it is off."""

    rewrite: Rewrite
    default: Literal["on", "off"]
    why: str


class Platform:
    """Where a model runs. Subclasses are tables: `vae` and `encoder` are ordered steps, `note` what is not measured."""

    name: ClassVar[str]
    note: ClassVar[str] = ""
    vae: ClassVar[tuple[Step, ...]] = ()
    encoder: ClassVar[tuple[Step, ...]] = ()

    def optimize_vae(self, vae: nn.Module, **options: Any) -> nn.Module:
        """Rewrites a VAE in place by this platform's plan and returns it. Options as in `vae_accel.optimize`."""
        run(vae, self, self.vae, "vae", options)
        return vae

    def optimize_encoder(self, encoder: nn.Module, **options: Any) -> nn.Module:
        """Rewrites a vision encoder in place by this platform's plan and returns it."""
        run(encoder, self, self.encoder, "encoder", options)
        return encoder


def run(
    root: nn.Module,
    platform: Platform,
    steps: Sequence[Step],
    role: str,
    options: dict[str, Any],
    must_apply: bool = True,
) -> Ledger:
    """Applies `steps` to `root`: all or nothing per rewrite. The same request twice changes nothing the second time.

    Raises:
        NoSite: with `must_apply`, a rewrite asked for by name took nothing; the model is left as it was.
        ValueError: `root` cannot be optimized (meta tensors, an optimized part inside it).
    """
    options = dict(options)
    only = _names(options.pop("only", None))
    settings = env.read(NAMES, **options)
    check(root)
    request = repr((platform.name, role, steps, only, settings))
    before = ledger_of(root)
    if before is not None and before.request == request:
        return before
    replace(root, None)
    ledger = Ledger(platform.name, request, platform.note)
    root.__dict__[LEDGER] = ledger
    try:
        for step in steps:
            ledger.outcomes.append(_step(root, ledger, step, settings, only))
        if must_apply:
            for name in forced(settings, only):
                require(name, [ledger], f"this {type(root).__name__} on {platform.name}")
    except BaseException:
        replace(root, before)
        raise
    return ledger


def _names(only: Any) -> tuple[str, ...] | None:
    only = (only,) if isinstance(only, str) else only
    if not isinstance(only, (tuple, list, set, frozenset, type(None))):
        raise TypeError(f"only must be the name of a rewrite, or several, not {only!r}")
    for name in only or ():
        if name not in NAMES:
            raise ValueError(f"only={name!r} is no rewrite; there are: {', '.join(NAMES)}")
    return None if only is None else tuple(only)


def forced(settings: env.Settings, only: Sequence[str] | None) -> list[str]:
    """The rewrites that were asked for by name, and so must take a site."""
    return sorted({*(only or ()), *(n for n, s in settings.switches.items() if s == "1")})


def require(name: str, ledgers: Sequence[Ledger], where: str) -> None:
    """Raises NoSite, with the reasons it was refused, unless `name` took a site in one of the ledgers."""
    outcomes = [o for ledger in ledgers for o in ledger.outcomes if o.name == name]
    if any(o.taken for o in outcomes):
        return
    reasons = sorted({r for o in outcomes for r in o.refused.values()} | {o.why for o in outcomes if o.state != "on"})
    raise NoSite(f"{name} was asked for by name but takes nothing in {where}: {'; '.join(reasons) or 'no such site'}")


def replace(root: nn.Module, ledger: Ledger | None) -> None:
    """Takes back what the ledger of `root` lists and makes the edits of `ledger` instead; None leaves it stock."""
    present = ledger_of(root)
    if present is not None:
        present.undo(root)
        del root.__dict__[LEDGER]
    if ledger is not None:
        ledger.redo(root)
        root.__dict__[LEDGER] = ledger


def check(root: nn.Module) -> None:
    """Raises a ValueError that names the remedy when a model cannot be optimized as it is."""
    offloaded = any("_hf_hook" in m.__dict__ for m in root.modules())
    if not offloaded and any(p.device.type == "meta" for p in root.parameters()):
        raise ValueError(
            f"{type(root).__name__} has parameters on the meta device (no data): load its weights before optimizing it"
        )
    inner = next((path for path, m in root.named_modules() if path and ledger_of(m) is not None), None)
    if inner is not None:
        raise ValueError(f"{inner!r} inside this {type(root).__name__} is optimized by itself: restore() it first")


def _step(root: nn.Module, ledger: Ledger, step: Step, settings: env.Settings, only: Sequence[str] | None) -> Outcome:
    switch = settings.switches[step.rewrite.name]
    asked = switch == "1" or (only is not None and step.rewrite.name in only)
    rewrite = step.rewrite.asked(settings, asked)
    tier = rewrite.tier
    if settings.bf16 and rewrite.lowers:
        lowered: Any = {"compute_dtype": torch.bfloat16}
        rewrite, tier = dataclasses.replace(rewrite, **lowered), Tier.LOWERED
    off = None
    if switch == "0":
        off = f"{env.PREFIX}{rewrite.name.upper()}=0"
    elif only is not None and not asked:
        off = "not among the rewrites asked for"
    elif step.default == "off" and not asked:
        off = step.why
    elif not (settings.bf16 and rewrite.lowers) and not Tier(settings.tier).allows(tier):
        off = f"its tier is {tier.value}, above {env.PREFIX}TIER={settings.tier}"
    if off is not None:
        return Outcome(rewrite.name, tier.value, "off", off)
    outcome = Outcome(rewrite.name, tier.value, "on", step.why, direction=rewrite.direction)
    pen = Pen(root, ledger, rewrite.name, rewrite.over, outcome)
    try:
        for site in list(rewrite.sites(root, ledger)):
            if site.refused is None:
                rewrite.apply(root, site, pen)
                outcome.taken.append(site.path)
            else:
                outcome.refused[site.path] = site.refused
    except Exception as error:
        pen.rollback()
        if settings.strict or asked:
            raise
        why = f"rolled back: {type(error).__name__}: {error}"
        return Outcome(rewrite.name, tier.value, "failed", why)
    return outcome
