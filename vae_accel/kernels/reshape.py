"""einops patterns compiled into native reshapes, once a shape: `"... h d -> ... (h d)"` is what `flatten(-2)` does.

The notation is that of einops (Rogozhnikov, ICLR 2022). The result runs the same sequence of views as einops does
(reshape, permute, reduce, expand, reshape), so values are bit for bit the same, a view stays a view, and strides are
equal. What is saved is the work on strings and shapes around it, every call.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from math import prod

from torch import Tensor

REDUCTIONS = ("min", "max", "sum", "mean", "prod", "any", "all")
_TOKEN = re.compile(r"\s*(\.\.\.|…|[()]|[^\W\d]\w*|\d+)")
_ELLIPSIS, _INSIDE = ["..."], "(...)"  # a dimension of its own, or an axis of a parenthesis

Native = Callable[[Tensor], Tensor]
Side = list[list[str]]  # the elementary axes of each dimension; a number n > 1 is an axis "n@position"


class PatternError(ValueError):
    """A pattern this compiler does not accept, or a tensor whose shape the pattern does not fit."""


@functools.lru_cache(maxsize=4096)
def compile_pattern(
    pattern: str, operation: str, shape: tuple[int, ...], axes: tuple[tuple[str, int], ...] = ()
) -> Native:
    """A function that does `pattern` to tensors of `shape`.

    Args:
        pattern: an einops pattern, e.g. `"b (h d) t -> b h t d"`.
        operation: "rearrange", "repeat", or one of REDUCTIONS.
        shape: every size is settled here, so that a call does no arithmetic.
        axes: sizes of named axes; at most one axis of each parenthesis may be left to infer.

    Raises:
        PatternError: the pattern is wrong for this operation, this shape or these axes.
    """
    if operation not in ("rearrange", "repeat", *REDUCTIONS):
        raise PatternError(f"unknown operation {operation!r}")
    left, right = _sides(pattern, len(shape))
    old, wanted = [a for dim in left for a in dim], [a for dim in right for a in dim]
    vanished, new = [a for a in old if a not in wanted], [a for a in wanted if a not in old]
    if (vanished and operation not in REDUCTIONS) or (new and operation != "repeat"):
        raise PatternError(f"{operation} cannot make or drop {vanished + new}: {pattern!r}")
    length = _lengths(pattern, left, new, shape, dict(axes))

    kept = [a for a in wanted if a in old]
    order = [old.index(a) for a in kept + vanished]
    split = [length[a] for a in old] if any(len(dim) != 1 for dim in left) else None
    permuted = order if order != sorted(order) else None
    reduced = tuple(range(len(kept), len(old)))
    added = [i for i, a in enumerate(wanted) if a in new]
    expanded = [length[a] if a in new else -1 for a in wanted]
    merged = [prod(length[a] for a in dim) for dim in right] if any(len(dim) != 1 for dim in right) else None

    wide = [dim for dim in right if len(dim) != 1]
    if len(wide) == 1 and wide[0] and split is None and permuted is None and not (reduced or added):
        return _flatten(old.index(wide[0][0]), old.index(wide[0][-1]))

    def native(x: Tensor) -> Tensor:
        if split is not None:
            x = x.reshape(split)
        if permuted is not None:
            x = x.permute(*permuted)
        if reduced:
            x = _reduce(x, operation, reduced)
        if added:
            for dim in added:
                x = x.unsqueeze(dim)
            x = x.expand(expanded)
        return x if merged is None else x.reshape(merged)

    return native


def _flatten(first: int, last: int) -> Native:
    return lambda x: x.flatten(first, last)


def _lengths(pattern: str, left: Side, new: list[str], shape: Sequence[int], given: dict[str, int]) -> dict[str, int]:
    """The size of every elementary axis: written in the pattern, given by name, or inferred from the shape."""
    names = [a for dim in left for a in dim] + new
    length = {a: int(a.partition("@")[0]) for a in names if "@" in a}
    if any(a not in names for a in given):
        raise PatternError(f"axes {sorted(given)} are not all in {pattern!r}")
    length |= given
    for dim, size in zip(left, shape, strict=True):
        unknown = [a for a in dim if a not in length]
        rest = prod(length[a] for a in dim if a in length)
        if len(unknown) > 1 or (size != rest if not unknown else rest == 0 or size % rest):
            raise PatternError(f"{tuple(shape)} does not fit {pattern!r}")
        length |= dict.fromkeys(unknown, size // max(rest, 1))
    if any(a not in length for a in new):
        raise PatternError(f"the size of {new} is not given: {pattern!r}")
    return length


def _sides(pattern: str, ndim: int) -> tuple[Side, Side]:
    halves = pattern.split("->")
    if len(halves) != 2:
        raise PatternError(f"a pattern has one '->': {pattern!r}")
    left, right = _parse(halves[0], "<"), _parse(halves[1], ">")
    rest = ndim - sum(dim != _ELLIPSIS for dim in left)
    if any(_INSIDE in dim for dim in left) or rest < 0 or (rest > 0 and _ELLIPSIS not in left):
        raise PatternError(f"{ndim} dimensions do not fit the left of {pattern!r}")
    if _ELLIPSIS not in left and any(_INSIDE in dim or dim == _ELLIPSIS for dim in right):
        raise PatternError(f"an ellipsis on the right only: {pattern!r}")
    axes = [f".{i}" for i in range(rest)]
    return _fill(left, axes), _fill(right, axes)


def _fill(side: Side, axes: list[str]) -> Side:
    """Puts the axes that an ellipsis stands for in its place: each a dimension, or all within one parenthesis."""
    full: Side = []
    for dim in side:
        full += [[a] for a in axes] if dim == _ELLIPSIS else [[b for a in dim for b in (axes if a == _INSIDE else [a])]]
    return full


def _parse(text: str, side: str) -> Side:
    dims: Side = []
    group: list[str] | None = None
    seen: set[str] = set()
    at, text = 0, text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise PatternError(f"cannot read {text[at:]!r}")
        token, at = match[1].replace("…", "..."), match.end()
        if token == "(" and group is None:
            dims.append(group := [])
        elif token == ")" and group is not None:
            group = None
        elif token in "()" or token in seen or token[0] == "_" or token[-1] == "_":
            raise PatternError(f"{token!r} is out of place in {text!r}")
        else:
            axes = [token]
            if token.isdecimal():  # a 1 is a dimension without axes
                axes = [f"{int(token)}@{side}{at}"] if int(token) > 1 else []
                if int(token) < 1:
                    raise PatternError(f"an axis of size {token} in {text!r}")
            else:
                seen.add(token)
            if group is None:
                dims.append(axes)
            else:
                group += [_INSIDE] if axes == _ELLIPSIS else axes
    if group is not None:
        raise PatternError(f"a parenthesis stays open in {text!r}")
    return dims


def _reduce(x: Tensor, operation: str, dims: Sequence[int]) -> Tensor:
    if operation == "mean" and not x.is_floating_point():
        raise PatternError("the mean of integers")
    if operation in ("sum", "mean"):
        return getattr(x, operation)(dim=tuple(dims))
    if operation in ("min", "max"):
        return getattr(x, f"a{operation}")(dim=tuple(dims))
    for dim in reversed(dims):
        x = getattr(x, operation)(dim=dim)
    return x
