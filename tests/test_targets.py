"""Every kind of pipeline of diffusers that holds a vision encoder: found, rewritten, and its neighbours left alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import vae_accel
from tests import towers
from tests.snapshots import assert_identical, snapshot
from tests.test_towers import Everything
from tests.towers import QWEN3_PROMPT, VIT, Tower
from tests.vaes import TABLE
from vae_accel.workloads.weights import randomise

VAES = {tiny.id: tiny for tiny in TABLE}
TOWERS = {tower.id: tower for tower in (*towers.TABLE, *towers.PACKED)}
TEXT: dict[str, Any] = {**VIT, "vocab_size": 16, "num_key_value_heads": 1, "pad_token_id": 0}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
TOKENS = {name: QWEN3_PROMPT[name] for name in QWEN3_PROMPT if name.endswith("_id")}


def model(name: str, **config: Any) -> nn.Module:
    """A class of transformers by name, of a configuration, with seeded weights."""
    cls = getattr(transformers, name)
    return randomise(cls(cls.config_class(**config)), dtype=torch.float32, device="cpu").requires_grad_(False)


def qwen_vl(name: str, tower: str) -> nn.Module:
    vision = {**TOWERS[tower].config, "hidden_size" if tower == "qwen2-vl" else "out_hidden_size": 32}
    return model(name, vision_config=vision, text_config={**TEXT, **ROPE}, **TOKENS)


def llava() -> nn.Module:
    vision = {"model_type": "clip_vision_model", **TOWERS["clip"].config}
    return model("LlavaForConditionalGeneration", vision_config=vision, text_config={"model_type": "llama", **TEXT})


def glm_image() -> nn.Module:
    text = {**TEXT, **ROPE, "vision_vocab_size": 16}
    vq = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 32}
    return model(
        "GlmImageForConditionalGeneration", vision_config=TOWERS["glm-image"].config, text_config=text, vq_config=vq
    )


def t5(name: str = "T5EncoderModel") -> nn.Module:
    return model(name, vocab_size=16, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)


def clip_text() -> nn.Module:
    return model("CLIPTextModel", **VIT, vocab_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)


@dataclass(frozen=True)
class Kind:
    """A pipeline class, how its components are made, which holds a tower and where, and which are left alone.

    `rewrites` are those that take a site in the tower.
    """

    pipeline: str
    components: Mapping[str, Callable[[], nn.Module]]
    holder: str
    path: str
    tower: Tower
    rewrites: tuple[str, ...]
    alone: tuple[str, ...] = ()


LINEAR, METADATA = ("patch_embed_as_linear",), ("vision_metadata",)
BOTH = LINEAR + METADATA
LAYERS = ("fused_elementwise", "residual_norm")
IMAGES = ("joint_projections", *LAYERS)
QWEN2 = (*BOTH, "packed_attention", *LAYERS)
WINDOWED = (*BOTH, "packed_attention", "padded_mlp", *LAYERS)
QWEN25 = {"text_encoder": lambda: qwen_vl("Qwen2_5_VLForConditionalGeneration", "qwen2.5-vl")}
SIGLIP, CLIP = TOWERS["siglip"], TOWERS["clip"]
QWEN_IMAGE, WAN, HUNYUAN = (VAES[id].build for id in ("qwen-image", "wan2.1", "hunyuan-video"))

KINDS = (
    Kind(
        "QwenImageEditPipeline",
        {"vae": QWEN_IMAGE, **QWEN25},
        "text_encoder",
        "model.visual",
        TOWERS["qwen2.5-vl"],
        WINDOWED,
    ),
    Kind(
        "QwenImageEditPlusPipeline",
        {"vae": QWEN_IMAGE, **QWEN25},
        "text_encoder",
        "model.visual",
        TOWERS["qwen2.5-vl"],
        WINDOWED,
    ),
    # Never runs the tower: rewriting it is harmless.
    Kind(
        "QwenImagePipeline",
        {"vae": QWEN_IMAGE, **QWEN25},
        "text_encoder",
        "model.visual",
        TOWERS["qwen2.5-vl"],
        WINDOWED,
    ),
    Kind(
        "Kandinsky5I2IPipeline",
        {"vae": VAES["sd"].build, **QWEN25, "text_encoder_2": clip_text},
        "text_encoder",
        "model.visual",
        TOWERS["qwen2.5-vl"],
        WINDOWED,
        ("text_encoder_2",),
    ),
    Kind(
        "Kandinsky6TI2VAPipeline",
        {"vae": HUNYUAN, **QWEN25, "text_encoder_2": clip_text},
        "text_encoder",
        "model.visual",
        TOWERS["qwen2.5-vl"],
        WINDOWED,
        ("text_encoder_2",),
    ),
    Kind(
        "EasyAnimatePipeline",
        {
            "vae": VAES["easyanimate"].build,
            "text_encoder": lambda: qwen_vl("Qwen2VLForConditionalGeneration", "qwen2-vl"),
        },
        "text_encoder",
        "model.visual",
        TOWERS["qwen2-vl"],
        QWEN2,
    ),
    Kind(
        "GlmImagePipeline",
        {"vae": VAES["sd"].build, "vision_language_encoder": glm_image, "text_encoder": t5},
        "vision_language_encoder",
        "model.visual",
        TOWERS["glm-image"],
        (*BOTH, "fused_elementwise"),
        ("text_encoder",),
    ),
    Kind(
        "HunyuanVideoImageToVideoPipeline",
        {"vae": HUNYUAN, "text_encoder": llava, "text_encoder_2": clip_text},
        "text_encoder",
        "model.vision_tower",
        CLIP,
        LINEAR + IMAGES,
        ("text_encoder_2",),
    ),
    Kind(
        "HunyuanVideo15ImageToVideoPipeline",
        {
            "vae": VAES["hunyuan-video-1.5"].build,
            "image_encoder": SIGLIP.build,
            "text_encoder": lambda: model("Qwen2_5_VLTextModel", **TEXT, **ROPE),
            "text_encoder_2": t5,
        },
        "image_encoder",
        "",
        SIGLIP,
        LINEAR + IMAGES,
        ("text_encoder", "text_encoder_2"),
    ),
    Kind(
        "HunyuanVideoFramepackPipeline",
        {"vae": HUNYUAN, "image_encoder": SIGLIP.build, "text_encoder": lambda: model("LlamaModel", **TEXT)},
        "image_encoder",
        "",
        SIGLIP,
        LINEAR + IMAGES,
        ("text_encoder",),
    ),
    Kind(
        "WanImageToVideoPipeline",
        {"vae": WAN, "image_encoder": CLIP.build, "text_encoder": lambda: t5("UMT5EncoderModel")},
        "image_encoder",
        "",
        CLIP,
        LINEAR + IMAGES,
        ("text_encoder",),
    ),
    Kind(
        "FluxPriorReduxPipeline",
        {"image_encoder": SIGLIP.build, "text_encoder": clip_text, "text_encoder_2": t5},
        "image_encoder",
        "",
        SIGLIP,
        LINEAR + IMAGES,
        ("text_encoder", "text_encoder_2"),
    ),
    Kind(
        "ZImageOmniPipeline",
        {
            "vae": VAES["sd"].build,
            "siglip": TOWERS["siglip2"].build,
            "text_encoder": lambda: model("Qwen3Model", **TEXT),
        },
        "siglip",
        "",
        TOWERS["siglip2"],
        METADATA + IMAGES,
        ("text_encoder",),
    ),
    Kind(
        "StableVideoDiffusionPipeline",
        {"vae": VAES["svd"].build, "image_encoder": TOWERS["clip-projection"].build},
        "image_encoder",
        "",
        TOWERS["clip-projection"],
        LINEAR + IMAGES,
    ),
)


def pipeline(kind: Kind) -> Any:
    import diffusers

    cls = getattr(diffusers, kind.pipeline)
    parameters = inspect.signature(cls.__init__).parameters.values()
    needed = {p.name: None for p in parameters if p.default is p.empty and p.name != "self"}
    return cls(**{**needed, **{name: make() for name, make in kind.components.items()}})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.pipeline)
def test_the_tower_is_found_and_text_encoders_are_left_alone(kind: Kind) -> None:
    pipe = pipeline(kind)
    tower = pipe.components[kind.holder].get_submodule(kind.path).requires_grad_(False)
    feed = kind.tower.inputs()
    modules = {name: c for name, c in pipe.components.items() if isinstance(c, nn.Module)}
    before = {name: snapshot(module) for name, module in modules.items()}
    stock = kind.tower.outputs(tower, feed)
    vae_accel.optimize(pipe, platform=Everything())
    sections = {s.component: s for s in vae_accel.report(pipe).sections}
    assert set(sections) == set(modules)
    taken = {o.name: o.taken for o in sections[kind.holder].outcomes if o.taken}
    assert tuple(taken) == kind.rewrites
    assert all(site.startswith(kind.path) for sites in taken.values() for site in sites)
    for got, want in zip(kind.tower.outputs(tower, feed), stock, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for name in kind.alone:
        assert "no vision tower: left alone" in sections[name].note
        assert_identical(modules[name], before[name])
    vae_accel.restore(pipe)
    for name, module in modules.items():
        assert_identical(module, before[name])
    assert all(torch.equal(a, b) for a, b in zip(kind.tower.outputs(tower, feed), stock, strict=True))


def test_a_text_encoder_with_a_tower_that_does_not_run() -> None:
    """Qwen-Image asks its vision-language model about text alone."""
    encoder = QWEN25["text_encoder"]()
    ids = torch.tensor([[1, 3, 5, 2]])
    with torch.no_grad():
        stock = encoder(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        ours = vae_accel.optimize(encoder, platform=Everything())(input_ids=ids, output_hidden_states=True)
    assert torch.equal(ours.hidden_states[-1], stock)
    (found,) = [o for o in vae_accel.report(encoder).sections[0].outcomes if o.name == "vision_metadata"]
    assert found.taken == ["model.visual"] and not found.counts
