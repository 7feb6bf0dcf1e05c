"""Ways in which users move a model's weights off the device, for tests: on a CPU, which stands for the device too."""

import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from torch import nn

CPU = torch.device("cpu")


def sequential(model: nn.Module) -> None:
    """accelerate's: weights wait on meta, a hook fetches them for each module's call."""
    cpu_offload(model, execution_device=CPU)


def grouped(model: nn.Module) -> None:
    """diffusers': a hook on each leaf fetches its weights."""
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
