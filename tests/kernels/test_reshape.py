"""The pattern compiler against einops: values, shapes and strides, on patterns written here and on random ones."""

import random

import einops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_accel.kernels.reshape import REDUCTIONS, PatternError, compile_pattern

REARRANGE = [
    ("... h d -> ... (h d)", (2, 3, 4, 5), {}),
    ("b l (h d) -> b h l d", (2, 3, 20), {"h": 4}),
    ("b c t h w -> (b t) c h w", (2, 3, 4, 5, 6), {}),
    ("(b t) c h w -> b c t h w", (8, 3, 5, 6), {"t": 4}),
    ("b c (h p) (w q) -> b (h w) (c p q)", (2, 3, 8, 12), {"p": 2, "q": 3}),
    ("b 1 c -> b c", (2, 1, 3), {}),
    ("b c -> b 1 c ()", (2, 3), {}),
    ("... -> (...)", (2, 3, 4), {}),
    ("a … b -> (a b) …", (2, 3, 4), {}),
    ("a ... -> (a ...)", (2,), {}),
    ("a -> (a)", (3,), {}),
    ("b n d -> b n d", (2, 3, 4), {}),
    ("b n -> b n", (0, 4), {}),
]
REPEAT = [
    ("b c -> b c n", (2, 3), {"n": 4}),
    ("h w -> (h 2) (w n)", (2, 3), {"n": 3}),
    ("... d -> ... r d", (2, 3, 4), {"r": 1}),
    ("d -> b 1 d", (3,), {"b": 2}),
]
REDUCE = [
    ("b c (h 2) (w p) -> b c h w", (2, 3, 4, 6), {"p": 3}),
    ("b ... -> b", (2, 3, 4), {}),
    ("... -> ", (2, 3), {}),
    ("b c -> b c 1", (2, 3), {}),
    ("a b c -> c a", (2, 3, 4), {}),
]
WRONG = [
    ("a b -> a", "rearrange", (2, 3), {}),
    ("a b -> a b c", "rearrange", (2, 3), {}),
    ("a b -> a b c", "repeat", (2, 3), {}),
    ("a -> a b", "sum", (2,), {}),
    ("(a b) -> a b", "rearrange", (6,), {}),
    ("(a b) -> a b", "rearrange", (6,), {"a": 4}),
    ("a b -> a b", "rearrange", (2, 3), {"a": 3}),
    ("a b -> a b", "rearrange", (2, 3), {"c": 3}),
    ("a b -> b a", "rearrange", (2, 3, 4), {}),
    ("a b 1 -> b a", "rearrange", (2, 3, 4), {}),
    ("a b -> ... a b", "rearrange", (2, 3), {}),
    ("(... a) -> ... a", "rearrange", (2,), {}),
    ("a a -> a", "rearrange", (2, 2), {}),
    ("((a b)) -> a b", "rearrange", (6,), {"a": 2}),
    ("(a b -> a b", "rearrange", (2, 3), {}),
    ("a b) -> a b", "rearrange", (2, 3), {}),
    ("a_ b -> b a_", "rearrange", (2, 3), {}),
    ("a 2 -> a 2", "rearrange", (3, 2), {}),
    ("a 0 -> a", "sum", (3, 0), {}),
    ("a -> a -> a", "rearrange", (2,), {}),
    ("a b", "rearrange", (2, 3), {}),
    ("a - b -> a b", "rearrange", (2, 3), {}),
]


def strided(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values in a layout in which some merges are views and others copy."""
    order = torch.randperm(len(shape)).tolist()
    return torch.randn([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))]).to(dtype)


def run_einops(x, pattern, operation, axes):
    if operation in ("rearrange", "repeat"):
        return getattr(einops, operation)(x, pattern, **axes)
    return einops.reduce(x, pattern, operation, **axes)


def compare(x, pattern, operation, axes):
    want = run_einops(x, pattern, operation, axes)
    got = compile_pattern(pattern, operation, x.shape, tuple(axes.items()))(x)
    assert torch.equal(want, got) and want.shape == got.shape
    assert want.stride() == got.stride()
    shared = want.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert shared == (got.untyped_storage().data_ptr() == x.untyped_storage().data_ptr())


@pytest.mark.parametrize("operation, cases", [("rearrange", REARRANGE), ("repeat", REPEAT)])
def test_values_strides_and_views_are_those_of_einops(operation, cases):
    for pattern, shape, axes in cases:
        for _ in range(4):
            compare(strided(shape), pattern, operation, axes)


@pytest.mark.parametrize("operation", REDUCTIONS)
def test_reductions_are_bit_for_bit_those_of_einops(operation):
    dtype = torch.bool if operation in ("any", "all") else torch.float32
    for pattern, shape, axes in REDUCE:
        compare(strided(shape, dtype), pattern, operation, axes)


@pytest.mark.parametrize("pattern, operation, shape, axes", WRONG)
def test_what_einops_rejects_is_rejected(pattern, operation, shape, axes):
    with pytest.raises(Exception):  # noqa: B017 - einops raises EinopsError, ValueError and others
        run_einops(torch.zeros(shape), pattern, operation, axes)
    with pytest.raises(PatternError):
        compile_pattern(pattern, operation, shape, tuple(axes.items()))


def test_the_mean_of_integers_is_rejected():
    with pytest.raises(PatternError, match="integers"):
        compile_pattern("a b -> a", "mean", (2, 3))(torch.ones(2, 3, dtype=torch.long))


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(["rearrange", "repeat", "min", "sum", "mean", "prod"]))
def test_random_patterns(rng: random.Random, operation):
    axes = {name: rng.randint(1, 4) for name in "abcdef"[: rng.randint(1, 5)]}
    left = grouped(rng, list(axes))
    ellipsis = rng.random() < 0.4
    kept = [a for a in axes if operation in ("rearrange", "repeat") or rng.random() < 0.6]
    new = {"n": 2, "m": 1} if operation == "repeat" and rng.random() < 0.7 else {}
    right = grouped(rng, kept + list(new))
    shape = [product(axes, dim) for dim in left]
    at = rng.randrange(len(left) + 1)
    if ellipsis:
        shape[at:at] = [2, 3]
        left.insert(at, ["..."])
        right.insert(rng.randrange(len(right) + 1), ["..."])
    given = {**new, **{a: axes[a] for dim in left if len(dim) > 1 for a in dim[1:]}}
    pattern = f"{written(rng, left)} -> {written(rng, right)}"
    compare(strided(tuple(shape)), pattern, operation, given)


def grouped(rng, names):
    rng.shuffle(names)
    groups = [[]] if rng.random() < 0.3 else []
    for name in names:
        if groups and rng.random() < 0.4:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def product(axes, dim):
    size = 1
    for axis in dim:
        size *= axes[axis]
    return size


def written(rng, side):
    return " ".join(dim[0] if len(dim) == 1 and rng.random() < 0.9 else _parenthesis(dim) for dim in side)


def _parenthesis(dim):
    return "..." if dim == ["..."] else f"({' '.join(dim)})"
