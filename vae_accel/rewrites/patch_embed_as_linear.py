"""Patch embedding as one matrix product: a convolution whose kernel is its stride reads every pixel once.

vLLM's `Conv3dLayer` (vllm/model_executor/layers/conv.py) and transformers' `fusion_config` (huggingface/transformers
#45041) do this for Conv3d at load time and rename or reshape the parameters. Here the slot is `_conv_forward`: the
convolution keeps its class, its parameters and its hooks. Worth 17x for Qwen2-VL's Conv3d on an H200 at 5476 patches
(0.727 ms to 0.043 ms), where torch 2.9 and later run bf16 Conv3d without cuDNN (pytorch/pytorch#163539).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_accel.edits import Ledger, Pen, obstacle, unusable_weight
from vae_accel.rewrite import Rewrite, Site, Tier, runs_stock

Conv = nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class PatchEmbedAsLinear(Rewrite):
    """`conv2d`: whether Conv2d is taken too; "16bit" takes it where it computes in bf16 or fp16 only.

    On a CPU a Conv2d in fp32 mostly loses (0.53x to 1.08x) and one in bf16 gains 1.19x to 1.37x.
    """

    name = "patch_embed_as_linear"
    tier = Tier.ROUNDING
    lowers = True

    conv2d: bool | Literal["16bit"] = True
    compute_dtype: torch.dtype | None = None

    def sites(self, root: nn.Module, ledger: Ledger) -> Iterator[Site]:
        for path, module in root.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)) and _reads_every_pixel_once(module):
                yield Site(path, self._refusal(root, ledger, path, module))

    def _refusal(self, root: nn.Module, ledger: Ledger, path: str, conv: Conv) -> str | None:
        if (unusable := unusable_weight(conv)) is not None:
            return unusable
        if type(conv) not in (nn.Conv2d, nn.Conv3d):
            return f"{type(conv).__name__} may pad or cache in its own forward"
        if conv.groups != 1:
            return f"{conv.groups} groups"
        if any(d != 1 for d in conv.dilation):
            return f"dilation {tuple(conv.dilation)}"
        if conv.padding_mode != "zeros":
            return f"padding_mode {conv.padding_mode!r}"
        taken = obstacle(root, ledger, path, "_conv_forward")
        if taken is not None or type(conv) is nn.Conv3d or self.conv2d is True:
            return taken
        if self.conv2d is False:
            return "Conv2d is faster as it is on this platform"
        if (self.compute_dtype or conv.weight.dtype).itemsize > 2:
            return f"{_short(conv.weight.dtype)} Conv2d is faster as it is on this platform"
        return None

    def apply(self, root: nn.Module, site: Site, pen: Pen) -> None:
        pen.method(site.path, "_conv_forward", conv_forward, self.compute_dtype)


def conv_forward(
    conv: Conv,
    below: Callable[..., Tensor],
    compute_dtype: torch.dtype | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """`_conv_forward` of a Conv2d or Conv3d on [N, C, *sizes] or [C, *sizes]: same shape and dtype as stock.

    The result is contiguous, or channels-last where the input or the weight is: the strides cuDNN, MIOpen and oneDNN
    return, which a later `.view` may depend on. A size that the kernel does not divide floors as the convolution's
    does. Packed patches, [L, C, *kernel], are the matrix already: nothing is copied.
    """
    if compute_dtype is None and _is_packed(input, weight) and not runs_stock(input, weight, bias):
        out = F.linear(input.flatten(1), weight.flatten(1), bias)
        return out.view(*out.shape, *(1,) * (weight.dim() - 2))
    kernel = weight.shape[2:]
    counts = [s // k for s, k in zip(input.shape[-len(kernel) :], kernel, strict=False)]
    fits = input.dim() in (weight.dim(), weight.dim() - 1) and input.shape[-len(kernel) - 1] == weight.shape[1]
    if not fits or input.dtype != weight.dtype or input.numel() == 0 or 0 in counts:
        return below(input, weight, bias)  # stock says what is wrong
    if runs_stock(input, weight, bias):
        return below(input, weight, bias)
    x = input.unsqueeze(0) if input.dim() < weight.dim() else input
    out_dtype = x.dtype
    if compute_dtype is not None and x.dtype.itemsize > compute_dtype.itemsize:
        x, weight = x.to(compute_dtype), weight.to(compute_dtype)
        bias = None if bias is None else bias.to(compute_dtype)
    order = _memory_order(weight)
    matrix = weight.permute(0, *order).flatten(1)
    patches = _patches(x, kernel, counts, order)
    if _is_channels_last(x) or _is_channels_last(weight):
        out = F.linear(patches, matrix, bias).unflatten(1, counts).movedim(-1, 1)
    elif patches.shape[1] == 1:
        out = F.linear(patches, matrix, bias).view(len(x), -1, *counts)
    else:
        out = _matmul(matrix, patches.transpose(1, 2), bias).unflatten(2, counts)
    out = out.to(out_dtype)
    return out.squeeze(0) if input.dim() < weight.dim() else out


def _reads_every_pixel_once(conv: Conv) -> bool:
    """Kernel == stride > 1 and no padding; "valid" stays a string in `padding`."""
    unpadded = conv.padding == "valid" or (not isinstance(conv.padding, str) and not any(conv.padding))
    return tuple(conv.kernel_size) == tuple(conv.stride) and math.prod(conv.kernel_size) > 1 and unpadded


def _is_packed(x: Tensor, weight: Tensor) -> bool:
    """Whether `x` is patches [L, C, *kernel] that are a matrix, as the weight is. Asked first: of the 40 us of a call
    with few patches most are Python's."""
    alike = x.shape[1:] == weight.shape[1:] and x.dtype == weight.dtype and x.shape[0] > 0
    return alike and x.is_contiguous() and weight.is_contiguous()


def _memory_order(weight: Tensor) -> tuple[int, ...]:
    """Dimensions of a weight [O, I, *kernel] but the first, outermost in memory first: flattened so, it is a view."""
    return tuple(sorted(range(1, weight.dim()), key=lambda d: -weight.stride()[d]))


def _patches(x: Tensor, kernel: torch.Size, counts: list[int], order: tuple[int, ...]) -> Tensor:
    """[N, C, *sizes] as [N, patches, values of a patch], the values in the weight's memory order."""
    dims = len(kernel)
    for d, (count, size) in enumerate(zip(counts, kernel, strict=True), 2):
        x = x.narrow(d, 0, count * size)
    for d in reversed(range(dims)):
        x = x.unflatten(2 + d, (counts[d], kernel[d]))
    within = [1, *range(3, 3 + 2 * dims, 2)]  # channels, and where in a patch
    x = x.permute(0, *range(2, 2 + 2 * dims, 2), *(within[d - 1] for d in order))
    return x.flatten(1 + dims).flatten(1, dims)


def _matmul(matrix: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """[O, K] by [N, K, P] as a contiguous [N, O, P], which is how stock's output lies in memory."""
    expanded = matrix.expand(columns.shape[0], *matrix.shape)
    if bias is None:
        return torch.bmm(expanded, columns)
    return torch.baddbmm(bias[:, None], expanded, columns)


def _is_channels_last(x: Tensor) -> bool:
    format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=format) and not x.is_contiguous()


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float64: "fp64"}.get(dtype, str(dtype).removeprefix("torch."))
