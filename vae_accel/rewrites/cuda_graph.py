"""The forward of a vision tower, or of half a VAE, as one launch: a CUDA graph, captured when a call comes the second
time, then replayed.

What is replayed is what the rewrites beneath and stock launched at the capture: the same kernels on the same shapes, so
an exact graph's outputs are those of the forward bit for bit, in tensors of their own. When a graph is captured, when
it is dropped, and what a call does without one: vae_accel/graphs. A bucket, which `vae_accel.warmup` makes, computes
in other shapes: from then on this is a rewrite of tier `rounding`, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from vae_accel.edits import Ledger, Pen, ledger_of, obstacle
from vae_accel.families import towers
from vae_accel.families.match import estranged, known_as
from vae_accel.graphs import packed
from vae_accel.graphs.capture import Capture, Cuda
from vae_accel.graphs.steering import Beneath
from vae_accel.graphs.store import Graphs, Limits
from vae_accel.rewrite import Rewrite, Site, Tier
from vae_accel.settings import Settings

# Halves of VAEs, of one image or tile a call: of Wan's and Qwen-Image's those that carry no frames to a next step.
HALVES = (
    "Encoder",
    "Decoder",
    "QwenImageEncoder3d",
    "QwenImageDecoder3d",
    "WanEncoder3d",
    "WanDecoder3d",
    "HunyuanImageEncoder2D",
    "HunyuanImageDecoder2D",
)
# What a rewrite that may lie beneath derives from a grid on the host in each call, which a capture holds too.
DERIVED = {"bilinear_pos_embed": ("interp_indices", "interp_weights")}


@dataclass(frozen=True)
class CudaGraph(Rewrite):
    """`names`: classes of the modules whose forward is captured, the outermost of them."""

    name = "cuda_graph"
    tier = Tier.EXACT
    over = ("vision_metadata", "bilinear_pos_embed", "channels_last")

    names: tuple[str, ...] = towers.NAMES
    limits: Limits = field(default_factory=Limits)
    capture: Capture = field(default_factory=Cuda)

    def asked(self, settings: Settings, by_name: bool) -> CudaGraph:
        budgets = settings.graph_budgets if settings.tier != Tier.EXACT.value else ()
        limits = Limits(settings.graph_keep, settings.graph_pool_mib << 20, budgets)
        return replace(self, limits=limits)

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        taken: list[str] = []
        for path, module in root.named_modules():
            if any(not outer or path.startswith(f"{outer}.") for outer in taken):
                continue
            if known_as(module, self.names) is not None:
                taken.append(path)
                yield Site(path, self._refusal(root, ledger, path))
            elif (stranger := estranged(module, self.names)) is not None:
                yield Site(path, stranger)

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        ledger = ledger_of(root)
        assert pen.outcome is not None and ledger is not None
        owners = {edit.by for edit in ledger.edits if (edit.path, edit.slot) == (site.path, "forward")}
        derives = tuple(name for owner in sorted(owners) for name in DERIVED.get(owner, ()))
        loops = not any(edit.by == "packed_attention" for edit in ledger.edits)
        graphs = Graphs(self.limits, self.capture, pen.outcome, Beneath(derives, loops))
        pen.method(site.path, "forward", forward, graphs)

    def _refusal(self, root: nn.Module, ledger: Ledger, path: str) -> str | None:
        module = root.get_submodule(path)
        parameter = next(module.parameters(), None)
        if parameter is not None and not _offloaded(root):  # else it computes elsewhere than its weights wait
            reason = self.capture.refusal(parameter.device)
            if reason is not None:
                return reason
        reason = packed.refusal(module) if packed.is_packed(module) else None
        return reason or obstacle(root, ledger, path, "forward", self.over)


def forward(module: nn.Module, below: Callable[..., Any], graphs: Graphs, *args: Any, **kwargs: Any) -> Any:
    """A module's `forward`, replayed where it was captured."""
    if torch.compiler.is_compiling():
        return below(*args, **kwargs)
    return graphs.call(module, below, args, kwargs)


def graphs_of(root: nn.Module) -> list[tuple[nn.Module, Callable[..., Any], Graphs]]:
    """The towers in `root` that have graphs: each with what its forward runs without them."""
    ledger = ledger_of(root)
    edits = [] if ledger is None or not ledger.active else ledger.edits
    return [edit.new.args for edit in edits if edit.by == CudaGraph.name]


def _offloaded(root: nn.Module) -> bool:
    return any("_hf_hook" in vars(m) or "_diffusers_hook" in vars(m) for m in root.modules())
