"""How a row of a family finds its modules: by class name, so that no model library is imported."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import TypeVar

from torch import nn

Found = TypeVar("Found")


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


def by_row(module: nn.Module, rows: Mapping[str, Callable[[nn.Module], Found | str | None]]) -> Found | str | None:
    """What the row of a module's class says of it; the reason where it is a known class that lacks what the row reads,
    or derives from one with a forward of its own; None where it is none."""
    name = known_as(module, rows)
    if name is None:
        return estranged(module, rows)
    try:
        return rows[name](module)
    except (AttributeError, TypeError, ValueError, KeyError, IndexError):
        return f"this {type(module).__name__} lacks the attributes of diffusers' class of that name"
