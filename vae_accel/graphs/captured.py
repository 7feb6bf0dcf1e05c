"""A forward captured with static inputs: filled, replayed, and its outputs copied out in the structure it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from vae_accel.graphs.capture import CannotCapture, Pool

_CONSTANT = (type(None), bool, int, float, str)


class Captured:
    """`forward(**inputs, **options)` captured in `pool`. `inputs` are static: what they hold at `replay` counts.

    Raises:
        CannotCapture: the forward waits for the device, or returns something that is neither tensor nor constant.
    """

    def __init__(
        self, pool: Pool, forward: Callable[..., Any], inputs: Mapping[str, Tensor], options: Mapping[str, Any]
    ):
        self.inputs = inputs
        self._options = options  # metadata among them is read by the graph: it must live as long
        self._pool = pool
        self._leaves: list[Any] = []
        self._structure: Any = None

        def outputs() -> list[Tensor]:
            leaves, self._structure = tree_flatten(forward(**inputs, **options))
            strange = next((x for x in leaves if not isinstance(x, (Tensor, *_CONSTANT))), None)
            if strange is not None:
                raise CannotCapture(f"it returns a {type(strange).__name__}")
            tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
            order = {key: i for i, key in enumerate(tensors)}  # one tensor returned twice is one copy returned twice
            self._leaves = [(order[id(x)],) if isinstance(x, Tensor) else x for x in leaves]
            return list(tensors.values())

        self._recording = pool.record(outputs)

    @property
    def input_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.inputs.values())

    def turn(self) -> None:
        """Before the inputs are written: the stream of the replay before, if another, comes first."""
        self._pool.turn(self.inputs.values())

    def replay(self) -> list[Tensor]:
        """The outputs, each once, in memory that the next replay overwrites."""
        self._recording.replay()
        return self._recording.outputs

    def rebuild(self, tensors: list[Tensor]) -> Any:
        """What the forward returned, with `tensors` in the places of its outputs."""
        return tree_unflatten([tensors[x[0]] if isinstance(x, tuple) else x for x in self._leaves], self._structure)

    def run(self, data: Mapping[str, Tensor]) -> Any:
        """The forward of `data`, which has the shapes of the static inputs."""
        self.turn()
        for name, tensor in data.items():
            self.inputs[name].copy_(tensor)
        return self.rebuild(copies(self.replay()))


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """New tensors of the same values; one launch for all of one dtype (33 hidden states of a tower)."""
    made = [torch.empty_like(tensor) for tensor in tensors]
    if made:
        torch._foreach_copy_(made, tensors)
    return made
