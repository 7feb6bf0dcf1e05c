"""e4m3 operands in image decoders: within the floors of their tier, what cannot run them as before, and counted."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

import vae_accel
from tests import interpreter
from tests.kernels.hopper import Card
from tests.snapshots import assert_identical, snapshot
from tests.subjects import BROAD, plan
from tests.tiny import Tiny, image
from tests.vaes import TABLE
from vae_accel.edits import Outcome, ledger_of
from vae_accel.families import fp8
from vae_accel.kernels._dispatch import E4M3
from vae_accel.kernels.bordered import is_bordered
from vae_accel.metrics import compare, lowered_holds, rms_error
from vae_accel.platforms import NoSite, base
from vae_accel.rewrites.fp8_operands import SMALL, Fp8Operands
from vae_accel.rewrites.fused_blocks import FusedBlocks
from vae_accel.rewrites.fused_norm_act import FusedNormAct

HUNYUAN = image(
    "hunyuan-image-broad", "AutoencoderKLHunyuanImage", 128, (4, 6), 2,
    config={"in_channels": 3, "out_channels": 3, "latent_channels": 128, "block_out_channels": (128, 256),
            "layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 16},
)  # fmt: skip
each_case = pytest.mark.parametrize("case", [BROAD, HUNYUAN], ids=lambda case: case.id)
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def steps(*rewrites: Any) -> base.Platform:
    return plan(tuple(base.Step(rewrite, "on", "test") for rewrite in rewrites))


FUSED = steps(FusedNormAct(), FusedBlocks())
QUANTIZED = steps(FusedNormAct(), FusedBlocks(), Fp8Operands())
ALONE = steps(Fp8Operands())


def optimized(model: Any, made: base.Platform = QUANTIZED) -> Any:
    base.run(model, made, made.vae, "vae", {"strict": True, "tier": "lowered"})
    return model


def outcome_of(model: nn.Module) -> Outcome:
    return next(outcome for outcome in ledger_of(model).outcomes if outcome.name == "fp8_operands")


def block_of(made: base.Platform = QUANTIZED, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A VAE under a plan, and one of its residual blocks."""
    vae = optimized(BROAD.build(dtype=dtype), made)
    return vae, vae.decoder.up_blocks[1].resnets[1]


def pictures(dtype: torch.dtype = torch.bfloat16, channels: int = 128) -> Tensor:
    return torch.randn(2, channels, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["picture", "ramp", "noise"])
def test_the_floors_of_its_tier_hold(kind: Any, dtype: torch.dtype) -> None:
    vae, latent = BROAD.build(dtype=dtype), BROAD.latent(kind).to(dtype)
    golden = BROAD.decode(copy.deepcopy(vae).double(), latent.double())
    stock = BROAD.decode(vae, latent)
    ours = BROAD.decode(optimized(vae), latent)
    assert lowered_holds(compare(ours, golden, peak=2.0)) == (True, "")
    assert rms_error(ours, golden) > 2 * rms_error(stock, golden), "e4m3 was not met"
    assert not outcome_of(vae).counts


@each_case
@pytest.mark.parametrize("made", [QUANTIZED, ALONE], ids=["beside", "alone"])
def test_decoders_alone_and_taken_back(case: Tiny, made: base.Platform) -> None:
    vae = case.build(dtype=torch.bfloat16)
    before, latent, pixels = snapshot(vae), case.latent("picture").bfloat16(), case.pixels("picture").bfloat16()
    stock = case.decode(vae, latent), case.encode(vae, pixels)
    fused = (
        stock
        if made is ALONE
        else [f(optimized(vae, FUSED), x) for f, x in zip((case.decode, case.encode), (latent, pixels), strict=True)]
    )
    optimized(vae, made)
    taken = outcome_of(vae).taken
    blocks = {p for p, m in vae.named_modules() if p.startswith("decoder.") and fp8.gains_of(m) is not None}
    refused = outcome_of(vae).refused
    assert {*taken} | {*refused} == blocks and {*refused.values()} == {SMALL}
    first = ("up_blocks.0.resnets",) if case is BROAD else ("up_blocks.0", "up_blocks.1")
    assert all(path.removeprefix("decoder.").startswith(("mid_block.", *first)) for path in refused) and len(taken) == 2
    ours = case.decode(vae, latent)
    assert not torch.equal(ours, fused[0]) and compare(ours, stock[0], peak=2.0).psnr > 40
    assert torch.equal(case.encode(vae, pixels), fused[1])
    with vae_accel.paused(vae):
        assert torch.equal(case.decode(vae, latent), stock[0])
    assert torch.equal(case.decode(vae, latent), ours)
    vae_accel.restore(vae)
    assert_identical(vae, before)
    assert torch.equal(case.decode(vae, latent), stock[0])


