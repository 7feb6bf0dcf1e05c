"""Layers of transformers' vision towers that are `x + attention(norm(x))`, then the same with an MLP.

Forwards were compared by source in transformers 5.23. Not here: layers that scale what they add (DINOv2).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """The names of a layer's children."""

    norms: tuple[str, str]
    attention: str
    mlp: str = "mlp"


_IMAGE, _PACKED = Layer(("layer_norm1", "layer_norm2"), "self_attn"), Layer(("norm1", "norm2"), "attn")
LAYERS: dict[str, Layer] = {
    **dict.fromkeys(("CLIPEncoderLayer", "SiglipEncoderLayer", "Siglip2EncoderLayer"), _IMAGE),
    **dict.fromkeys(("Qwen2VLVisionBlock", "Qwen2_5_VLVisionBlock", "Qwen3VLVisionBlock"), _PACKED),
    **dict.fromkeys(("Qwen3VLMoeVisionBlock", "Qwen3_5VisionBlock", "Qwen3_5MoeVisionBlock"), _PACKED),
    **dict.fromkeys(("Qwen3OmniMoeVisionBlock", "Qwen4ExpVisionBlock", "CohereCompassVisionBlock"), _PACKED),
    **dict.fromkeys(("Ernie4_5_VLMoeVisionBlock", "Glm4vVisionBlock", "Glm4vMoeVisionBlock"), _PACKED),
    **dict.fromkeys(("Qwen2_5OmniVisionBlock", "Exaone4_5_VisionBlock"), _PACKED),
}
