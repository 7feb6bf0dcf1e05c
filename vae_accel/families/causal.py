"""The causal convolutions of diffusers 0.42: what each one's forward pads, with what, and which convolution follows.

`causal_of(module)` answers for one module, read off the instance; `read(name, module)` is the same inside a forward,
where the name is already known and attributes may have changed since. A pass that replaces such a forward pads as the
row says and then calls the convolution through its own call path: `module.conv(x)` for a wrapper, and for a subclass
of nn.Conv3d `module._conv_forward(x, module.weight, module.bias)`, so that its arithmetic stays another pass's slot.

Not here, because their forward is a state machine over calls: EasyAnimateCausalConv3d (Magvit; one convolution per
output frame), VidTokCausalConv3d, KVAECachedCausalConv3d and Kandinsky6SRCausalConv3d (a cache the caller owns, two
convolutions per call). QwenImage21CausalConv3d is a Conv2d. Allegro pads by hand between plain convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from vae_accel.families.match import estranged, known_as

Call = Literal["plain", "cache_x", "conv_cache", "causal"]


@dataclass(frozen=True)
class Causal:
    """What the forward of one causal convolution over [N, C, T, H, W] does before it convolves.

    conv: the attribute that holds the nn.Conv3d; '' when the module itself is one.
    pad: (w0, w1, h0, h1, t0, t1) as in F.pad, all in pixels and frames of the input. What the convolution pads by
        itself (`conv.padding`: LTX, LTX2 and CogVideoX leave H and W to it) is not included. t1 > 0: not causal.
    time: what t0 and t1 hold: zeros, or the first (t0) and last (t1) frame again.
    space: what w0 to h1 hold: a mode of F.pad, with zeros for constant.
    call: `plain` forward(x); `cache_x` forward(x, cache_x=None), frames that stand in front of x and take their place
        out of t0; `conv_cache` forward(x, conv_cache=None), exactly t0 such frames, returns (y, the last t0 frames of
        the padded input) or (y, None) where `caches` is false; `causal` forward(x, causal=True), see `two_sided`.
    """

    conv: str
    pad: tuple[int, int, int, int, int, int]
    time: str
    space: str = "zeros"
    call: Call = "plain"
    caches: bool = False

    @property
    def two_sided(self) -> tuple[int, int, int, int, int, int]:
        """`pad` when `causal=False` is passed: half of the frames before, half after."""
        return (*self.pad[:4], self.pad[4] // 2, self.pad[4] // 2)


def causal_of(module: nn.Module) -> Causal | None:
    """What a module's forward pads, if a row knows its class and its attributes are those the row reads."""
    name = known_as(module, ROWS)
    try:
        return None if name is None else read(name, module)
    except (AttributeError, TypeError, ValueError, KeyError):  # a class of that name from elsewhere
        return None


def refusal(module: nn.Module) -> str | None:
    """Why a module that looks like a causal convolution is not described by a row, or None."""
    if causal_of(module) is not None:
        return None
    if known_as(module, ROWS) is not None:
        return f"this {type(module).__name__} lacks the attributes of diffusers' class of that name"
    return estranged(module, ROWS)


def read(name: str, module: nn.Module) -> Causal:
    """What the forward of `module`, of the known class `name`, pads now."""
    return ROWS[name](module)


def _wan(m: Any) -> Causal:
    w0, w1, h0, h1, t0, t1 = m._padding
    return Causal("", (w0, w1, h0, h1, t0, t1), time="zeros", call="cache_x")


def _hunyuan(m: Any) -> Causal:
    w0, w1, h0, h1, t0, t1 = m.time_causal_padding
    mode = _mode(m.pad_mode)
    return Causal("conv", (w0, w1, h0, h1, t0, t1), time=_frames(mode), space=mode)


def _cogvideox(m: Any) -> Causal:  # also Mochi's, with pad_mode replicate
    if m.pad_mode == "replicate":
        w0, w1, h0, h1, t0, t1 = m.time_causal_padding
        return Causal("conv", (w0, w1, h0, h1, t0, t1), time="replicate", space="replicate", call="conv_cache")
    return Causal("conv", (0, 0, 0, 0, m.time_kernel_size - 1, 0), time="replicate", call="conv_cache", caches=True)


def _ltx(m: Any) -> Causal:
    frames = m.kernel_size[0] - 1
    before, after = (frames, 0) if m.is_causal else (frames // 2, frames // 2)
    return Causal("conv", (0, 0, 0, 0, before, after), time="replicate")


def _ltx2(m: Any) -> Causal:
    return Causal("conv", (0, 0, 0, 0, m.kernel_size[0] - 1, 0), time="replicate", call="causal")


def _cosmos(m: Any) -> Causal:
    w0, w1, h0, h1 = m.spatial_pad
    return Causal("", (w0, w1, h0, h1, m.temporal_pad, 0), time="replicate", space=_mode(m.pad_mode))


def _minimax(m: Any) -> Causal:
    side = m.spatial_padding
    mode = _mode(m.spatial_padding_mode)
    return Causal("", (side, side, side, side, m.temporal_padding, 0), time="zeros", space=mode)


def _mode(name: str) -> str:
    return {"constant": "zeros", "replicate": "replicate", "reflect": "reflect"}[name]


def _frames(mode: str) -> str:
    if mode == "reflect":
        raise ValueError("frames reflected in time are no causal padding")
    return mode


ROWS: dict[str, Callable[[Any], Causal]] = {
    "WanCausalConv3d": _wan,
    "QwenImageCausalConv3d": _wan,
    "HunyuanVideoCausalConv3d": _hunyuan,
    "HunyuanVideo15CausalConv3d": _hunyuan,
    "HunyuanImageRefinerCausalConv3d": _hunyuan,
    "CogVideoXCausalConv3d": _cogvideox,
    "LTXVideoCausalConv3d": _ltx,
    "LTX2VideoCausalConv3d": _ltx2,
    "CosmosCausalConv3d": _cosmos,
    "MiniMaxH3VideoCausalConv3d": _minimax,
}
