"""What was done to a model, per rewrite: tier, sites taken or refused and why, what calls met, and why one is off."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from vae_accel.edits import Ledger, Outcome


@dataclass(frozen=True)
class Section:
    """One component: its name in the pipeline (or its class), the platform whose plan was used, and the outcomes."""

    component: str
    platform: str
    outcomes: tuple[Outcome, ...]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Prints as text; `as_dict` is the same for JSON."""

    sections: tuple[Section, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            s.component: {"platform": s.platform, "note": s.note, "rewrites": [vars(o) for o in s.outcomes]}
            for s in self.sections
        }

    def __str__(self) -> str:
        return "\n".join(line for section in self.sections for line in _lines(section))


def section(component: str, ledger: Ledger | None, note: str = "") -> Section:
    """The section of one component; one that was never optimized says so."""
    if ledger is None:
        return Section(component, "none", (), note or "not optimized")
    paused = "" if ledger.active else "paused"
    return Section(component, ledger.platform, tuple(ledger.outcomes), note or paused or ledger.note)


def _lines(section: Section) -> list[str]:
    lines = [f"{section.component} on {section.platform}" + (f": {section.note}" if section.note else "")]
    for o in section.outcomes:
        sites = f"{len(o.taken)} taken" + (f", {len(o.refused)} refused" if o.refused else "")
        lines.append(f"  {o.name:<22} {o.tier:<9} {o.state:<7} {sites if o.state == 'on' else o.why}")
        if o.state == "on":
            lines += [f"  {'':<22} {n:>4} x {reason}" for reason, n in Counter(o.refused.values()).most_common()]
            lines += [f"  {'':<22} {n:>4} x {what}" for what, n in o.counts.items()]
            lines += [f"  {'':<22} {o.bytes / 2**20:.1f} MiB held beside the model"] * bool(o.bytes)
    return lines
