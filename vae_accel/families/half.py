"""Whether fp16 holds what a norm and the convolution behind it multiply, in a bf16 or an fp32 model.

It has three bits of mantissa more than bf16, and as many as TF32, in which stock multiplies fp32. Its range is checked
at both ends, once, when a model is optimized: should larger weights be loaded later, the norm saturates, and a weight
that is infinite shows in the picture.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vae_accel.kernels._dispatch import FP16_MAX
from vae_accel.kernels.half_operands import HALVED

ROOM = FP16_MAX / 4  # a factor 4 to spare
NORMAL = 2.0**-14  # below, fp16 is off by up to LOST whatever the value
LOST = 2.0**-25
SHARE = 2.0**-15  # of the result may be lost so; the rounding of normal numbers to 11 bits is 2^-12.4 of it


def peaks(scale: Tensor, shift: Tensor | None, weight: Tensor) -> tuple[float, float, float] | None:
    """The largest |scale| and |shift| of a norm, and |weight| of the `[O, C, *taps]` that convolves it.

    None where fp16 will not do: for other dtypes, for weights on meta (offloaded), which cannot be read, and where
    numbers are so small that the products lose bits. `scale` and `shift` hold C elements.
    """
    scale, weight = scale.detach().flatten(), weight.detach()
    shift = torch.zeros_like(scale) if shift is None else shift.detach().flatten()
    given = (scale, shift, weight)
    if weight.dtype not in HALVED or any(p.dtype != weight.dtype or p.device.type == "meta" for p in given):
        return None
    if weight.shape[1] != scale.numel():  # groups, or no convolution of these channels: a block that is not taken
        return None
    gamma, beta, largest = (float(p.abs().max()) for p in given)
    return (gamma, beta, largest) if largest < ROOM and not _vanish(*(p.float() for p in given)) else None


def _vanish(scale: Tensor, shift: Tensor, weight: Tensor) -> bool:
    """Whether what fp16 loses of small numbers is more than `SHARE` of the products, in RMS.

    Of weights it is what it is; of normalised values, which are not known, `LOST` each. A channel counts by what
    it is multiplied with.
    """
    values = scale.square() + shift.square()
    small = torch.where(weight.abs() < NORMAL, weight, 0.0)
    lost = (small.half().float() - small).square()
    weights, lost = (t.transpose(0, 1).flatten(1).sum(1) for t in (weight.square(), lost))
    return bool((values * lost + LOST**2 * weights).sum() > SHARE**2 * (values * weights).sum())
