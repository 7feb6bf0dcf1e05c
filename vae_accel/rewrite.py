"""What a rewrite is: a name, a tier, the sites it finds in a model, and how it takes one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vae_accel.edits import Ledger, Pen
    from vae_accel.settings import Settings


class Tier(str, Enum):
    """How far the output may move; `floors` in metrics.py say how each promise is measured.

    EXACT: bit for bit the stock output on the same device. ROUNDING: the same function in the same precision, no
    further from an fp32 golden than stock is. LOWERED: fewer bits or another algorithm, measured and reported.
    """

    EXACT = "exact"
    ROUNDING = "rounding"
    LOWERED = "lowered"

    def allows(self, other: Tier) -> bool:
        """Whether a model optimized at this tier may carry a rewrite of tier `other`."""
        order = list(Tier)
        return order.index(other) <= order.index(self)


@dataclass(frozen=True)
class Site:
    """One place a rewrite looked at: taken when `refused` is None, otherwise left alone for the reason it holds.

    `path` is dotted from the root ('' is the root itself); `facts` is what `apply` needs to know, found by `sites`.
    """

    path: str
    refused: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rewrite(ABC):
    """A change to a model in place. Subclasses are frozen dataclasses: their fields are what a platform may choose.

    `over` names rewrites whose method slot this one may claim on top of: it handles a case and hands the rest to them.
    `direction` is the only one it changes (None: both), so that its tier is not held against the other.
    `compute_dtype` (convolutions only) runs the rewritten arithmetic in that dtype and returns the model's own. One
    that `repairs` is there because stock is wrong on the platform, and is on without a measured speed.
    """

    name: ClassVar[str]
    tier: ClassVar[Tier]
    over: ClassVar[tuple[str, ...]] = ()
    direction: ClassVar[str | None] = None
    lowers: ClassVar[bool] = False  # takes compute_dtype
    repairs: ClassVar[bool] = False

    def asked(self, settings: Settings, by_name: bool) -> Rewrite:
        """This rewrite as the user's settings want it; of most there is nothing to set but the switch. `by_name`: the
        user names it, where else the plan does."""
        return self

    @abstractmethod
    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        """Every place in `root` this rewrite is about, taken or refused with the reason. Looks, never touches."""

    @abstractmethod
    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        """Takes one site, writing only through `pen`."""


def runs_stock(*tensors: Tensor | None) -> bool:
    """Whether this call must run stock arithmetic: for a gradient, under autocast, or on the meta device.

    Autograd through our forms would be right but is not what was proved; under autocast stock promotes norms to fp32.
    """
    given = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return True
    device = given[0].device.type
    return device == "meta" or torch.is_autocast_enabled(device)


def module_runs_stock(module: nn.Module, *tensors: Tensor | None) -> bool:
    """`runs_stock` of tensors and of all parameters of a module, which are gathered only where a gradient is possible:
    those of Qwen-Image take the host 2 ms."""
    return runs_stock(*tensors, *(module.parameters() if torch.is_grad_enabled() else ()))
