"""Blocks of which a whole forward is ours: what a family's row says, and where the rows are."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from vae_accel.families import cogvideox, hunyuan_video, hunyuan_video_15, kl, mochi, wan
from vae_accel.families.match import by_row, known_as
from vae_accel.families.row import Block

ROWS: dict[str, Callable[[nn.Module], Block | str | None]] = {
    **wan.ROWS,
    **kl.ROWS,
    **hunyuan_video.ROWS,
    **hunyuan_video_15.ROWS,
    **mochi.ROWS,
    **cogvideox.ROWS,
}


# Whose pictures were proved on a card: interpreters do not miscompile.
PROVED = frozenset((*wan.ROWS, *kl.ROWS, *hunyuan_video.ROWS, *mochi.ROWS, *cogvideox.ROWS))


def block_of(module: nn.Module) -> Block | str | None:
    """What is ours in this block; the reason where it is a known block that cannot be taken; None where it is none."""
    return by_row(module, ROWS)


def unproved(module: nn.Module) -> str | None:
    """Why the plan leaves a block of ROWS alone until somebody asks for it, or None."""
    if known_as(module, PROVED) is not None:
        return None
    return "its family was proved in an interpreter and on no card yet: fused_blocks=1 takes it"
