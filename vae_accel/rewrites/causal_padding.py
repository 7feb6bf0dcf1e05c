"""Causal padding in one read and one write, in the layout the activation already has.

Stock copies every activation before a causal convolution: `F.pad(mode="replicate")` (591 of the 3208 ms of a
HunyuanVideo decode on an H200, 369 of 2141 for Mochi, 193 of 1221 for HunyuanVideo-1.5) and, whatever the layout it is
given, into NCDHW; `repeat` and `concatenate` in LTX; `cat`, then `F.pad` in Wan and Cosmos, whose 1x1x1 convolutions
are padded by nothing and copied all the same; in CogVideoX a clone of the whole input as the cache of a 1x1x1 kernel.

Only data moves, so the values that reach the convolution are stock's, bit for bit. So does the layout: an activation
that is channels-last stays so only where the weight is too (the pass channels_last put it there); before a contiguous
weight stock's own padding runs, since another layout may pick another algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, obstacle
from vae_accel.families import causal
from vae_accel.families.causal import Causal, read
from vae_accel.kernels._dispatch import is_channels_last
from vae_accel.kernels.causal_pad import causal_pad
from vae_accel.rewrite import Rewrite, Site, Tier, runs_stock


@dataclass(frozen=True)
class CausalPadding(Rewrite):
    """Takes the `forward` of every causal convolution that `families.causal` describes; the convolution is called."""

    name = "causal_padding"
    tier = Tier.EXACT

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        for path, module in root.named_modules():
            row, stranger = causal.causal_of(module), causal.refusal(module)
            if row is not None:
                yield Site(path, _refusal(module, row) or obstacle(root, ledger, path, "forward"))
            elif stranger is not None:
                yield Site(path, stranger)

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        module = root.get_submodule(site.path)
        row = causal.causal_of(module)
        assert row is not None
        pen.method(site.path, "forward", FORWARDS[row.call], causal.known_as(module, causal.ROWS))


def plain(module: nn.Module, below: Callable[..., Tensor], name: str, hidden_states: Tensor) -> Tensor:
    """HunyuanVideo, HunyuanVideo-1.5 and the image refiner, LTX, Cosmos, MiniMax-H3."""
    row = read(name, module)
    padded = _padded(module, row, row.pad, hidden_states)
    return below(hidden_states) if padded is None else _convolve(module, row, padded)


def with_cache_x(
    module: nn.Module, below: Callable[..., Tensor], name: str, x: Tensor, cache_x: Tensor | None = None
) -> Tensor:
    """Wan and Qwen-Image: up to t0 cached frames in front, zeros before them."""
    row = read(name, module)
    history = None if cache_x is None or row.pad[4] == 0 else cache_x.to(x.device)
    padded = _padded(module, row, row.pad, x, history)
    return below(x, cache_x) if padded is None else _convolve(module, row, padded)


def with_conv_cache(
    module: nn.Module, below: Callable[..., Any], name: str, inputs: Tensor, conv_cache: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """CogVideoX and Mochi: exactly t0 cached frames in front, or the first frame again; returns the next cache too."""
    row = read(name, module)
    frames = row.pad[4]
    history = conv_cache if row.caches and frames else None
    if history is not None and history.shape[2] != frames:
        return below(inputs, conv_cache)
    padded = _padded(module, row, row.pad, inputs, history)
    if padded is None:
        return below(inputs, conv_cache)
    output = _convolve(module, row, padded)
    if not row.caches:
        return output, None
    # Without frames to keep (1x1x1) stock clones all of them, and never reads the clone: `[:, :, -0:]`.
    return output, padded[:, :, -frames:].clone() if frames else padded


def with_causal(
    module: nn.Module, below: Callable[..., Tensor], name: str, hidden_states: Tensor, causal: bool = True
) -> Tensor:
    """LTX-2, which is told by each call whether to pad in front or on both sides."""
    row = read(name, module)
    padded = _padded(module, row, row.pad if causal else row.two_sided, hidden_states)
    return below(hidden_states, causal) if padded is None else _convolve(module, row, padded)


FORWARDS: dict[causal.Call, Callable[..., Any]] = {
    "plain": plain,
    "cache_x": with_cache_x,
    "conv_cache": with_conv_cache,
    "causal": with_causal,
}


def _refusal(module: nn.Module, row: Causal) -> str | None:
    if not isinstance(_conv(module, row), nn.Conv3d):
        return f"its convolution is a {type(_conv(module, row)).__name__}, no Conv3d"
    if min(row.pad) < 0:
        return "it crops instead of padding"
    return None


def _padded(
    module: nn.Module, row: Causal, pad: tuple[int, ...], x: Tensor, history: Tensor | None = None
) -> Tensor | None:
    """`x` `[N, C, T, H, W]` padded as the row says, itself where there is nothing to pad; None: stock must do it."""
    if x.dim() != 5 or x.numel() == 0 or runs_stock(x, history):
        return None
    if is_channels_last(x) and not _reads_channels_last(_conv(module, row)):
        return None
    if row.space == "reflect" and max(pad[:4]) >= min(x.shape[3:]):
        return None  # stock says what is wrong
    if history is not None and not _continues(history, x, pad[4]):
        return None
    if not any(pad):
        return x
    return causal_pad(x, pad, time=row.time, space=row.space, history=history)


def _continues(history: Tensor, x: Tensor, frames: int) -> bool:
    n, c, t, h, w = history.shape
    return (n, c, h, w) == (*x.shape[:2], *x.shape[3:]) and t <= frames and history.dtype == x.dtype


def _reads_channels_last(conv: nn.Module) -> bool:
    """Whether the weight was laid out with its channels innermost. An offloaded weight on meta never was."""
    weight = conv._parameters.get("weight")
    return weight is not None and weight.dim() == 5 and weight.stride(-1) != 1


def _conv(module: nn.Module, row: Causal) -> nn.Module:
    return getattr(module, row.conv) if row.conv else module


def _convolve(module: Any, row: Causal, x: Tensor) -> Tensor:
    if row.conv:
        return getattr(module, row.conv)(x)
    return module._conv_forward(x, module.weight, module.bias)
