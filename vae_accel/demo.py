"""The embedded demo VAE and the clip it is shown on: a first run that needs no hub and no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

DEMO_VAE = Path(__file__).parent / "data"
HELD_OUT = ("coffee", "chelsea")
"""Photographs of scikit-image that the demo VAE was never trained on."""


def load_demo_vae(dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """The embedded VAE in evaluation mode: Wan2.1's at reduced width, see `data/MODEL_CARD.md`."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(DEMO_VAE, torch_dtype=dtype, local_files_only=True).eval()


def photograph(name: str) -> torch.Tensor:
    """A photograph bundled in the scikit-image wheel, `[3, H, W]` in [0, 1]; grey ones get three equal channels."""
    import skimage.data
    from skimage.util import img_as_float32

    if name in ("motorcycle_left", "motorcycle_right"):
        pixels = skimage.data.stereo_motorcycle()[name == "motorcycle_right"]
    else:
        pixels = getattr(skimage.data, name)()
    image = torch.from_numpy(img_as_float32(pixels).copy())
    return image.expand(3, -1, -1) if image.ndim == 2 else image[..., :3].permute(2, 0, 1).contiguous()


def moving_crop(
    photo: torch.Tensor, x: torch.Tensor, y: torch.Tensor, zoom: torch.Tensor, angle: torch.Tensor, size: int
) -> torch.Tensor:
    """Clips a camera sees while it moves over one photograph.

    Args:
        photo: `[3, H, W]`; beyond its edges it is mirrored.
        x, y: the camera's centre in pixels of the photograph, `[N, T]`: N clips of T frames.
        zoom: pixels of the clip per pixel of the photograph, `[N, T]`.
        angle: the camera's roll in radians, `[N, T]`.
        size: height and width of the clip.

    Returns:
        `[N, 3, T, size, size]` in [0, 1], sampled bicubically.
    """
    clips, frames = x.shape
    height, width = photo.shape[1:]
    offset = torch.arange(size, device=photo.device, dtype=photo.dtype) - (size - 1) / 2
    x, y, zoom, angle = (path[..., None, None] for path in (x, y, zoom, angle))
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    source_x = x + cos * offset - sin * offset[:, None]
    source_y = y + sin * offset + cos * offset[:, None]
    grid = torch.stack([(2 * source_x + 1) / width - 1, (2 * source_y + 1) / height - 1], dim=-1).flatten(0, 1)
    sampled = F.grid_sample(
        photo.expand(len(grid), -1, -1, -1), grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )
    return sampled.unflatten(0, (clips, frames)).transpose(1, 2).clamp(0, 1)


def demo_clip(frames: int = 17, size: int = 256, name: str = HELD_OUT[0]) -> torch.Tensor:
    """A deterministic hand-held pan over a held-out photograph, `[1, 3, frames, size, size]` in [-1, 1]."""
    photo = photograph(name)
    t = torch.arange(frames, dtype=torch.float32)[None]
    x = photo.shape[2] / 2 - 20 + 2.5 * t
    y = photo.shape[1] / 2 + 6 * torch.sin(0.4 * t)
    zoom = 1 + 0.006 * t
    angle = 0.03 * torch.sin(0.25 * t)
    return moving_crop(photo, x, y, zoom, angle, size) * 2 - 1
