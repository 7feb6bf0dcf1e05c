"""A workload: an autoencoder as a checkpoint configures it, and the sizes it takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from . import inputs
from .codec import decode, encode
from .weights import build_random, vae_class

Direction = Literal["decode", "encode"]
# Up to this many pixels an fp64 golden costs seconds on a CPU; above it fp32 (with TF32 off) is the golden.
FP64_PIXELS = 9 * 256 * 256


@dataclass(frozen=True)
class Size:
    """Height and width in pixels, and frames; an image has one frame."""

    height: int
    width: int
    frames: int = 1

    @classmethod
    def parse(cls, text: str) -> Size:
        """`"480x832x81"` (height x width x frames) or `"1024x1024"`."""
        if not re.fullmatch(r"\d+x\d+(x\d+)?", text):
            raise ValueError(f"size {text!r} is not HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES, such as 480x832x81")
        size = cls(*map(int, text.split("x")))
        if min(size.height, size.width, size.frames) < 1:
            raise ValueError(f"size {text!r} has a side of zero")
        return size

    def __str__(self) -> str:
        return f"{self.height}x{self.width}" + (f"x{self.frames}" if self.frames > 1 else "")


@dataclass(frozen=True)
class Workload:
    """One VAE with a real checkpoint's configuration, at the size and in the dtype it is used in.

    `layout` is how it takes its frames: `clip` is `[N, C, T, H, W]`, `image` is `[N, C, H, W]`, and `frames` is
    `[T, C, H, W]`, one clip whose frames are the batch. `frames` is the rule for their number: `1+k*n` where the first
    frame stands alone, `k*n` where it does not, k being `frame_step` or else the temporal compression.
    """

    name: str
    vae_class: str
    default_size: str
    latent_channels: int
    spatial: int
    temporal: int = 1
    config: Mapping[str, Any] = field(default_factory=dict)
    layout: Literal["clip", "image", "frames"] = "clip"
    frames: Literal["1+k*n", "k*n"] = "1+k*n"
    frame_step: int | None = None
    max_frames: int | None = None
    pixel_channels: int = 3
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    smallest: str | None = None
    tiling: bool = False

    def size(self, text: str | None = None) -> Size:
        """`text` (or the default size) as a size that this VAE takes; a `ValueError` says which sizes it does."""
        size = Size.parse(text or self.default_size)
        for side, value in (("height", size.height), ("width", size.width)):
            if value % self.spatial:
                low = value // self.spatial * self.spatial
                near = " or ".join(str(v) for v in (low, low + self.spatial) if v)
                raise ValueError(f"{self.name}: {side} {value} is not a multiple of {self.spatial}; {near} is")
        most = 1 if self.layout == "image" else self.max_frames
        if most and size.frames > most:
            raise ValueError(f"{self.name} takes images: {size.frames} frames asked for")
        alone = int(self.frames == "1+k*n")
        step = self.frame_step or self.temporal
        if (size.frames - alone) % step:
            low = (size.frames - alone) // step * step + alone
            near = " or ".join(str(v) for v in (low, low + step) if v)
            rule = f"{'1 + ' * alone}a multiple of {step}"
            raise ValueError(f"{self.name}: {size.frames} frames are not {rule}; {near} is")
        if self.smallest and any(a < b for a, b in zip(_sides(size), _sides(Size.parse(self.smallest)), strict=True)):
            raise ValueError(f"{self.name}: {size} is below {self.smallest}, the tile it decodes in")
        return size

    def tiny(self) -> Size:
        """The smallest size with more than one latent in every direction it has, and no two sides alike."""
        if self.smallest:
            return self.size(self.smallest)
        height, width = (4, 6) if self.spatial <= 8 else (2, 3)
        several = self.layout != "image" and self.max_frames is None and self.default_frames > 1
        frames = 1 if not several else (self.frame_step or self.temporal) + int(self.frames == "1+k*n")
        return self.size(str(Size(height * self.spatial, width * self.spatial, frames)))

    @property
    def default_frames(self) -> int:
        return Size.parse(self.default_size).frames

    def pixel_shape(self, size: Size, batch: int = 1) -> tuple[int, ...]:
        """The shape of the frames, as the VAE takes and gives them."""
        return self._shape(self.pixel_channels, size.frames, size.height, size.width, batch)

    def latent_shape(self, size: Size, batch: int = 1) -> tuple[int, ...]:
        """The shape of the latent of frames of that size."""
        alone = int(self.frames == "1+k*n")
        frames = (size.frames - alone) // self.temporal + alone
        return self._shape(self.latent_channels, frames, size.height // self.spatial, size.width // self.spatial, batch)

    def _shape(self, channels: int, frames: int, height: int, width: int, batch: int) -> tuple[int, ...]:
        if self.layout == "clip":
            return (batch, channels, frames, height, width)
        if self.layout == "image":
            return (batch, channels, height, width)
        if batch != 1:
            raise ValueError(f"{self.name} takes the frames of one clip as its batch: batch is {batch}, not 1")
        return (frames, channels, height, width)

    def directions(self, model: nn.Module) -> tuple[Direction, ...]:
        """What a model of this workload can do; a decoder alone has no `encode`."""
        return ("decode", "encode") if hasattr(model, "encode") else ("decode",)

    def run(self, model: nn.Module, direction: Direction, x: Tensor) -> Tensor:
        """Decodes latents to frames, or encodes frames to latents."""
        return decode(model, x) if direction == "decode" else encode(model, x)

    def golden_dtype(self, size: Size) -> torch.dtype:
        """The precision of the golden at that size: fp64 where it is affordable, else fp32."""
        return torch.float64 if size.height * size.width * size.frames <= FP64_PIXELS else torch.float32

    def inputs(
        self,
        kind: inputs.Kind,
        direction: Direction = "decode",
        size: Size | None = None,
        *,
        batch: int = 1,
        seed: int = 0,
    ) -> Tensor:
        """The latent to decode, or the frames to encode, in fp32 on the CPU: a picture, a ramp or noise, seeded."""
        size = size or self.size()
        if direction not in ("decode", "encode"):
            raise ValueError(f"no direction {direction!r}: choose decode or encode")
        make, shape_of = {"decode": (inputs.latents, self.latent_shape), "encode": (inputs.pixels, self.pixel_shape)}[
            direction
        ]
        shape = shape_of(size, batch)
        if self.layout != "frames":
            return make(kind, shape, seed=seed)
        frames, channels, height, width = shape
        return make(kind, (1, channels, frames, height, width), seed=seed)[0].transpose(0, 1).contiguous()

    def build(
        self,
        dtype: torch.dtype,
        device: torch.device | str,
        seed: int = 0,
        model: str | Path | None = None,
    ) -> nn.Module:
        """The VAE in eval mode: with seeded random weights, or the checkpoint `model`.

        `model` is a local folder or a hub id, of a pipeline (its subfolder `vae` is taken) or of the VAE itself. A
        checkpoint of another class, or one that lacks weights, is a `ValueError`.
        """
        if model is None:
            vae: Any = build_random(self.vae_class, self.config, dtype=dtype, device=device, seed=seed)
        else:
            vae = self._load(str(model), dtype).to(device).eval()
        if self.tiling:
            vae.enable_tiling()
        return vae

    def _load(self, model: str, dtype: torch.dtype) -> Any:
        cls = vae_class(self.vae_class)
        try:
            config, folder = cls.load_config(model, subfolder="vae"), {"subfolder": "vae"}
        except OSError:
            config, folder = cls.load_config(model), {}
        if config.get("_class_name") != self.vae_class:
            raise ValueError(f"{model} holds a {config.get('_class_name')}: {self.name} is a {self.vae_class}")
        try:
            vae, loading = cls.from_pretrained(model, **folder, torch_dtype=dtype, output_loading_info=True)
        except (SafetensorError, OSError) as e:  # diffusers makes an OSError of a file cut short
            raise ValueError(f"the weights at {model} are missing or half-written; fetch them again: {e}") from e
        if missing := loading["missing_keys"]:
            raise ValueError(f"{model} lacks {len(missing)} weights of {self.vae_class}, {missing[0]} among them")
        return vae


def _sides(size: Size) -> tuple[int, int, int]:
    return size.height, size.width, size.frames
