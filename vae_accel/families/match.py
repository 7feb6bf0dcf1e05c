"""How a row of a family finds its modules: by class name, so that no model library is imported."""

from __future__ import annotations

from collections.abc import Container

from torch import nn


def known_as(module: nn.Module, names: Container[str]) -> str | None:
    """The name under which rows know the class whose `forward` this module runs; None when they know no such class."""
    for cls in type(module).__mro__:
        if "forward" in vars(cls):
            return cls.__name__ if cls.__name__ in names else None
    return None


def estranged(module: nn.Module, names: Container[str]) -> str | None:
    """Why a subclass of a known class is left alone (it has a forward of its own), or None."""
    base = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in names), None)
    if base is None or known_as(module, names) is not None:
        return None
    return f"{type(module).__name__} has a forward of its own, unlike {base}"
