"""Clips with a border of zeros: the layout in which a convolution finds every tap at a fixed distance.

Channels-last, and before every frame one row of zeros, before every row a pixel of zeros. What follows a row or a frame
is the next one's border, so one is enough on either side of it, and a 3x3 tap of any pixel, also at the edge of the
picture, lies `kh * row + kw` pixels further in memory. A convolution then is a matrix product over shifted rows of one
matrix `[pixels, C]`, which the copy engine loads without looking at height and width, and the three taps of a row are
one run of 3 C numbers. Rows have an even number of pixels, so that two neighbours can be one pixel of twice the
channels; an image of 480 x 832 grows by 0.4 %.

To everything else a bordered clip is a strided tensor `[N, C, T, H, W]` or `[N, C, H, W]`. That its border holds zeros
is known by a mark on the tensor object, which no view and no result of another operation inherits.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import empty_in_layout_of

_MARK = "_vae_accel_bordered"


class Geometry(NamedTuple):
    """How a bordered clip lies in memory, in pixels: `frames` of `frame` pixels in rows of `row`, and a tail of zeros.

    The first pixel of a frame's picture is `row + 1` pixels behind the frame's start.
    """

    frames: int
    height: int
    width: int

    @property
    def row(self) -> int:
        return self.width + 2 - self.width % 2

    @property
    def frame(self) -> int:
        return (self.height + 1) * self.row

    @property
    def pixels(self) -> int:
        """Of the whole allocation: the frames, and behind the last one as many zeros as before a frame's picture."""
        return self.frames * self.frame + self.first

    @property
    def first(self) -> int:
        return self.row + 1


def geometry(x: Tensor) -> Geometry:
    """Of `[N, C, T, H, W]` or `[N, C, H, W]`, bordered or to be; the samples of a batch are frames after each other."""
    return Geometry(x.shape[0] * (x.shape[2] if x.dim() == 5 else 1), *x.shape[-2:])


def is_bordered(x: Tensor) -> bool:
    """Whether `x` was made here and its border still holds zeros."""
    pixels: Tensor | None = getattr(x, _MARK, None)
    if pixels is None:
        return False
    first = geometry(x).first * x.shape[1] * x.element_size()
    return x.data_ptr() == pixels.data_ptr() + first  # else somebody assigned to `x.data`


def empty(
    shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device, *, versions: bool = False
) -> Tensor:
    """A bordered clip of which nothing is written: the border's zeros are the caller's to write too.

    With `versions` it counts them also when it is made in inference mode, so that a write can be seen.
    """
    frames = shape[0] * (shape[2] if len(shape) == 5 else 1)
    place = Geometry(frames, *shape[-2:])
    with torch.inference_mode(False) if versions else nullcontext():
        pixels = torch.empty((place.pixels, shape[1]), dtype=dtype, device=device)
    return view(pixels, shape)


def view(pixels: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The clip of that shape whose bordered memory is `pixels` `[pixels, C]`; the caller answers for the zeros."""
    channels, place = shape[1], Geometry(shape[0] * (shape[2] if len(shape) == 5 else 1), *shape[-2:])
    frame, row = place.frame * channels, place.row * channels
    time = (frame,) if len(shape) == 5 else ()
    strides = (shape[2] * frame if time else frame, 1, *time, row, channels)
    x = pixels.as_strided(tuple(shape), strides, pixels.storage_offset() + place.first * channels)
    setattr(x, _MARK, pixels)
    return x


def pixels_of(x: Tensor) -> Tensor:
    """The whole memory `[pixels, C]` of a bordered clip."""
    return getattr(x, _MARK)


def bordered(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`x` as a bordered clip of `dtype` (default: its own); itself where it is one."""
    dtype = dtype or x.dtype
    if is_bordered(x) and x.dtype == dtype:
        return x
    place = geometry(x)
    pixels = torch.empty((place.pixels, x.shape[1]), dtype=dtype, device=x.device)
    clear_border(pixels, place)
    out = view(pixels, x.shape)
    out.copy_(x)
    return out


def dense(x: Tensor) -> Tensor:
    """A bordered clip as channels-last, of which views can be taken; anything else as it is."""
    return empty_in_layout_of(x).copy_(x) if is_bordered(x) else x


def clear_border(pixels: Tensor, place: Geometry) -> None:
    """Zeros into all of the border of `[pixels, C]`."""
    frames = pixels[: place.frames * place.frame].view(place.frames, place.height + 1, place.row, -1)
    frames[:, 0].zero_()
    frames[:, :, 0].zero_()
    frames[:, :, place.width + 1 :].zero_()
    pixels[place.frames * place.frame :].zero_()


def last_frames(x: Tensor, count: int) -> Tensor:
    """A bordered copy of the last `count` frames of a bordered `[N, C, T, H, W]`."""
    n, c, t, h, w = x.shape
    shape, place = (n, c, count, h, w), geometry(x)
    pixels = torch.empty((Geometry(n * count, h, w).pixels, c), dtype=x.dtype, device=x.device)
    source = pixels_of(x)
    if n == 1:
        pixels.copy_(source[(t - count) * place.frame :])
        return view(pixels, shape)
    body = n * count * place.frame
    pixels[:body].view(n, count, -1).copy_(source[: n * t * place.frame].view(n, t, -1)[:, t - count :])
    pixels[body:].zero_()
    return view(pixels, shape)


def pictures(x: Tensor) -> Tensor:
    """`[N, C, T, H, W]` as `[N T, C, H, W]`: bordered where `x` is, a view where `x` is bordered or channels-last.

    One frame of a dense clip by indexing: `view` and `flatten` give dimensions of size 1 the stride of a channel, which
    is no memory format to `F.pad` and `torch.cat`, and they answer in NCHW.
    """
    n, c, t, h, w = x.shape
    if is_bordered(x):
        return view(pixels_of(x), (n * t, c, h, w))
    return x[:, :, 0] if t == 1 else x.transpose(1, 2).flatten(0, 1)


def clip(y: Tensor, frames: int) -> Tensor:
    """The reverse: `[N T, C, H, W]` as `[N, C, T, H, W]` with T = `frames`."""
    if is_bordered(y):
        return view(pixels_of(y), (y.shape[0] // frames, y.shape[1], frames, *y.shape[2:]))
    return y.unsqueeze(2) if frames == 1 else y.unflatten(0, (-1, frames)).transpose(1, 2)
