"""Vision towers of transformers: those that take all their images as one packed sequence, and what each takes
precomputed; by name, those of images of one size.

transformers derives position ids, segments, windows and interpolation taps from `grid_thw` in every forward, on the
device, by loops that read it back. Late versions take each of them as a keyword argument instead (seen in 5.17 and
5.23), derived by functions that are called here on a grid on the host. Earlier ones (4.57, 5.0 and 5.6) take none: the
towers of ON_HOST are handed their grid on the host, where their loops and, in attention, their segments read it free.

Not here: classes whose forward reads the grid for other things too (HunYuanVL, LFM3-VL), takes it elsewhere than second
(PaddleOCR-VL, Inkling2) or takes more than a grid (VideoLLaMA 3, MiniCPM-V). What a table held by a child of the tower
needs (Kimi-K2.5, Muse) is left to that child.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.families import position_embeddings, segments
from vae_accel.families.match import estranged, known_as
from vae_accel.families.position_embeddings import Resampling

Grids = tuple[tuple[int, int, int], ...]  # (t, h, w) of every image, in patches

# What belongs together: a caller who gives one of a group gets none of the others from here.
POSITIONS = ("position_ids",)
SEGMENTS = ("cu_seqlens", "max_seqlen")
WINDOWS = ("window_index", "cu_window_seqlens", "max_window_seqlen")
TAPS = ("interp_indices", "interp_weights")
PRECOMPUTED = frozenset((*POSITIONS, *SEGMENTS, *WINDOWS, *TAPS))
LONGEST = {"cu_seqlens": "max_seqlen", "cu_window_seqlens": "max_window_seqlen"}
_ROWS_READ = "_vae_accel_rows"
_READ_FREELY = ("cpu",)  # devices whose tensors cost nothing to read, and may be written to behind torch's back


@dataclass(frozen=True)
class PackedTower:
    """What the forward of a tower takes besides position_ids and cu_seqlens, and where it keeps what they follow from.

    rotary: the attribute whose module makes cosines and sines of position_ids; '' where they are changed on the way.
    merge: the attribute that holds the side of a spatial-merge block; '' for raster order.
    windows: some of its layers attend within windows.
    longest: it takes the length of the longest segment.
    clips: the frames of a clip are one segment (None: the attribute `merge_temporal` says so).
    """

    rotary: str = "rotary_pos_emb"
    merge: str = "spatial_merge_size"
    windows: bool = False
    longest: bool = True
    clips: bool | None = False


@dataclass(frozen=True)
class Packing:
    """How a tower packs images now: with the grids, all that its metadata depends on."""

    merge: int
    clips: bool
    with_time: bool
    window: tuple[int, int] | None
    resampling: Resampling | None
    mode: str
    longest: bool


def inside(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What lies in the vision towers of `root`, by path: no module of a language model or text encoder beside."""
    outer = [path for path, module in root.named_modules() if known_as(module, NAMES) is not None]
    for path, module in root.named_modules():
        if any(not tower or path.startswith(f"{tower}.") for tower in outer):
            yield path, module


def row_of(module: nn.Module) -> PackedTower | None:
    """The row of a packed tower that takes metadata, or None."""
    name = known_as(module, ROWS)
    return ROWS[name] if name is not None and _takes_metadata(module) else None


def sizes_of(module: nn.Module) -> str | None:
    """The argument with the sizes of its images of a module that may be given them on the host; or None."""
    name = known_as(module, SIZES)
    if name is None and known_as(module, ON_HOST) is not None and not _takes_metadata(module):
        return "grid_thw"
    return None if name is None else SIZES[name]


def hands_on_sizes(module: Any) -> bool:
    """Whether an earlier tower hands its segments to a kernel now, which wants them on the device."""
    return known_as(module, ON_HOST) is not None and "flash" in (
        getattr(module.config, "_attn_implementation", None) or ""
    )


def _takes_metadata(module: nn.Module) -> bool:
    """Whether the module's class is of a version of transformers whose towers take keyword arguments for it."""
    home = next(sys.modules[cls.__module__] for cls in type(module).__mro__ if "forward" in vars(cls))
    return hasattr(home, "get_vision_position_ids")


