"""A tiny configuration of every kind of vision tower a diffusers pipeline holds, for the batteries to run over.

Weights are seeded and random; each runs in under 0.1 s. Patches are cut from photographs, ramps or noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.workloads import inputs
from vae_accel.workloads.weights import randomise

Kind = inputs.Kind
STILLS = ((1, 8, 10), (1, 4, 6))
GRIDS = ((1, 8, 10), (3, 4, 6))  # (t, h, w) in patches of the images of one packed batch; weights that are no dyadics


@dataclass(frozen=True)
class Tower:
    """A row of the table: a class of transformers by name, and keywords of its configuration.

    `convolution` is the path of the patch embedding that is a convolution ('' for none), `table` that of the module
    which resamples a table of positions bilinearly, `metadata` that of the module which is handed what follows from
    its grids (None for none).
    """

    id: str
    model_class: str
    config_class: str
    config: Mapping[str, Any]
    feed: Callable[[Kind, int], dict[str, Tensor]]
    convolution: str = ""
    table: str | None = None
    metadata: str | None = None

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A fresh model on the CPU, in eval mode; one seed gives one model."""
        import transformers

        config_class = getattr(transformers, self.config_class)
        home = import_module(config_class.__module__.replace("configuration_", "modeling_"))
        model = getattr(home, self.model_class)._from_config(config_class(**self.config))
        return randomise(model, dtype=torch.float32, device="cpu", seed=seed).to(dtype)

    def inputs(self, kind: Kind = "picture", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Keywords of the model's forward."""
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.feed(kind, seed).items()}

    def run(self, model: nn.Module, feed: Mapping[str, Tensor]) -> list[Tensor]:
        """Every floating-point tensor that the model returns."""
        return _tensors(model(**feed))

    def outputs(self, model: nn.Module, feed: Mapping[str, Tensor]) -> list[Tensor]:
        """The same without gradients."""
        with torch.no_grad():
            return self.run(model, feed)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def packed(patch: int, temporal: int = 2, merge: int = 2, grids: tuple[tuple[int, int, int], ...] = GRIDS):
    """Images as Qwen's processors pack them: [patches, C * temporal * patch * patch] in spatial-merge order."""

    def feed(kind: Kind, seed: int) -> dict[str, Tensor]:
        rows = []
        for i, (t, h, w) in enumerate(grids):
            pixels = inputs.pixels(kind, (1, 3, t * temporal, h * patch, w * patch), seed=seed + i)[0]
            blocks = pixels.reshape(3, t, temporal, h // merge, merge, patch, w // merge, merge, patch)
            rows.append(blocks.permute(1, 3, 6, 4, 7, 0, 2, 5, 8).reshape(t * h * w, -1))
        return {"hidden_states": torch.cat(rows), "grid_thw": torch.tensor(grids)}

    return feed


def _muse(kind: Kind, seed: int) -> dict[str, Tensor]:
    feed = packed(4)(kind, seed)
    return {"pixel_values": feed["hidden_states"], "grid_thw": feed["grid_thw"]}


def _stills(kind: Kind, seed: int) -> dict[str, Tensor]:
    feed = packed(4, temporal=1, grids=STILLS)(kind, seed)
    return {"pixel_values": feed["hidden_states"], "grid_thw": feed["grid_thw"]}


def _kimi(kind: Kind, seed: int) -> dict[str, Tensor]:
    feed = _stills(kind, seed)
    return {**feed, "pixel_values": feed["pixel_values"].reshape(-1, 3, 4, 4)}


def _paddle(kind: Kind, seed: int) -> dict[str, Tensor]:
    feed = packed(4, temporal=1)(kind, seed)
    return {"pixel_values": feed["hidden_states"].reshape(1, -1, 3, 4, 4), "grid_thw": feed["grid_thw"]}


def image(size: int, batch: int = 2) -> Callable[[Kind, int], dict[str, Tensor]]:
    def feed(kind: Kind, seed: int) -> dict[str, Tensor]:
        return {"pixel_values": inputs.pixels(kind, (batch, 3, size, size), seed=seed)}

    return feed


def _naflex(kind: Kind, seed: int) -> dict[str, Tensor]:
    pixels = inputs.pixels(kind, (2, 3, 8, 12), seed=seed)
    patches = pixels.reshape(2, 3, 2, 4, 3, 4).permute(0, 2, 4, 3, 5, 1).reshape(2, 6, 48)
    shapes = torch.tensor([[2, 3], [3, 2]])
    return {"pixel_values": patches, "pixel_attention_mask": torch.ones(2, 6).long(), "spatial_shapes": shapes}


def _prompt(kind: Kind, seed: int) -> dict[str, Tensor]:
    """One image of 4 x 8 patches in a prompt: token 9 stands for the 8 merged patches."""
    tower = packed(4, grids=((1, 4, 8),))(kind, seed)
    ids = torch.tensor([[1, 7, *[9] * 8, 8, 2]])
    types = (ids == 9).long()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": types,
        "pixel_values": tower["hidden_states"],
        "image_grid_thw": tower["grid_thw"],
    }


