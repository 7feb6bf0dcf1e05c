"""Clips with a border: the layout in which a convolution finds every tap at a fixed distance.

Channels-last, and before every frame one row of zeros, before every row a pixel of zeros. What follows a row or a frame
is the next one's border, so one is enough on either side of it, and a 3x3 tap of any pixel, also at the edge of the
picture, lies `kh * row + kw` pixels further in memory. A convolution then is a matrix product over shifted rows of one
matrix `[pixels, C]`, which the copy engine loads without looking at height and width, and the three taps of a row are
one run of 3 C numbers. Rows have an even number of pixels, so that two neighbours can be one pixel of twice the
channels; an image of 480 x 832 grows by 0.4 %.

Zeros can be shared; pixels that are repeated ("replicate": the nearest of the picture, "reflect": mirrored at it)
belong to one frame. Where a border holds these, every row has two pixels of it and every frame two rows. The kernels
are the same, given another distance from row to row and from frame to frame. Convolutions leave such a border open;
norms, which read pixel by pixel, repeat the pixels as they read, at no cost; else `bordered` fills it (0.7 % of the
memory of 480 x 832 pixels).

To everything else a bordered clip is a strided tensor `[N, C, T, H, W]` or `[N, C, H, W]`. What its border holds is
known by a mark on the tensor object, which no view and no result of another operation inherits. An operation in place
leaves zeros as they are; a repeated border is open after it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._dispatch import LazyFunction, empty_in_layout_of

tl: Any = None  # triton.language, bound at the first launch

BORDERS = ("zeros", "replicate", "reflect")  # a kernel takes the index
_MARK = "_vae_accel_bordered"


class Geometry(NamedTuple):
    """How a bordered clip lies in memory, in pixels: `frames` of `frame` pixels in rows of `row`, and a tail.

    The first pixel of a frame's picture is `row + 1` pixels behind the frame's start. `border`: one of `BORDERS`.
    """

    frames: int
    height: int
    width: int
    border: str = "zeros"

    @property
    def row(self) -> int:
        odd = self.width % 2
        return self.width + 2 + (odd if self.border != "zeros" else -odd)

    @property
    def frame(self) -> int:
        return (self.height + (2 if self.border != "zeros" else 1)) * self.row

    @property
    def pixels(self) -> int:
        """Of the whole allocation: the frames, and behind the last one as many as before a frame's picture."""
        return self.frames * self.frame + self.first

    @property
    def first(self) -> int:
        return self.row + 1


class _Mark(NamedTuple):
    """What is known of a bordered tensor. `version`: of the tensor as its border was filled; None while it is open."""

    pixels: Tensor
    border: str
    version: int | None


@LazyFunction
def is_picture(pixel, ROW, FRAME, H, W):
    """Whether a pixel of a bordered clip, counted from the start of its memory, is none of the border."""
    pixel = pixel % FRAME
    return (pixel >= ROW) & (pixel < (H + 1) * ROW) & (pixel % ROW > 0) & (pixel % ROW <= W)


@LazyFunction
def repeated(pixel, ROW, FRAME, H, W, BORDER: tl.constexpr):
    """The pixel of the picture whose value stands at `pixel`, as `BORDERS[BORDER]` says."""
    h = pixel % FRAME // ROW - 1
    w = pixel % ROW - 1
    if BORDER == 2:
        h = H - 1 - tl.abs(H - 1 - tl.abs(h))
        w = W - 1 - tl.abs(W - 1 - tl.abs(w))
    h = tl.minimum(tl.maximum(h, 0), H - 1)
    w = tl.minimum(tl.maximum(w, 0), W - 1)
    return pixel // FRAME * FRAME + (h + 1) * ROW + w + 1


def geometry(x: Tensor) -> Geometry:
    """Of `[N, C, T, H, W]` or `[N, C, H, W]`, bordered or to be; the samples of a batch are frames after each other."""
    mark: _Mark | None = getattr(x, _MARK, None)
    return _geometry(x.shape, "zeros" if mark is None else mark.border)


def _geometry(shape: tuple[int, ...] | torch.Size, border: str) -> Geometry:
    return Geometry(shape[0] * (shape[2] if len(shape) == 5 else 1), shape[-2], shape[-1], border)


def is_bordered(x: Tensor) -> bool:
    """Whether `x` was made here and lies as it says."""
    mark: _Mark | None = getattr(x, _MARK, None)
    if mark is None:
        return False
    first = geometry(x).first * x.shape[1] * x.element_size()
    return x.data_ptr() == mark.pixels.data_ptr() + first  # else somebody assigned to `x.data`


def is_filled(x: Tensor) -> bool:
    """Whether the border of a bordered clip holds what it is to hold."""
    mark: _Mark = getattr(x, _MARK)
    return mark.border == "zeros" or mark.version == x._version


