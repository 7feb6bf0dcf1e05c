"""Nearest 2x upsampling followed by a 3x3 convolution, as one convolution on the small picture.

A nearest upsampling is a transposed convolution with a box of ones, and two convolutions are one: along each axis the
three taps (w0, w1, w2) become the four (w0, w0 + w1, w1 + w2, w2), of which an even output pixel sees two and an odd
one the other two. 4 multiplications instead of 9 per output, and the upsampled picture is never written. Two forms:

- `phases`: one Conv2d with 2x2 kernels makes the four phases as channels, on the grid of (H + 1) x (W + 1) corners of
  pixels; one pass interleaves them.
- `transposed`: one ConvTranspose2d with kernel 4, stride 2, padding 1. Nothing to interleave, but its speed is the
  vendor's: MIOpen's is 20 times slower than its convolution.

Where time is doubled too (HunyuanVideo: the first frame single, replicated borders, causal) the same holds along time,
8 taps remain of 27, and two neighbouring frames stand in the channels of a Conv2d. `budget` bounds, in bytes, what
is materialised at once beside input and output.

The taps are summed at every call, in fp32 from the weight as it is then, and rounded once: nothing can go stale. In 16
bits that is one rounding more than stock's. Few convolutions fold, so a decode's error was 1.02 of stock's on average
and 0.96 to 1.06 by model and kind of latent (SD, HunyuanVideo, CogVideoX, Wan 2.1: narrow, random, of full depth).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, obstacle, unusable_weight
from vae_accel.families.upsamplers import Upsampler, is_marked, upsampler_of
from vae_accel.kernels.causal_pad import causal_pad
from vae_accel.rewrite import Rewrite, Site, Tier, runs_stock

Form = Literal["phases", "transposed"]


@dataclass(frozen=True)
class FoldedUpsample(Rewrite):
    """`form` as above; `budget` in bytes."""

    name = "folded_upsample"
    tier = Tier.ROUNDING
    lowers = True

    form: Form = "phases"
    budget: int = 1 << 28
    compute_dtype: torch.dtype | None = None

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        for path, module in root.named_modules():
            found = upsampler_of(module)
            if isinstance(found, str):
                yield Site(path, found)
            elif found is not None:
                yield Site(path, _refusal(root, ledger, path, found), {"upsampler": found})

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        upsampler: Upsampler = site.facts["upsampler"]
        for hand in upsampler.hands:
            pen.method(_join(site.path, hand.path), hand.slot, hand.function, *hand.facts)
        for name in upsampler.convs:
            path = _join(site.path, name)
            border = upsampler.pad or _border(root.get_submodule(path))
            facts = (self.form, upsampler.time, border, upsampler.crop, self.budget, self.compute_dtype)
            pen.method(path, "_conv_forward", conv_forward, *facts)


def _refusal(root: nn.Module, ledger: Ledger, path: str, upsampler: Upsampler) -> str | None:
    slots = [(_join(path, hand.path), hand.slot) for hand in upsampler.hands]
    for name in upsampler.convs:
        conv = root.get_submodule(_join(path, name))
        reason = _unlike(conv, upsampler) or unusable_weight(conv)
        if reason is not None:
            return f"{name}: {reason}"
        slots.append((_join(path, name), "_conv_forward"))
    reasons = (obstacle(root, ledger, *slot) for slot in slots)
    return next((reason for reason in reasons if reason is not None), None)


def _unlike(conv: nn.Module, upsampler: Upsampler) -> str | None:
    """Why a convolution is not the 3x3 one that folds."""
    if not isinstance(conv, (nn.Conv2d, nn.Conv3d)):
        return f"{type(conv).__name__} is no convolution"
    stock = nn.Conv2d if isinstance(conv, nn.Conv2d) else nn.Conv3d
    if type(conv)._conv_forward is not stock._conv_forward:
        return f"{type(conv).__name__} has arithmetic of its own (_conv_forward)"
    if isinstance(conv, nn.modules.lazy.LazyModuleMixin):
        return "its shape is not known yet (lazy)"
    around = (0, 0) if upsampler.pad else (1, 1)
    time = conv.kernel_size[:-2]
    if conv.kernel_size[-2:] != (3, 3) or time not in ((), (1,), (3,)) or (upsampler.time == "double" and time != (3,)):
        return f"a kernel of {conv.kernel_size} does not fold"
    if conv.padding != (0,) * len(time) + around or (time == (3,) and upsampler.pad != "replicate"):
        return f"a padding of {conv.padding} does not fold"
    if set(conv.stride) != {1} or set(conv.dilation) != {1} or conv.groups != 1:
        return "stride, dilation or groups"
    return None


def _border(conv: Any) -> str:
    """How the small picture continues where the convolution's own padding mode continues the upsampled one."""
    return "replicate" if conv.padding_mode == "reflect" else conv.padding_mode  # its second pixel is the first again


