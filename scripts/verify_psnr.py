"""Proves an optimized VAE frame by frame: PSNR of stock and of the rewritten model against a golden, worst frame last.

    python scripts/verify_psnr.py PIPELINE_OR_VAE_PATH [--size 480x832x17] [--dtype bf16] [--floor 40]

Takes a folder (or hub id) of a diffusers pipeline or of a VAE. Exits 1 when a frame of the optimized model is below
the floor, or further from the golden than stock by more than 0.5 dB; 2 when the path cannot be used.
"""

import argparse
import sys

import torch

import vae_accel
from vae_accel import metrics, verify, workloads

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="local folder or hub id of a diffusers pipeline (its vae) or of a VAE")
    parser.add_argument("--size", help="HEIGHTxWIDTH[xFRAMES]; default: small, as the VAE's class allows")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--platform", help="cuda, rocm, npu or cpu; default: the device's own")
    parser.add_argument("--floor", type=float, default=metrics.LOWERED_WORST_FRAME_DB, help="dB, per frame")
    parser.add_argument("--kind", choices=verify.KINDS, default="picture")
    args = parser.parse_args()
    try:
        workload = workloads.of_checkpoint(args.path)
        size = workload.size(args.size) if args.size else workload.tiny()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        vae = workload.build(DTYPES[args.dtype], device, model=args.path)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    latent = workload.inputs(args.kind, "decode", size).to(device, DTYPES[args.dtype])
    with verify.full_precision():
        golden_vae = workload.build(DTYPES[args.dtype], device, model=args.path).to(torch.float32)
        golden = verify.run(workload, golden_vae, "decode", latent.float())
    del golden_vae
    stock = verify.run(workload, vae, "decode", latent)
    vae_accel.optimize_vae(vae, platform=args.platform)
    ours = verify.run(workload, vae, "decode", latent)
    print(vae_accel.report(vae))
    print(f"{'frame':>6} {'stock dB':>10} {'ours dB':>10}")
    failed = 0
    for index, frames in enumerate(zip(*map(by_frame, (golden, stock, ours)), strict=True)):
        truth, before, after = (frame[None] for frame in frames)
        a, b = (metrics.psnr(x, truth, peak=verify.PEAK) for x in (before, after))
        below = b < args.floor or b < a - metrics.ROUNDING_WORST_FRAME_DB
        failed += below
        print(f"{index:>6} {a:>10.2f} {b:>10.2f}{'  BELOW' if below else ''}")
    print(
        f"{failed} frames below the floor of {args.floor:.0f} dB or 0.5 dB under stock"
        if failed
        else "every frame holds"
    )
    return 1 if failed else 0


def by_frame(x: torch.Tensor) -> torch.Tensor:
    """[N, C, T, H, W] or [N, C, H, W] as [frames, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x


if __name__ == "__main__":
    raise SystemExit(main())