def refusal(module: nn.Module) -> str | None:
    """Why a module with a known name, or derived from one, cannot be taken; None where it can or is something else."""
    row = row_of(module)
    if row is None:
        known = known_as(module, ROWS) is not None and sizes_of(module) is None
        old = f"transformers {sys.modules['transformers'].__version__} derives it in the tower's forward and takes none"
        return old if known else estranged(module, ROWS)
    try:
        packing(module)
        rotary: Any = getattr(module, row.rotary) if row.rotary else None
    except AttributeError as missing:
        return f"this {type(module).__name__} is not transformers' class of that name: {missing}"
    if rotary is not None and not ("inv_freq" in rotary._buffers and hasattr(rotary, "attention_scaling")):
        return f"its {row.rotary} is a {type(rotary).__name__}, whose tables are not known to follow from position ids"
    return None


def packing(tower: Any) -> Packing:
    """Raises AttributeError for a class of a known name that lacks what its row reads, KeyError for another class."""
    row = row_of(tower)
    if row is None:
        raise KeyError(type(tower).__name__)
    table = position_embeddings.table_of(tower)
    return Packing(
        merge=attrgetter(row.merge)(tower) if row.merge else 1,
        clips=tower.merge_temporal if row.clips is None else row.clips,
        with_time=getattr(tower, "include_temporal", False),
        window=(tower.window_size, tower.patch_size) if row.windows else None,
        resampling=None if table is None else position_embeddings.read(table, tower),
        mode=getattr(tower, "interpolation_mode", "bilinear"),
        longest=row.longest,
    )


def rows_of(sizes: Any) -> tuple[tuple[int, ...], ...] | None:
    """The rows of an integer tensor [images, n], such as `grid_thw`; None for anything else, fake tensors included.

    One on an accelerator is read back once, which waits for what was launched before, and again after it was written
    to; in inference mode torch does not say whether it was, and it is read in each call.
    """
    if type(sizes) is not Tensor or sizes.dim() != 2 or sizes.is_floating_point() or sizes.is_meta:
        return None
    if sizes.device.type in _READ_FREELY or sizes.is_inference():
        return tuple(map(tuple, sizes.tolist()))
    stamp = id(sizes), sizes._version  # a copy takes our note along, and has another id
    if getattr(sizes, _ROWS_READ, (None, ()))[0] != stamp:
        setattr(sizes, _ROWS_READ, (stamp, tuple(map(tuple, sizes.tolist()))))
    return getattr(sizes, _ROWS_READ)[1]


def call_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The patches and the grid in a call of a tower's `forward(patches, grid_thw, **kwargs)`; None where missing."""
    patches = args[0] if args else kwargs.get("hidden_states", kwargs.get("pixel_values"))
    return patches, args[1] if len(args) > 1 else kwargs.get("grid_thw")


def metadata(tower: nn.Module, grids: Grids, device: torch.device, given: Collection[str] = ()) -> dict[str, Any]:
    """The keyword arguments of the tower's forward that follow from `grids`, on `device`, equal to what it derives.

    `position_ids` [patches, 2 or 3]; `cu_seqlens` [segments + 1] and, as an int, `max_seqlen`; of a tower with windows
    `window_index` [merged patches], `cu_window_seqlens` and `max_window_seqlen`; of one that resamples a table
    `interp_indices` and `interp_weights` [patches, taps]. Both `cu_seqlens` are marked (segments.py). Groups of which
    the caller has some in `given` are left out. Computed on the host and sent by one copy each, for which nobody waits.

    Raises:
        RuntimeError: as transformers does, for sides that the spatial merge does not divide.
    """
    how, derive = packing(tower), sys.modules["transformers.vision_utils"]
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # kept, and may meet autograd in a later call
        stack.enter_context(torch.device("cpu"))
        grid = torch.tensor(grids)
        if not set(POSITIONS) & set(given):
            time = {"include_temporal": True} if how.with_time else {}
            found["position_ids"] = derive.get_vision_position_ids(grid, how.merge, **time)
        if not set(SEGMENTS) & set(given):
            clips = {"merge_temporal": True} if how.clips else {}
            found["cu_seqlens"] = derive.get_vision_cu_seqlens(grid, **clips)
        if how.window is not None and not set(WINDOWS) & set(given):
            found["window_index"], found["cu_window_seqlens"] = derive.get_vision_window_index(
                grid, how.merge, *how.window
            )
        if how.resampling is not None and not set(TAPS) & set(given):
            found["interp_indices"], found["interp_weights"] = _taps(derive, grid, how.resampling, how.mode)
        result: dict[str, Any] = {name: _sent(tensor, device) for name, tensor in found.items()}
    for name in LONGEST.keys() & found.keys():
        lengths = segments.of(found[name])
        segments.mark(result[name], lengths.lengths, lengths.longest)
        if how.longest:
            result[LONGEST[name]] = lengths.longest
    return result


