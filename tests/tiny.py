"""One autoencoder class at a tiny size: how to build it, what to feed it, and how to call it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from vae_accel.workloads import codec, inputs
from vae_accel.workloads.weights import randomise


@dataclass(frozen=True)
class Tiny:
    """A row of the table.

    `causal` means that a frame depends on itself and earlier frames alone, `stochastic` that decoding draws noise from
    torch's global generator (`decode` here seeds it), `single_frame` that it also decodes a latent of one frame,
    `batch` that it decodes several latents at once, `tiling` and `slicing` that upstream's own switches work.
    """

    id: str
    vae_class: str
    latent_shape: tuple[int, ...]
    pixel_shape: tuple[int, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    causal: bool = False
    stochastic: bool = False
    single_frame: bool = True
    batch: bool = True
    tiling: bool = True
    slicing: bool = True
    tile_stride: int = 1
    prepare: Callable[[Any], None] | None = None
    decode_kwargs: Callable[[], dict[str, Any]] = dict
    home: str = "diffusers.models.autoencoders"

    @property
    def video(self) -> bool:
        return len(self.latent_shape) == 5

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A fresh model on the CPU, in eval mode; one seed gives one model."""
        with init_empty_weights(include_buffers=False):
            vae = getattr(import_module(self.home), self.vae_class)(**self.config)
        randomise(vae, dtype=dtype, device="cpu", seed=seed)
        if self.prepare is not None:
            self.prepare(vae)
        return vae

    def latent(self, kind: inputs.Kind = "noise", *, seed: int = 0, batch: int | None = None) -> Tensor:
        return inputs.latents(kind, (batch or self.latent_shape[0], *self.latent_shape[1:]), seed=seed)

    def single_frame_latent(self, kind: inputs.Kind = "noise", *, seed: int = 0) -> Tensor:
        """A latent of one frame: an image to a video autoencoder."""
        batch, channels, _, height, width = self.latent_shape
        return inputs.latents(kind, (batch, channels, 1, height, width), seed=seed)

    def pixels(self, kind: inputs.Kind = "noise", *, seed: int = 0, batch: int | None = None) -> Tensor:
        return inputs.pixels(kind, (batch or self.pixel_shape[0], *self.pixel_shape[1:]), seed=seed)

    def decode(self, vae: nn.Module, latent: Tensor) -> Tensor:
        if self.stochastic:
            torch.manual_seed(0)
        return codec.decode(vae, latent, **{k: v.to(latent) for k, v in self.decode_kwargs().items()})

    def encode(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        return codec.encode(vae, pixels)

    def tile(self, vae: nn.Module) -> nn.Module:
        """Switch tiling on, with tiles of 2x2 latents `tile_stride` apart, so that even this size has several."""
        ratio = self.pixel_shape[-1] // self.latent_shape[-1]
        cast(Any, vae).enable_tiling()
        values = {
            "sample_min": 2 * ratio,
            "latent_min": 2,
            "sample_stride": self.tile_stride * ratio,
            "sample_min_overlap": ratio,
        }
        sizes = {f"tile_{key}_{side}": v for key, v in values.items() for side in ("height", "width", "size")}
        overlaps = {f"tile_overlap_factor{side}": 0.5 for side in ("", "_height", "_width")}
        for name, value in {**sizes, **overlaps}.items():
            if name in vars(vae):
                setattr(vae, name, value)
        return vae


def video(name: str, vae_class: str, z: int, latent: tuple[int, ...], ratio: tuple[int, int], **more: Any) -> Tiny:
    """`latent` is (t, h, w) and `ratio` (temporal, spatial); the first frame stands alone."""
    t, h, w = latent
    temporal, spatial = ratio
    channels = more.pop("pixel_channels", 3)
    frames = more.pop("frames", 1 + temporal * (t - 1))
    return Tiny(name, vae_class, (1, z, t, h, w), (1, channels, frames, h * spatial, w * spatial), **more)


def image(name: str, vae_class: str, z: int, latent: tuple[int, int], ratio: int, **more: Any) -> Tiny:
    h, w = latent
    channels = more.pop("pixel_channels", 3)
    return Tiny(name, vae_class, (1, z, h, w), (1, channels, h * ratio, w * ratio), **more)
