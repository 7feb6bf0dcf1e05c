"""At one frame a causally padded Conv3d is a Conv2d: of its last tap in time, or of the sum of its taps.

Whatever stands before the only frame is padding. Zeros multiply the earlier taps (Wan, Qwen-Image), so the last tap is
all there is; the frame again multiplies all of them (HunyuanVideo, CogVideoX, LTX on both sides), so their sum is. A
third of the work of a 3x3x3 kernel: 19.0 -> 7.2 TFLOP for a Qwen-Image decode of 1328 x 1328, 136 -> 45 for
HunyuanImage-2.1's refiner. Decided at every call: more frames, or cached ones, go to whatever was there before.

The last tap is a view of the weight. The sum is formed at every call, in fp32 from the weight as it is then. Rounding
it to 16 bits is one rounding more than stock's, and too much where every convolution does it: the error of a whole
decode grew to 1.09 of stock's on average and 1.47 at worst (tiny random models of eight families, bf16). So a 16-bit
sum stays a pair, rounded value and remainder, over the frame twice along channels: two thirds of stock's work, and an
error of 1.00 of stock's. With `compute_dtype` (lowered) it is rounded once and costs a third.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, obstacle, unusable_weight
from vae_accel.families import causal
from vae_accel.families.causal import Causal
from vae_accel.families.match import known_as
from vae_accel.rewrite import Rewrite, Site, Tier, runs_stock

Taps = Literal["last", "sum"]
STATEFUL = (
    "EasyAnimateCausalConv3d",
    "VidTokCausalConv3d",
    "KVAECachedCausalConv3d",
    "Kandinsky6SRCausalConv3d",
)


@dataclass(frozen=True)
class SingleFrameConv(Rewrite):
    """Takes the `forward` of every causal convolution that `families.causal` describes and has taps in time.

    `pixels`: a 16-bit sum is worth forming for frames of at least so many (a CPU runs 256 channels in bf16 at 0.65 of
    stock's speed on 16x16, 1.08 on 32x32 and 1.90 on 64x64).
    """

    name = "single_frame_conv"
    tier = Tier.ROUNDING
    over = ("causal_padding", "conv3d_as_conv2d")
    lowers = True

    pixels: int = 1024
    compute_dtype: torch.dtype | None = None

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        for path, module in root.named_modules():
            row, stranger = causal.causal_of(module), causal.refusal(module)
            if row is not None and not _pointwise(_conv(module, row)):
                yield Site(path, _refusal(root, ledger, path, row))
            elif stranger is not None:
                yield Site(path, stranger)
            elif known_as(module, STATEFUL) is not None:
                yield Site(path, "its forward keeps frames of its own between calls")

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        module = root.get_submodule(site.path)
        row = causal.causal_of(module)
        assert row is not None
        name = known_as(module, causal.ROWS)
        pen.method(site.path, "forward", forward, name, self.pixels, self.compute_dtype)
        if row.conv:
            pen.method(_inner(site.path, row), "_conv_forward", conv_forward, _taps(row), self.compute_dtype)


def _refusal(root: nn.Module, ledger: Ledger, path: str, row: Causal) -> str | None:
    conv = _conv(root.get_submodule(path), row)
    if not isinstance(conv, nn.Conv3d):
        return f"its convolution is a {type(conv).__name__}, no Conv3d"
    if type(conv)._conv_forward is not nn.Conv3d._conv_forward:
        return f"{type(conv).__name__} has arithmetic of its own (_conv_forward)"
    if conv.padding_mode != "zeros" and not row.conv:
        return f"{type(conv).__name__} pads twice, the second time in mode {conv.padding_mode}"
    if isinstance(conv.padding, str) or conv.padding[0] or not _one_frame_comes_out(conv, row):
        return "one frame does not become one frame"
    if min(row.pad) < 0:
        return "it crops instead of padding"
    reason = unusable_weight(conv) or obstacle(root, ledger, path, "forward", SingleFrameConv.over)
    if reason is None and row.conv:
        reason = obstacle(root, ledger, _inner(path, row), "_conv_forward", SingleFrameConv.over)
    return reason


def _inner(path: str, row: Causal) -> str:
    return f"{path}.{row.conv}".lstrip(".")


def _pointwise(conv: Any) -> bool:
    """One tap in time: nothing to collapse."""
    return isinstance(conv, nn.Conv3d) and conv.kernel_size[0] == 1


def _one_frame_comes_out(conv: nn.Conv3d, row: Causal) -> bool:
    """Padding in time fills all the other taps; the last one sees the frame where they see zeros."""
    before, after = row.pad[4:]
    fills = before + after == conv.dilation[0] * (conv.kernel_size[0] - 1)
    return fills and (after == 0 or row.time != "zeros")


def _taps(row: Causal) -> Taps:
    return "last" if row.time == "zeros" else "sum"


def _conv(module: nn.Module, row: Causal) -> Any:
    return getattr(module, row.conv, None) if row.conv else module


def forward(
    module: nn.Module,
    below: Callable[..., Any],
    name: str,
    pixels: int,
    compute_dtype: torch.dtype | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The forward of a causal convolution: one frame [N, C, 1, H, W] without a cache here, anything else below."""
    row = causal.read(name, module)
    further = [*args[1:], *kwargs.values()]
    cached = row.call != "causal" and any(value is not None for value in further)
    conv = _conv(module, row)
    if not args or cached or not _single(args[0], conv):
        return below(*args, **kwargs)
    x = args[0]
    if _is_pair(_taps(row), compute_dtype, conv.weight) and x.shape[3] * x.shape[4] < pixels:
        return below(*args, **kwargs)
    y = _of_one_frame(module, row, compute_dtype, x)
    if row.call != "conv_cache":
        return y
    return y, x.repeat(1, 1, row.pad[4], 1, 1) if row.caches else None


def conv_forward(
    conv: nn.Conv3d,
    below: Callable[..., Tensor],
    taps: Taps,
    compute_dtype: torch.dtype | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """`_conv_forward` of the convolution in a causal wrapper: fewer frames than taps are those that `forward` sent."""
    if input.dim() != 5 or input.shape[2] != 1:
        return below(input, weight, bias)
    return _collapse(conv, taps, compute_dtype, input, weight, bias, conv.padding[1:])


def _single(x: Any, conv: Any) -> bool:
    """Whether this call is for one frame, and the convolution still one (no adapter wraps it)."""
    if not isinstance(conv, nn.Conv3d) or not isinstance(x, Tensor) or x.dim() != 5 or x.shape[2] != 1:
        return False
    if x.shape[1] != conv.in_channels or x.numel() == 0 or x.device.type == "meta":
        return False
    return not runs_stock(x, conv.weight, conv.bias)


def _is_pair(taps: Taps, compute_dtype: torch.dtype | None, weight: Tensor) -> bool:
    """Whether the sum stays rounded value and remainder."""
    return taps == "sum" and compute_dtype is None and weight.dtype.itemsize == 2


def _of_one_frame(module: Any, row: Causal, compute_dtype: torch.dtype | None, x: Tensor) -> Tensor:
    w0, w1, h0, h1 = row.pad[:4]
    padding: tuple[int, ...] = (0, 0)
    if row.space == "zeros" and (w0, h0) == (w1, h1) and not row.conv:
        padding = (h0, w0)
    elif any(row.pad[:4]):
        mode = "constant" if row.space == "zeros" else row.space
        x = F.pad(x.squeeze(2), (w0, w1, h0, h1), mode=mode).unsqueeze(2)
    if row.conv:
        return getattr(module, row.conv)(x)
    return _collapse(module, _taps(row), compute_dtype, x, module.weight, module.bias, padding)


def _collapse(
    conv: nn.Conv3d,
    taps: Taps,
    compute_dtype: torch.dtype | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Any,
) -> Tensor:
    """One frame [N, C, 1, H, W] by the taps in time that see it: [N, C', 1, H', W'] in the input's memory format."""
    last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    out_dtype, frame = x.dtype, x.squeeze(2)
    if conv.padding_mode != "zeros" and any(padding):
        h, w = padding
        frame, padding = F.pad(frame, (w, w, h, h), mode=conv.padding_mode), (0, 0)
    if compute_dtype is not None and out_dtype.itemsize > compute_dtype.itemsize:
        frame, bias = frame.to(compute_dtype), None if bias is None else bias.to(compute_dtype)
    if taps == "last":
        kernel = weight[:, :, -1].to(frame.dtype)
    elif _is_pair(taps, compute_dtype, weight):
        exact = weight.sum(2, dtype=torch.float32)
        kernel = exact.to(weight.dtype)
        frame, kernel = torch.cat([frame, frame], 1), torch.cat([kernel, (exact - kernel).to(weight.dtype)], 1)
    else:
        kernel = weight.sum(2, dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32).to(frame.dtype)
    y = F.conv2d(frame, kernel, bias, conv.stride[1:], padding, conv.dilation[1:], conv.groups)
    y = y.to(out_dtype).unsqueeze(2)
    return y.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
