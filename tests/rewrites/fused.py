"""Plans with fused_blocks, and a model under one, for the tests of its families."""

from torch import nn

from tests.subjects import everything, plan
from vae_accel.edits import Outcome, ledger_of
from vae_accel.platforms import Cuda, base
from vae_accel.rewrites.fused_blocks import FusedBlocks
from vae_accel.rewrites.fused_norm_act import FusedNormAct

ALONE = plan((base.Step(FusedBlocks(), "on", "test"),))
NORMS = plan((base.Step(FusedNormAct(), "on", "test"), base.Step(FusedBlocks(), "on", "test")))
BESIDE = everything(Cuda)


def optimized(model: nn.Module, steps: base.Platform = BESIDE) -> nn.Module:
    """`model`, in place, of which fused_blocks took something."""
    base.run(model, steps, steps.vae, "vae", {"strict": True})
    assert outcome_of(model).taken
    return model


def outcome_of(model: nn.Module) -> Outcome:
    """What became of fused_blocks on `model`."""
    return next(outcome for outcome in ledger_of(model).outcomes if outcome.name == FusedBlocks.name)
