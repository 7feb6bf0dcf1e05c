"""Conv3d as batched Conv2d: time becomes batch, and the taps in time become channels or a sum.

A Conv3d over [N, C, T, H, W] is, for each of its kt taps in time, a Conv2d over frames. Two forms:

- `stack`: the kt shifted inputs are concatenated along channels and one Conv2d does the rest, so the accumulation stays
  inside one kernel. Materialises kt copies of the input; walking over time bounds them (`budget` bytes).
- `sum`: kt Conv2d whose results are added. No copy. In 16 bits each partial result is rounded, so the sum is formed in
  fp32 from rounded parts: the error of one convolution grows to 1.45 of stock's (`auto` uses it in fp32 only).

The weight is not copied: its memory is laid out so that each tap, or the stack of taps, is a view of it (`Pen.layout`).
The slot is `_conv_forward(x, weight, bias)`, the arithmetic alone (private in torch, stable since 1.5): causal padding
and feature caches live in the `forward` of the subclasses and are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, obstacle, unusable_weight
from vae_accel.kernels._dispatch import empty_in_layout_of, is_channels_last
from vae_accel.rewrite import Rewrite, Site, Tier, runs_stock

Form = Literal["stack", "sum", "auto"]


@dataclass(frozen=True)
class Conv3dAsConv2d(Rewrite):
    """`max_channels` limits the pass to convolutions whose wider side has at most so many channels (0: no limit)."""

    name = "conv3d_as_conv2d"
    tier = Tier.ROUNDING
    lowers = True

    form: Form = "auto"
    max_channels: int = 0
    channels_last: bool = True
    budget: int = 1 << 28
    compute_dtype: torch.dtype | None = None

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        for path, module in root.named_modules():
            if isinstance(module, nn.Conv3d):
                yield Site(path, self._refusal(root, ledger, path, module))

    def _refusal(self, root: nn.Module, ledger: Ledger, path: str, conv: nn.Conv3d) -> str | None:
        if type(conv)._conv_forward is not nn.Conv3d._conv_forward:
            return f"{type(conv).__name__} has arithmetic of its own (_conv_forward)"
        if isinstance(conv, nn.modules.lazy.LazyModuleMixin):
            return "its shape is not known yet (lazy)"
        if self.max_channels and max(conv.in_channels, conv.out_channels) > self.max_channels:
            return f"wider than {self.max_channels} channels, where the vendor's Conv3d is faster"
        return unusable_weight(conv) or obstacle(root, ledger, path, "_conv_forward")

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        weight = root.get_parameter(f"{site.path}.weight" if site.path else "weight")
        pen.layout(site.path, "weight", _order(_settle(self.form, weight.dtype), self.channels_last))
        pen.method(site.path, "_conv_forward", conv_forward, self.form, self.budget, self.compute_dtype)


def conv_forward(
    conv: nn.Conv3d,
    below: Callable[..., Tensor],
    form: Form,
    budget: int,
    compute_dtype: torch.dtype | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """`nn.Conv3d._conv_forward` on [N, C, T, H, W] or [C, T, H, W], in the input's dtype and memory format."""
    if runs_stock(input, weight, bias) or input.numel() == 0 or input.dim() not in (4, 5):
        return below(input, weight, bias)
    x = input.unsqueeze(0) if input.dim() == 4 else input
    last = is_channels_last(x)
    if compute_dtype is not None and x.dtype.itemsize > compute_dtype.itemsize:
        x, weight = x.to(compute_dtype), weight.to(compute_dtype)
        bias = None if bias is None else bias.to(compute_dtype)
    x, spatial = _pad(x, conv)
    kt, st, dt = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
    frames = (x.shape[2] - dt * (kt - 1) - 1) // st + 1
    if frames < 1 or x.shape[1] != conv.in_channels:
        return below(input, weight, bias)  # stock says what is wrong
    shifted = [x[:, :, t * dt : t * dt + st * (frames - 1) + 1 : st] for t in range(kt)]
    conv2d = functools.partial(
        _conv2d, last=last, stride=conv.stride[1:], padding=spatial, dilation=conv.dilation[1:], groups=conv.groups
    )
    if kt == 1 or _settle(form, x.dtype) == "sum":
        out = _sum(shifted, weight, bias, conv2d)
    else:
        out = _stack(shifted, weight, bias, conv2d, conv.groups, budget)
    out = out.to(input.dtype)
    return out.squeeze(0) if input.dim() == 4 else out


