"""The memory layouts a kernel may be given."""

import torch

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def every_other_channel(x: torch.Tensor) -> torch.Tensor:
    """Strided over channels, dense over positions: read in place."""
    return x.repeat_interleave(2, dim=1)[:, ::2]


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The last two axes swapped in memory: positions are no single axis, so it is copied."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": channels_last,
    "every_other_channel": every_other_channel,
    "transposed": transposed,
}


def is_channels_last(x: torch.Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()
