"""Wide heads through the math backend, and no other backend for anybody else afterwards."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.vaes import TABLE
from vae_accel.edits import ledger_of
from vae_accel.families.attention import head_dim_of
from vae_accel.platforms import Cpu, NoSite, base
from vae_accel.rewrites.math_attention import MathAttention

NAME = "math_attention"
TINY = {tiny.id: tiny for tiny in TABLE}


def rewrite(module: nn.Module) -> nn.Module:
    base.run(module, Cpu(), [base.Step(MathAttention(), "on", "test")], "vae", {"only": NAME})
    return module


def blocks() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Every known attention with one head of 288 channels, and an input."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.autoencoders import (
        autoencoder_kl_cosmos,
        autoencoder_kl_hunyuanimage,
        autoencoder_kl_hunyuanimage_refiner,
        autoencoder_kl_hunyuanvideo15,
        autoencoder_kl_qwenimage,
        autoencoder_kl_qwenimage21,
        autoencoder_kl_wan,
        autoencoder_vidtok,
    )

    clip, image = torch.randn(1, 288, 2, 3, 4), torch.randn(1, 288, 3, 4)
    spatial = autoencoder_kl_cosmos.CosmosSpatialAttentionProcessor2_0()
    return {
        "Attention": (Attention(288, heads=1, dim_head=288, _from_deprecated_attn_block=True), image),
        "Wan": (autoencoder_kl_wan.WanAttentionBlock(288), clip),
        "QwenImage": (autoencoder_kl_qwenimage.QwenImageAttentionBlock(288), clip),
        "QwenImage21": (autoencoder_kl_qwenimage21.QwenImage21AttentionBlock(288), clip[:, :, :1]),
        "HunyuanImage": (autoencoder_kl_hunyuanimage.HunyuanImageAttentionBlock(288), image),
        "HunyuanImageRefiner": (autoencoder_kl_hunyuanimage_refiner.HunyuanImageRefinerAttnBlock(288), clip),
        "HunyuanVideo15": (autoencoder_kl_hunyuanvideo15.HunyuanVideo15AttnBlock(288), clip),
        "VidTok": (autoencoder_vidtok.VidTokAttnBlock(288), clip),
        "Cosmos": (autoencoder_kl_cosmos.CosmosCausalAttention(1, 288, processor=spatial), clip),
    }  # fmt: skip


@pytest.fixture(params=list(blocks()))
def block(request):
    module, x = blocks()[request.param]
    return module.eval().requires_grad_(False), x


def backends() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return cuda.math_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()


def watch(monkeypatch) -> list[tuple[bool, ...]]:
    seen, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.append(backends()) or sdpa(*a, **k))
    return seen


def test_each_block_attends_by_the_math_backend_alone(block, monkeypatch):
    module, x = block
    assert head_dim_of(module) == 288
    expected, before = module(x), backends()
    seen = watch(monkeypatch)
    actual = rewrite(module)(x)
    assert seen and set(seen) == {(True, False, False)}
    assert backends() == before
    torch.testing.assert_close(actual, expected)


def test_each_block_compiles_in_one_graph(block):
    module, x = block
    torch._dynamo.reset()
    expected = rewrite(module)(x)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), expected)


def test_a_failing_forward_gives_the_backends_back(block):
    module, x = block
    before = backends()
    with pytest.raises((RuntimeError, ValueError)):
        rewrite(module)(x[:, :7])
    assert backends() == before


@pytest.mark.parametrize("name", ["wan2.1", "sd", "hunyuan-video-1.5", "cosmos"])
def test_narrow_heads_are_refused(name):
    with pytest.raises(NoSite, match="is at most 256"):
        rewrite(TINY[name].build())


def test_a_whole_model_with_a_wide_head(monkeypatch):
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = AutoencoderKL(block_out_channels=(32, 288), layers_per_block=1, **blocks).requires_grad_(False)
    z = torch.randn(1, 4, 4, 5)
    expected = model.eval().decode(z).sample
    rewrite(model)
    sides = ("encoder", "decoder")
    assert ledger_of(model).outcomes[0].taken == [f"{side}.mid_block.attentions.0" for side in sides]
    seen = watch(monkeypatch)
    torch.testing.assert_close(model.decode(z).sample, expected)
    assert seen == [(True, False, False)]


def test_two_threads_leave_the_backends_as_they_were():
    module, x = blocks()["Wan"]
    module = rewrite(module.eval().requires_grad_(False))
    before, expected, wrong = backends(), module(x), []

    def decode() -> None:
        wrong.extend(y for y in (module(x) for _ in range(20)) if not torch.equal(y, expected))

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and backends() == before


def test_a_subclass_with_its_own_forward_is_refused():
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock

    class Other(WanAttentionBlock):
        def forward(self, x):
            return x

    with pytest.raises(NoSite, match="Other has a forward of its own"):
        rewrite(Other(288))
