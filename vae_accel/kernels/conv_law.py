"""What our convolutions compute, in torch: the law they are held to, and the vendor's where no form of ours runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import empty_in_layout_of
from .causal_pad import causal_pad
from .causal_pad import reference as padded


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    padding: tuple[int, int] = (0, 0),
    before: int = 0,
    history: Tensor | None = None,
    residual: Tensor | None = None,
    split: int = 1,
    after: int = 0,
    time: str = "zeros",
    space: str = "zeros",
) -> Tensor:
    """The law: the vendor's convolution of the padded clip, and the residual added to what it rounded.

    fp16 beside bf16 is multiplied in fp32: fp16 cannot hold every result.
    """
    dtype = weight.dtype
    if x.dtype != dtype:
        x = x.to(torch.promote_types(x.dtype, dtype))
    sides = _sides(padding, space)
    if x.dim() == 5:
        history = None if history is None else history.to(x.dtype)
        x = padded(x, (*sides, before, after), time=time, space=space, history=history)
    elif any(sides):
        x = F.pad(x, sides, mode=space)
    padding = (0, 0) if any(sides) else padding
    convolve = F.conv3d if x.dim() == 5 else F.conv2d
    y = convolve(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), 1, (0,) * (x.dim() - 4) + padding)
    if split > 1:
        y = interleaved(y, split, x)
    return (y if residual is None else y + residual).to(dtype)


def interleaved(y: Tensor, split: int, like: Tensor) -> Tensor:
    """`[N, split * C, T, H, W]` as frames `[N, C, T * split, H, W]`, those of one frame after each other, in the layout
    of `like` (the vendor's may be another)."""
    frames = y.unflatten(1, (split, -1)).movedim(1, 3)
    shape = (y.shape[0], y.shape[1] // split, y.shape[2] * split, *y.shape[3:])
    out = empty_in_layout_of(like, shape, y.dtype)
    out.unflatten(2, (-1, split)).copy_(frames)
    return out


def has_form(x: Tensor, before: int, history: Tensor | None, after: int, time: str, space: str) -> bool:
    """Whether a form of ours has what is around the clip: history and zeros in front, or repeated frames alone."""
    if space == "reflect" and min(x.shape[-2:]) < 2:  # stock says what is wrong
        return False
    if time == "zeros":
        return after == 0
    return history is None or (after == 0 and history.shape[2] == before)


def vendor(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: tuple[int, int],
    before: int,
    history: Tensor | None,
    residual: Tensor | None,
    split: int,
    after: int,
    time: str,
    space: str,
) -> Tensor:
    """The law, with what is around the clip put there in one pass."""
    if history is not None:
        history = history.to(x.dtype)
    elif x.dim() == 5 and x.shape[2] == 1 and before == weight.shape[2] - 1 and time == "zeros":
        before, weight = 0, weight[:, :, -1:]  # behind zeros only the last tap sees anything: a third of the work
    sides = _sides(padding, space)
    if x.dim() == 5 and any((*sides, before, after)):
        x = causal_pad(x, (*sides, before, after), time=time, space=space, history=history)
        padding, space = (0, 0) if any(sides) else padding, "zeros"
    return reference(x, weight, bias, padding=padding, residual=residual, split=split, space=space)


def _sides(padding: tuple[int, int], space: str) -> tuple[int, int, int, int]:
    """What is to be padded before the convolution, which pads zeros itself."""
    height, width = padding if space != "zeros" else (0, 0)
    return (width, width, height, height)
