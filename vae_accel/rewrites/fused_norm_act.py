"""GroupNorm or RMS norm, and the SiLU after it, as one op with fp32 statistics in the activation's own layout.

aten's GroupNorm statistics alone are 46 of the 86 ms of a FLUX.1 decode on an H200 and 1117 of the 3208 ms of
HunyuanVideo's (`RowwiseMoments` runs one block a group), and GroupNorm copies a channels-last input to NCHW. Wan's RMS
norm and SiLU write 18 bytes an element in 7 passes; here it is one pass of 2.

The norm's `forward` does both, and the activation's becomes the identity, where `families.norms` proves that every use
of that activation follows a norm taken here: a block is taken whole or not at all. Where a call must run stock (a
gradient, autocast, mixed dtypes) the norm still does both, by the stock ops. Any other norm is taken alone.

Modules around a GroupNorm hand it the whole clip, and it does their work, so that weights are read inside their own
module's call: it takes the frames apart (Mochi, Cosmos), or scales and shifts by what CogVideoX convolves from the
latent. Those 1x1x1 convolutions commute with the nearest upsampling before them and run at the latent's size: stock
enlarges the latent for each norm, and 64 % of all that a CogVideoX decode's convolutions write is theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, obstacle, unusable_weight
from vae_accel.families import norms
from vae_accel.kernels.group_norm_act import group_norm_act
from vae_accel.kernels.group_norm_modulate_act import group_norm_modulate_act
from vae_accel.kernels.line_pairs import norm_lines
from vae_accel.kernels.rms_norm_act import rms_norm_act
from vae_accel.kernels.winograd import rms_norm_pairs
from vae_accel.rewrite import Rewrite, Site, Tier, runs_stock

L2_EPS = 1e-12  # of F.normalize


@dataclass(frozen=True)
class FusedNormAct(Rewrite):
    """Sites are norms; `facts`: how each computes, whether SiLU follows, which activation falls silent with it."""

    name = "fused_norm_act"
    tier = Tier.ROUNDING

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        uses = Counter(id(child) for module in root.modules() for child in module._modules.values())
        done: set[str] = set()
        for pair in norms.pairs(root):
            why = next(filter(None, (_unclaimable(root, ledger, p) for p in (*pair.norms, pair.act))), None)
            if any(uses[id(root.get_submodule(p))] > 1 for p in (*pair.norms, pair.act)):
                why = "its norm or its activation is shared with another block"
            for norm in pair.norms:
                last = norm == pair.norms[-1]
                yield _site(root, norm, why, act=True, silences=pair.act if last else None)
                done.add(norm)
        done |= {path for norm in done for path in _slots(root, norm)}
        channels = norms.channels_last_rms(root)
        for path, module in root.named_modules():
            kind = norms.kind_of(module)
            if path in done or (kind == "last" and path not in channels):
                continue
            if kind is not None or norms.wrapper_of(module) is not None:
                yield _site(root, path, _unclaimable(root, ledger, path), act=False, silences=None)
                done |= set(_slots(root, path))
            elif norms.refusal(module) is not None:
                yield Site(path, norms.refusal(module))

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        kind, act, silences = (site.facts[k] for k in ("kind", "act", "silences"))
        *wrapper, norm = _slots(root, site.path)
        for path in wrapper:
            pen.method(path, "forward", WRAPPERS[kind], act, norm.rpartition(".")[2])
        pen.method(norm, "forward", FORWARDS[kind], act)
        if silences is not None:
            pen.method(silences, "forward", silent)


def group_norm(
    module: nn.GroupNorm,
    below: Callable[..., Tensor],
    act: bool,
    input: Tensor,
    dtype: torch.dtype | None = None,
    lines: bool = False,
) -> Any:
    """nn.GroupNorm over [N, C, *spatial].

    `dtype` is what the next convolution would rather read (`fused_blocks`); a call that runs stock keeps the input's.
    With `lines` it reads pairs of lines transformed: the result is that of `norm_lines`, or None where that is not what
    this norm and its SiLU compute.
    """
    if _runs_stock(input, module.weight, module.bias) or input.shape[1] != module.num_channels:
        return None if lines else _silu(below(input), act)
    if lines:
        groups = module.num_groups
        return norm_lines(input, module.weight, module.bias, module.eps, groups=groups) if act else None
    return group_norm_act(input, module.num_groups, module.weight, module.bias, module.eps, act=act, dtype=dtype)


def group_norm_of_frames(
    module: nn.GroupNorm, below: Callable[..., Tensor], act: bool, input: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """The GroupNorm inside `by_frame`, which sends it clips [N, C, T, H, W]; a batch of frames [N, C, H, W] as ever.

    `dtype` as in `group_norm`.
    """
    if input.dim() != 5:
        return group_norm(module, below, act, input, dtype)
    if _runs_stock(input, module.weight, module.bias) or input.shape[1] != module.num_channels:
        frames = below(input.transpose(1, 2).flatten(0, 1))
        return _silu(frames.unflatten(0, (input.shape[0], -1)).transpose(1, 2), act)
    return group_norm_act(
        input, module.num_groups, module.weight, module.bias, module.eps, act=act, per_frame=True, dtype=dtype
    )


def own_frames(module: nn.GroupNorm, below: Callable[..., Tensor], act: bool, hidden_states: Tensor) -> Tensor:
    """MiniMax-H3's subclass of nn.GroupNorm, which cuts [N, C, T, H, W] into frames itself."""
    x = hidden_states
    if _runs_stock(x, module.weight, module.bias) or x.dim() != 5 or x.shape[1] != module.num_channels:
        return _silu(below(x), act)
    return group_norm_act(x, module.num_groups, module.weight, module.bias, module.eps, act=act, per_frame=True)


