"""Residual blocks of image decoders in which the convolutions behind a norm and SiLU multiply e4m3.

The norm quantizes what it writes, the convolution its weight, each in its own module's call, so that what a hook
fetches or casts is what is read. By how much a norm's result is multiplied is chosen from its affine when a model is
optimized (`fp8_conv.gain_of`): should a larger one be loaded later, the norm saturates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.edits import Ledger
from vae_accel.families import kl
from vae_accel.families.match import by_row, known_as
from vae_accel.kernels._dispatch import E4M3
from vae_accel.kernels.bordered import dense
from vae_accel.kernels.fp8_conv import fp8_conv, gain_of, refusal, unfit
from vae_accel.kernels.group_norm_act import group_norm_act
from vae_accel.rewrite import module_runs_stock

ROWS = {name: kl.ROWS[name] for name in ("ResnetBlock2D", "HunyuanImageResnetBlock")}
PAIRS = (("norm1", "conv1"), ("norm2", "conv2"))
UPSAMPLERS = ("Upsample2D", "HunyuanImageUpsample")
BELOW = "block without e4m3: {}"  # how the report counts a call that runs as before


def before_upsampling(decoder: nn.Module) -> set[str]:
    """The paths of modules of a decoder that compute at the size of its latent: the middle, and what is listed before
    the first upsampling."""
    found = set()
    upsampled = False
    for path, module in decoder.named_modules():
        upsampled = upsampled or known_as(module, UPSAMPLERS) is not None
        if not upsampled or path.startswith("mid_block."):
            found.add(path)
    return found


def gains_of(block: Any) -> tuple[float, float] | str | None:
    """By how much each norm of a residual block multiplies; the reason where the block cannot be taken; None where it
    is no such block."""
    row = by_row(block, ROWS)
    if row is None or isinstance(row, str):
        return row
    if (reason := _not_silu(block)) is not None:
        return reason
    for norm, conv in ((getattr(block, norm), conv) for norm, conv in PAIRS):
        if type(norm) is not nn.GroupNorm:
            return f"{type(norm).__name__} is no GroupNorm"
        if any(p.device.type == "meta" for p in norm.parameters()):
            return "its norms are on the meta device: how far they reach is not known"
        form = getattr(block, conv).kernel_size, getattr(block, conv).padding
        if form != ((3, 3), (1, 1)):
            return f"{conv} has a kernel of {form[0]} with a padding of {form[1]}"
    reason = unfit(_channels(block))
    return reason or (gain_of(block.norm1.weight, block.norm1.bias), gain_of(block.norm2.weight, block.norm2.bias))


def residual_block(
    block: Any, below: Callable[..., Tensor], ledger: Ledger, alone: bool, *args: Any, **kwargs: Any
) -> Tensor:
    """[N, C, H, W] -> [N, C', H, W], the shortcut in 16 bits; `alone`: what comes next reads no bordered pictures."""
    if torch.compiler.is_compiling():
        return below(*args, **kwargs)
    reason = _refusal(block, args, kwargs)
    if reason is not None:
        ledger.count("fp8_operands", BELOW.format(reason))
        return below(*args, **kwargs)
    x: Tensor = args[0]
    shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
    y = block.conv1(block.norm1(x, e4m3=True))
    y = block.conv2(block.norm2(y, e4m3=True), residual=shortcut)
    return dense(y) if alone else y


def norm(
    module: nn.GroupNorm, below: Callable[..., Tensor], gain: float, *args: Any, e4m3: bool = False, **kwargs: Any
) -> Tensor:
    """A GroupNorm; with `e4m3` and SiLU behind it, times `gain`, as `conv` reads it."""
    if not e4m3:
        return below(*args, **kwargs)
    affine = module.weight, module.bias
    return group_norm_act(args[0], module.num_groups, *affine, module.eps, act=True, dtype=E4M3, gain=gain)


def conv(
    module: nn.Conv2d, below: Callable[..., Tensor], gain: float, input: Tensor, residual: Tensor | None = None
) -> Tensor:
    """A convolution, of what `norm` wrote by e4m3 and of anything else as before; a norm comes next."""
    if input.dtype != E4M3:
        return below(input) if residual is None else below(input, residual=residual)
    return fp8_conv(input, module.weight, module.bias, gain, residual=residual, statistics=True)


def _refusal(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if not kl.alone(args, kwargs) or args[0].dim() != 4 or args[0].numel() == 0:
        return "it was given more than pictures"
    x = args[0]
    if block.training or module_runs_stock(block, x):
        return "training, a gradient, or autocast"
    if (reason := _not_silu(block)) is not None:
        return reason
    for name, child in ((name, getattr(block, name)) for pair in PAIRS for name in pair):
        if type(child) not in (nn.GroupNorm, nn.Conv2d):
            return f"{name} is {type(child).__name__}"
        if child._forward_hooks or child._forward_pre_hooks:
            return f"{name} has hooks"
        if "_conv_forward" in vars(child) or getattr(child, "padding_mode", "zeros") != "zeros":
            return f"{name} was patched"
        if child.weight is not None and child.weight.dtype != x.dtype:
            return f"{name} holds {child.weight.dtype} beside pictures of {x.dtype}"
    return refusal(x, _channels(block))


def _not_silu(block: Any) -> str | None:
    act = type(block.nonlinearity)
    return None if act is nn.SiLU else f"its activation is {act.__name__}, not SiLU"


def _channels(block: Any) -> tuple[int, ...]:
    return block.conv1.in_channels, block.conv1.out_channels, block.conv2.out_channels