@each_case
def test_through_the_kernels(case: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of Python beside Triton's interpreter, over poisoned memory, gives what the law gives."""
    golden = case.build(dtype=torch.float16).double()
    latent = case.latent("picture", batch=2).half()
    law = case.decode(optimized(case.build(dtype=torch.float16)), latent)
    card = Card().install(monkeypatch)
    with interpreter.kernels(monkeypatch):
        interpreter.poison(monkeypatch)
        vae = optimized(case.build(dtype=torch.float16))
        ours = case.decode(vae, latent)
    truth = case.decode(golden, latent.double())
    assert not outcome_of(vae).counts
    assert sum(macro["OPERANDS"] == 2 for macro in card.launches) == 2 * len(outcome_of(vae).taken)
    assert rms_error(ours, truth) <= 1.1 * rms_error(law, truth)


def test_norms_and_convolutions_meet_in_e4m3_and_leave_bordered_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    Card().install(monkeypatch)
    with interpreter.kernels(monkeypatch):
        for made in (QUANTIZED, ALONE):
            _, block = block_of(made, torch.float16)
            x, seen = pictures(torch.float16), []
            kept = block.norm2.forward
            block.norm2.forward = lambda x, kept=kept, seen=seen, **k: seen.append((x, kept(x, **k))) or seen[-1][1]
            y = block(x)
            assert [(a.dtype, b.dtype) for a, b in seen] == [(torch.float16, E4M3)]
            assert is_bordered(seen[0][0]) and is_bordered(seen[0][1])
            assert is_bordered(y) == (made is QUANTIZED) and y.dtype == torch.float16


class Adapter(nn.Module):
    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer(x, *args, **kwargs) + x.mean()


def hooked(block: Any) -> None:
    block.conv1.register_forward_pre_hook(lambda _, args: (args[0] * 2,))


def watched(block: Any) -> None:
    block.norm2.register_forward_hook(lambda _, args, y: y * 2)


def adapted(block: Any) -> None:
    block.conv2 = Adapter(block.conv2)


def seamless(block: Any) -> None:
    block.conv1.padding_mode = "circular"


def patched(block: Any) -> None:
    block.conv2._conv_forward = lambda x, weight, bias: x * 2


def widened(block: Any) -> None:
    block.double()


CHANGES: dict[Callable[[Any], None], str] = {
    hooked: "conv1 has hooks",
    watched: "norm2 has hooks",
    adapted: "conv2 is Adapter",
    seamless: "conv1 was patched",
    patched: "conv2 was patched",
    widened: "its pictures are torch.float64, and the result has 16 bits",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_cannot_run_it_runs_as_before_and_is_counted(change: Any) -> None:
    vae, block = block_of()
    _, fused = block_of(FUSED)
    change(block), change(fused)
    x = pictures(next(block.parameters()).dtype)
    for times in (1, 2):
        assert torch.equal(block(x), fused(x))
        assert outcome_of(vae).counts == {fp8.BELOW.format(CHANGES[change]): times}
    assert f"2 x {fp8.BELOW.format(CHANGES[change])}" in str(vae_accel.report(vae))


def test_gradients_autocast_and_training_run_as_before() -> None:
    (vae, block), (_, fused), x = block_of(), block_of(FUSED), pictures()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block(x, None), fused(x, None))
    with torch.enable_grad():
        y = block.requires_grad_(True)(x, None)
        y.float().sum().backward()
        assert torch.equal(y, fused(x, None)) and block.conv1.weight.grad is not None
    block.requires_grad_(False).train(), fused.train()
    assert torch.equal(block(x, None), fused(x, None))
    assert outcome_of(vae).counts == {fp8.BELOW.format("training, a gradient, or autocast"): 3}


def test_other_cards_run_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    (vae, block), (_, fused), x = block_of(), block_of(FUSED), pictures()
    monkeypatch.setattr(fp8, "refusal", lambda x, channels: "another card")
    assert torch.equal(block(x), fused(x))
    assert outcome_of(vae).counts == {fp8.BELOW.format("another card"): 1}


def test_a_compiled_block_is_as_before() -> None:
    torch._dynamo.reset()
    (vae, block), (_, fused), x = block_of(), block_of(FUSED), pictures()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), fused(x), rtol=0, atol=0.05)
    assert not outcome_of(vae).counts


