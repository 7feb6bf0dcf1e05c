"""Vision towers as real checkpoints configure them, and what a processor hands them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .inputs import Kind, pixels
from .weights import randomise


@dataclass(frozen=True)
class Grids:
    """The images of a batch as (t, h, w) in patches; a tower of fixed-size images counts one patch a pixel."""

    each: tuple[tuple[int, int, int], ...]

    def __str__(self) -> str:
        return "+".join("x".join(map(str, grid)) for grid in self.each)


@dataclass(frozen=True)
class Tower:
    """One vision tower. `packed` takes flattened patches and `grid_thw` (Qwen's), otherwise images [N, 3, H, W]."""

    name: str
    model_class: str
    default_size: str
    config: Mapping[str, Any] = field(default_factory=dict)
    packed: bool = False
    dtype: Literal["bfloat16", "float16"] = "bfloat16"

    def size(self, text: str | None = None) -> Grids:
        """`"1x28x28"` is one image of 28 by 28 patches, `"1x16x16+3x8x8"` two; a fixed-size tower has its own only.

        Raises:
            ValueError: another form, sides the patch merger cannot pair, or another size than a fixed tower's own.
        """
        text = text or self.default_size
        if not re.fullmatch(r"\d+x\d+x\d+(\+\d+x\d+x\d+)*", text):
            raise ValueError(f"{self.name}: size {text!r} is not TxHxW in patches, such as 1x28x28 or 1x16x16+1x8x8")
        grids = Grids(tuple(tuple(map(int, grid.split("x"))) for grid in text.split("+")))  # type: ignore[misc]
        if self.packed and any(min(g) < 1 or g[1] % 2 or g[2] % 2 for g in grids.each):
            raise ValueError(f"{self.name}: {text} has an odd side; the patch merger pairs rows and columns")
        if not self.packed and any(g != _fixed(self.default_size) for g in grids.each):
            raise ValueError(f"{self.name} takes images of {self.default_size} only, not {text}")
        return grids

    def tiny(self) -> Grids:
        """The smallest mixed batch; a tower of fixed-size images has one size."""
        return self.size("1x4x6+1x2x4" if self.packed else None)

    def directions(self, model: nn.Module) -> tuple[str, ...]:
        return ("embed",)

    def golden_dtype(self, size: Grids) -> torch.dtype:
        """fp64 up to a thousand patches, beyond which it would take minutes on a CPU; else fp32."""
        return torch.float64 if sum(map(math.prod, size.each)) <= 1024 else torch.float32

    def inputs(
        self, kind: Kind, direction: str = "embed", size: Grids | None = None, *, seed: int = 0
    ) -> dict[str, Any]:
        """The keyword arguments of the tower's forward: photographs, ramps or noise cut into patches, seeded, fp32."""
        grids = size or self.size()
        if not self.packed:
            _, height, width = grids.each[0]
            clip = pixels(kind, (len(grids.each), 3, 1, height, width), seed=seed)
            return {"pixel_values": clip[:, :, 0]}
        patch, depth = self.config.get("patch_size", 14), self.config.get("temporal_patch_size", 2)
        rows = [
            _patches(pixels(kind, (1, 3, t * depth, h * patch, w * patch), seed=seed), depth, patch)
            for t, h, w in grids.each
        ]
        return {"hidden_states": torch.cat(rows), "grid_thw": torch.tensor(grids.each)}

    def run(self, model: nn.Module, direction: str, inputs: dict[str, Any]) -> Tensor:
        """The embedding of every token, [tokens, D] after the patch merger or [N, tokens, D]."""
        out = model(**inputs)
        if isinstance(out, Tensor):  # transformers 4.57's Qwen towers
            return out
        return out.pooler_output if self.packed else out.last_hidden_state

    def build(
        self, dtype: torch.dtype, device: torch.device | str, seed: int = 0, model: str | Path | None = None
    ) -> nn.Module:
        """The tower in eval mode: with seeded random weights, or the checkpoint `model` (a folder or a hub id)."""
        from accelerate import init_empty_weights

        cls: Any = _tower_class(self.model_class)
        if model is not None:
            return cls.from_pretrained(model, dtype=dtype).to(device).eval()
        config = cls.config_class(**self.config)
        config._attn_implementation = "sdpa"
        with init_empty_weights(include_buffers=False):
            tower = cls(config)
        return randomise(tower, dtype=dtype, device=device, seed=seed)


_QWEN = {"patch_size": 14, "temporal_patch_size": 2, "in_channels": 3}
_TOWERS = (
    Tower(
        "qwen2-vl",
        "qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        "1x28x28",
        {**_QWEN, "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16},
        packed=True,
    ),
    Tower(
        "qwen2.5-vl",
        "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
        "1x28x28",
        {
            **_QWEN,
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
        packed=True,
    ),
    Tower(
        "qwen3-vl",
        "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel",
        "1x28x28",
        {**_QWEN, "patch_size": 16, "out_hidden_size": 4096},
        packed=True,
    ),
    Tower(
        "clip-h",
        "clip.modeling_clip.CLIPVisionModel",
        "1x224x224",
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "patch_size": 14,
        },
    ),
    Tower(
        "siglip-so400m",
        "siglip.modeling_siglip.SiglipVisionModel",
        "1x384x384",
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 384,
        },
    ),
)
TOWERS = {tower.name: tower for tower in _TOWERS}


def _fixed(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def _tower_class(path: str) -> Any:
    from importlib import import_module

    module, _, name = path.rpartition(".")
    return getattr(import_module(f"transformers.models.{module}"), name)


def _patches(clip: Tensor, depth: int, patch: int, merge: int = 2) -> Tensor:
    """[1, C, t*depth, h*patch, w*patch] as Qwen's processor packs it: [t*h*w, C*depth*patch*patch] in merge order."""
    c, frames, height, width = clip.shape[1:]
    t, h, w = frames // depth, height // patch, width // patch
    x = clip.reshape(c, t, depth, h // merge, merge, patch, w // merge, merge, patch)
    return x.permute(1, 3, 6, 4, 7, 0, 2, 5, 8).reshape(t * h * w, c * depth * patch * patch)
