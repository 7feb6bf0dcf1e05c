"""Several latents a step where stock decodes one and encodes one, into one clip.

Small frames leave a card waiting for launches, and every convolution of a step reads its weights and its two cached
frames again. Stock also grows its result by `cat`, which copies all earlier frames at every step: quadratic, and two
clips at the end. Here the clip is allocated once.

A step's memory grows with its latents, so their number is taken from what is free. Where that was too many after all,
the clip is begun again with half as many, and a warning says so.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, obstacle
from vae_accel.families import chunked
from vae_accel.families.match import estranged
from vae_accel.kernels._dispatch import is_channels_last
from vae_accel.rewrite import Rewrite, Site, Tier, module_runs_stock

SLOTS = ("_decode", "_encode")  # beneath `decode` and `encode`: slicing and the hook that moves the model stay stock's


@dataclass(frozen=True)
class LatentChunks(Rewrite):
    """`most`: latents of a step; `budget`: bytes that a step may take, of which it never takes over a quarter of what
    is free."""

    name = "latent_chunks"
    tier = Tier.ROUNDING

    most: int = 4
    budget: int = 6 << 30

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        for path, module in root.named_modules():
            if chunked.is_chunked(module):
                yield Site(path, _refusal(root, ledger, path))
            elif (stranger := estranged(module, chunked.ROWS)) is not None:
                yield Site(path, stranger)

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        pen.method(site.path, "_decode", decode, self)
        pen.method(site.path, "_encode", encode, self)

    def step(self, x: Tensor, per_latent: int) -> int:
        """Latents of a step on `x`'s device, of which each takes `per_latent` bytes."""
        return latents_per_step(per_latent, most=self.most, budget=self.budget, free=_free(x.device))


def latents_per_step(per_latent: int, *, most: int, budget: int, free: int | None) -> int:
    """As many latents, from 1 to `most`, as take no more than `budget` bytes and a quarter of what is `free`.

    `free` None: not known, and not limited by it.
    """
    room = budget if free is None else min(budget, free // 4)
    return max(1, min(most, room // max(per_latent, 1)))


def chunks_of(vae: nn.Module) -> LatentChunks | None:
    """The rewrite as it is on this VAE now; None where it is stock or paused."""
    patch = vars(vae).get("_decode")
    chunks = patch.args[-1] if isinstance(patch, functools.partial) and patch.args else None
    return chunks if isinstance(chunks, LatentChunks) else None


def frames(vae: Any, z: Tensor, chunks: LatentChunks | None) -> Iterator[Tensor]:
    """The finished frames `[N, C, t, H, W]` of latents `z` `[N, Z, T, h, w]` a step at a time, in stock's steps without
    `chunks`."""
    step = 1 if chunks is None else chunks.step(z, chunked.decode_bytes(vae, z))
    return while_memory_lasts(functools.partial(chunked.decoded, vae, z), step)


def decode(vae: Any, below: Callable[..., Any], chunks: LatentChunks, z: Tensor, return_dict: bool = True) -> Any:
    """`_decode`: [N, Z, T, h, w] -> a DecoderOutput of [N, C, 1 + ratio * (T - 1), H, W]."""
    if not _takes(vae, z):
        return below(z, return_dict=return_dict)
    clip = _collected(frames(vae, z, chunks), 1 + chunked.ratio(vae) * (z.shape[2] - 1))
    if not return_dict:
        return (clip,)
    from diffusers.models.autoencoders.vae import DecoderOutput  # there already: it made this VAE

    return DecoderOutput(sample=clip)


def encode(vae: Any, below: Callable[..., Tensor], chunks: LatentChunks, x: Tensor) -> Tensor:
    """`_encode`: [N, C, T, H, W] -> the moments [N, 2 Z, 1 + (T - 1) // 4, h, w]."""
    if not _takes(vae, x):
        return below(x)
    step = chunks.step(x, chunked.encode_bytes(vae, x))
    parts = while_memory_lasts(functools.partial(chunked.encoded, vae, x), step)
    return vae.quant_conv(torch.cat(list(parts), 2))


def _collected(parts: Iterator[Tensor], length: int) -> Tensor:
    """Parts `[N, C, t, H, W]` of a clip of `length` frames in one tensor, in the layout and dtype of the first."""
    first = next(parts)
    if first.shape[2] == length:
        return first
    layout = torch.channels_last_3d if is_channels_last(first) else torch.contiguous_format
    shape = (*first.shape[:2], length, *first.shape[3:])
    clip = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout)
    done = 0
    for part in chain([first], parts):
        clip[:, :, done : done + part.shape[2]] = part
        done += part.shape[2]
    return clip


def while_memory_lasts(parts: Callable[[int], Iterator[Tensor]], step: int) -> Iterator[Tensor]:
    """What `parts(step)` yields `[N, C, t, H, W]`; out of memory, the rest of it from `parts(step // 2)`.

    The caches of the failed step are spoilt, and a second set in reserve would be 1.8 GiB (Wan 2.1, 480x832, bf16), so
    the clip is begun again; frames that were yielded before are computed and dropped.

    Raises:
        torch.OutOfMemoryError: at one latent a step.
    """
    given = 0
    while True:
        seen = 0
        try:
            with closing(parts(step)) as run:  # type: ignore[type-var]
                for part in run:
                    seen += part.shape[2]
                    if seen > given:
                        part = part[:, :, given - seen :]
                        given = seen
                        yield part
            return
        except torch.OutOfMemoryError:
            if step == 1:
                raise
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory at {step} latents a step: begun again at {step // 2}", RuntimeWarning, stacklevel=2
        )
        step //= 2


def _takes(vae: Any, x: Tensor) -> bool:
    """Whether this call is ours: a clip, untiled, whose arithmetic is not stock's. A compiler unrolls stock's loop, for
    which what memory is free says nothing."""
    if x.dim() != 5 or x.numel() == 0 or vae.use_tiling or torch.compiler.is_compiling():
        return False
    return not module_runs_stock(vae, x)


def _refusal(root: nn.Module, ledger: Ledger, path: str) -> str | None:
    vae = root.get_submodule(path)
    for slot in SLOTS:
        owner = next((c.__name__ for c in type(vae).__mro__ if slot in vars(c)), None)
        if owner not in chunked.ROWS:
            return f"{type(vae).__name__} has no {slot} of diffusers'"
        reason = obstacle(root, ledger, path, slot)
        if reason is not None:
            return reason
    return None


def _free(device: torch.device) -> int | None:
    """Bytes that can still be allocated: the driver's, and those the allocator holds without using them."""
    if device.type != "cuda":
        return None
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held
