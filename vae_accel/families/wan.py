"""Forwards of blocks on the fused convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vae_accel.families.row import Block

ROWS: dict[str, Callable[[Any], Block | str | None]] = {}
