"""What a packed vision tower derives from the grids of its images, derived once a batch of grids and kept.

transformers derives it on the device in each forward and reads it back in loops (Qwen2.5-VL's windows image by image).
Here it is computed on the host when a batch of grids is met first (families/towers.py), handed to the tower as its own
keyword arguments, and kept with the rotary tables that the tower's own module makes of it. A grid on an accelerator is
read once, before anything of the tower is launched; one on the host, or met before, costs no synchronisation.

SigLIP2 reads the size of each image to resample its positions, one by one: it is handed the sizes on the host. What it
resamples is weights, so it is not kept; one product for all images would not be F.interpolate's antialiasing bit for
bit.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, ledger_of, obstacle
from vae_accel.families import towers
from vae_accel.rewrite import Rewrite, Site, Tier

# An edit of Qwen-Image meets one batch of grids for its prompt and another for its negative, of up to three images. An
# entry is about 700 bytes a patch, most of it the rotary tables: 4 MB for one image of 1024x1024.
KEPT = 8
MET, DERIVED = "batches of grids met before", "batches of grids derived"
_TABLES = "_vae_accel_tables"


@dataclass(frozen=True)
class VisionMetadata(Rewrite):
    name = "vision_metadata"
    tier = Tier.EXACT

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        for path, module in root.named_modules():
            row, sizes = towers.row_of(module), towers.sizes_of(module)
            reason = towers.refusal(module)
            if reason is not None:
                yield Site(path, reason)
            elif row is not None:
                rotary = _join(path, row.rotary) if row.rotary else None
                reason = obstacle(root, ledger, path, "forward")
                if reason is None and rotary is not None:
                    reason = obstacle(root, ledger, rotary, "forward")
                yield Site(path, reason, {"rotary": rotary})
            elif sizes is not None:
                yield Site(path, obstacle(root, ledger, path, "forward"), {"sizes": sizes})

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        if "sizes" in site.facts:
            pen.method(site.path, "forward", with_sizes_on_the_host, site.facts["sizes"])
            return
        pen.method(site.path, "forward", forward, Kept(), ledger_of(root))
        if site.facts["rotary"] is not None:
            pen.method(site.facts["rotary"], "forward", rotary_tables)


class Kept:
    """The metadata of the last `KEPT` batches of grids. A copy of a model, or a pickled one, begins with none."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Any, dict[str, Any]] = OrderedDict()
        self._turn = threading.Lock()

    def get(self, key: Any, derive: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
        """The entry of `key`, and whether it was met before. Keys end in a device: entries on another are dropped, so
        that a model that was moved leaves nothing behind."""
        with self._turn:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                return entry, True
            entry = derive()
            for other in [k for k in self._entries if k[-1] != key[-1]]:
                del self._entries[other]
            self._entries[key] = entry
            if len(self._entries) > KEPT:
                self._entries.popitem(last=False)
            return entry, False

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def forward(tower: nn.Module, below: Callable[..., Any], kept: Kept, ledger: Ledger, *args: Any, **kwargs: Any) -> Any:
    """A tower's `forward(patches, grid_thw, **kwargs)`: stock's, which is handed what follows from the grid. What the
    caller gives of it wins."""
    patches, thw = towers.call_of(args, kwargs)
    if _traced() or not isinstance(patches, Tensor) or patches.is_meta:
        return below(*args, **kwargs)
    grids: Any = towers.rows_of(thw)
    if not grids or len(grids[0]) != 3:  # empty, or not a grid: stock says what it makes of it
        return below(*args, **kwargs)
    given = frozenset(name for name in towers.PRECOMPUTED & kwargs.keys() if kwargs[name] is not None)
    key = grids, towers.packing(tower), given, patches.device
    entry, met = kept.get(key, lambda: _derived(tower, grids, patches.device, given))
    ledger.count(VisionMetadata.name, MET if met else DERIVED)
    return below(*args, **{**kwargs, **entry})


def rotary_tables(
    rotary: Any, below: Callable[..., tuple[Tensor, Tensor]], x: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """`forward(x, position_ids)` of a vision rotary embedding: cosines and sines [patches, head_dim], those made before
    for position ids of ours. Of `x` it reads device and dtype alone."""
    kept = getattr(position_ids, _TABLES, None)
    frequencies = rotary.inv_freq
    if kept is None or frequencies.is_inference():
        return below(x, position_ids)
    made_of = id(frequencies), frequencies._version, rotary.attention_scaling, x.dtype, x.device
    if kept.get("made of") != made_of:
        with torch.inference_mode(False), torch.no_grad():
            kept.update({"made of": made_of, "frequencies": frequencies, "tables": below(x, position_ids)})
    return kept["tables"]


def with_sizes_on_the_host(module: nn.Module, below: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
    """`forward(pixels, sizes, ...)` of a module that reads sizes alone: SigLIP2's embeddings, earlier Qwen towers."""
    sizes = args[1] if len(args) > 1 else kwargs.get(name)
    rows = None if _traced() or towers.hands_on_sizes(module) else towers.rows_of(sizes)
    if not rows:
        return below(*args, **kwargs)
    on_host = torch.tensor(rows, device="cpu")
    if len(args) > 1:
        return below(args[0], on_host, *args[2:], **kwargs)
    return below(*args, **{**kwargs, name: on_host})


def _traced() -> bool:
    """Whether this call is being recorded: a graph is not to hold what we keep, nor sizes that we read on the host."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _derived(tower: nn.Module, grids: towers.Grids, device: torch.device, given: frozenset[str]) -> dict[str, Any]:
    entry = towers.metadata(tower, grids, device, given)
    if "position_ids" in entry:
        setattr(entry["position_ids"], _TABLES, {})
    return entry


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
