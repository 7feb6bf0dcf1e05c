"""Frames of a clip that attend to earlier ones and to themselves, with one head over all channels.

Stock gives every pixel a row of a mask. The pixels of a frame have the same keys: so many calls as there are frames, of
all that stand before the frame's end, are the same softmax without one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_accel.kernels.attention import FUSED, wide_head_attention


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head over all channels: [N, L, C] and twice [N, M, C], in rows of adjacent channels, -> [N, L, C]."""
    if q.shape[-1] > FUSED:
        return wide_head_attention(q, k, v)
    return F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)


def attend_to_earlier(q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
    """[N, L, C] three times, of so many `frames` after each other, -> [N, L, C]."""
    frame = q.shape[1] // frames
    ends = range(frame, q.shape[1] + 1, frame)
    return torch.cat([attend(q[:, end - frame : end], k[:, :end], v[:, :end]) for end in ends], 1)
