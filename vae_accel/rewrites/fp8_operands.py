"""Convolutions of image decoders on e4m3 operands, at twice fp16's rate on a Hopper card: half of the bits.

Of a decoder's residual blocks those whose channels have a form (`kernels/fp8_conv.py`): the convolutions behind norm
and SiLU. Not those at the size of the latent, whose errors every later block enlarges: of FLUX.1 they are 11 % of these
convolutions' work and 3.5 dB (by the law, random weights, a picture of 192x192 is 45.0 dB from fp32 without them and
41.6 with them). Shortcuts, residual stream, upsampling, attention and both ends stay in 16 bits, and encoding is left
alone: what an encoder loses is in the latent for good. A call that cannot run e4m3 (another card or dtype, a gradient,
hooks or adapters on its layers) goes to the forward that was there before, and is counted in the report.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from vae_accel.edits import Ledger, Pen, ledger_of, obstacle, unusable_weight
from vae_accel.families import fp8
from vae_accel.rewrite import Rewrite, Site, Tier

OPT_IN = "not asked for: e4m3 has 3 bits of mantissa (VAE_ACCEL_TIER=lowered with VAE_ACCEL_FP8_OPERANDS=1)"
SMALL = "at the size of the latent: little work, and errors that every later block enlarges"


@dataclass(frozen=True)
class Fp8Operands(Rewrite):
    """Sites are residual blocks of a decoder; `facts`: by how much their norms multiply what they write."""

    name = "fp8_operands"
    tier = Tier.LOWERED
    over = ("fused_blocks", "fused_norm_act")
    direction = "decode"

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        decoder = root._modules.get("decoder")
        if decoder is None:
            return
        small = fp8.before_upsampling(decoder)
        for inner, module in decoder.named_modules():
            gains, path = fp8.gains_of(module), f"decoder.{inner}"
            if isinstance(gains, str):
                yield Site(path, gains)
            elif gains is not None:
                refused = SMALL if inner in small else _refusal(root, ledger, path)
                yield Site(path, refused, {"gains": gains})

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        ledger = ledger_of(root)
        assert ledger is not None
        alone = ledger.owner(site.path, "forward") != "fused_blocks"
        pen.method(site.path, "forward", fp8.residual_block, ledger, alone)
        for (norm, conv), gain in zip(fp8.PAIRS, site.facts["gains"], strict=True):
            pen.method(f"{site.path}.{norm}", "forward", fp8.norm, gain)
            pen.method(f"{site.path}.{conv}", "forward", fp8.conv, gain)


def _refusal(root: nn.Module, ledger: Ledger, path: str) -> str | None:
    for name in (name for pair in fp8.PAIRS for name in pair):
        reason = unusable_weight(root.get_submodule(f"{path}.{name}"))
        reason = reason or obstacle(root, ledger, f"{path}.{name}", "forward", Fp8Operands.over)
        if reason is not None:
            return f"{name}: {reason}"
    return obstacle(root, ledger, path, "forward", Fp8Operands.over)
