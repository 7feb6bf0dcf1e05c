"""Where channels-last activations are copied back to NCHW inside the VAEs of diffusers 0.42, block by block.

Only what happens at every convolution, or in every block, counts: a depth-to-space or a nearest upsampling of a clip
also ends in NCHW, but once a level, and the next convolution brings the layout back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vae_accel.families.match import known_as

# Convolutions whose forward pads, or collects its output, in NCHW.
IN_NCHW: dict[str, str] = {
    "EasyAnimateCausalConv3d": "pads by replication in NCDHW",
    "VidTokCausalConv3d": "concatenates with repeated frames, in NCDHW",
    "KVAECausalConv3d": "pads by replication in NCDHW",
    "KVAECachedCausalConv3d": "collects its output in NCDHW",
    "Kandinsky6SRCausalConv3d": "collects its output in NCDHW",
}


def in_nchw(module: nn.Module) -> str | None:
    """Why a module leaves channels-last whatever it is given, or None."""
    name = known_as(module, IN_NCHW)
    if name is not None:
        return f"{name} {IN_NCHW[name]}"
    if isinstance(module, nn.Conv2d | nn.Conv3d) and module.padding_mode != "zeros":
        return f"a convolution pads in mode {module.padding_mode}, in NCHW"
    return None


def hunyuan_resnet(module: Any, below: Callable[..., Tensor], hidden_states: Tensor) -> Tensor:
    """HunyuanVideoResnetBlockCausal3D without the `.contiguous()` it begins with."""
    x = module.conv1(module.nonlinearity(module.norm1(hidden_states)))
    x = module.conv2(module.dropout(module.nonlinearity(module.norm2(x))))
    shortcut = module.conv_shortcut
    return x + (hidden_states if shortcut is None else shortcut(hidden_states))


# Blocks that make their input contiguous, without need: the forward that does not.
KEEPS_LAYOUT: dict[str, Callable[..., Tensor]] = {"HunyuanVideoResnetBlockCausal3D": hunyuan_resnet}
