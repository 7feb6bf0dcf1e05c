"""Stands for a card's graphs on a CPU: a replay runs the captured function again, on whatever its inputs hold by then.

As unkind as a card is: before every replay all outputs in the pool are NaN, as another graph may have written there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vae_accel.graphs.capture import CannotCapture, Capture, Pool, Recording


class RecorderPool(Pool):
    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.turns = 0

    def static(self, tensor: Tensor) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty_like(tensor).fill_(float("nan") if tensor.is_floating_point() else -(2**20))

    def send(self, host: Tensor, static: Tensor) -> None:
        static.copy_(host)

    def turn(self, inputs: Iterable[Tensor]) -> None:
        self.turns += 1

    def record(self, function: Callable[[], list[Tensor]], asks: bool) -> Recording:
        if Recorder.fails:
            raise CannotCapture(Recorder.fails)
        for _ in range(2):
            function()
        outputs = function()
        with torch.inference_mode(False):
            outputs = [torch.empty_like(out) for out in outputs]
        self.outputs += outputs
        self.bytes += sum(out.numel() * out.element_size() for out in outputs)

        def replay() -> None:
            for out in self.outputs:
                if out.is_floating_point():
                    out.fill_(float("nan"))
            for out, new in zip(outputs, function(), strict=True):
                out.copy_(new)

        return Recording(outputs, replay)


@dataclass(frozen=True)
class Recorder(Capture):
    """`fails` and `capturing` are what the next capture and call meet."""

    fails = ""
    capturing = False

    def refusal(self, device: torch.device) -> str | None:
        return None

    def busy(self) -> bool:
        return self.capturing

    def share(self, device: torch.device) -> int:
        return 1 << 40

    def pool(self, device: torch.device) -> Pool:
        return RecorderPool()
