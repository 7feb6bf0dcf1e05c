"""Blocks of HunyuanVideo on the fused convolution: stock's clips, frames that attend without a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from tests.rewrites.fused import ALONE, BESIDE, NORMS, TINY, WIDE, clip, optimized, outcome_of
from tests.subjects import plan
from tests.tiny import Tiny
from vae_accel.families import clip_conv, frames_attend, hunyuan_video
from vae_accel.families.blocks import block_of
from vae_accel.platforms import base
from vae_accel.workloads.weights import randomise

CASE = TINY["hunyuan-video"]
each_case = pytest.mark.parametrize("case", [CASE, WIDE], ids=lambda case: case.id)


def watched(module: nn.Module) -> list[Any]:
    """What is given to a module from now on."""
    seen: list[Any] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


@each_case
@torch.inference_mode()
def test_every_block_is_taken_and_no_convolution_is_given_a_padded_clip(case: Tiny) -> None:
    vae: Any = optimized(case.build(dtype=torch.bfloat16))
    outcome = outcome_of(vae)
    assert not outcome.refused
    given = {}
    for path, module in vae.named_modules():
        if isinstance(module, nn.Conv3d) and set(module.stride) == {1} and "quant" not in path:
            given[path] = watched(module)
        if type(module).__name__ == "HunyuanVideoResnetBlockCausal3D":
            assert path in outcome.taken
            (hand,) = (h for h in block_of(module).hands if h.path == "")
            assert min(hand.facts[0]) > 1e6  # fp16: groups of a million elements are safe with weights like these
    case.decode(vae, case.latent().bfloat16())
    case.encode(vae, case.pixels().bfloat16())
    for path, (x,) in given.items():
        if "upsamplers" in path:  # on a CPU folded_upsample's, which marks its clips
            continue
        assert x.shape[-1] in (3, 6, 12, 24), path
        assert x.dtype == (torch.float16 if path.endswith(("conv1.conv", "conv2.conv")) else torch.bfloat16), path


def attended(dtype: torch.dtype, **more: Any) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoMidBlock3D

    block = HunyuanVideoMidBlock3D(64, resnet_groups=8, attention_head_dim=64, **more)
    return randomise(block, dtype=dtype, device="cpu").requires_grad_(False)


class Frames:
    """How many keys each call of attention is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: list[int] = []
        run = frames_attend.attend
        monkeypatch.setattr(frames_attend, "attend", lambda q, k, v: self.keys.append(k.shape[1]) or run(q, k, v))


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_a_frame_attends_to_those_up_to_it(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, stock, ours = Frames(monkeypatch), attended(torch.float64), optimized(attended(torch.float64), ALONE)
    x = clip(batch, 64, 3, 2, 5)
    torch.testing.assert_close(ours(x), stock(x), rtol=0, atol=1e-12)
    assert calls.keys == [10, 20, 30]


@pytest.mark.parametrize("change", ["processor", "hook", "gradient", "no attention"])
def test_other_attentions_are_stocks(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"add_attention": False} if change == "no attention" else {}
    stock, ours = attended(torch.float64, **more), optimized(attended(torch.float64, **more), ALONE)
    calls, x = Frames(monkeypatch), clip(1, 64, 3, 2, 5)
    if change == "processor":
        for block in (stock, ours):
            block.attentions[0].set_processor(AttnProcessor())
    elif change == "hook":
        for block in (stock, ours):
            block.attentions[0].register_forward_hook(lambda m, args, y: 2 * y)
    elif change == "gradient":
        x.requires_grad_()
    y, expected = ours(x), stock(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert not calls.keys
    if change == "gradient":
        gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)]
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)


class Adapter(nn.Module):
    """What adds to a convolution, as LoRA's layers do."""

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer(x, *args, **kwargs) + x.mean()


@pytest.mark.parametrize("which", ["conv1.conv", "conv2.conv", "conv_shortcut.conv", "upsamplers"])
@torch.no_grad()
def test_an_adapter_sees_what_it_sees_in_stock(which: str) -> None:
    stock, ours = CASE.build(dtype=torch.float64), optimized(CASE.build(dtype=torch.float64), NORMS)
    for vae in (stock, ours):
        for path, module in list(vae.decoder.named_modules()):
            inner = getattr(module, "conv", None)
            if isinstance(inner, nn.Conv3d) and which.removesuffix(".conv") in path:
                module.conv = Adapter(inner)
    latent = CASE.latent("picture").double()
    torch.testing.assert_close(CASE.decode(ours, latent), CASE.decode(stock, latent), rtol=0, atol=1e-11)


def test_a_call_that_runs_stock_is_given_the_dtype_of_the_model() -> None:
    case, vae = CASE, optimized(CASE.build(dtype=torch.bfloat16), NORMS)
    block: Any = vae.decoder.up_blocks[0].resnets[0]
    block.conv1.conv.weight.requires_grad_()
    y = block(clip(1, 32, 2, 4, 4, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and y.requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert case.decode(vae, case.latent()).isfinite().all()


@torch.no_grad()
def test_where_ours_does_not_run_the_rewrites_beneath_it_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32, and cards other than Hopper: bit for bit the plan without these blocks."""
    monkeypatch.setattr(clip_conv, "runs", lambda x: False)
    monkeypatch.setattr(hunyuan_video, "_attends", lambda attn: False)
    without = plan(tuple(step for step in BESIDE.vae if step.rewrite.name != "fused_blocks"))
    ours, others = optimized(CASE.build()), CASE.build()
    base.run(others, without, without.vae, "vae", {"strict": True})
    for latent in (CASE.latent(), CASE.single_frame_latent()):
        assert torch.equal(CASE.decode(ours, latent), CASE.decode(others, latent))
    assert torch.equal(CASE.encode(ours, CASE.pixels()), CASE.encode(others, CASE.pixels()))


def test_what_is_no_such_block_is_refused_with_the_reason() -> None:
    from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as hv

    block = hv.HunyuanVideoResnetBlockCausal3D(32)
    block.conv2.conv = nn.Conv3d(32, 32, 3, groups=2)
    assert block_of(block) == "conv2: stride, dilation or groups"
    block.conv2.conv = nn.Conv3d(32, 32, 3, padding=1)
    assert block_of(block).startswith("conv2: a padding of (1, 1, 1, 1, 2, 0) and of (1, 1, 1)")
    block.conv2.conv = nn.Linear(32, 32)
    assert block_of(block) == "conv2: its convolution is a Linear"
    block.conv2 = nn.Conv3d(32, 32, 3)
    assert "lacks the attributes" in block_of(block)
    assert block_of(hv.HunyuanVideoUpsampleCausal3D(32, upsample_factor=(1, 4, 4))) == "it upsamples by (1, 4, 4)"


@torch.no_grad()
def test_compiles_as_one_graph() -> None:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoResnetBlockCausal3D

    block: Any = randomise(HunyuanVideoResnetBlockCausal3D(32, 64), dtype=torch.float32, device="cpu")
    block, x = optimized(block.requires_grad_(False), NORMS), clip(1, 32, 3, 5, 7, dtype=torch.float32)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), block(x))