def _join(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)


def conv_forward(
    conv: nn.Conv2d | nn.Conv3d,
    below: Callable[..., Tensor],
    form: Form,
    time: str,
    border: str,
    crop: int | None,
    budget: int,
    compute_dtype: torch.dtype | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """`_conv_forward` of a convolution behind a nearest 2x: [N, C, (T,) H, W, 1] -> [N, C', (T',) 2H, 2W].

    With `crop`, of the upsampled picture with that many pixels of padding. Memory format and dtype are the input's.
    """
    axes = len(conv.kernel_size) + 2
    if crop is None and is_marked(input, axes):
        x = input.squeeze(-1)
    elif crop is not None and input.dim() == axes and input.numel() and not runs_stock(input, weight, bias):
        x = input[..., crop : input.shape[-2] - crop : 2, crop : input.shape[-1] - crop : 2]
    else:
        return below(input, weight, bias)
    dtype = x.dtype
    if compute_dtype is not None and dtype.itemsize > compute_dtype.itemsize:
        x, bias = x.to(compute_dtype), None if bias is None else bias.to(compute_dtype)
    clip, last = axes == 5, _is_channels_last(input.squeeze(-1) if crop is None else input)
    formats = (torch.channels_last, torch.channels_last_3d) if last else (torch.contiguous_format,) * 2
    n, (t, h, w) = x.shape[0], (x.shape[2:] if clip else (x.shape[0], *x.shape[2:]))
    if clip:
        before = 2 if time == "hold" and weight.shape[2] == 3 else 0
        if border != "zeros" or before:
            x = causal_pad(x, (1, 1, 1, 1, before, 0), time="replicate", space=border)
    else:  # a batch of pictures is a clip of which every frame is convolved by itself
        x = x if border == "zeros" else F.pad(x, (1, 1, 1, 1), mode=border)
        x, weight, n = x.transpose(0, 1).unsqueeze(0), weight.unsqueeze(2), 1
    inside = 1 if border == "zeros" else 0
    o, kt = weight.shape[0], weight.shape[2]
    if kt == 1 and form == "transposed":  # the result as it comes
        y = _convolve(x, _fold(weight, "hold", form, last, x.dtype), bias, 1, form, inside).to(dtype)
        y = y.unflatten(0, (n, t)).transpose(1, 2) if clip else y
        return y.contiguous(memory_format=formats[clip])
    frames = 2 * t - 1 if time == "double" and kt > 1 else t
    shape = (n, o, frames, 2 * h, 2 * w) if clip else (t, o, 2 * h, 2 * w)
    out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=formats[clip])
    clips = out if clip else out.transpose(0, 1).unsqueeze(0)
    _fill(clips, x, weight, bias, form, time, inside, last, budget)
    return out


