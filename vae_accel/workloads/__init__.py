"""Named workloads: real configurations, seeded weights and inputs, and one way to call every model."""

from .checkpoint import of_checkpoint
from .codec import decode, encode
from .table import WORKLOADS
from .towers import TOWERS, Tower
from .workload import Size, Workload

__all__ = ["TOWERS", "WORKLOADS", "Size", "Tower", "Workload", "decode", "encode", "get", "of_checkpoint"]


def get(name: str) -> Workload | Tower:
    """The workload of that name, a VAE or a vision tower; a `ValueError` names them all."""
    known: dict[str, Workload | Tower] = {**WORKLOADS, **TOWERS}
    if name not in known:
        raise ValueError(f"no workload named {name!r}: choose one of {', '.join(known)}")
    return known[name]
