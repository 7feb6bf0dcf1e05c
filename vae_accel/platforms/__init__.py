"""The platforms: `Cuda`, `Rocm`, `Npu`, `Cpu`, and how one is picked for a model."""

from __future__ import annotations

import torch
from torch import nn

from vae_accel.platforms.base import NoSite, Platform, Step
from vae_accel.platforms.cpu import Cpu
from vae_accel.platforms.cuda import Cuda
from vae_accel.platforms.npu import Npu
from vae_accel.platforms.rocm import Rocm

ALL: dict[str, type[Platform]] = {p.name: p for p in (Cuda, Rocm, Npu, Cpu)}

__all__ = ["ALL", "Cpu", "Cuda", "NoSite", "Npu", "Platform", "Rocm", "Step", "Unknown", "by_name", "of"]


class Unknown(Platform):
    """An accelerator without a plan: nothing is rewritten, and the report says so."""

    def __init__(self, device_type: str):
        self.name = device_type  # type: ignore[misc]
        self.note = f"no plan for {device_type!r} yet: nothing was rewritten"  # type: ignore[misc]


def by_name(name: str) -> Platform:
    """The platform called `name`.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in ALL:
        raise ValueError(f"platform={name!r} is unknown; there are: {', '.join(ALL)}")
    return ALL[name]()


def of(module: nn.Module) -> Platform:
    """The platform of the device a module computes on: its offload hook's execution device, else its parameters'."""
    device = execution_device(module)
    if device.type == "cuda":  # also what a ROCm build of torch calls its devices: ask for hip first
        return Rocm() if torch.version.hip else Cuda()
    return ALL[device.type]() if device.type in ALL else Unknown(device.type)


def execution_device(module: nn.Module) -> torch.device:
    """Where a module's arithmetic runs, also while its weights wait elsewhere."""
    for part in module.modules():
        device = getattr(part.__dict__.get("_hf_hook"), "execution_device", None)
        if device is not None:
            return torch.device(f"cuda:{device}" if isinstance(device, int) else device)
        registry = part.__dict__.get("_diffusers_hook")
        for hook in getattr(registry, "hooks", {}).values():
            onload = getattr(getattr(hook, "group", None), "onload_device", None)
            if onload is not None:
                return torch.device(onload)
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
