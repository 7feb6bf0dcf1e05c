"""Rewrite the figures of a demo VAE's MODEL_CARD.md from the metrics.json beside it.

python scripts/demo_vae_card.py vae_accel/data
"""

import json
import sys
from pathlib import Path

FIGURES = "<!-- figures: written by scripts/demo_vae_card.py -->"


def figures(metrics: dict) -> str:
    """The tables of the model card: what was reconstructed how well, and what the training took."""
    lines = [
        "| clip | held-out photograph | fp32 PSNR dB | worst frame | bf16 PSNR dB | worst frame |",
        "|---|---|---|---|---|---|",
    ]
    for clip, photographs in metrics["psnr_db"].items():
        for name, scores in photographs.items():
            cells = [f"{scores[d][k]:.2f}" for d in ("float32", "bfloat16") for k in ("mean", "worst_frame")]
            lines.append(f"| {clip} | {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| training run | steps | minutes | clips a step | learning rate | device |",
        "|---|---|---|---|---|---|",
    ]
    for number, run in enumerate(metrics["runs"], 1):
        batch, *clip = run["clips_a_step"]
        shape = f"{batch} of {'x'.join(map(str, clip))}"
        lines.append(
            f"| {number} | {run['steps']} | {run['minutes']} | {shape} | {run['learning_rate']} | {run['device']} |"
        )
    return "\n".join(lines)


def main(folder: Path) -> None:
    path = folder / "MODEL_CARD.md"
    before, _, after = path.read_text().split(FIGURES)
    body = figures(json.loads((folder / "metrics.json").read_text()))
    path.write_text(f"{before}{FIGURES}\n{body}\n{FIGURES}{after}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
