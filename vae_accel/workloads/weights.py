"""Seeded random weights that keep activations sane: a real configuration without its checkpoint."""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
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


def _random(module: nn.Module, path: str, name: str, shape: torch.Size, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {path}.{name}".encode()))
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
    """Give every parameter of `model` a random value, in place, and move it to `dtype` and `device`, in eval mode.

    Convolutions and linears get randn / sqrt(fan in), norm scales 1 + 0.1 randn, biases and the rest 0.1 randn. Values
    are drawn in fp32 on the CPU from the seed and the parameter's name: one seed gives one model on every device.
    Parameters may start on meta; buffers keep their values.
    """

    def draw(slot: tuple[str, nn.Module, str, nn.Parameter]) -> Tensor:
        path, module, name, parameter = slot
        return _random(module, path, name, parameter.shape, seed).to(dtype)

    slots = [
        (path, module, name, parameter)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    # randn draws 0.2 G values a second on one core and releases the GIL.
    with ThreadPoolExecutor() as pool:
        for (_, module, name, parameter), value in zip(slots, pool.map(draw, slots), strict=True):
            setattr(module, name, nn.Parameter(value.to(device), requires_grad=parameter.requires_grad))
    for module in model.modules():
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
