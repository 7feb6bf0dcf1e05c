"""Every environment variable of the package, typed, in one table; the only reader of the environment.

Read when a model is optimized, never at import and never in a forward. A keyword of `optimize` wins over a variable.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, create_model
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "VAE_ACCEL_"
Switch = Literal["auto", "0", "1"]
PlatformName = Literal["auto", "cuda", "rocm", "npu", "cpu"]
TierName = Literal["exact", "rounding", "lowered"]


class SettingsError(ValueError):
    """A setting has a value, or a name, that does not exist; the message names the choices."""


class _Variables(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", env_ignore_empty=True)

    platform: PlatformName = Field("auto", description="whose plan to use; auto: the device of the module's parameters")
    tier: TierName = Field("rounding", description="how far a rewrite may go: bit-exact, same precision, or fewer bits")
    strict: bool = Field(
        False, description="raise when a rewrite fails to install, instead of rolling it back and saying so"
    )
    bf16: bool = Field(
        False, description="run the rewritten convolutions in bf16 inside a higher-precision model (lowered)"
    )
    half_operands: bool = Field(
        True, description="fp32 models: fused_blocks on fp16 operands where stock multiplies in TF32, for the process"
    )
    tiles: str = Field(
        "auto", description="what `vae-accel tune` found; auto: vae-accel/tiles.json in the user's cache directory"
    )
    # A pipeline repeats a few sizes; each more holds its inputs (13 MB of 5476 patches) beside the shared memory.
    graph_keep: int = Field(8, ge=1, description="cuda_graph: exact graphs a tower keeps; the least recently used goes")
    # The images that Qwen-Image-Edit shows its encoder: 384x384 are 196 tokens, 1024x1024 are 1369.
    graph_budgets: str = Field(
        "256,512,1024,1536",
        pattern=r"^[1-9]\d*(,[1-9]\d*)*$",
        description="cuda_graph: output tokens of the buckets that `warmup` captures where it is told nothing",
    )
    # Qwen2-VL with 5476 patches peaks at 0.2 GB, at 0.7 GB with its hidden states; graphs of one tower share that.
    # A FLUX.1 decode at 1024x1024 holds 2.1 GiB. Beside it, never more than a sixteenth of the card: graphs/store.py.
    graph_pool_mib: int = Field(
        4096,
        ge=1,
        description="cuda_graph: MiB that the graphs of a module may hold together, and 1/16 of the card",
    )


@dataclass(frozen=True)
class Settings:
    """What was asked for. `switches`: a rewrite's name to auto (the platform decides), 0 (off) or 1 (must apply)."""

    platform: PlatformName
    tier: TierName
    strict: bool
    bf16: bool
    half_operands: bool
    tiles: Path
    graph_keep: int
    graph_budgets: tuple[int, ...]
    graph_pool_mib: int
    switches: dict[str, Switch]


@dataclass(frozen=True)
class Variable:
    """One row of the table that `vae-accel env` prints: its value now, its default, its choices and what it means."""

    name: str
    value: str
    default: str
    choices: str
    meaning: str


def tf32_forbidden() -> bool:
    """NVIDIA's own switch: at 0 its libraries keep fp32 whatever torch allows them."""
    return os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"


def read(rewrites: Iterable[str], **overrides: Any) -> Settings:
    """Reads the environment; `overrides` are settings by name (`tier="exact"`, `conv3d_as_conv2d="0"`) and win over it.

    Raises:
        SettingsError: an unknown setting or a value outside its choices, from either source.
    """
    names = tuple(rewrites)
    variables = _table(names)
    fields = variables.model_fields
    _refuse_unknown(overrides, fields)
    _refuse_unknown((n for n in os.environ if n.startswith(PREFIX)), [PREFIX + field.upper() for field in fields])
    given = {k: (_switch(v) if k in names else _plain(v)) for k, v in overrides.items() if v is not None}
    try:
        values = variables(**given).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]).lower().removeprefix(PREFIX.lower())
        name = field if field in given else PREFIX + field.upper()
        choices = _choices(field, fields[field].annotation)
        raise SettingsError(f"{name}={first['input']!r}: choose one of {choices}") from error
    tiles = _tiles_file(values.pop("tiles"))
    budgets = tuple(map(int, values.pop("graph_budgets").split(",")))
    switches = {n: values.pop(n) for n in names}
    return Settings(switches=switches, tiles=tiles, graph_budgets=budgets, **values)


def table(rewrites: Iterable[str]) -> list[Variable]:
    """Every variable with its value now: the source of `vae-accel env` and of the README's table."""
    names = tuple(rewrites)
    settings = read(names)
    rows = []
    for field, info in _table(names).model_fields.items():
        value = settings.switches[field] if field in settings.switches else getattr(settings, field)
        default, choices = _text(info.default), _choices(field, info.annotation)
        rows.append(Variable(PREFIX + field.upper(), _text(value), default, choices, info.description or ""))
    return rows


def _table(rewrites: tuple[str, ...]) -> type[_Variables]:
    switches = {n: (Switch, Field("auto", description=f"the rewrite {n}: 1 must apply, 0 off")) for n in rewrites}
    return create_model("Variables", __base__=_Variables, **switches)  # type: ignore[call-overload]


def cache_directory() -> Path:
    """Where what was measured or compiled on this machine is kept. It need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache") / "vae-accel"


def _tiles_file(given: str) -> Path:
    return cache_directory() / "tiles.json" if given == "auto" else Path(given).expanduser()


def _refuse_unknown(given: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise SettingsError(f"{unknown[0]} is not a setting; there are: {', '.join(sorted(known))}")


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return value.value if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value


def _switch(value: Any) -> Any:
    return {True: "1", False: "0"}.get(value, value) if isinstance(value, bool) else value


def _choices(field: str, annotation: Any) -> str:
    if annotation is str:
        return {"tiles": "auto, a file"}.get(field, "numbers with commas between")
    if annotation is int:
        return "a number from 1"
    return ", ".join(get_args(annotation)) if get_args(annotation) else "0, 1"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(int(value)) if isinstance(value, bool) else str(value)
