"""Vision towers as real checkpoints configure them, and what a processor hands them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inputs import Kind, pixels
from .weights import randomise


@dataclass(frozen=True)
class Grids:
    """The images of a batch as (t, h, w) in patches; a tower of fixed-size images counts one patch a pixel."""

    each: tuple[tuple[int, int, int], ...]

    def __str__(self) -> str:
        runs = [("x".join(map(str, grid)), len(list(same))) for grid, same in itertools.groupby(self.each)]
        return "+".join(f"{n}*{grid}" if n > 1 else grid for grid, n in runs)


@dataclass(frozen=True)
class Tower:
    """One vision tower. `form` is what it takes: `image` [N, 3, H, W] of one size; `packed`, the patches of all images
    and their `grid_thw` (Qwen's); `naflex`, each image's patches padded to a number of them (SigLIP2's)."""

    name: str
    model_class: str
    default_size: str
    config: Mapping[str, Any] = field(default_factory=dict)
    form: Literal["image", "packed", "naflex"] = "image"
    dtype: Literal["bfloat16", "float16"] = "bfloat16"

    def size(self, text: str | None = None) -> Grids:
        """`"1x28x28"` is one image of 28 by 28 patches, `"1x16x16+3x8x8"` two, the second a clip, and
        `"20*1x24x24"` twenty; a fixed-size tower has its own size only.

        Raises:
            ValueError: another form, sides the patch merger cannot pair, or another size than a fixed tower's own.
        """
        text = text or self.default_size
        found = [re.fullmatch(r"(?:(\d+)\*)?(\d+)x(\d+)x(\d+)", part) for part in text.split("+")]
        if None in found or 0 in (int(n) for m in found if m for n in m.groups("1")):
            raise ValueError(f"{self.name}: size {text!r} is not TxHxW in patches, such as 1x28x28 or 20*1x24x24+1x8x8")
        grids = Grids(tuple(_grid(m) for m in found if m for _ in range(int(m[1] or 1))))
        if self.form == "packed" and any(g[1] % 2 or g[2] % 2 for g in grids.each):
            raise ValueError(f"{self.name}: {text} has an odd side; the patch merger pairs rows and columns")
        if self.form == "naflex" and any(g[0] != 1 for g in grids.each):
            raise ValueError(f"{self.name} takes images, not clips: {text}")
        if self.form == "image" and any(g != _fixed(self.default_size) for g in grids.each):
            raise ValueError(f"{self.name} takes images of {self.default_size} only, not {text}")
        return grids

    def tiny(self) -> Grids:
        """The smallest mixed batch; a tower of fixed-size images has one size."""
        return self.size(None if self.form == "image" else "1x4x6+1x2x4")

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
        if self.form == "image":
            _, height, width = grids.each[0]
            clip = pixels(kind, (len(grids.each), 3, 1, height, width), seed=seed)
            return {"pixel_values": clip[:, :, 0]}
        patch, depth = self.config.get("patch_size", 14), self.config.get("temporal_patch_size", 1)
        clips = [
            pixels(kind, (1, 3, t * depth, h * patch, w * patch), seed=seed + i)
            for i, (t, h, w) in enumerate(grids.each)
        ]
        if self.form == "packed":
            rows = [_patches(clip, depth, patch) for clip in clips]
            return {"hidden_states": torch.cat(rows), "grid_thw": torch.tensor(grids.each)}
        rows = [_raster(clip[0, :, 0], patch) for clip in clips]
        room = max(self.config["num_patches"], *map(len, rows))
        padded = torch.stack([F.pad(row, (0, 0, 0, room - len(row))) for row in rows])
        mask = torch.stack([torch.arange(room) < len(row) for row in rows]).long()
        shapes = torch.tensor([grid[1:] for grid in grids.each])
        return {"pixel_values": padded, "pixel_attention_mask": mask, "spatial_shapes": shapes}

    def run(self, model: nn.Module, direction: str, inputs: dict[str, Any]) -> Tensor:
        """The embedding of every token, [tokens, D] after the patch merger or [N, tokens, D].

        With sizes in tensors of their own, as a processor makes them for each call: nobody has read those yet.
        """
        out = model(**{k: x if x.is_floating_point() else x.clone() for k, x in inputs.items()})
        if isinstance(out, Tensor):  # transformers 4.57's Qwen towers
            return out
        return out.pooler_output if self.form == "packed" else out.last_hidden_state

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
        form="packed",
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
        form="packed",
    ),
    Tower(
        "qwen3-vl",
        "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel",
        "1x28x28",
        {**_QWEN, "patch_size": 16, "out_hidden_size": 4096},
        form="packed",
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
    Tower(  # siglip2-so400m-patch16-naflex, which Z-Image Omni looks at its images with
        "siglip2",
        "siglip2.modeling_siglip2.Siglip2VisionModel",
        "1x16x16",
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "patch_size": 16,
            "num_patches": 256,
        },
        form="naflex",
    ),
    Tower(  # dinov2-large, at the size its processor crops to: its table is one of 518x518, resampled in each call
        "dinov2",
        "dinov2.modeling_dinov2.Dinov2Model",
        "1x224x224",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 518,
        },
    ),
)
TOWERS = {tower.name: tower for tower in _TOWERS}


def _grid(found: re.Match[str]) -> tuple[int, int, int]:
    return int(found[2]), int(found[3]), int(found[4])


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


def _raster(image: Tensor, patch: int) -> Tensor:
    """[C, h*patch, w*patch] as SigLIP2's processor cuts it: [h*w, patch*patch*C] in raster order."""
    c, height, width = image.shape
    x = image.reshape(c, height // patch, patch, width // patch, patch)
    return x.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * c)