def by_frame(
    module: nn.Module, below: Callable[..., Tensor], act: bool, norm: str, x: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Mochi's and Cosmos' wrapper around `group_norm_of_frames`, which applies the activation, in `dtype`."""
    if x.dim() != 5:
        return below(x)
    return getattr(module, norm)(x) if dtype is None else getattr(module, norm)(x, dtype=dtype)


def modulated(
    module: Any,
    below: Callable[..., Any],
    act: bool,
    norm: str,
    f: Tensor,
    zq: Tensor,
    conv_cache: dict[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """CogVideoX' spatial norm around `group_norm_modulated`: convolutions at the size of the latent `zq`.

    The caches of 1x1x1 convolutions are handed on as the callers expect them; nothing ever reads them.
    """
    frames = _latent_frames(f.shape[2], zq.shape[2])
    if frames is None or _runs_stock(f, zq):
        normed, cache = below(f, zq, conv_cache)
        return _silu(normed, act), cache
    cache = {}
    scale, cache["conv_y"] = module.conv_y(zq)
    shift, cache["conv_b"] = module.conv_b(zq)
    return getattr(module, norm)(f, scale, shift, frames), cache


def group_norm_modulated(
    module: nn.GroupNorm,
    below: Callable[..., Tensor],
    act: bool,
    input: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    frames: list[int] | None = None,
) -> Tensor:
    """The GroupNorm inside `modulated`; called by stock's own forward it is a GroupNorm, without the activation."""
    if scale is None or shift is None or frames is None:
        return group_norm(module, below, False, input)
    if _runs_stock(input, module.weight, module.bias, scale, shift):
        enlarged = (F.interpolate(m[:, :, frames], size=input.shape[2:]) for m in (scale, shift))
        return _silu(below(input) * next(enlarged) + next(enlarged), act)
    return group_norm_modulate_act(
        input, module.num_groups, module.weight, module.bias, module.eps, scale, shift, frames, act=act
    )


def rms_norm(
    module: Any,
    below: Callable[..., Tensor],
    act: bool,
    x: Tensor,
    dtype: torch.dtype | None = None,
    pairs: bool = False,
    lines: bool = False,
    history: Tensor | None = None,
) -> Any:
    """Wan's RMS_norm and its copies over dimension 1 of [N, C, *spatial], or the last with channel_first=False.

    `dtype` is what the next convolution would rather read (`fused_blocks`); a call that runs stock keeps x's. With
    `pairs` it reads pairs of frames transformed, behind `history`, with `lines` pairs of lines: the result is that of
    `rms_norm_pairs`, or of `norm_lines`, or None where that is not what this norm and its SiLU compute.
    """
    bias = getattr(module, "bias", None)
    bias = bias if isinstance(bias, Tensor) else None  # else 0.0, which stock adds in a pass of its own
    dim = 1 if getattr(module, "channel_first", True) else -1
    if _runs_stock(x, module.gamma, bias) or x.shape[dim] != module.gamma.numel():
        return None if pairs or lines else _silu(below(x), act)
    if pairs or lines:
        if not act or bias is not None or dim != 1:
            return None
        return rms_norm_pairs(x, module.gamma, L2_EPS, history) if pairs else norm_lines(x, module.gamma, None, L2_EPS)
    if dim == 1:
        return rms_norm_act(x, module.gamma, bias, L2_EPS, act=act, dtype=dtype)
    return rms_norm_act(x.movedim(-1, 1), module.gamma, bias, L2_EPS, act=act, dtype=dtype).movedim(1, -1)


def rms_norm_in_fp32(module: Any, below: Callable[..., Tensor], act: bool, hidden_states: Tensor) -> Tensor:
    """The same where stock squares in fp32 whatever it is given: fp64 is left to it."""
    if hidden_states.dtype == torch.float64:
        return _silu(below(hidden_states), act)
    return rms_norm(module, below, act, hidden_states)


def per_channel_rms_norm(
    module: Any, below: Callable[..., Tensor], act: bool, x: Tensor, channel_dim: int | None = None
) -> Tensor:
    """LTX-2's, without weights. Stock squares in the input's dtype: above 255 it overflows in fp16, this does not."""
    if _runs_stock(x) or module.channel_dim != 1:
        return _silu(below(x, channel_dim), act)
    return rms_norm_act(x, None, None, module.eps, act=act, mode="mean")


def last_dim_rms_norm(module: Any, below: Callable[..., Tensor], act: bool, hidden_states: Tensor) -> Tensor:
    """diffusers' RMSNorm on channels moved to the end, [N, *spatial, C]: moved back, they lie as they did before."""
    x = hidden_states
    if x.dtype == torch.float64 or _runs_stock(x, module.weight, module.bias) or (x.shape[-1],) != _size(module, x):
        return _silu(below(x), act)
    return rms_norm_act(x.movedim(-1, 1), module.weight, module.bias, module.eps, act=act, mode="mean").movedim(1, -1)


def silent(module: nn.Module, below: Callable[..., Tensor], input: Tensor) -> Tensor:
    """An activation whose every input comes from a norm that has applied it already."""
    return input


FORWARDS: dict[str, Callable[..., Any]] = {
    "group": group_norm,
    "by_frame": group_norm_of_frames,
    "modulated": group_norm_modulated,
    "frames": own_frames,
    "l2": rms_norm,
    "l2_fp32": rms_norm_in_fp32,
    "mean": per_channel_rms_norm,
    "last": last_dim_rms_norm,
}


WRAPPERS: dict[str, Callable[..., Any]] = {"by_frame": by_frame, "modulated": modulated}


def _site(root: nn.Module, path: str, why: str | None, act: bool, silences: str | None) -> Site:
    module = root.get_submodule(path)
    wrapper = norms.wrapper_of(module)
    kind = norms.kind_of(module) if wrapper is None else wrapper[0]
    return Site(path, why, {"kind": kind, "act": act, "silences": silences})


def _slots(root: nn.Module, path: str) -> tuple[str, ...]:
    """The modules whose `forward` a norm's site takes: itself, and inside a wrapper the norm it wraps."""
    wrapper = norms.wrapper_of(root.get_submodule(path))
    return (path,) if wrapper is None else (path, f"{path}.{wrapper[1]}" if path else wrapper[1])


def _unclaimable(root: nn.Module, ledger: Ledger, path: str) -> str | None:
    for slot in _slots(root, path):
        module = root.get_submodule(slot)
        for name in ("weight", "bias", "gamma"):
            if isinstance(getattr(module, name, None), Tensor) and unusable_weight(module, name) is not None:
                return unusable_weight(module, name)
        reason = obstacle(root, ledger, slot, "forward")
        if reason is not None:
            return reason
    return None


def _runs_stock(x: Tensor, *parameters: Tensor | None) -> bool:
    if x.dim() < 3 or x.numel() == 0 or any(p is not None and p.dtype != x.dtype for p in parameters):
        return True
    return runs_stock(x, *parameters)


def _latent_frames(frames: int, latents: int) -> list[int] | None:
    """The latent frame of each frame as CogVideoX enlarges time; None where nearest is more than a shift of bits.

    Of an odd number of frames the first stands alone; F.interpolate scales in fp32, which is exact for powers of two.
    """
    alone = int(frames > 1 and frames % 2 == 1)
    rest, of = frames - alone, latents - alone
    if of < 1 or rest % of or (rest // of).bit_count() != 1:
        return None
    return [0] * alone + [alone + i // (rest // of) for i in range(rest)]


def _silu(x: Tensor, act: bool) -> Tensor:
    return F.silu(x) if act else x


def _size(module: Any, x: Tensor) -> tuple[int, ...]:
    return (x.shape[-1],) if module.weight is None else tuple(module.weight.shape)
