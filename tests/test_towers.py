"""Every vision tower through the public call, with every rewrite for encoders on: the neighbours of a pipeline."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import vae_accel
from tests.towers import HOLDER, RELATIVES, TABLE, Tower
from vae_accel.edits import ledger_of
from vae_accel.platforms import Platform
from vae_accel.platforms.base import Step
from vae_accel.rewrites.bilinear_pos_embed import BilinearPosEmbed
from vae_accel.rewrites.fused_elementwise import FusedElementwise
from vae_accel.rewrites.joint_projections import JointProjections
from vae_accel.rewrites.native_reshape import NativeReshape
from vae_accel.rewrites.packed_attention import PackedAttention
from vae_accel.rewrites.padded_mlp import PaddedMlp
from vae_accel.rewrites.patch_embed_as_linear import PatchEmbedAsLinear
from vae_accel.rewrites.residual_norm import ResidualNorm
from vae_accel.rewrites.vision_metadata import VisionMetadata


class Everything(Platform):
    name = "cpu"
    encoder = (
        Step(NativeReshape(), "on", "test"),
        Step(PatchEmbedAsLinear(), "on", "test"),
        Step(VisionMetadata(), "on", "test"),
        Step(BilinearPosEmbed(), "on", "test"),
        Step(PackedAttention(), "on", "test"),
        Step(PaddedMlp(), "on", "test"),
        Step(JointProjections(), "on", "test"),
        Step(FusedElementwise(), "on", "test"),
        Step(ResidualNorm(), "on", "test"),
    )


def optimized(model: nn.Module) -> nn.Module:
    return vae_accel.optimize_encoder(model, platform=Everything())


def error(outputs: list[Tensor], golden: list[Tensor]) -> list[float]:
    return [(o.double() - g).square().mean().sqrt().item() for o, g in zip(outputs, golden, strict=True)]


each_tower = pytest.mark.parametrize("tower", (*TABLE, HOLDER, *RELATIVES), ids=lambda t: t.id)


@each_tower
def test_fp32_restore_and_state_dict(tower: Tower) -> None:
    model = tower.build()
    state = {k: (v.clone(), v.stride()) for k, v in model.state_dict().items()}
    for kind in ("picture", "ramp", "noise"):
        feed = tower.inputs(kind)
        want = tower.outputs(model, feed)
        for got, stock in zip(tower.outputs(optimized(model), feed), want, strict=True):
            torch.testing.assert_close(got, stock, rtol=1e-5, atol=1e-5)
        taken = {o.name: o.taken for o in ledger_of(model).outcomes}
        assert taken["patch_embed_as_linear"] == ([tower.convolution] if tower.convolution else [])
        assert taken["vision_metadata"] == ([] if tower.metadata is None else [tower.metadata])
        assert taken["bilinear_pos_embed"] == ([] if tower.table is None else [tower.table])
        model.load_state_dict(model.state_dict(), strict=True)
        vae_accel.restore(model)
        assert all(torch.equal(a, b) for a, b in zip(tower.outputs(model, feed), want, strict=True))
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], v) and after[k].stride() == strides for k, (v, strides) in state.items())


# Not the holder: its logits are those of a language model, and its tower is qwen3-vl's.
@pytest.mark.parametrize("tower", TABLE + RELATIVES, ids=lambda t: t.id)
def test_bf16_is_as_near_to_fp64_as_stock(tower: Tower) -> None:
    stock, ours = 0.0, 0.0
    for seed in range(4):  # a tower of this size has few values: one draw says little of a mean
        model, feed = tower.build(seed, torch.bfloat16), tower.inputs("picture", seed=seed, dtype=torch.bfloat16)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in feed.items()}
        golden = tower.outputs(copy.deepcopy(model).double(), wide)
        stock += sum(error(tower.outputs(model, feed), golden))
        ours += sum(error(tower.outputs(optimized(model), feed), golden))
    assert ours <= 1.05 * stock


def test_hidden_states_for_a_pipeline() -> None:
    """diffusers asks a text encoder for `output_hidden_states`, which transformers hands on to the tower."""
    model, feed = HOLDER.build(), HOLDER.inputs()
    with torch.no_grad():
        want = model(**feed, output_hidden_states=True).hidden_states[-1]
        got = optimized(model)(**feed, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
