"""Attention with heads wider than 256 through the math backend of `scaled_dot_product_attention`.

On ROCm's gfx11xx the fused backends accept such heads and return wrong values without an error
(github.com/pytorch/pytorch/issues/189849, github.com/vllm-project/vllm-omni/issues/7484), and a VAE's single head is
384 to 1024 wide. The math backend materialises the scores, [frames, heads, H * W, H * W], and computes them in fp32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vae_accel.edits import Ledger, Pen, obstacle
from vae_accel.families.attention import head_dim_of
from vae_accel.rewrite import Rewrite, Site, Tier

WIDEST = 256  # the widest head of every fused backend
_switch = threading.RLock()


@dataclass(frozen=True)
class MathAttention(Rewrite):
    """Takes the `forward` of every attention module of `families.attention` whose heads are wider than 256."""

    name = "math_attention"
    tier = Tier.ROUNDING
    repairs = True

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        for path, module in root.named_modules():
            width = head_dim_of(module)
            if isinstance(width, str):
                yield Site(path, width)
            elif width is not None:
                narrow = f"head_dim {width} is at most {WIDEST}" if width <= WIDEST else None
                yield Site(path, narrow or obstacle(root, ledger, path, "forward"))

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        pen.method(site.path, "forward", forward)


def forward(module: nn.Module, below: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The module's own forward, with the math backend alone allowed."""
    if torch.compiler.is_compiling():
        with sdpa_kernel(SDPBackend.MATH):
            return below(*args, **kwargs)
    # The switch is the process's: a second thread that entered in between would restore what the first had set.
    with _switch, sdpa_kernel(SDPBackend.MATH):
        return below(*args, **kwargs)
