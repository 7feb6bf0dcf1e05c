"""Where one call spends its time: by kernel, and by operation with the rate at which it computes or moves memory.

The profiler times, and another run of the same call counts: 2 FLOP a multiply-add from the shapes at a convolution,
stock's or ours, what torch knows of products and attention, and for everything else the bytes of its tensors, each
read or written once, which is what a memory-bound kernel cannot do without. Our own kernels say what they do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vae_accel.kernels import _dispatch
from vae_accel.results import ProfileRow

CONVOLUTIONS = ("aten::convolution", "vae_accel::conv")
SMALLEST_SHARE = 0.005  # of the whole; what is below is summed as "other"
OTHER, UNTRACED = "other", "(launched by no operator)"
RUNTIME = re.compile(r"cu(da)?[A-Z]")  # cudaLaunchKernel, cuLaunchKernelEx
LONGEST_NAME = 72


@dataclass
class Cost:
    """What one name cost in one call: how often it ran, and microseconds."""

    calls: int = 0
    us: float = 0.0

    def add(self, us: float, calls: int = 1) -> None:
        self.us += us
        self.calls += calls


@dataclass
class Work:
    """What one operation did in one call: floating-point operations, and bytes read and written."""

    flop: int = 0
    bytes: int = 0


@dataclass
class Counter(TorchDispatchMode):
    """Adds up the work of every operation that runs inside `with`; one inside another is part of the outer one."""

    work: dict[str, Work] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # inference mode hands over composites (conv3d), whose parts are what the profiler sees at work
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        out = func(*args, **kwargs)
        name = func._schema.name
        if not func.is_view and "empty" not in name:
            done = self.work.setdefault(name, Work())
            done.flop += flop(name, func.overloadpacket, args, kwargs, out)
            done.bytes += sum(map(_bytes, tree_leaves((args, kwargs, out))))
        return out


def flop(name: str, packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """The floating-point operations of one call by its shapes, 0 where they are not known."""
    if name in CONVOLUTIONS and not (name == "aten::convolution" and args[6]):
        return 2 * out.numel() * args[1][0].numel()
    known = flop_registry.get(packet)
    args = tuple(a for a in args if not isinstance(a, torch.dtype))  # bmm.dtype has a third that its formula has not
    return 0 if known is None else int(known(*args, **kwargs, out_val=out))


def profile(call: Callable[[], Any], device: torch.device, *, direction: Any, model: Any) -> list[ProfileRow]:
    """Two tables of one call on a warm model: by kernel (on a CPU by operator, its own time alone) and by operation.

    An operation's time is that of everything launched inside it. Each table sums to the time of the device.
    """
    launched: dict[str, Work] = {}

    def tally(kernel: str, flop: int, size: int) -> None:
        done = launched.setdefault(kernel, Work())
        done.flop, done.bytes = done.flop + flop, done.bytes + size

    with Counter() as counter:
        _dispatch.tally = tally
        try:
            call()
        finally:
            _dispatch.tally = None
    accelerated = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if accelerated else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if accelerated:
            torch.cuda.synchronize(device)
    events = profiler.events() or []
    kernels = by_kernel(events, accelerated)
    operations = by_operation(events, counter.work, accelerated)
    total = sum(cost.us for cost in kernels.values())
    if (rest := total - sum(cost.us for cost in operations.values())) > 0.5:
        operations[UNTRACED] = Cost(0, rest)
    rows = [{"by": "kernel", **row} for row in table(kernels, launched)]
    rows += [{"by": "operation", **row} for row in table(operations, counter.work)]
    return [ProfileRow(direction=direction, model=model, **row) for row in rows]


def by_kernel(events: Iterable[Any], accelerated: bool) -> dict[str, Cost]:
    """Kernels by their short names; without an accelerator, operators by the time that is their own."""
    found: dict[str, Cost] = {}
    for event in events:
        if accelerated and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            found.setdefault(short(event.name), Cost()).add(event.time_range.elapsed_us())
        elif not accelerated:
            found.setdefault(event.name, Cost()).add(event.self_cpu_time_total)
    return found


def by_operation(events: Iterable[Any], counted: Mapping[str, Work], accelerated: bool) -> dict[str, Cost]:
    """The time of each event under the outermost operation that was counted and holds it, else under its own name.

    Calls of the runtime hold no kernels, though torch hands them some: it looks kernels up by the number of their
    operation, and numbers calls beside them (seen in 2.11 and 2.13: 0.077 ms of operations in 0.044 ms of kernels).
    """
    found: dict[str, Cost] = {}
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        kernels = () if RUNTIME.match(event.name) else event.kernels
        us = sum(kernel.duration for kernel in kernels) if accelerated else event.self_cpu_time_total
        owner, above = event, event
        while above is not None:
            owner = above if above.name in counted else owner
            above = above.cpu_parent
        if us > 0 or owner is event:
            found.setdefault(owner.name, Cost()).add(us, calls=int(owner is event))
    return {name: cost for name, cost in found.items() if cost.us > 0}


def table(costs: Mapping[str, Cost], work: Mapping[str, Work]) -> list[dict[str, Any]]:
    """Rows by falling time, as fields of a `ProfileRow`; the small ones in one."""
    total = sum(cost.us for cost in costs.values())
    rest, rows = Cost(), []
    for name, cost in sorted(costs.items(), key=lambda item: -item[1].us):
        if cost.us < SMALLEST_SHARE * total:
            rest.add(cost.us, cost.calls)
        else:
            rows.append(_row(name, cost, total) | _rate(work.get(name, Work()), cost))
    return [*rows, _row(OTHER, rest, total)] if rest.us else rows


def short(name: str) -> str:
    """A kernel's name without return type, namespaces, template arguments and parameters."""
    name = torch._C._demangle(name) if name.startswith("_Z") else name
    if name.startswith("void ") or "::" in name:  # a signature in C++; Triton and cuDNN name theirs plainly
        name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
        while (plain := re.sub(r"<[^<>]*>", "", name)) != name:
            name = plain
        name = name.partition("(")[0].rpartition("::")[2]
    return name[:LONGEST_NAME]


def _row(name: str, cost: Cost, total: float) -> dict[str, Any]:
    return {"name": name, "calls": cost.calls, "ms": cost.us / 1e3, "share": cost.us / total if total else 0.0}


def _rate(work: Work, cost: Cost) -> dict[str, float]:
    """TFLOP/s where the operations are known, else GB/s where the bytes are."""
    if work.flop:
        return {"tflops": work.flop / cost.us / 1e6}
    return {"gbps": work.bytes / cost.us / 1e3} if work.bytes else {}


def _bytes(leaf: Any) -> int:
    """Of a tensor; one that was expanded is read once."""
    return min(leaf.numel() * leaf.element_size(), leaf.untyped_storage().nbytes()) if isinstance(leaf, Tensor) else 0
