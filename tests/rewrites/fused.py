"""Plans with fused_blocks, a model under one, and what it is given, for the tests of its families."""

import torch
from torch import Tensor, nn

from tests.subjects import everything, plan
from tests.tiny import video
from tests.vaes import TABLE
from vae_accel.edits import Outcome, ledger_of
from vae_accel.platforms import Cuda, base
from vae_accel.rewrites.fused_blocks import FusedBlocks
from vae_accel.rewrites.fused_norm_act import FusedNormAct

ALONE = plan((base.Step(FusedBlocks(), "on", "test"),))
NORMS = plan((base.Step(FusedNormAct(), "on", "test"), base.Step(FusedBlocks(), "on", "test")))
BESIDE = everything(Cuda)

TINY = {case.id: case for case in TABLE}
# A head that is wider than every fused attention.
WIDE = video(
    "hunyuan-video-wide", "AutoencoderKLHunyuanVideo", 4, (3, 2, 3), (4, 8),
    config={**TINY["hunyuan-video"].config, "block_out_channels": (32, 32, 64, 288)},
)  # fmt: skip


def clip(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def optimized(model: nn.Module, steps: base.Platform = BESIDE) -> nn.Module:
    """`model`, in place, of which fused_blocks took something."""
    base.run(model, steps, steps.vae, "vae", {"strict": True})
    assert outcome_of(model).taken
    return model


def outcome_of(model: nn.Module) -> Outcome:
    """What became of fused_blocks on `model`."""
    return next(outcome for outcome in ledger_of(model).outcomes if outcome.name == FusedBlocks.name)
