"""Real pipelines of diffusers, from tiny components: optimized, reported on, paused and restored as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vae_accel
from tests import towers
from tests.snapshots import assert_identical, snapshot
from tests.vaes import TABLE

TINY = {tiny.id: tiny for tiny in TABLE}
TOWERS = {tower.id: tower for tower in towers.TABLE}


def clip_text() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=64,
        projection_dim=32,
    )
    return CLIPTextModel(config).eval()


def stable_diffusion() -> Any:
    """With an image encoder, as IP-Adapter gives it one."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    pipe = StableDiffusionPipeline(
        vae=TINY["sd"].build(),
        text_encoder=clip_text(),
        tokenizer=None,
        unet=unet.eval(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=TOWERS["clip-projection"].build(),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd_call(pipe: Any) -> torch.Tensor:
    embeddings = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    return pipe(
        prompt_embeds=embeddings,
        negative_prompt_embeds=embeddings * 0,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=2,
        height=16,
        width=16,
        output_type="pt",
    ).images


def wan() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=TINY["wan2.1"].build(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_call(pipe: Any) -> torch.Tensor:
    embeddings = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    return pipe(
        prompt_embeds=embeddings,
        negative_prompt_embeds=embeddings * 0,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=2,
        height=16,
        width=32,
        num_frames=5,
        output_type="pt",
    ).frames


PIPELINES = {"stable_diffusion": (stable_diffusion, sd_call), "wan": (wan, wan_call)}


@pytest.mark.parametrize("make, call", PIPELINES.values(), ids=PIPELINES)
@pytest.mark.parametrize("platform", ["cuda", "rocm", "npu", "cpu"])
def test_a_pipeline_from_end_to_end(make, call, platform):
    pipe = make()
    modules = {name: c for name, c in pipe.components.items() if isinstance(c, torch.nn.Module)}
    before = {name: snapshot(module) for name, module in modules.items()}
    stock = call(pipe)
    assert stock.isfinite().all() and stock.std() > 0
    assert vae_accel.optimize(pipe, platform=platform) is pipe
    torch.testing.assert_close(call(pipe), stock, rtol=0, atol=1e-3)
    text = str(vae_accel.report(pipe))
    assert f"vae on {platform}" in text
    for name, module in modules.items():
        if name not in ("vae", "image_encoder"):
            assert_identical(module, before[name])
    with vae_accel.paused(pipe):
        assert torch.equal(call(pipe), stock)
    torch.testing.assert_close(call(pipe), stock, rtol=0, atol=1e-3)
    assert vae_accel.restore(pipe) is pipe
    for name, module in modules.items():
        assert_identical(module, before[name])
    assert torch.equal(call(pipe), stock)


def test_the_tower_is_found_and_the_text_encoder_left_alone():
    pipe = stable_diffusion()
    vae_accel.optimize(pipe, only="patch_embed_as_linear", platform="cuda")
    sections = {section.component: section for section in vae_accel.report(pipe).sections}
    assert list(sections) == ["vae", "image_encoder", "text_encoder"]
    assert "no vision tower: left alone" in sections["text_encoder"].note
    (outcome,) = [o for o in sections["image_encoder"].outcomes if o.name == "patch_embed_as_linear"]
    assert outcome.taken == ["vision_model.embeddings.patch_embedding"]
    tower = TOWERS["clip-projection"]
    feed = tower.inputs()
    stock = tower.outputs(tower.build(), feed)
    for ours, expected in zip(tower.outputs(pipe.image_encoder, feed), stock, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    vae_accel.restore(pipe)
    assert not any("forward" in vars(m) for m in pipe.image_encoder.modules())


def test_save_and_load_of_a_pipeline(tmp_path):
    from diffusers import WanPipeline

    pipe = wan()
    stock = wan_call(pipe)
    vae_accel.optimize(pipe, platform="cuda")
    pipe.save_pretrained(tmp_path)
    loaded = WanPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(wan_call(loaded), stock, rtol=0, atol=1e-5)  # stock's own reload: 5e-7, by alignment
    assert "not optimized" in str(vae_accel.report(loaded))


def test_a_pipeline_with_tiling_and_slicing_switched_on_afterwards():
    pipe = stable_diffusion()
    vae_accel.optimize(pipe, platform="cuda")
    pipe.vae.enable_slicing()
    TINY["sd"].tile(pipe.vae)
    ours = sd_call(pipe)
    vae_accel.restore(pipe)
    torch.testing.assert_close(ours, sd_call(pipe), rtol=0, atol=1e-3)
