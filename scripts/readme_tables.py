"""Writes the generated tables of README.md between their markers: settings, results, plans. A test compares.

python scripts/readme_tables.py          # rewrites README.md
"""

from __future__ import annotations

import re
from pathlib import Path

from vae_accel import platforms, results
from vae_accel import settings as env
from vae_accel.rewrites import NAMES

ROOT = Path(__file__).resolve().parents[1]


def settings_table() -> str:
    rows = [(f"`{v.name}`", f"`{v.default}`", v.choices, v.meaning) for v in env.table(NAMES)]
    return _table(("variable", "default", "choices", "meaning"), rows)


def results_table() -> str:
    """One row a workload and direction, from the committed result files."""
    rows = []
    for platform in platforms.ALL:
        for result in results.load(ROOT / "platforms" / platform / "results"):
            proofs = {row.direction: row for row in result.proof}
            for speed in result.speed:
                proof = proofs[speed.direction]
                elsewhere = f" at {proof.size}" if proof.size != result.size else ""
                rows.append(
                    (
                        f"{result.workload} {result.size} {speed.direction}",
                        _card(result),
                        result.dtype,
                        _ms(speed.stock),
                        f"**{_ms(speed.ours)}**",
                        f"{speed.speedup:.2f}x",
                        _memory(speed),
                        f"{proof.ours_psnr:.1f} / {proof.stock_psnr:.1f}{elsewhere}",
                    )
                )
    return _table(("", "card", "dtype", "stock ms", "ours ms", "", "peak GiB", "dB to golden"), rows)


def calls_table() -> str:
    """What is small beside its model, timed by itself on the card: of each call the newest result."""
    newest: dict[tuple[str, str], results.Call] = {}
    for result in sorted(results.load(ROOT / "platforms" / "cuda" / "results"), key=lambda result: result.date):
        newest |= {(call.rewrite, call.what): call for call in result.calls}
    rows = [
        (f"`{rewrite}`", f"`{what}`", f"{call.stock_us:.1f}", f"**{call.ours_us:.1f}**")
        for (rewrite, what), call in sorted(newest.items())
    ]
    return _table(("rewrite", "call", "stock us", "ours us"), rows)


def plans_table() -> str:
    """Which rewrite is on where; VAE and encoder plans together."""
    plans = {name: {s.rewrite.name: s for s in (*p.vae, *p.encoder)} for name, p in platforms.ALL.items()}
    tiers = {s.rewrite.name: s.rewrite.tier.value for plan in plans.values() for s in plan.values()}
    rows = [
        (f"`{name}`", tiers[name], *(plan[name].default if name in plan else "" for plan in plans.values()))
        for name in NAMES
        if name in tiers
    ]
    return _table(("rewrite", "tier", *plans), rows)


def _card(result: results.Result) -> str:
    """A card by its model, any processor as the platform's name."""
    known = (model for model in ("H100", "H200") if model in result.device)
    return next(known, result.platform)


TABLES = {"settings": settings_table, "results": results_table, "calls": calls_table, "plans": plans_table}


def fill(text: str) -> str:
    """README's text with every marked table written anew."""
    for name, table in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not block.search(text):
            raise ValueError(f"README.md lacks the markers <!-- {name} --> and <!-- /{name} -->")
        text = block.sub(lambda m, t=table: m[1] + t() + "\n" + m[2], text)
    return text


def _ms(timing: results.Timing) -> str:
    return f"{timing.median_ms:.1f}" if timing.median_ms < 100 else f"{timing.median_ms:.0f}"


def _memory(speed: results.Speed) -> str:
    if speed.stock.peak_gib is None or speed.ours.peak_gib is None:
        return ""
    return f"{speed.stock.peak_gib:.1f} -> {speed.ours.peak_gib:.1f}"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text()))
