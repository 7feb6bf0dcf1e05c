"""Whole blocks on our own convolution: norm and SiLU once, then a convolution that pads, adds bias and residual itself.

What a block is, and its forward, is the family's (`families/blocks.py` lists them). A call that cannot run ours (a
gradient, autocast, training) goes to the forward that was there before, with the other rewrites in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from vae_accel.edits import Ledger, Pen, obstacle, unusable_weight
from vae_accel.families.blocks import block_of, unproved
from vae_accel.families.row import Block
from vae_accel.rewrite import Rewrite, Site, Tier
from vae_accel.settings import Settings


@dataclass(frozen=True)
class FusedBlocks(Rewrite):
    """Sites are blocks; `facts`: the family's row.

    Blocks wider than `compute_dtype` are left to the rewrites that lower their convolutions: ours multiply what they
    are given. `proved`: families that were proved on a card alone, unless the rewrite is asked for by name.
    """

    name = "fused_blocks"
    tier = Tier.ROUNDING
    over = (
        "causal_padding",
        "channels_last",
        "conv3d_as_conv2d",
        "folded_upsample",
        "fused_norm_act",
        "single_frame_conv",
    )
    lowers = True

    compute_dtype: torch.dtype | None = None
    proved: bool = False

    def asked(self, settings: Settings, by_name: bool) -> FusedBlocks:
        return replace(self, proved=self.proved and not by_name)

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        for path, module in root.named_modules():
            block = block_of(module)
            if isinstance(block, str):
                yield Site(path, block)
            elif block is not None:
                refused = unproved(module) if self.proved else None
                refused = refused or _wider(module, self.compute_dtype) or _refusal(root, ledger, path, block)
                yield Site(path, refused, {"block": block})

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        block: Block = site.facts["block"]
        for hand in block.hands:
            pen.method(_join(site.path, hand.path), hand.slot, hand.function, *hand.facts)


def _wider(module: nn.Module, compute_dtype: torch.dtype | None) -> str | None:
    if compute_dtype is None or all(p.dtype.itemsize <= compute_dtype.itemsize for p in module.parameters()):
        return None
    return f"its convolutions are to run in {compute_dtype}, which is what the rewrites beneath it do"


def _refusal(root: nn.Module, ledger: Ledger, path: str, block: Block) -> str | None:
    for norm in block.norms:
        if ledger.owner(_join(path, norm), "forward") != "fused_norm_act":
            return f"{norm} is not taken by fused_norm_act"
    for hand in block.hands:
        full = _join(path, hand.path)
        module = root.get_submodule(full)
        reason = obstacle(root, ledger, full, hand.slot, FusedBlocks.over)
        if reason is None and isinstance(module, (nn.Conv2d, nn.Conv3d)):
            reason = unusable_weight(module)
        if reason is not None:
            return f"{hand.path or 'the block'}: {reason}"
    return None


def _join(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)
