"""A tiny autoencoder written as models behind `trust_remote_code` are: einops by name, as a module, and as layers."""

from __future__ import annotations

import einops
import torch
from einops import rearrange
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn

from vae_accel.workloads import inputs
from vae_accel.workloads.weights import randomise

SHAPE = (1, 3, 3, 8, 12)


class FrameAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def heads_of(self, x: Tensor) -> Tensor:
        return rearrange(x, "b (s n c) h w -> s b n (h w) c", s=3, n=self.heads)

    def forward(self, x: Tensor) -> Tensor:
        frames, (height, width) = x.shape[2], x.shape[3:]
        q, k, v = self.heads_of(self.qkv(rearrange(x, "b c t h w -> (b t) c h w")))
        y = einops.rearrange(nn.functional.scaled_dot_product_attention(q, k, v), "b n l c -> b (n c) l")
        y = self.out(rearrange(y, "b c (h w) -> b c h w", h=height, w=width))
        return x + rearrange(y, "(b t) c h w -> b c t h w", t=frames)


class RemoteAutoencoder(nn.Module):
    """Patches of 2 x 2 pixels, attention within a frame, and a mean over frames beside the reconstruction."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.patch = Rearrange("b c t (h p) (w q) -> b (c p q) t h w", p=2, q=2)
        self.conv_in, self.conv_out = nn.Conv3d(12, width, 1), nn.Conv3d(width, 12, 3, padding=1)
        self.attention = FrameAttention(width, 2)
        self.unpatch = Rearrange("b (c p q) t h w -> b c t (h p) (w q)", p=2, q=2)
        self.still = Reduce("b c t h w -> b c h w", "mean")

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.unpatch(self.conv_out(self.attention(self.conv_in(self.patch(x)))))
        return [y, self.still(y)]


def build(dtype: torch.dtype = torch.float32, seed: int = 0) -> RemoteAutoencoder:
    model = RemoteAutoencoder()
    randomise(model, dtype=dtype, device="cpu", seed=seed)
    return model


def run(model: nn.Module, kind: inputs.Kind) -> list[Tensor]:
    dtype = next(model.parameters()).dtype
    return model(inputs.pixels(kind, SHAPE).to(dtype))