def _taps(derive: Any, grid: Tensor, how: Resampling, mode: str) -> tuple[Tensor, Tensor]:
    return derive.get_vision_interpolation_indices_and_weights(
        grid,
        how.side,
        mode=mode,
        align_corners=how.align_corners,
        spatial_merge_size=how.merge,
        padding=how.padding,
    )


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """From pinned memory where that lets the host go on: torch keeps the memory until the copy has been made."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


_PLAIN, _WINDOWED = PackedTower(), PackedTower(windows=True)
_MUSE = PackedTower(rotary="", windows=True, longest=False)

ROWS: dict[str, PackedTower] = {
    "Qwen2VisionTransformerPretrainedModel": _PLAIN,
    "Qwen2_5_VisionTransformerPretrainedModel": _WINDOWED,
    "Qwen2_5OmniVisionEncoder": _WINDOWED,
    "Exaone4_5_VisionModel": _WINDOWED,
    "Qwen3VLVisionModel": _PLAIN,
    "Qwen3VLMoeVisionModel": _PLAIN,
    "Qwen3_5VisionModel": _PLAIN,
    "Qwen3_5MoeVisionModel": _PLAIN,
    "Qwen3OmniMoeVisionEncoder": _PLAIN,
    "Qwen4ExpVisionModel": _PLAIN,
    "CohereCompassVisionModel": _PLAIN,
    "Ernie4_5_VLMoeVisionTransformerPretrainedModel": _PLAIN,
    "Dots3NoteVisionModel": _PLAIN,
    "Glm4vVisionModel": _PLAIN,
    "Glm4vMoeVisionModel": _PLAIN,
    "Glm5NextVisionModel": _PLAIN,
    "GlmOcrVisionModel": _PLAIN,
    "GlmImageVisionModel": PackedTower(rotary=""),
    "Kimi_K25VisionModel": PackedTower(rotary="rotary_emb", merge="", clips=True),
    "MiniMaxM3VLVisionModel": PackedTower(rotary="rotary_emb", clips=None),
    "MuseSparkVisionModel": _MUSE,
    "MuseGlimmerVisionModel": _MUSE,
}

# Towers of images of one size, or of rows padded to one length, outermost first.
IMAGES = (
    "CLIPVisionModelWithProjection",
    "CLIPVisionModel",
    "CLIPVisionTransformer",
    "SiglipVisionModel",
    "SiglipVisionTransformer",
    "Siglip2VisionModel",
    "Siglip2VisionTransformer",
    "Dinov2Model",
)
NAMES = (*IMAGES, *ROWS)

# Towers whose forward, before it took metadata, made do with a grid on the host.
ON_HOST = (
    "Qwen2VisionTransformerPretrainedModel",
    "Qwen2_5_VisionTransformerPretrainedModel",
    "Qwen3VLVisionModel",
    "Qwen3VLMoeVisionModel",
)

# Modules that read the sizes of their images one by one, in every version: the argument that has them.
SIZES: dict[str, str] = {"Siglip2VisionEmbeddings": "spatial_shapes"}
