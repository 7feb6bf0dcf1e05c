"""A forward captured with static inputs: filled, replayed, and its outputs copied out in the structure it returns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from vae_accel.graphs.capture import CannotCapture, Pool

_CONSTANT = (type(None), bool, int, float, str)


class Outputs:
    """Calls `forward(**inputs, **options)` for its tensors, each once; keeps the structure they were returned in."""

    def __init__(self, forward: Callable[..., Any], inputs: Mapping[str, Tensor], options: Mapping[str, Any]):
        self._forward, self._inputs, self._options = forward, inputs, options
        self._leaves: list[Any] = []
        self._structure: Any = None
        self._order: tuple[str, ...] = ()

    def __call__(self) -> list[Tensor]:
        returned = self._forward(**self._inputs, **self._options)
        self._order = tuple(returned) if isinstance(returned, OrderedDict) else ()
        leaves, self._structure = tree_flatten(returned)
        strange = next((x for x in leaves if not isinstance(x, (Tensor, *_CONSTANT))), None)
        if strange is not None:
            raise CannotCapture(f"it returns a {type(strange).__name__}")
        tensors = distinct(leaves)
        index = {id(tensor): i for i, tensor in enumerate(tensors)}
        self._leaves = [(index[id(x)],) if isinstance(x, Tensor) else x for x in leaves]
        return tensors

    def rebuild(self, tensors: list[Tensor]) -> Any:
        """The structure with other tensors in the places of those that were returned."""
        made = tree_unflatten([tensors[x[0]] if isinstance(x, tuple) else x for x in self._leaves], self._structure)
        for key in self._order:  # torch rebuilds a ModelOutput in the order of its class, and it can be indexed
            made.move_to_end(key)
        return made


class Captured:
    """A forward captured in `pool`. `inputs` are static: what they hold at `replay` counts; `options` are constant, and
    tensors among them are read by the graph.

    Raises:
        CannotCapture: the forward waits for the device, returns what is neither tensor nor constant, or a replay does
            not give what it computes: code may ask whether it is captured, or draw random numbers.
    """

    def __init__(
        self,
        pool: Pool,
        forward: Callable[..., Any],
        inputs: Mapping[str, Tensor],
        options: Mapping[str, Any],
        asks: bool = False,
    ):
        self.inputs = inputs
        self._pool = pool
        self._outputs = Outputs(forward, inputs, options)
        self._recording = pool.record(self._outputs, asks)
        want = self._outputs()
        if not all(map(_same, self.replay(), want)):
            raise CannotCapture("its replay is not what it computes")

    @property
    def input_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.inputs.values())

    def rebuild(self, tensors: list[Tensor]) -> Any:
        """What the forward returned, with other tensors."""
        return self._outputs.rebuild(tensors)

    def turn(self) -> None:
        """Before the inputs are written: the stream of the replay before, if another, comes first."""
        self._pool.turn(self.inputs.values())

    def replay(self) -> list[Tensor]:
        """The outputs, each once, in memory that the next replay overwrites."""
        self._recording.replay()
        return self._recording.outputs

    def run(self, data: Mapping[str, Tensor]) -> Any:
        """What the forward returns for `data`, which has the shapes of the static inputs."""
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


def distinct(leaves: list[Any]) -> list[Tensor]:
    """The tensors among `leaves`, each once."""
    return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, so that a NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