QWEN: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
WIDTHS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 24}
# Like Qwen2.5-VL's 3420, 44 is no multiple of 8.
WINDOWED: dict[str, Any] = {
    **QWEN,
    **WIDTHS,
    "intermediate_size": 44,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
QWEN3: dict[str, Any] = {
    **QWEN,
    **WIDTHS,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0],
}
QWEN3_PROMPT: dict[str, Any] = {
    "vision_config": QWEN3,
    "text_config": {
        "vocab_size": 16,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "image_token_id": 9,
    "video_token_id": 10,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

MUSE: dict[str, Any] = {**VIT, "patch_size": 4, "pos_emb_height": 6, "pos_emb_width": 6, "layer_types": None}


def _qwen3(id: str, name: str, config_class: str | None = None, **config: Any) -> Tower:
    config_class = config_class or f"{name}VisionConfig"
    return Tower(id, f"{name}VisionModel", config_class, {**QWEN3, **config}, packed(4), "patch_embed.proj", "", "")


TABLE = (
    Tower(
        "qwen2-vl",
        "Qwen2VisionTransformerPretrainedModel",
        "Qwen2VLVisionConfig",
        {**QWEN, "embed_dim": 32, "hidden_size": 24},
        packed(4),
        "patch_embed.proj",
        metadata="",
    ),
    Tower(
        "qwen2.5-vl",
        "Qwen2_5_VisionTransformerPretrainedModel",
        "Qwen2_5_VLVisionConfig",
        WINDOWED,
        packed(4),
        "patch_embed.proj",
        metadata="",
    ),
    _qwen3("qwen3-vl", "Qwen3VL"),
    Tower(
        "clip",
        "CLIPVisionModel",
        "CLIPVisionConfig",
        {**VIT, "image_size": 12, "patch_size": 4},
        image(12),
        "embeddings.patch_embedding",
    ),
    Tower(
        "clip-projection",
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {**VIT, "image_size": 12, "patch_size": 4, "projection_dim": 16},
        image(12),
        "vision_model.embeddings.patch_embedding",
    ),
    Tower(
        "siglip",
        "SiglipVisionModel",
        "SiglipVisionConfig",
        {**VIT, "image_size": 30, "patch_size": 14},  # like 384 / 14, the patches leave a margin
        image(30),
        "embeddings.patch_embedding",
    ),
    Tower(
        "siglip2",
        "Siglip2VisionModel",
        "Siglip2VisionConfig",
        {**VIT, "num_patches": 16, "patch_size": 4},
        _naflex,
        metadata="embeddings",
    ),
    Tower(
        "dinov2",
        "Dinov2Model",
        "Dinov2Config",
        {**VIT, "image_size": 12, "patch_size": 4},
        image(12),
        "embeddings.patch_embeddings.projection",
    ),
)

# A tower inside a vision-language model, as pipelines hold it. Each forward leaves `rope_deltas` on the model.
HOLDER = Tower(
    "qwen3-vl-prompt",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLConfig",
    QWEN3_PROMPT,
    _prompt,
    "model.visual.patch_embed.proj",
    "model.visual",
    "model.visual",
)

# The other classes that resample a table bilinearly; no pipeline of diffusers 0.42 holds one.
RELATIVES = (
    _qwen3("qwen3-vl-moe", "Qwen3VLMoe"),
    _qwen3("qwen3.5", "Qwen3_5"),
    _qwen3("qwen3.5-moe", "Qwen3_5Moe"),
    _qwen3("qwen4-exp", "Qwen4Exp"),
    _qwen3("cohere-compass", "CohereCompass"),
    Tower(
        "qwen3-omni-moe",
        "Qwen3OmniMoeVisionEncoder",
        "Qwen3OmniMoeVisionEncoderConfig",
        QWEN3,
        packed(4),
        "patch_embed.proj",
        "",
        "",
    ),
    Tower(
        "paddleocr-vl",
        "PaddleOCRVisionModel",
        "PaddleOCRVisionConfig",
        {**VIT, "image_size": 24, "patch_size": 4},
        _paddle,
        "vision_model.embeddings.patch_embedding",
        "vision_model.embeddings",
    ),
    Tower("muse-spark", "MuseSparkVisionModel", "MuseSparkVisionConfig", MUSE, _muse, "", "patch_embedder", ""),
    Tower("muse-glimmer", "MuseGlimmerVisionModel", "MuseGlimmerVisionConfig", MUSE, _muse, "", "patch_embedder", ""),
)

GLM: dict[str, Any] = {**QWEN, **WIDTHS, "image_size": 24}
DOTS: dict[str, Any] = {**VIT, "patch_size": 4, "adapter_in_dim": 32, "mlp_layer_types": ["dense", "dense"]}
KIMI: dict[str, Any] = {**VIT, "patch_size": 4, "pos_emb_height": 6, "pos_emb_width": 6}
MINIMAX: dict[str, Any] = {**VIT, "hidden_size": 48, "patch_size": 4, "image_size": 24}


def _packed(id: str, name: str, config_class: str, config: dict[str, Any], feed: Any = None) -> Tower:
    return Tower(id, name, config_class, config, feed or packed(4), metadata="")


# The other classes whose forward takes what follows from the grids; GLM-Image's pipeline holds one. Stock's GLM-4V and
# GLM-Image take no clips (their embeddings count frames as images), Kimi-K2.5 none of different lengths.
PACKED = (
    _packed("qwen2.5-omni", "Qwen2_5OmniVisionEncoder", "Qwen2_5OmniVisionEncoderConfig", WINDOWED),
    _packed("exaone4.5", "Exaone4_5_VisionModel", "Exaone4_5_VisionConfig", {**WINDOWED, "num_key_value_heads": 1}),
    _packed("glm4v", "Glm4vVisionModel", "Glm4vVisionConfig", GLM, packed(4, grids=STILLS)),
    _packed("glm4v-moe", "Glm4vMoeVisionModel", "Glm4vMoeVisionConfig", GLM, packed(4, grids=STILLS)),
    _packed("glm-ocr", "GlmOcrVisionModel", "GlmOcrVisionConfig", GLM),
    _packed("glm5-next", "Glm5NextVisionModel", "Glm5NextVisionConfig", GLM),
    _packed("glm-image", "GlmImageVisionModel", "GlmImageVisionConfig", {**GLM, "spatial_merge_size": 1}, _stills),
    _packed(
        "ernie4.5-vl",
        "Ernie4_5_VLMoeVisionTransformerPretrainedModel",
        "Ernie4_5_VLMoeVisionConfig",
        GLM,
        packed(4, temporal=1),
    ),
    _packed("dots3", "Dots3NoteVisionModel", "Dots3NoteVisionConfig", DOTS, _stills),
    _packed("kimi-k2.5", "Kimi_K25VisionModel", "Kimi_K25VisionConfig", KIMI, _kimi),
    _packed("minimax-m3-vl", "MiniMaxM3VLVisionModel", "MiniMaxM3VLVisionConfig", MINIMAX, _muse),
)
