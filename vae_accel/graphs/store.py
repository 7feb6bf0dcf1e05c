"""The captured graphs of one tower: which are kept, when one is captured, and what a call does without one.

An *exact* graph serves the calls that equal the captured one in all but the values of their pixels, and returns what
the forward would have, bit for bit. It is captured when a call comes the second time: a pipeline repeats its sizes, and
one that never comes back is not worth the capture. A call without an exact graph goes to a *bucket* if `warmup` made
one that holds it, and runs as before otherwise, for a reason that is counted.

One lock covers filling, replaying and copying out: threads take turns. Streams may differ from call to call; each
waits for the one before.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vae_accel.edits import Outcome
from vae_accel.graphs import packed
from vae_accel.graphs.bucket import Bucket, rooms
from vae_accel.graphs.call import Call, Signature
from vae_accel.graphs.capture import CannotCapture, Capture, Pool
from vae_accel.graphs.captured import Captured
from vae_accel.graphs.packing import replay_packed
from vae_accel.graphs.steering import GRID, Beneath, constants
from vae_accel.graphs.witness import Witness
from vae_accel.kernels import _dispatch
from vae_accel.rewrite import Tier, module_runs_stock

REMEMBERED = 64  # calls seen once, or that cannot be captured


@dataclass(frozen=True)
class Limits:
    """keep: exact graphs. pool_bytes: of all graphs of a module together. budgets: of buckets, in output tokens; none
    where the tier is exact."""

    keep: int = 8
    pool_bytes: int = 4 << 30
    budgets: tuple[int, ...] = (256, 512, 1024, 1536)


class Graphs:
    """Belongs to one module's `forward`. A copy of it, or one from a pickle, starts empty."""

    def __init__(self, limits: Limits, capture: Capture, outcome: Outcome, beneath: Beneath):
        self.limits, self._capture, self._outcome, self._beneath = limits, capture, outcome, beneath
        outcome.bytes = 0
        self._lock = threading.RLock()
        self._signature: Signature | None = None
        self._witness: Witness | None = None
        self._seen: OrderedDict[Any, None] = OrderedDict()
        self._hopeless: OrderedDict[Any, str] = OrderedDict()
        self._pool: Pool | None = None
        self._share = limits.pool_bytes  # what the card has to spare, once it is known
        self._exact: OrderedDict[Any, Captured] = OrderedDict()
        self._buckets: dict[Any, list[Bucket]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.limits, self._capture, self._outcome, self._beneath)

    def call(self, module: nn.Module, below: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """`below(*args, **kwargs)`, from a graph where there is one and no profile asks the launches for their work."""
        if _dispatch.tally is not None:
            return below(*args, **kwargs)
        with self._lock:
            try:
                call = self._read(module, args, kwargs)
                ahead = self._ahead(call)
                self._check(module)
                exact = self._exact.get(call.key)
                if exact is None:
                    ahead = None
                    through_bucket = self._through_buckets(module, below, call)
                    if through_bucket is not None:
                        return through_bucket
                    exact = self._capture_exact(module, below, call, again=True)
            except CannotCapture as reason:
                self._count(f"run as before: {reason}")
            else:
                self._exact.move_to_end(call.key)
                self._count("replayed")
                return exact.run(call.data) if ahead is None else ahead
        return below(*args, **kwargs)

    def _ahead(self, call: Call) -> Any:
        """What the exact graph of a call gives, launched before the module is asked whether it changed, which takes the
        host up to 0.3 ms: the card computes meanwhile, and what it computes is dropped where something did. Asked first
        is only whether all the memory it reads is still there. None: there is no such graph."""
        exact = self._exact.get(call.key)
        ready = exact is not None and self._witness is not None and self._witness.in_place()
        return exact.run(call.data) if exact is not None and ready else None

    def warm(self, module: nn.Module, below: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
        """Captures the exact graph of a call, unless there is one.

        Raises:
            CannotCapture: with the reason.
        """
        with self._lock:
            call = self._read(module, (), kwargs)
            self._check(module)
            if call.key not in self._exact:
                self._capture_exact(module, below, call, again=False)

    def warm_bucket(self, module: nn.Module, below: Callable[..., Any], tokens: int, kwargs: Mapping[str, Any]) -> None:
        """Captures a bucket of `tokens` output tokens for calls like the given one, of any grids.

        Raises:
            CannotCapture: with the reason.
        """
        with self._lock:
            if not self.limits.budgets:
                raise CannotCapture("a bucket is of tier rounding, and the tier is exact")
            call = self._read(module, (), kwargs)
            self._check(module)
            if not _is_packed(module, call):
                raise CannotCapture("a budget is for towers that pack their images")
            held = self._buckets.setdefault(call.kind, [])
            if any(bucket.room.tokens == tokens for bucket in held):
                return
            (room,) = rooms(module, (tokens,))
            ((name, like),) = call.data.items()
            with self._in_memory():
                held.append(Bucket(self._open(call.device), module, below, room, (name, like), call.options))
            self._count("captured, for a budget")
            self._outcome.tier = Tier.ROUNDING.value
            if not self._fits():
                raise CannotCapture(f"with it, more than {self._most}")

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call, if a graph could serve it at all."""
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not tensors:
            raise CannotCapture("no tensor among its arguments")
        refusal = self._capture.refusal(tensors[0].device)
        if refusal is not None:
            raise CannotCapture(refusal)
        if self._capture.busy():  # a torch without CUDA cannot be asked
            raise CannotCapture("inside another capture")
        if module_runs_stock(module, *tensors):
            raise CannotCapture("a gradient is wanted, or autocast is on")
        if self._signature is None:
            self._signature = Signature(module)
        return self._signature.read(module, args, kwargs)

    def _check(self, module: nn.Module) -> None:
        """Drops every graph if the module is not what it was."""
        if self._witness is None or not self._witness.holds():
            now = Witness(module)
            if self._witness is not None and now.identity != self._witness.identity:
                if self._exact or self._buckets:
                    self._count("dropped: the module was changed")
                self._drop()
                self._seen.clear()
                self._hopeless.clear()
            self._witness = now
        if self._witness.refusal is not None:
            raise CannotCapture(self._witness.refusal)

    def _through_buckets(self, module: nn.Module, below: Callable[..., Any], call: Call) -> Any:
        """The outputs by way of buckets; None where there is none, or an exact graph is due."""
        held = self._buckets.get(call.kind)
        if not held or call.key in self._seen or not _is_packed(module, call):
            return None
        out = replay_packed(module, below, held, call, GRID, self._count)
        if out is not None:
            _note(self._seen, call.key, None)
        return out

    def _capture_exact(self, module: nn.Module, below: Callable[..., Any], call: Call, *, again: bool) -> Captured:
        """A new exact graph; with `again`, only of a call that was seen before."""
        if call.key in self._hopeless:
            raise CannotCapture(self._hopeless[call.key])
        if again and call.key not in self._seen:
            _note(self._seen, call.key, None)
            raise CannotCapture("the first of its size" + (", and no bucket holds it" if self._buckets else ""))
        try:
            with self._in_memory():
                alone = not self._exact and not self._buckets
                made = self._made(module, below, call)
                if made is None and not alone:
                    self._count("dropped: together more than the pool may hold")
                    made = self._made(module, below, call)
            if made is None:
                raise CannotCapture(f"its graph is larger than {self._most}")
        except CannotCapture as reason:
            _note(self._hopeless, call.key, str(reason))
            raise
        self._seen.pop(call.key, None)
        return made

    def _made(self, module: nn.Module, below: Callable[..., Any], call: Call) -> Captured | None:
        """A new exact graph; None where it was one too many for the pool, and all are dropped."""
        pool = self._open(call.device)
        inputs = {name: pool.static(tensor).copy_(tensor) for name, tensor in call.data.items()}
        steady = constants(module, call, self._beneath)
        self._exact[call.key] = made = Captured(pool, below, inputs, steady.arguments, asks=steady.asks)
        self._count("captured")
        while len(self._exact) > self.limits.keep:
            self._exact.popitem(last=False)
            self._count("dropped: the least recently used")
        return made if self._fits() else None

    @contextmanager
    def _in_memory(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            self._drop()
            raise CannotCapture("out of memory while it was captured") from error

    def _open(self, device: torch.device) -> Pool:
        if self._pool is None:
            self._share = self._capture.share(device)
            self._pool = self._capture.pool(device)
        return self._pool

    @property
    def _most(self) -> str:
        if self._share < self.limits.pool_bytes:
            return f"{self._share >> 20} MiB, a sixteenth of the card"
        return f"VAE_ACCEL_GRAPH_POOL_MIB={self.limits.pool_bytes >> 20}"

    def _drop(self) -> None:
        self._exact.clear()
        self._buckets.clear()
        self._pool = None
        self._outcome.bytes = 0

    def _fits(self) -> bool:
        """Notes what is held; drops all of it if that is too much, as a pool shrinks only once no graph of it lives."""
        captured = [*self._exact.values(), *(b.captured for held in self._buckets.values() for b in held)]
        pool = 0 if self._pool is None else self._pool.bytes
        self._outcome.bytes = pool + sum(c.input_bytes for c in captured)
        fits = self._outcome.bytes <= min(self.limits.pool_bytes, self._share)
        if not fits:
            self._drop()
        return fits

    def _count(self, what: str) -> None:
        self._outcome.counts[what] = self._outcome.counts.get(what, 0) + 1


def _is_packed(module: nn.Module, call: Call) -> bool:
    """Whether a call is patches and the grid of them, and nothing that has one row an image."""
    shaped = len(call.data) == 1 and next(iter(call.data.values())).dim() == 2 and list(call.steering) == [GRID]
    return shaped and packed.is_packed(module) and not call.options.get("output_attentions")


def _note(where: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    where[key] = value
    where.move_to_end(key)
    if len(where) > REMEMBERED:
        where.popitem(last=False)
