"""What the batteries run over: every tiny model, every rewrite, and every plan of a platform."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache

import torch
from torch import Tensor, nn

from tests.tiny import Tiny
from tests.vaes import TABLE
from vae_accel import rewrites
from vae_accel.edits import Ledger
from vae_accel.platforms import ALL, Platform, Step, base
from vae_accel.rewrite import Rewrite, Site
from vae_accel.workloads.inputs import Kind

KINDS: tuple[Kind, ...] = ("noise", "ramp")


@dataclass(frozen=True)
class Subject:
    """A model at a tiny size and everything it computes: `run(model, kind)` in the dtype of the model."""

    id: str
    role: str
    build: Callable[[torch.dtype], nn.Module]
    run: Callable[[nn.Module, Kind], list[Tensor]]


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def decode(tiny: Tiny, vae: nn.Module, latent: Tensor) -> Tensor:
    return tiny.decode(vae, latent.to(dtype_of(vae)))


def autoencoder(tiny: Tiny) -> Subject:
    def run(vae: nn.Module, kind: Kind) -> list[Tensor]:
        return [decode(tiny, vae, tiny.latent(kind)), tiny.encode(vae, tiny.pixels(kind).to(dtype_of(vae)))]

    return Subject(tiny.id, "vae", lambda dtype: tiny.build(dtype=dtype), run)


SUBJECTS: dict[str, Subject] = {tiny.id: autoencoder(tiny) for tiny in TABLE}


def optimized(model: nn.Module, rewrite: Rewrite, role: str = "vae") -> nn.Module:
    """`model` with one rewrite on it; a rewrite that fails to install raises."""
    made = plan((Step(rewrite, "on", "test"),))
    base.run(model, made, made.vae, role, {"strict": True, "tier": "lowered"})
    return model


def plan(vae: tuple[Step, ...], encoder: tuple[Step, ...] = (), platform: str = "cpu") -> Platform:
    made = type("Made", (Platform,), {"name": platform, "vae": vae, "encoder": encoder})
    return made()


def everything(platform: type[Platform]) -> Platform:
    """The plan of a platform with every one of its steps on."""
    on = [tuple(replace(step, default="on") for step in steps) for steps in (platform.vae, platform.encoder)]
    return plan(*on, platform=platform.name)


@cache
def all_rewrites() -> dict[str, Rewrite]:
    """Each rewrite with its own defaults, and once more for every choice of options in a platform's table."""
    for module in pkgutil.iter_modules(rewrites.__path__):
        importlib.import_module(f"{rewrites.__name__}.{module.name}")
    classes = [c for c in Rewrite.__subclasses__() if c.__module__.startswith(f"{rewrites.__name__}.")]
    found = [cls() for cls in classes]
    found += [step.rewrite for platform in ALL.values() for step in (*platform.vae, *platform.encoder)]
    return {label(rewrite): rewrite for rewrite in found}


def label(rewrite: Rewrite) -> str:
    default = type(rewrite)()
    changed = [f.name for f in fields(rewrite) if getattr(rewrite, f.name) != getattr(default, f.name)]
    return rewrite.name + "".join(f"-{name}={getattr(rewrite, name)}" for name in changed)


@cache
def _models() -> dict[str, nn.Module]:
    return {subject.id: subject.build(torch.float32) for subject in SUBJECTS.values()}


def sites(rewrite: Rewrite, model: nn.Module) -> list[Site]:
    return list(rewrite.sites(model, Ledger()))


@cache
def cases() -> dict[str, tuple[Rewrite, Subject]]:
    """Every rewrite on every model in which it takes a site."""
    return {
        f"{name}-{id}": (rewrite, SUBJECTS[id])
        for name, rewrite in all_rewrites().items()
        for id, model in _models().items()
        if any(site.refused is None for site in sites(rewrite, model))
    }
