"""Which component of a pipeline is a VAE, which holds a vision encoder, and which is left alone."""

from __future__ import annotations

import re
from typing import Any, Literal

from torch import nn

Role = Literal["vae", "encoder"]
_VAE = re.compile(r"Autoencoder|VAE|VQModel|Decoder")
_TOWER = re.compile(r"Vision|Dinov2|SiglipModel|CLIPModel")
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def role(module: nn.Module) -> Role:
    """A transformers model, remote code included, is an encoder; anything else is treated as a VAE or a part of one."""
    return "encoder" if any(c.__module__.startswith("transformers.") for c in type(module).__mro__) else "vae"


def parts(pipeline: Any) -> list[tuple[str, nn.Module, str]]:
    """The components of a diffusers pipeline to rewrite: (name, module, role)."""
    found: list[tuple[str, nn.Module, str]] = []
    for name, component in pipeline.components.items():
        if not isinstance(component, nn.Module) or any(component is module for _, module, _ in found):
            continue
        if is_vae(component):
            found.append((name, component, "vae"))
        elif has_tower(component):
            found.append((name, component, "encoder"))
    return found


def left_alone(pipeline: Any) -> list[tuple[str, str]]:
    """The text encoders of a pipeline without a vision tower: (name, the reason)."""
    return [
        (name, f"{type(component).__name__} has no vision tower: left alone")
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module) and role(component) == "encoder" and not has_tower(component)
    ]


def is_vae(module: nn.Module) -> bool:
    """Has a `decode`, the name of an autoencoder, and convolutions (audio autoencoders in one dimension have none)."""
    named = any(_VAE.search(c.__name__) for c in type(module).__mro__)
    return named and hasattr(module, "decode") and any(isinstance(m, _CONVOLUTIONS) for m in module.modules())


def has_tower(module: nn.Module) -> bool:
    """A transformers model that is a vision tower, or holds one."""
    return role(module) == "encoder" and any(_TOWER.search(type(m).__name__) for m in module.modules())