def empty(
    shape: tuple[int, ...] | torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    border: str = "zeros",
    *,
    versions: bool = False,
) -> Tensor:
    """A bordered clip of which nothing is written: zeros around it are the caller's to write too, a repeated border is
    open.

    With `versions` it counts them also when it is made in inference mode, so that a write can be seen; a clip whose
    border is repeated always does.
    """
    place = _geometry(shape, border)
    with torch.inference_mode(False) if versions or border != "zeros" else nullcontext():
        pixels = torch.empty((place.pixels, shape[1]), dtype=dtype, device=device)
    return view(pixels, shape, border)


def view(pixels: Tensor, shape: tuple[int, ...] | torch.Size, border: str = "zeros", *, filled: bool = False) -> Tensor:
    """The clip of that shape whose bordered memory is `pixels` `[pixels, C]`; the caller answers for zeros, and for
    a repeated border where it is `filled`."""
    channels, place = shape[1], _geometry(shape, border)
    frame, row = place.frame * channels, place.row * channels
    time = (frame,) if len(shape) == 5 else ()
    strides = (shape[2] * frame if time else frame, 1, *time, row, channels)
    x = pixels.as_strided(tuple(shape), strides, pixels.storage_offset() + place.first * channels)
    setattr(x, _MARK, _Mark(pixels, border, x._version if filled and border != "zeros" else None))
    return x


def pixels_of(x: Tensor) -> Tensor:
    """The whole memory `[pixels, C]` of a bordered clip."""
    mark: _Mark = getattr(x, _MARK)
    return mark.pixels


def bordered(x: Tensor, dtype: torch.dtype | None = None, border: str = "zeros") -> Tensor:
    """`x` as a bordered clip of `dtype` (default: its own), what lies around it with it; itself where it is one."""
    x = laid_out(x, dtype, border)
    if not is_filled(x):
        _fill(pixels_of(x), geometry(x))
        setattr(x, _MARK, _Mark(pixels_of(x), border, x._version))
    return x


def laid_out(x: Tensor, dtype: torch.dtype | None = None, border: str = "zeros") -> Tensor:
    """`bordered`, but for a repeated border that may be open: for who reads the pictures alone."""
    dtype = dtype or x.dtype
    if is_bordered(x) and x.dtype == dtype and geometry(x).border == border:
        return x
    out = empty(x.shape, dtype, x.device, border)
    if border == "zeros":
        clear_border(pixels_of(out), geometry(out))
    return out.copy_(x)


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


def _fill(pixels: Tensor, place: Geometry) -> None:
    """The picture's pixels again into a border of its own: the columns, then whole rows, corners with them."""
    frames = pixels[: place.frames * place.frame].view(place.frames, place.height + 2, place.row, -1)
    inner = 1 if place.border == "reflect" else 0
    h, w = place.height - inner, place.width - inner
    frames[:, :, 0] = frames[:, :, 1 + inner]
    frames[:, :, place.width + 1 :] = frames[:, :, w : w + 1]
    frames[:, 0] = frames[:, 1 + inner]
    frames[:, place.height + 1] = frames[:, h]


def last_frames(x: Tensor, count: int) -> Tensor:
    """A bordered copy of the last `count` frames of a bordered `[N, C, T, H, W]`."""
    n, c, t, h, w = x.shape
    shape, place = (n, c, count, h, w), geometry(x)
    pixels, source = pixels_of(empty(shape, x.dtype, x.device, place.border)), pixels_of(x)
    if n == 1:
        pixels.copy_(source[(t - count) * place.frame :])
        return view(pixels, shape, place.border, filled=is_filled(x))
    body = n * count * place.frame
    pixels[:body].view(n, count, -1).copy_(source[: n * t * place.frame].view(n, t, -1)[:, t - count :])
    pixels[body:].zero_()
    return view(pixels, shape, place.border, filled=is_filled(x))


def pictures(x: Tensor) -> Tensor:
    """`[N, C, T, H, W]` as `[N T, C, H, W]`: bordered where `x` is, a view where `x` is bordered or channels-last.

    One frame of a dense clip by indexing: `view` and `flatten` give dimensions of size 1 the stride of a channel, which
    is no memory format to `F.pad` and `torch.cat`, and they answer in NCHW.
    """
    n, c, t, h, w = x.shape
    if is_bordered(x):
        return _seen_as(x, (n * t, c, h, w))
    return x[:, :, 0] if t == 1 else x.transpose(1, 2).flatten(0, 1)


def clip(y: Tensor, frames: int) -> Tensor:
    """The reverse: `[N T, C, H, W]` as `[N, C, T, H, W]` with T = `frames`."""
    if is_bordered(y):
        return _seen_as(y, (y.shape[0] // frames, y.shape[1], frames, *y.shape[2:]))
    return y.unsqueeze(2) if frames == 1 else y.unflatten(0, (-1, frames)).transpose(1, 2)


def _seen_as(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return view(pixels_of(x), shape, geometry(x).border, filled=is_filled(x))