def test_weights_are_quantized_in_each_call() -> None:
    (_, block), (_, other), x = block_of(), block_of(), pictures()
    block(x)
    for parameter in block.parameters():
        parameter.data += 0.1 * parameter.data  # PEFT's merge: no version is bumped, no pointer moves
    other.load_state_dict(block.state_dict())
    assert torch.equal(block(x), other(x))


def test_copied_pickled_and_offloaded() -> None:
    vae, latent = optimized(BROAD.build(dtype=torch.bfloat16)), BROAD.latent("picture").bfloat16()
    expected = BROAD.decode(vae, latent)
    for other in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert torch.equal(BROAD.decode(other, latent), expected)
        other.float()
        BROAD.decode(other, latent.float())
        assert sum(outcome_of(other).counts.values()) == len(outcome_of(vae).taken) and not outcome_of(vae).counts
    cpu_offload(vae, execution_device="cpu")
    assert torch.equal(BROAD.decode(vae, latent), expected) and not outcome_of(vae).counts


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda b: b.register_module("nonlinearity", nn.GELU()), "its activation is GELU, not SiLU"),
        (lambda b: b.norm1.to("meta"), "meta device"),
        (lambda b: setattr(b.conv2, "padding", (0, 0)), r"conv2 has a kernel of \(3, 3\) with a padding of \(0, 0\)"),
        (lambda b: setattr(b, "conv1", nn.Conv2d(96, 128, 3, padding=1)), "96 input channels are no multiple of 128"),
        (lambda b: setattr(b, "norm2", nn.LayerNorm(128)), "LayerNorm is no GroupNorm"),
        (lambda b: setattr(b, "output_scale_factor", 2.0), "divides its output"),
    ],
)
def test_blocks_it_cannot_take_are_refused_with_the_reason(change: Any, why: str) -> None:
    block = BROAD.build().decoder.mid_block.resnets[0]
    assert isinstance(fp8.gains_of(block), tuple)
    change(block)
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(fp8.gains_of(block))


def test_a_slot_that_another_owns_is_refused() -> None:
    vae = BROAD.build(dtype=torch.bfloat16)
    vae.decoder.up_blocks[1].resnets[0].conv2.forward = lambda x: x
    refused = outcome_of(optimized(vae, ALONE)).refused
    assert "conv2: forward was replaced on the instance" in refused["decoder.up_blocks.1.resnets.0"]
    assert outcome_of(vae).taken == ["decoder.up_blocks.1.resnets.1"]


def test_models_without_such_channels_are_refused_by_name() -> None:
    vae = next(case for case in TABLE if case.id == "sd").build(dtype=torch.bfloat16)
    with pytest.raises(NoSite, match="64 input channels are no multiple of 128"):
        vae_accel.optimize_vae(vae, platform="cuda", fp8_operands="1", tier="lowered")


def test_it_is_asked_for_by_name_and_by_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> str:
        return outcome_of(vae_accel.optimize_vae(BROAD.build(dtype=torch.bfloat16), platform="cuda")).state

    assert state() == "off"
    monkeypatch.setenv("VAE_ACCEL_TIER", "lowered")
    assert state() == "off"
    monkeypatch.setenv("VAE_ACCEL_FP8_OPERANDS", "1")
    assert state() == "on"
    monkeypatch.setenv("VAE_ACCEL_TIER", "rounding")
    with pytest.raises(NoSite, match="its tier is lowered"):
        state()
