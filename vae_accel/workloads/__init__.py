"""Named workloads: real configurations, seeded weights and inputs, and one way to call every VAE."""

from .codec import decode, encode
from .table import WORKLOADS, get
from .workload import Size, Workload

__all__ = ["WORKLOADS", "Size", "Workload", "decode", "encode", "get"]
