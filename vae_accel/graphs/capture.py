"""How a forward is captured and replayed: the seam between the bookkeeping, which any machine can test, and a card."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SYNCHRONIZES = "called a synchronizing CUDA operation"  # torch's words under set_sync_debug_mode


class CannotCapture(RuntimeError):
    """A forward cannot be captured; the message is the reason as the report prints it."""


@dataclass
class Recording:
    """`replay()` computes `outputs` anew, in place, from whatever the inputs of the capture hold by then.

    The outputs are good until the next replay in the same pool: copy them on the stream that replayed.
    """

    outputs: list[Tensor]
    replay: Callable[[], None]


class Pool(ABC):
    """Memory that captures of one tower share; one replay at a time, on one stream after the other. `bytes` of it."""

    bytes: int = 0

    @abstractmethod
    def record(self, function: Callable[[], list[Tensor]], asks: bool) -> Recording:
        """Captures `function`, which reads static inputs and returns its outputs. Calls it three times.

        `asks`: it may wait for the device in a call that is not captured.

        Raises:
            CannotCapture: it waits for the device, or fails in a way only a capture does.
        """

    @abstractmethod
    def static(self, tensor: Tensor) -> Tensor:
        """A buffer of the shape, strides, dtype and device of `tensor`, outside the shared memory; not yet written."""

    @abstractmethod
    def send(self, host: Tensor, static: Tensor) -> None:
        """Copies from the host into a static buffer, for which nobody waits."""

    @abstractmethod
    def turn(self, inputs: Iterable[Tensor]) -> None:
        """Before inputs are written: work of the stream before, if it was another, comes first."""


class Capture(ABC):
    """Something that captures; has no state."""

    @abstractmethod
    def refusal(self, device: torch.device) -> str | None:
        """Why nothing can be captured on a device, or None."""

    @abstractmethod
    def busy(self) -> bool:
        """Whether this call is itself part of a capture."""

    @abstractmethod
    def share(self, device: torch.device) -> int:
        """Bytes of a device's memory that the graphs of one module may hold at most."""

    @abstractmethod
    def pool(self, device: torch.device) -> Pool: ...


@dataclass(frozen=True)
class Cuda(Capture):
    """torch.cuda.CUDAGraph."""

    def refusal(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"CUDA graphs are for NVIDIA cards, not {device.type}"
        return "graphs of HIP are not measured yet" if torch.version.hip else None

    def busy(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def share(self, device: torch.device) -> int:
        return torch.cuda.get_device_properties(device).total_memory // 16  # nobody else can use it

    def pool(self, device: torch.device) -> Pool:
        return CudaPool(device)


class CudaPool(Pool):
    def __init__(self, device: torch.device):
        self.device = device
        self.handle = torch.cuda.graph_pool_handle()
        self.side = torch.cuda.Stream(device)
        self.home = self.last = torch.cuda.current_stream(device)

    def record(self, function: Callable[[], list[Tensor]], asks: bool) -> Recording:
        with torch.cuda.device(self.device):
            self._warm(function, asks)
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: what another thread does on the card must not end this capture.
                mode = "thread_local"
                with torch.cuda.graph(graph, pool=self.handle, stream=self.side, capture_error_mode=mode):
                    before = torch.cuda.memory_reserved(self.device)
                    outputs = function()
            except RuntimeError as error:
                self._abandon()
                raise CannotCapture(f"its capture failed: {str(error).splitlines()[0]}") from error
            self.bytes += max(torch.cuda.memory_reserved(self.device) - before, 0)
            return Recording([_borrowed(t, graph) for t in outputs], graph.replay)

    def static(self, tensor: Tensor) -> Tensor:
        now = torch.cuda.current_stream(self.device)
        # A buffer made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.cuda.stream(self.home):
            made = torch.empty_like(tensor)
        if now != self.home:
            now.wait_stream(self.home)
        return made

    def send(self, host: Tensor, static: Tensor) -> None:
        static.copy_(host.pin_memory(), non_blocking=True)  # torch keeps pinned memory until the copy has been made

    def turn(self, inputs: Iterable[Tensor]) -> None:
        now = torch.cuda.current_stream(self.device)
        if now != self.last:
            now.wait_stream(self.last)
            self.last = now
        if now != self.home:
            for tensor in inputs:
                tensor.record_stream(now)

    def _warm(self, function: Callable[[], list[Tensor]], asks: bool) -> None:
        """Runs twice beside the current stream: what is made once is made (handles, kernels, caches), and then nothing
        may wait for the device. Asked here, because a capture that fails leaves torch's allocator in capture mode."""
        current = torch.cuda.current_stream(self.device)
        self.side.wait_stream(current)
        mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(self.side), warnings.catch_warnings(record=True) as told:
            function()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # of the process: "error" would raise in other threads
            try:
                function()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        current.wait_stream(self.side)
        if not asks and any(_SYNCHRONIZES in str(warning.message) for warning in told):
            raise CannotCapture("its forward waits for the device")

    def _abandon(self) -> None:
        """torch (2.6 to 2.13) ends a failed capture without telling its allocator, which then frees nothing more."""
        try:
            torch._C._cuda_endAllocateToPool(self.device.index or 0, self.handle)
        except RuntimeError:  # it had been told
            return


class _Memory:
    """`bytes` of the card at an address, for `torch.as_tensor`; keeps `owner` alive."""

    def __init__(self, address: int, size: int, owner: Any):
        self.owner = owner
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def _borrowed(tensor: Tensor, graph: Any) -> Tensor:
    """The same memory without a claim on it, so that the pool's next capture may write there too.

    Outputs are copied at once after a replay. Were each graph's kept, 33 hidden states of 5476 patches would be 0.46 GB
    a graph; the address stays mapped as long as the graph holds the pool.
    """
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return tensor
    whole = torch.as_tensor(_Memory(storage.data_ptr(), storage.nbytes(), graph), device=tensor.device)
    return whole.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
