"""Frames while the rest of the clip is still being decoded: memory for one step, however long the clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vae_accel.families import chunked
from vae_accel.rewrite import runs_stock
from vae_accel.rewrites import latent_chunks

Progress = Callable[[int, int], None]


def decode_stream(
    vae: nn.Module, latents: Tensor, *, progress: Progress | None = None, to: Literal["cpu"] | None = None
) -> Iterator[Tensor]:
    """Decodes a clip step by step: yields finished frames `[N, C, t, H, W]` in [-1, 1], in order.

    Put together along time they are `vae.decode(latents).sample`, bit for bit where that takes the same steps: an
    optimized VAE chooses them from the memory that is free, stock decodes one latent a step. Runs without gradients.
    Nothing of a clip stays in the VAE, so that it may be abandoned, and others decoded, between any two frames. Out of
    memory, an optimized VAE begins again with half as many latents a step, warns, and yields no frame twice.

    Args:
        vae: an AutoencoderKLWan or AutoencoderKLQwenImage, optimized or not; offloaded and sliced as for `decode`.
        latents: `[N, Z, T, h, w]` as `vae.decode` takes them.
        progress: called with (latents decoded, T) after every step.
        to: "cpu" for frames in host memory. From a CUDA device they are copied into pinned memory by a stream of their
            own and handed out one step late, so that copying, and what is done with them, overlaps with decoding.

    Raises:
        torch.OutOfMemoryError: from the iterator, at one latent a step.
        ValueError: at the call, where the VAE cannot be streamed (another class, tiling) or `latents` is no clip.
    """
    if not chunked.is_chunked(vae):
        raise ValueError(
            f"{type(vae).__name__} cannot be streamed: only {' and '.join(chunked.ROWS)} decode a clip in steps that "
            "do not depend on later ones"
        )
    if getattr(vae, "use_tiling", False):
        raise ValueError("a tiled clip cannot be streamed, its tiles are whole clips: vae.disable_tiling() first")
    if latents.dim() != 5 or latents.numel() == 0:
        raise ValueError(f"latents must be [N, Z, T, h, w] and not empty, not {list(latents.shape)}")
    if to not in (None, "cpu"):
        raise ValueError(f'to must be None or "cpu", not {to!r}')
    frames = _frames(vae, latents, progress)
    return frames if to is None else _pinned(frames) if latents.is_cuda else (part.cpu() for part in frames)


@torch.no_grad()  # in force while a step runs, not while the caller holds its frames
def _frames(vae: Any, latents: Tensor, progress: Progress | None) -> Iterator[Tensor]:
    hook: Any = getattr(
        vae, "_hf_hook", None
    )  # of model offload, as diffusers' `apply_forward_hook` around `decode` does
    if hasattr(hook, "pre_forward"):
        hook.pre_forward(vae)
    chunks = None if runs_stock(latents) else latent_chunks.chunks_of(vae)
    seen = 0
    for part in latent_chunks.frames(vae, latents, chunks):
        seen += part.shape[2]
        if progress is not None:
            progress(1 + (seen - 1) // chunked.ratio(vae), latents.shape[2])
        yield part


def _pinned(frames: Iterator[Tensor]) -> Iterator[Tensor]:
    """Copies of CUDA tensors in pinned memory, each yielded when the kernels of the next step are in the queue."""
    waiting: tuple[Tensor, torch.cuda.Event] | None = None
    stream: torch.cuda.Stream | None = None
    for part in frames:
        stream = stream or torch.cuda.Stream(part.device)
        stream.wait_stream(torch.cuda.current_stream(part.device))
        with torch.cuda.stream(stream):
            host = torch.empty_like(part, device="cpu", pin_memory=True)
            host.copy_(part, non_blocking=True)
        part.record_stream(stream)
        ready, waiting = waiting, (host, stream.record_event())
        if ready is not None:
            ready[1].synchronize()
            yield ready[0]
    if waiting is not None:
        waiting[1].synchronize()
        yield waiting[0]