def _fill(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    form: Form,
    time: str,
    inside: int,
    last: bool,
    budget: int,
) -> None:
    """Writes the upsampled and convolved clip [N, C', T', 2H, 2W] of the padded `x` [N, C, T, H, W]."""
    t, together = x.shape[2], 1
    if weight.shape[2] == 1:
        taps = [x]
    elif time == "hold":
        t = t - 2
        taps = [x[:, :, i : i + t] for i in range(3)]
    else:
        first = _fold(weight, "first", form, last, x.dtype)
        _place(out[:, :, :1], _convolve(x[:, :, :1], first, bias, 1, form, inside), 1, form)
        out, t, together = out[:, :, 1:], t - 1, 2
        taps = [x[:, :, :-1], x[:, :, 1:]]
    if t == 0:
        return
    kernel = _fold(weight, time, form, last, x.dtype)
    frame = 2 * math.prod(out.shape[:2]) * math.prod(out.shape[3:]) * together * x.element_size()
    walk = max(1, min(t, budget // max(frame, 1)))
    for k in range(0, t, walk):
        piece = [tap[:, :, k : k + walk] for tap in taps]
        y = _convolve(piece[0] if len(piece) == 1 else torch.cat(piece, 1), kernel, bias, together, form, inside)
        _place(out[:, :, k * together : (k + walk) * together], y, together, form)


def _fold(weight: Tensor, time: str, form: Form, last: bool, dtype: torch.dtype) -> Tensor:
    """The kernel over one small frame, from a weight [O, I, kt, 3, 3]; sums in at least fp32, rounded once to `dtype`.

    `phases`: [(4 phases, P, O), (taps, I), 2, 2]; `transposed`: [(taps, I), (P, O), 4, 4]. P is 2 where time doubles.
    """
    o, i = weight.shape[:2]
    if time != "hold":
        window, around = (2, 1) if time == "double" else (3, 0)
        weight = weight if weight.dtype == torch.float64 else weight.float()
        weight = _sums(weight.flatten(3), (window, 1), (around, 0)).unflatten(3, (3, 3))
    taps = _sums(weight.flatten(1, 2), (2, 2), (1, 1))
    taps = taps.reshape(o, i, -1, 2 if time == "double" else 1, 4, 4)
    if time == "double":
        taps = taps.flip(3)  # of the two frames between f[k-1] and f[k], the odd one comes first
    if form == "transposed":
        return _dense(taps.flip((4, 5)).permute(2, 1, 3, 0, 4, 5), 2, last).to(dtype)
    taps = taps.unflatten(5, (2, 2)).unflatten(4, (2, 2))  # o, i, tap, p, kh, ph, kw, pw
    return _dense(taps.permute(5, 7, 3, 0, 2, 1, 4, 6), 4, last).to(dtype)


def _sums(planes: Tensor, window: tuple[int, int], around: tuple[int, int]) -> Tensor:
    """Sums over a window sliding over zero-padded planes [N, C, a, b]; 16 bits accumulate in fp32 and round once."""

    def pool(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, 1, around, divisor_override=1)

    if planes.device.type != "cpu":
        return pool(planes)
    # The CPU pools planes of nine one by one: 17 ms for 256 x 256 of them, where a product takes 0.3 ms.
    a, b = planes.shape[2:]
    each = pool(torch.eye(a * b, dtype=planes.dtype).view(a * b, 1, a, b))
    return (planes.flatten(2) @ each.flatten(1)).unflatten(2, each.shape[2:])


def _dense(taps: Tensor, rows: int, last: bool) -> Tensor:
    """Merges all axes but the last two into `rows` of them and the rest, channels-last in memory where `last`."""
    if not last:
        return taps.flatten(rows, -3).flatten(0, rows - 1)
    axes = range(taps.dim() - 2)
    taps = taps.permute(*axes[:rows], -2, -1, *axes[rows:])
    return taps.flatten(rows + 2).flatten(0, rows - 1).permute(0, 3, 1, 2)


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, together: int, form: Form, inside: int) -> Tensor:
    """Every frame of [N, I, T, H, W]: [N * T, 4 * P * O, H + 1, W + 1] phases, or [N * T, P * O, 2H, 2W].

    `inside`: pixels of zeros the convolution adds around the frame; otherwise it comes with one of padding.
    """
    frames = x.transpose(1, 2).flatten(0, 1)
    repeats = together * (4 if form == "phases" else 1)
    bias = bias if bias is None or repeats == 1 else bias.repeat(repeats)
    if form == "phases":
        return F.conv2d(frames, kernel, bias, padding=inside)
    return F.conv_transpose2d(frames, kernel, bias, stride=2, padding=3 - 2 * inside)


def _place(out: Tensor, y: Tensor, together: int, form: Form) -> None:
    """Writes what `_convolve` made of T frames into `out` [N, O, T * P, 2H, 2W], in one pass."""
    n, o, frames, h, w = out.shape
    t = frames // together
    out = out.unflatten(2, (t, together))
    if form == "transposed":
        out.copy_(y.unflatten(0, (n, t)).unflatten(2, (together, o)).permute(0, 3, 1, 2, 4, 5))
        return
    h, w = h // 2, w // 2
    frame, channel, row, column = y.stride()
    phase = together * o * channel
    # Pixel (2i + a, 2j + b) is phase (a, b) at corner (i + a, j + b): the shift is a stride of the phase.
    shape = (n, o, t, together, h, 2, w, 2)
    strides = (t * frame, channel, frame, o * channel, row, 2 * phase + row, column, phase + column)
    out.unflatten(4, (h, 2)).unflatten(6, (w, 2)).copy_(y.as_strided(shape, strides))


def _is_channels_last(x: Tensor) -> bool:
    format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=format) and not x.is_contiguous()
