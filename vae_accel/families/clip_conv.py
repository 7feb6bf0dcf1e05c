"""The forwards of causal convolutions that wrap an nn.Conv3d, on the fused convolution.

What surrounds a clip its row says (`families/causal.py`). The wrapper hands the convolution the clip as it is, and by
keyword what it stands in, which only wrappers here pass: so weights are read inside their own module's call. What ours
does not do (a gradient, autocast, another dtype, shape or card) goes below in the model's dtype, and a residual is
added after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.edits import unusable_weight
from vae_accel.families.causal import ROWS as CAUSAL
from vae_accel.families.causal import Call, Causal, causal_of, known_as, read
from vae_accel.families.kl import NORMED
from vae_accel.families.row import Block, Hand
from vae_accel.kernels.bordered import is_bordered, last_frames
from vae_accel.kernels.conv import conv as fused
from vae_accel.kernels.eligible import runs, unsupported
from vae_accel.kernels.half_operands import HALVED
from vae_accel.kernels.thin_conv import MOST, thin_conv
from vae_accel.kernels.upsample_conv import upsample_conv
from vae_accel.rewrite import runs_stock

Around = dict[str, Any]
IN_PIECES = ("CogVideoXSafeConv3d",)  # nn.Conv3d, whose forward convolves long clips in pieces


def plain(
    module: Any,
    below: Callable[..., Tensor],
    name: str,
    hidden_states: Tensor,
    residual: Tensor | None = None,
    upsampled: dict[str, Any] | None = None,
) -> Tensor:
    """[N, C, T, H, W], plus `residual` [N, C', T, H, W]; `upsampled` is for `upsample` to say."""
    x = hidden_states
    if _ours(module.conv, x, residual):
        row = read(name, module)
        return module.conv(x, around=_around(module.conv, row, row.pad), residual=residual, upsampled=upsampled)
    return _added(below(_plain(module.conv, x)), residual)


def with_cache(
    module: Any,
    below: Callable[..., tuple[Tensor, Tensor | None]],
    name: str,
    inputs: Tensor,
    conv_cache: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same behind the frames `conv_cache` [N, C, t0, H, W] of the call before, and the frames for the next; None
    where nothing is to be kept: Mochi's clips come whole, and a kernel may have no taps in time."""
    row, x = read(name, module), inputs
    keeps = row.pad[4] if row.caches else 0
    history = conv_cache if keeps else None
    if not (_ours(module.conv, x, residual, history) and _continues(x, history, keeps)):
        y, kept = below(_plain(module.conv, x), _plain(module.conv, conv_cache))
        return _added(y, residual), kept
    history = None if history is None else history.to(x.dtype)
    y = module.conv(x, around={**_around(module.conv, row, row.pad), "history": history}, residual=residual)
    return y, _kept(x, history, keeps) if keeps else None


def convolve(
    conv: Any,
    below: Callable[..., Tensor],
    normed: bool,
    input: Tensor,
    around: Around | None = None,
    residual: Tensor | None = None,
    upsampled: dict[str, Any] | None = None,
) -> Tensor:
    """nn.Conv3d's forward; with what is `around`, of a clip that is not padded.

    `normed`: a GroupNorm reads the result, and its statistics are gathered on the way.
    """
    if around is None:
        return below(_plain(conv, input))
    if upsampled is not None:
        return upsample_conv(input, conv.weight, conv.bias, space=around["space"], statistics=normed, **upsampled)
    if conv.out_channels <= MOST and around["padding"] == (1, 1) and residual is None:
        return thin_conv(input, conv.weight, conv.bias, **{k: v for k, v in around.items() if k != "padding"})
    return fused(input, conv.weight, conv.bias, residual=residual, statistics=normed, **around)


def _continues(x: Tensor, history: Tensor | None, frames: int) -> bool:
    """Whether `history` is so many frames in front of `x`, or None; else stock says what is wrong."""
    return history is None or (history.shape == (*x.shape[:2], frames, *x.shape[3:]) and history.device == x.device)


def _kept(x: Tensor, history: Tensor | None, count: int) -> Tensor:
    """The last `count` frames of `x` behind `history`, or behind its own first one again.

    Copies, so that a long clip is not kept alive and the caller's, which is not bordered, may be written to.
    """
    if x.shape[2] > count:
        return last_frames(x, count) if is_bordered(x) else x[:, :, -count:].clone()
    x = x if is_bordered(x) else x.clone()
    if x.shape[2] == count:
        return x
    front = x[:, :, :1].expand(-1, -1, count, -1, -1) if history is None else history
    # A single frame, as of an image, is not copied in vain.
    return front if history is None and x.shape[2] == 1 else torch.cat([front[:, :, x.shape[2] :], x], 2)


def pointwise(conv: Any, below: Callable[..., Tensor], input: Tensor) -> Tensor:
    """nn.Conv3d's forward with a kernel of one pixel, of a bordered clip [N, C, T, H, W]: bordered as it is."""
    if is_bordered(input) and _ours(conv, input):
        return fused(input, conv.weight, conv.bias)
    return below(input)


def upsamples(module: Any, x: Tensor) -> bool:
    """Whether `module(x, upsampled=...)` convolves `x` as if it had been upsampled."""
    return _ours(module.conv, x) and unsupported(x, module.conv.weight, (1, 1)) is None


def hands(module: nn.Module, name: str, normed: bool = False) -> tuple[Hand, ...]:
    """Of the causal convolution `name` in `module`; `normed` as in `convolve`."""
    wrapper = module.get_submodule(name)
    known = known_as(wrapper, CAUSAL) or ""
    forward = FORWARDS[read(known, wrapper).call]
    return Hand(name, "forward", forward, (known,)), Hand(f"{name}.conv", "forward", convolve, (normed,))


FORWARDS: dict[Call, Callable[..., Any]] = {"plain": plain, "conv_cache": with_cache}


def with_convs(
    module: nn.Module, names: list[str], further: tuple[Hand, ...] = (), norms: tuple[str, ...] = ()
) -> Block | str:
    """A block with causal convolutions `names` that GroupNorms read as in `NORMED`; why not, where one is unlike."""
    convs = (hand for name in names for hand in hands(module, name, name in NORMED))
    return unlike_all(module, names) or Block((*further, *convs), norms)


def unlike_all(module: nn.Module, names: list[str]) -> str | None:
    """Why one of the convolutions `names` in a module is not for these forwards, or None."""
    reasons = ((name, unlike(module.get_submodule(name))) for name in names)
    return next((f"{name}: {reason}" for name, reason in reasons if reason is not None), None)


def unlike(module: nn.Module) -> str | None:
    """Why a module is not a convolution for these forwards, or None."""
    row = causal_of(module)
    if row is None or not row.conv or row.call not in FORWARDS:
        return f"{type(module).__name__} is no causal convolution known here"
    conv: Any = getattr(module, row.conv)
    if type(conv) is not nn.Conv3d and known_as(conv, IN_PIECES) is None:
        return f"its convolution is a {type(conv).__name__}"
    if reason := _uneven(conv):
        return reason
    w0, w1, h0, h1 = row.pad[:4]
    twice = any(row.pad[:4]) and (any(conv.padding) or conv.padding_mode != "zeros")
    if isinstance(conv.padding, str) or conv.padding[0] or (w0, h0) != (w1, h1) or twice:
        return f"a padding of {row.pad} and of {conv.padding}"
    if conv.padding_mode not in ("zeros", "reflect"):
        return f"a padding in mode {conv.padding_mode}"
    return unusable_weight(conv)


def unlike_pointwise(conv: Any) -> str | None:
    """Why a module is not one for `pointwise`, or None."""
    if type(conv) is not nn.Conv3d and known_as(conv, IN_PIECES) is None:
        return f"{type(conv).__name__} is no Conv3d"
    if conv.kernel_size != (1, 1, 1) or conv.padding != (0, 0, 0):
        return f"a kernel of {conv.kernel_size} with a padding of {conv.padding}"
    return _uneven(conv) or unusable_weight(conv)


def _uneven(conv: nn.Conv3d) -> str | None:
    even = set(conv.stride) == {1} and set(conv.dilation) == {1} and conv.groups == 1
    return None if even else "stride, dilation or groups"


def _around(conv: Any, row: Causal, pad: tuple[int, ...]) -> Around:
    outside = any(pad[:4])
    return {
        "padding": (pad[2], pad[0]) if outside else conv.padding[1:],
        "space": row.space if outside else conv.padding_mode,
        "before": pad[4],
        "after": pad[5],
        "time": row.time,
    }


def _ours(conv: Any, x: Tensor, *others: Tensor | None) -> bool:
    if not isinstance(conv, nn.Conv3d) or x.dim() != 5 or x.shape[1] != conv.in_channels or x.numel() == 0:
        return False
    fits = runs(x) and (x.dtype == conv.weight.dtype or _is_half(conv, x))
    return fits and not runs_stock(x, *others, conv.weight, conv.bias)


def _plain(conv: Any, x: Tensor | None) -> Any:
    """In the model's dtype again where a norm wrote fp16."""
    return x.to(conv.weight.dtype) if x is not None and _is_half(conv, x) else x


def _is_half(conv: Any, x: Tensor) -> bool:
    weight = getattr(conv, "weight", None)
    return x.dtype == torch.float16 and isinstance(weight, Tensor) and weight.dtype in HALVED


def _added(y: Tensor, residual: Tensor | None) -> Tensor:
    return y if residual is None else y + residual
