"""The workload of a checkpoint that somebody has on disk or on a hub."""

from __future__ import annotations

import dataclasses
from typing import Any

from .table import WORKLOADS
from .workload import Workload


def of_checkpoint(model: str) -> Workload:
    """The workload whose class a checkpoint is of and whose configuration is nearest to its own.

    `model` is a folder or hub id, of a pipeline (its subfolder `vae`) or of a VAE. Sizes and latents then follow the
    checkpoint: its number of latent channels wins over the workload's.

    Raises:
        ValueError: there is no workload for the checkpoint's class.
        OSError: there is no configuration at `model`.
    """
    config = read_config(model)
    name = config.get("_class_name")
    same = [w for w in WORKLOADS.values() if w.vae_class == name]
    if not same:
        known = sorted({w.vae_class for w in WORKLOADS.values()})
        raise ValueError(f"{model} holds a {name}, for which there is no workload; there are: {', '.join(known)}")

    def agreement(workload: Workload) -> int:
        return sum(_plain(config.get(key)) == _plain(value) for key, value in workload.config.items())

    nearest = max(same, key=agreement)
    channels = config.get("latent_channels") or config.get("z_dim") or nearest.latent_channels
    return dataclasses.replace(nearest, latent_channels=channels)


def read_config(model: str) -> dict[str, Any]:
    """The configuration of the VAE at `model`, from its subfolder `vae` where it has one."""
    from diffusers import AutoencoderKL

    try:
        return dict(AutoencoderKL.load_config(model, subfolder="vae"))
    except OSError:
        return dict(AutoencoderKL.load_config(model))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
