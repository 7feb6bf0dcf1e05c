"""One call makes any diffusers VAE, and the vision encoder beside it, faster, with a proof."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "decode_stream": "streaming",
    "optimize": "api",
    "optimize_vae": "api",
    "optimize_encoder": "api",
    "restore": "api",
    "paused": "api",
    "report": "api",
    "warmup": "api",
    "Report": "reports",
    "Tier": "rewrite",
}
_ROOMS = ("bench", "demo", "metrics", "platforms", "settings", "verify", "workloads")
__all__ = [
    "Report",
    "Tier",
    "bench",
    "decode_stream",
    "demo",
    "metrics",
    "optimize",
    "optimize_encoder",
    "optimize_vae",
    "paused",
    "platforms",
    "report",
    "restore",
    "settings",
    "verify",
    "warmup",
    "workloads",
]

if TYPE_CHECKING:
    from vae_accel.api import optimize, optimize_encoder, optimize_vae, paused, report, restore, warmup
    from vae_accel.reports import Report
    from vae_accel.rewrite import Tier
    from vae_accel.streaming import decode_stream


def __getattr__(name: str):
    """Public names resolve at first use, so that the import itself loads neither torch nor diffusers."""
    if name in _HOME:
        return getattr(import_module(f"vae_accel.{_HOME[name]}"), name)
    if name in _ROOMS:
        return import_module(f"vae_accel.{name}")
    raise AttributeError(f"module 'vae_accel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
