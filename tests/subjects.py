"""What the batteries run over: every tiny model, every rewrite, and every plan of a platform."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache

import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from tests import towers
from tests.recorder import Recorder
from tests.tiny import Tiny, image
from tests.towers import Tower
from tests.vaes import KL, TABLE
from vae_accel import rewrites, settings
from vae_accel.edits import Ledger
from vae_accel.platforms import ALL, Platform, Step, base
from vae_accel.rewrite import Rewrite, Site
from vae_accel.workloads.inputs import Kind, latents
from vae_accel.workloads.weights import randomise

KINDS: tuple[Kind, ...] = ("noise", "ramp")


@dataclass(frozen=True)
class Subject:
    """A model at a tiny size and everything it computes: `run(model, kind)` in the dtype of the model.

    `precision` is how far two right results in fp64 may lie apart, relative to the largest value.
    """

    id: str
    role: str
    build: Callable[[torch.dtype], nn.Module]
    run: Callable[[nn.Module, Kind], list[Tensor]]
    precision: float = 1e-9


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def decode(tiny: Tiny, vae: nn.Module, latent: Tensor) -> Tensor:
    return tiny.decode(vae, latent.to(dtype_of(vae)))


def autoencoder(tiny: Tiny) -> Subject:
    def run(vae: nn.Module, kind: Kind) -> list[Tensor]:
        return [decode(tiny, vae, tiny.latent(kind)), tiny.encode(vae, tiny.pixels(kind).to(dtype_of(vae)))]

    # The norms of LTX and DC-AE take their statistics in fp32 whatever the model's dtype.
    precision = 1e-6 if tiny.id.startswith(("ltx", "dc-ae")) else 1e-9
    return Subject(tiny.id, "vae", lambda dtype: tiny.build(dtype=dtype), run, precision)


def tower(row: Tower) -> Subject:
    def run(model: nn.Module, kind: Kind) -> list[Tensor]:
        return row.run(model, row.inputs(kind, dtype=dtype_of(model)))

    # transformers interpolates tables of positions in fp32 whatever the model's dtype.
    return Subject(row.id, "encoder", lambda dtype: row.build(dtype=dtype), run, 1e-6)


class EinopsBlock(nn.Module):
    """As the original code of Wan, LTX and HunyuanVideo writes it: a layer of einops, and calls by its global name."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.merge = nn.Linear(8, 24), Rearrange("b h n d -> b n (h d)")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=2) for part in self.qkv(x).chunk(3, -1))
        return self.merge((q @ k.mT).softmax(-1) @ v)


def einops_block() -> Subject:
    def build(dtype: torch.dtype) -> nn.Module:
        return randomise(EinopsBlock(), dtype=dtype, device="cpu")

    def run(model: nn.Module, kind: Kind) -> list[Tensor]:
        return [model(latents(kind, (2, 1, 6, 8))[:, 0].to(dtype_of(model)))]

    return Subject("einops", "vae", build, run)


# An SD autoencoder whose one attention head is wider than the fused kernels go.
WIDE = image("sd-wide", "AutoencoderKL", 4, (4, 6), 2, config={**KL, "block_out_channels": (32, 288)})
# And one whose channels are multiples of 128, which e4m3 operands need.
FLUX = next(tiny for tiny in TABLE if tiny.id == "flux.1")
BROAD = replace(FLUX, id="flux.1-broad", config={**FLUX.config, "block_out_channels": (128, 128)})
SUBJECTS: dict[str, Subject] = {
    subject.id: subject
    for subject in (
        *map(autoencoder, (*TABLE, WIDE, BROAD)),
        *map(tower, (*towers.TABLE, towers.HOLDER, *towers.RELATIVES, *towers.PACKED)),
        einops_block(),
    )
}


def optimized(model: nn.Module, rewrite: Rewrite, role: str = "vae") -> nn.Module:
    """`model` with one rewrite on it; a rewrite that fails to install raises."""
    made = plan((Step(rewrite, "on", "test"),))
    base.run(model, made, made.vae, role, {"strict": True, "tier": "lowered"})
    return model


def plan(vae: tuple[Step, ...], encoder: tuple[Step, ...] = (), platform: str = "cpu") -> Platform:
    made = type("Made", (Platform,), {"name": platform, "vae": vae, "encoder": encoder})
    return made()


def everything(platform: type[Platform]) -> Platform:
    """The plan of a platform with every one of its steps on, as if each was asked for by name."""
    on = [
        tuple(replace(step, default="on", rewrite=by_name(step.rewrite)) for step in steps)
        for steps in (platform.vae, platform.encoder)
    ]
    return plan(*on, platform=platform.name)


def by_name(rewrite: Rewrite) -> Rewrite:
    return rewrite.asked(settings.read(rewrites.NAMES), True)


@cache
def all_rewrites() -> dict[str, Rewrite]:
    """Each rewrite with its own defaults, and once more for every choice of options in a platform's table."""
    for module in pkgutil.iter_modules(rewrites.__path__):
        importlib.import_module(f"{rewrites.__name__}.{module.name}")
    classes = [c for c in Rewrite.__subclasses__() if c.__module__.startswith(f"{rewrites.__name__}.")]
    found = [cls() for cls in classes]
    found += [by_name(step.rewrite) for platform in ALL.values() for step in (*platform.vae, *platform.encoder)]
    return {label(rewrite): anywhere(rewrite) for rewrite in map(in_any_precision, found)}


def in_any_precision(rewrite: Rewrite) -> Rewrite:
    """A rewrite that a platform keeps to 16 bits is the one with its defaults there, and takes nothing in fp32."""
    return replace(rewrite, fp32=True) if hasattr(rewrite, "fp32") else rewrite


def anywhere(rewrite: Rewrite) -> Rewrite:
    """A rewrite that captures the launches of a card takes nothing on a CPU: there its calls are noted."""
    return replace(rewrite, capture=Recorder()) if hasattr(rewrite, "capture") else rewrite


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
