"""Convolution weights and activations in NHWC and NDHWC, where the whole path through an encoder or decoder keeps them.

cuDNN's Hopper convolutions are 1.1 to 1.6 times faster channels-last (128 -> 128 channels over 4 frames of 720x1280 on
an H200: 467 against 751 TFLOP/s). The weights alone are not enough: they made a FLUX.1 decode slower, 86 -> 127 ms,
because each aten GroupNorm copied its input to NCHW and each convolution copied it back. So a subtree is laid out only
when nothing in it does that at every block: its GroupNorms belong to fused_norm_act, its replicated padding to
causal_padding. Plan this rewrite last.

What goes in is laid out at the entry, what comes out is contiguous, as a caller expects who takes `.view()` of it
(stock too, but for Mochi's decoder, which hands out NDHWC). Feature caches stay channels-last between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, obstacle, unusable_weight
from vae_accel.families import causal, layout
from vae_accel.families.match import known_as
from vae_accel.rewrite import Rewrite, Site, Tier

SUBTREES = ("encoder", "decoder")
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
# The rewrites after which a norm, or a causal convolution, keeps the layout it is given.
KEEPERS = ("fused_norm_act", "causal_padding", "folded_upsample")


@dataclass(frozen=True)
class ChannelsLast(Rewrite):
    """Sites are the encoder and the decoder, or the root where it has neither.

    `clips`: Conv3d too, else refused. `fp32`: models in more than 16 bits too; there oneDNN's channels-last Conv2d has
    up to 2.9 times the error of its contiguous one, for 1.1 times the speed.
    """

    name = "channels_last"
    tier = Tier.ROUNDING

    clips: bool = True
    fp32: bool = True

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        parts = [name for name in SUBTREES if isinstance(getattr(root, name, None), nn.Module)]
        for part in parts or [""]:
            convs = [path for path, m in _within(root, part) if isinstance(m, nn.Conv2d | nn.Conv3d)]
            if len(convs) < 2:  # a lone patch embedding
                continue
            reason = self._too_wide(root, convs) or self._no_clips(root, convs)
            reason = reason or obstacle(root, ledger, part, "forward") or _offloaded(root, part)
            reason = reason or _breakers(root, ledger, part)
            blocks = [(path, name) for path, m in _within(root, part) if (name := known_as(m, layout.KEEPS_LAYOUT))]
            reason = reason or next(filter(None, (obstacle(root, ledger, p, "forward") for p, _ in blocks)), None)
            weights = [p for p in convs if unusable_weight(root.get_submodule(p)) is None]
            weights = [p for p in weights if obstacle(root, ledger, p, "weight") is None]
            yield Site(part, reason, {"weights": tuple(weights), "blocks": tuple(blocks)})

    def _too_wide(self, root: nn.Module, convs: list[str]) -> str | None:
        wide = sum(root.get_parameter(f"{path}.weight").dtype.itemsize > 2 for path in convs)
        return None if self.fp32 or not wide else f"{wide} convolutions in fp32, here less accurate channels-last"

    def _no_clips(self, root: nn.Module, convs: list[str]) -> str | None:
        three = sum(isinstance(root.get_submodule(path), nn.Conv3d) for path in convs)
        return f"{three} Conv3d, and no channels_last_3d on this platform" if three and not self.clips else None

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        for path in site.facts["weights"]:
            dimensions = root.get_parameter(f"{path}.weight").dim()
            pen.layout(path, "weight", (0, *range(2, dimensions), 1))
        for path, name in site.facts["blocks"]:
            pen.method(path, "forward", layout.KEEPS_LAYOUT[name])
        pen.method(site.path, "forward", through, self.clips)


def through(module: nn.Module, below: Callable[..., Any], clips: bool, *args: Any, **kwargs: Any) -> Any:
    """An encoder or decoder: channels-last in, contiguous out (of a tuple, the first)."""
    if args:
        args = (_channels_last(args[0], clips), *args[1:])
    result = below(*args, **kwargs)
    if isinstance(result, tuple):
        return (_contiguous(result[0]), *result[1:])
    return _contiguous(result)


def _channels_last(x: Any, clips: bool) -> Any:
    if not isinstance(x, Tensor) or x.dim() not in FORMATS or (x.dim() == 5 and not clips):
        return x
    return x.contiguous(memory_format=FORMATS[x.dim()])


def _contiguous(x: Any) -> Any:
    return x.contiguous() if isinstance(x, Tensor) else x


def _offloaded(root: nn.Module, part: str) -> str | None:
    if any(p.device.type == "meta" for p in root.get_submodule(part).parameters()):
        return "its weights are offloaded one by one and come back contiguous: optimize before offloading"
    return None


def _breakers(root: nn.Module, ledger: Ledger, part: str) -> str | None:
    """The first module of a subtree that leaves channels-last in every block, and how many do; None if none does."""
    kept = {edit.path for edit in ledger.edits if edit.slot == "forward" and edit.by in KEEPERS}
    found = [(path, why) for path, m in _within(root, part) if (why := _breaks(m, path in kept)) is not None]
    if not found:
        return None
    more = f", and {len(found) - 1} more like it" if len(found) > 1 else ""
    return f"{found[0][0]}: {found[0][1]}{more}"


def _breaks(module: nn.Module, kept: bool) -> str | None:
    row = causal.causal_of(module)
    if isinstance(module, nn.GroupNorm) and not kept:
        return "GroupNorm copies to NCHW unless fused_norm_act takes it"
    if row is not None and (row.time, row.space) != ("zeros", "zeros") and not kept:
        return "replicated padding copies to NCDHW unless causal_padding takes it"
    return layout.in_nchw(module)


def _within(root: nn.Module, part: str) -> Iterator[tuple[str, nn.Module]]:
    return root.get_submodule(part).named_modules(prefix=part)