def _settle(form: Form, dtype: torch.dtype) -> Form:
    if form != "auto":
        return form
    return "sum" if dtype.itemsize > 2 else "stack"


def _order(form: Form, channels_last: bool) -> tuple[int, ...]:
    """Memory order of a weight [O, I, kt, kh, kw] in which what each Conv2d reads is a dense view."""
    if form == "sum":
        return (2, 0, 3, 4, 1) if channels_last else (2, 0, 1, 3, 4)
    return (0, 3, 4, 2, 1) if channels_last else (0, 2, 1, 3, 4)


def _pad(x: Tensor, conv: nn.Conv3d) -> tuple[Tensor, tuple[int, int]]:
    """Applies what a Conv2d over frames cannot: padding in time, in a mode, or uneven; returns what is left to it."""
    w0, w1, h0, h1, t0, t1 = conv._reversed_padding_repeated_twice
    if conv.padding_mode != "zeros":
        return F.pad(x, (w0, w1, h0, h1, t0, t1), mode=conv.padding_mode), (0, 0)
    if not isinstance(conv.padding, str):  # causal subclasses reset `padding` to 0 and pad themselves
        t0, h0, w0 = t1, h1, w1 = conv.padding
    if (w0, h0) == (w1, h1):
        return (F.pad(x, (0, 0, 0, 0, t0, t1)) if t0 or t1 else x), (h0, w0)
    return F.pad(x, (w0, w1, h0, h1, t0, t1)), (0, 0)


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, last: bool, **options: Any) -> Tensor:
    """A Conv2d over every frame of [N, C, T, H, W]: [N, O, T, H', W'], dense, channels last or first as told."""
    n, _, t, _, _ = x.shape
    frames = x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2) if last else x.transpose(1, 2).flatten(0, 1)
    y = F.conv2d(frames, weight, bias, **options).unflatten(0, (n, t)).transpose(1, 2)
    return y.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)


def _sum(shifted: list[Tensor], weight: Tensor, bias: Tensor | None, conv2d: Callable[..., Tensor]) -> Tensor:
    total = conv2d(shifted[0], weight[:, :, 0], bias)
    if len(shifted) > 1 and total.dtype.itemsize == 2:
        total = total.float()
    for t, x in enumerate(shifted[1:], 1):
        total += conv2d(x, weight[:, :, t], None)
    return total


def _stack(
    shifted: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    conv2d: Callable[..., Tensor],
    groups: int,
    budget: int,
) -> Tensor:
    stacked = weight.transpose(1, 2).flatten(1, 2)  # [O, kt * I, kh, kw], a view in the layout `_order` gives
    frames = shifted[0].shape[2]
    frame_bytes = len(shifted) * shifted[0].nbytes // frames
    walk = max(1, min(frames, budget // frame_bytes))

    def walked(first: int) -> Tensor:
        parts = [x[:, :, first : first + walk] for x in shifted]
        return conv2d(torch.cat(parts, 1) if groups == 1 else _interleave(parts, groups), stacked, bias)

    y = walked(0)
    if walk == frames:
        return y
    out = empty_in_layout_of(y, (*y.shape[:2], frames, *y.shape[3:]))
    out[:, :, :walk] = y
    for first in range(walk, frames, walk):
        out[:, :, first : first + walk] = walked(first)
    return out


def _interleave(parts: list[Tensor], groups: int) -> Tensor:
    """The taps of each group of channels side by side: kt times [N, C, T, H, W] to [N, kt * C, T, H, W]."""
    return torch.stack([part.unflatten(1, (groups, -1)) for part in parts], 2).flatten(1, 3)
