"""Seeded random weights that keep activations sane: a real configuration without its checkpoint."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# conv_out reads silu of a normalised tensor, whose RMS is 0.6; at a third of the usual gain frames have a standard
# deviation of about 0.2, so that five of them fit below the clamp to [-1, 1] with which Wan and Qwen-Image end.
OUTPUT_GAIN = 1 / 3
_OUTPUTS = ("decoder.conv_out", "decoder.proj_out")
_MATRICES = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)


def vae_class(name: str) -> Any:
    """The autoencoder class of that name in the installed diffusers."""
    import diffusers

    found = getattr(diffusers, name, None) or getattr(diffusers.models.autoencoders, name, None)
    if not inspect.isclass(found):
        raise ValueError(f"diffusers {diffusers.__version__} has no autoencoder {name}: a newer diffusers may have it")
    return found


def _random(module: nn.Module, path: str, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    value = torch.randn(shape, generator=generator)
    if "bias" in name:
        return value.mul_(0.1)
    if isinstance(module, _MATRICES):
        gain = OUTPUT_GAIN if path.startswith(_OUTPUTS) else 1.0
        return value.mul_(gain / math.sqrt(math.prod(shape[1:])))
    one_dimensional = value.numel() == max(shape, default=1)  # Wan's gamma is [C, 1, 1, 1]
    if one_dimensional and name in ("weight", "gamma"):
        return value.mul_(0.1).add_(1)
    return value.mul_(0.1)


@torch.no_grad()
def randomise(model: nn.Module, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> nn.Module:
    """Give every parameter of `model` a seeded random value, in place, and move it to `dtype` and `device`.

    Convolutions and linears get randn / sqrt(fan in), norm scales 1 + 0.1 randn, biases and the rest 0.1 randn.
    Values are drawn in fp32 on the CPU, so that one seed gives one model on every device; parameters may start on meta.
    """
    generator = torch.Generator().manual_seed(seed)
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = _random(module, path, name, parameter.shape, generator).to(device, dtype)
            setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device, dtype if buffer.is_floating_point() else None)
    return model.eval()


def build_random(
    class_name: str, config: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> nn.Module:
    """An autoencoder of diffusers with seeded random weights, in eval mode; its own initialisation is skipped."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = vae_class(class_name)(**config)
    return randomise(model, dtype=dtype, device=device, seed=seed)
