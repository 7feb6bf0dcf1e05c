"""The public calls: optimize a pipeline or a module in place, report what was done, pause it, take it back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from vae_accel import platforms
from vae_accel import settings as env
from vae_accel.edits import ledger_of
from vae_accel.families import roles
from vae_accel.graphs import ahead
from vae_accel.graphs.capture import CannotCapture
from vae_accel.kernels import half_operands, tile_choice
from vae_accel.platforms import base
from vae_accel.reports import Report, section
from vae_accel.rewrites import NAMES
from vae_accel.rewrites.cuda_graph import graphs_of

T = TypeVar("T")


def optimize(target: T, *, platform: str | platforms.Platform | None = None, only: Any = None, **settings: Any) -> T:
    """Makes the VAE of a pipeline, and every vision encoder in it, faster in place; also takes a single module.

    Args:
        target: a diffusers pipeline, a VAE, or a transformers vision encoder.
        platform: a platform or its name; by default that of the device the module computes on.
        only: a rewrite's name, or several; nothing else is applied, and each must find something to do.
        settings: any `VAE_ACCEL_*` variable by its name in lower case, e.g. `tier="exact"`, `channels_last="0"`.

    Returns:
        `target`. Calling again with the same request changes nothing.

    Raises:
        TypeError: `target` is neither a module nor a pipeline.
        ValueError: a pipeline without either, an unknown rewrite or platform, a rewrite asked for by name that finds
            nothing, weights on the meta device. The model is left as it was.
    """
    parts = _parts(target)
    if not parts:
        raise ValueError(
            f"{type(target).__name__} has no VAE and no vision encoder among its components; pass the module itself"
        )
    _optimize(parts, platform, only, settings)
    return target


def optimize_vae(vae: nn.Module, *, platform: Any = None, only: Any = None, **settings: Any) -> nn.Module:
    """`optimize` for a module that is to be treated as a VAE."""
    _optimize([("", _module(vae), "vae")], platform, only, settings)
    return vae


def optimize_encoder(encoder: nn.Module, *, platform: Any = None, only: Any = None, **settings: Any) -> nn.Module:
    """`optimize` for a module that is to be treated as a vision encoder, or as a model that holds one."""
    _optimize([("", _module(encoder), "encoder")], platform, only, settings)
    return encoder


def restore(target: T) -> T:
    """Takes every rewrite back: methods, values and strides are bit for bit what they were. Returns `target`."""
    for _, module, _ in _parts(target):
        base.replace(module, None)
    return target


@contextmanager
def paused(target: T) -> Iterator[T]:
    """Stock behaviour inside the block, the rewrites again after it. Not for use while another thread decodes."""
    ledgers = [(module, ledger_of(module)) for _, module, _ in _parts(target)]
    done = [(module, ledger) for module, ledger in ledgers if ledger is not None and ledger.active]
    try:
        for module, ledger in done:
            ledger.undo(module)
        yield target
    finally:
        for module, ledger in done:
            if ledger_of(module) is ledger:  # not restored, nor optimized otherwise, inside the block
                ledger.redo(module)


def warmup(
    target: T,
    grids: Sequence[Any] = (),
    *,
    budgets: Sequence[int] = (),
    images: Sequence[tuple[int, int, int]] = (),
    **options: Any,
) -> T:
    """Captures the CUDA graphs of the vision towers ahead of their calls. Returns `target`.

    A VAE, whose size of latents nothing here says, captures when a size comes the second time. Told nothing, a tower of
    packed images (Qwen-VL's) gets the buckets of `VAE_ACCEL_GRAPH_BUDGETS`, any other a graph for one image of its own
    size.

    Args:
        target: a pipeline or an encoder that was optimized with `cuda_graph` on.
        grids: of packed images: one call each, (t, h, w) in patches or a list of them. Exact: bit for bit.
        budgets: of packed images: output tokens of buckets, which serve any grids that fit; their padded products are
            of tier `rounding`.
        images: of other towers: (batch, height, width) in pixels.
        options: what the caller passes to the tower besides, e.g. `output_hidden_states=True`, as Qwen-Image-Edit does.

    Raises:
        ValueError: no tower here has graphs, a graph cannot be captured, or `budgets` where the tier is exact.
    """
    towers = [each for _, module, role in _parts(target) if role == "encoder" for each in graphs_of(module)]
    if not towers:
        raise ValueError(f"no vision tower in this {type(target).__name__} has cuda_graph on; report() says why")
    for tower, below, graphs in towers:
        try:
            ahead.warm(tower, below, graphs, tuple(ahead.calls(grids)), budgets, images, options)
        except CannotCapture as reason:
            raise ValueError(f"{type(tower).__name__} cannot be captured: {reason}") from reason
    return target


def report(target: Any) -> Report:
    """What was done to each component of a pipeline, or to a module: prints as text, `as_dict()` for JSON."""
    parts = _parts(target)
    sections = [section(name or type(module).__name__, ledger_of(module)) for name, module, _ in parts]
    if not isinstance(target, nn.Module):
        sections += [section(name, None, note) for name, note in roles.left_alone(target)]
    return Report(tuple(sections))


def _optimize(parts: list[tuple[str, nn.Module, str]], platform: Any, only: Any, options: dict[str, Any]) -> None:
    if isinstance(platform, type) and issubclass(platform, platforms.Platform):
        platform = platform()
    if not isinstance(platform, (str, platforms.Platform, type(None))):
        raise TypeError(f"platform must be a name or a Platform, not {type(platform).__name__}")
    settings = env.read(NAMES, **options, platform=platform if isinstance(platform, str) else None)
    tile_choice.use(settings.tiles)
    half_operands.use(settings.half_operands)
    options = {**options, "only": only}
    before = [(module, ledger_of(module)) for _, module, _ in parts]
    ledgers = []
    try:
        for _, module, role in parts:
            chosen = platform if isinstance(platform, platforms.Platform) else _choose(module, settings.platform)
            steps = chosen.vae if role == "vae" else chosen.encoder
            ledgers.append(base.run(module, chosen, steps, role, options, must_apply=False))
        for name in base.forced(settings, (only,) if isinstance(only, str) else only):
            base.require(name, ledgers, " and ".join(type(module).__name__ for _, module, _ in parts))
    except BaseException:
        for module, ledger in before:
            if ledger_of(module) is not ledger:
                base.replace(module, ledger)
        raise


def _choose(module: nn.Module, name: str) -> platforms.Platform:
    return platforms.of(module) if name == "auto" else platforms.by_name(name)


def _parts(target: Any) -> list[tuple[str, nn.Module, str]]:
    if isinstance(target, nn.Module):
        return [("", target, roles.role(target))]
    if isinstance(getattr(target, "components", None), dict):
        return roles.parts(target)
    raise TypeError(f"target must be a diffusers pipeline or a torch module, not {type(target).__name__}")


def _module(module: Any) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch module, not {type(module).__name__}; a whole pipeline goes to optimize()")
    return module
