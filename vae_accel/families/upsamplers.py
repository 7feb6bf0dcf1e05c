"""The upsamplers of diffusers 0.42: nearest 2x in height and width (some in time too), then a 3x3 convolution.

`upsampler_of(module)` says where the convolution is and how it is to get the small picture instead of the upsampled
one. Two ways:

- *Handed on*: the upsampler skips the interpolation and calls the convolution, through its own call path (hooks,
  offload), with the small picture *marked* by a last axis of size 1. No stock convolution takes such an input, so
  nothing can mistake one for the other, and no state says which it is. `forward`s that do so are here.
- *Cropped*: the upsampled picture is needed anyway (a residual), so only the convolution changes: it keeps every second
  pixel of what it is given (`crop` pixels of padding inside). Nothing but its upsampler may call it.

Not here: EasyAnimateUpsampler3D (its causal convolution keeps upsampled frames between calls), the temporal halves of
Cosmos, KVAE and Kandinsky 6 (3x1x1 kernels over repeated frames), and upsamplers that convolve first and then shuffle
depth to space (LTX, HunyuanVideo 1.5, Mochi): there is nothing to fold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_accel.families.match import by_row, known_as
from vae_accel.families.row import Hand
from vae_accel.kernels._dispatch import empty_in_layout_of
from vae_accel.rewrite import runs_stock


@dataclass(frozen=True)
class Upsampler:
    """convs: paths, from the upsampler, of the convolutions that follow a nearest 2x.

    hands: the methods between the picture and them. crop: None where they hand it on, else pixels of padding around
        the upsampled picture that the convolution is given. time: `double` where the first frame stays single and
        every other one is doubled, `hold` where frames keep their number.
    pad: how the picture continues past its border where the convolution itself does not say; '' where it does.
    """

    convs: tuple[str, ...]
    hands: tuple[Hand, ...] = ()
    crop: int | None = None
    time: str = "hold"
    pad: str = ""


def upsampler_of(module: nn.Module) -> Upsampler | str | None:
    """How this module upsamples; the reason where it is an upsampler that cannot be folded; None where it is none."""
    return by_row(module, ROWS)


def mark(x: Tensor, single: bool = False) -> Tensor:
    """The small picture as the folded convolution knows it: a last axis of size 1.

    `single`: stock upsamples in fp32, which is a rounding where the model is in fp64.
    """
    if single and x.dtype == torch.float64:
        x = x.float().double()
    return x.unsqueeze(-1)


def is_marked(x: Tensor, axes: int) -> bool:
    """Whether `x`, of a picture with `axes` axes (4 for images, 5 for clips), is a marked one."""
    return x.dim() == axes + 1


def foldable(x: Tensor, conv: Any) -> bool:
    """Whether this call may hand `x` on: the convolution is still one (no adapter wraps it) and the input fits it."""
    if not isinstance(conv, (nn.Conv2d, nn.Conv3d)) or x.dim() != len(conv.kernel_size) + 2:
        return False
    if x.shape[1] != conv.in_channels or x.numel() == 0 or x.device.type == "meta":
        return False
    return not runs_stock(x, conv.weight, conv.bias)


def image_forward(
    module: nn.Module, below: Callable[..., Tensor], conv: str, single: bool, *args: Any, **kwargs: Any
) -> Tensor:
    """[N, C, H, W] -> [N, C', 2H, 2W]. Any further argument (`output_size`, the deprecated `scale`) is stock's."""
    child = getattr(module, conv)
    further = [*args[1:], *kwargs.values()]
    if not args or any(value is not None for value in further) or not foldable(args[0], child):
        return below(*args, **kwargs)
    return child(mark(args[0], single))


def sequence_forward(
    sequence: nn.Sequential, below: Callable[..., Tensor], pairs: tuple[int, ...], single: bool, x: Tensor
) -> Tensor:
    """nn.Sequential where at each of `pairs` an nn.Upsample is followed by its convolution."""
    if x.dim() != 4 or not all(isinstance(sequence[i + 1], nn.Conv2d) for i in pairs):
        return below(x)
    for i, child in enumerate(sequence):
        x = child(mark(x, single) if i in pairs and foldable(x, sequence[i + 1]) else x)
    return x


def upsample_forward(upsample: nn.Upsample, below: Callable[..., Tensor], x: Tensor) -> Tensor:
    """nn.Upsample inside such a sequence: a marked picture passes."""
    return x if is_marked(x, 4) else below(x)


def dc_forward(block: Any, below: Callable[..., Tensor], x: Tensor) -> Tensor:
    """DC-AE: plus a shortcut that shuffles repeated channels to space."""
    if not foldable(x, block.conv):
        return below(x)
    y = block.conv(mark(x))
    if block.shortcut:
        repeated = x.repeat_interleave(block.repeats, dim=1, output_size=x.shape[1] * block.repeats)
        y = y + F.pixel_shuffle(repeated, 2)
    return y


def cogvideox_forward(block: Any, below: Callable[..., Tensor], x: Tensor) -> Tensor:
    """CogVideoX, [N, C, T, H, W]: stock convolves frames it has just duplicated; here they are duplicated afterwards.

    With an odd T > 1 the first frame stays single (2T - 1 frames), with an even T it does not.
    """
    frames = x.transpose(1, 2).flatten(0, 1) if x.dim() == 5 else x
    if not foldable(frames, block.conv):
        return below(x)
    n, t = x.shape[0], x.shape[2]
    y = block.conv(mark(frames)).unflatten(0, (n, t)).transpose(1, 2)
    return twice(y, t % 2) if block.compress_time and t > 1 else y


def twice(x: Tensor, alone: int) -> Tensor:
    """Every frame of `[N, C, T, H, W]` twice, but for so many first ones, in x's layout: `[N, C, 2 T - alone, H, W]`.

    `repeat_interleave` answers in NCHW whatever it is given.
    """
    n, c, t, h, w = x.shape
    return doubled(x, empty_in_layout_of(x, (n, c, 2 * t - alone, h, w)), 2, alone)


def doubled(x: Tensor, out: Tensor, dim: int, alone: int) -> Tensor:
    """Into `out` what lies along `dim` of `x`, each twice but for so many first ones."""
    out.narrow(dim, 0, alone).copy_(x.narrow(dim, 0, alone))
    rest, pairs = (y.narrow(dim, alone, y.shape[dim] - alone) for y in (x, out))
    pairs.unflatten(dim, (-1, 2)).copy_(rest.unsqueeze(dim + 1))
    return out


def hunyuan_forward(block: Any, below: Callable[..., Tensor], x: Tensor) -> Tensor:
    """HunyuanVideo, [N, C, T, H, W]."""
    if not foldable(x, getattr(block.conv, "conv", None)):
        return below(x)
    return block.conv(mark(x))


def hunyuan_conv_forward(wrapper: Any, below: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Its causal convolution: a marked picture is padded by the folded convolution."""
    return wrapper.conv(x) if is_marked(x, 5) else below(x)


def _upsample2d(m: Any) -> Upsampler | str | None:
    if m.use_conv_transpose or not m.use_conv or not m.interpolate:
        return None
    if m.norm is not None:
        return "it normalizes before it upsamples"
    return _image("conv" if m.name == "conv" else "Conv2d_0")


def _image(conv: str, single: bool = False) -> Upsampler:
    return Upsampler((conv,), (Hand("", "forward", image_forward, (conv, single)),))


def _sequential(m: Any) -> Upsampler | None:
    pairs = tuple(i for i, child in enumerate(m) if i + 1 < len(m) and _doubles(child) and type(m[i + 1]) is nn.Conv2d)
    if not pairs:
        return None
    single = any(known_as(m[i], ("Upsample",)) is None for i in pairs)
    passes = (Hand(str(i), "forward", upsample_forward) for i in pairs)
    hands = (Hand("", "forward", sequence_forward, (pairs, single)), *passes)
    return Upsampler(tuple(str(i + 1) for i in pairs), hands)


def _doubles(m: nn.Module) -> bool:
    """Nearest and nearest-exact are the same at exactly 2x."""
    if known_as(m, UPSAMPLES) is None:
        return False
    factor = m.scale_factor if isinstance(m.scale_factor, tuple) else (m.scale_factor,)
    return m.size is None and set(factor) == {2.0} and m.mode in ("nearest", "nearest-exact")


def _dc(m: Any) -> Upsampler | str | None:
    if not m.interpolate:
        return None
    if m.interpolation_mode != "nearest" or m.factor != 2:
        return f"it upsamples {m.factor}x by {m.interpolation_mode}"
    return Upsampler(("conv",), (Hand("", "forward", dc_forward),))


def _cogvideox(m: Any) -> Upsampler:
    return Upsampler(("conv",), (Hand("", "forward", cogvideox_forward),))


def _hunyuan(m: Any) -> Upsampler | str:
    times = {(1, 2, 2): "hold", (2, 2, 2): "double"}.get(tuple(m.upsample_factor))
    wrapper = m.conv
    if times is None:
        return f"it upsamples by {tuple(m.upsample_factor)}"
    if known_as(wrapper, ("HunyuanVideoCausalConv3d",)) is None or wrapper.pad_mode != "replicate":
        return "its convolution is not causal with replicated borders"
    if tuple(wrapper.time_causal_padding) != (1, 1, 1, 1, 2, 0):
        return f"its convolution pads {tuple(wrapper.time_causal_padding)}"
    hands = (Hand("", "forward", hunyuan_forward), Hand("conv", "forward", hunyuan_conv_forward))
    return Upsampler(("conv.conv",), hands, time=times, pad="replicate")


def _residual(m: Any) -> Upsampler:
    return Upsampler(("spatial_conv",), crop=0)


def _cosmos(m: Any) -> Upsampler | str | None:
    if not m.spatial_upsample:
        return None
    if tuple(m.conv2.spatial_pad) != (1, 1, 1, 1) or m.conv2.pad_mode != "constant":
        return f"its convolution pads {tuple(m.conv2.spatial_pad)} in mode {m.conv2.pad_mode}"
    return Upsampler(("conv2",), crop=1, pad="zeros")


UPSAMPLES = ("Upsample", "WanUpsample", "QwenImageUpsample", "QwenImage21Upsample")  # all but the first via fp32
ROWS: dict[str, Callable[[Any], Upsampler | str | None]] = {
    "Upsample2D": _upsample2d,
    "VidTokUpsample2D": lambda m: _image("conv", single=True),
    "Sequential": _sequential,
    "DCUpBlock2d": _dc,
    "CogVideoXUpsample3D": _cogvideox,
    "HunyuanVideoUpsampleCausal3D": _hunyuan,
    "KVAEPXSUpsample": _residual,
    "KVAECachedPXSUpsample": _residual,
    "Kandinsky6SRUpsample": _residual,
    "CosmosUpsample3d": _cosmos,
}
