"""Which tile a convolution of ours gets on this card, or that the vendor's is faster.

What was tuned here (`vae-accel tune`) goes before what ships with the package, and that before the kernel's own rule.
The user's file is read when a model is optimized; a forward looks into a dictionary.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from vae_accel import __version__

from .tiles import Key, Tile

SHIPPED = Path(__file__).parents[1] / "data" / "tiles.json"
Answer = Callable[[Key, Tile], "Tile | None"]

_path: Path | None = None
_tuned: tuple[Section, ...] = ()
_answer: Answer | None = None


class Card(NamedTuple):
    """What a measured choice holds for."""

    gpu: str
    capability: str
    package: str
    triton: str


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Choice(_Row):
    """The tile of every convolution that has the fields given; a tile of null is the vendor's convolution.

    Without a `result` it is of 16 bits: weights in two terms fill the stages otherwise.
    """

    kernel: Literal["conv", "conv_pixel_pairs", "winograd", "upsample_conv", "downsample_conv", "thin_conv"]
    channels_in: int | None = None
    channels_out: int | None = None
    taps: int | None = None
    operands: str | None = None
    result: str | None = None
    size: int | None = None
    tile: Tile | None

    @model_validator(mode="after")
    def _is_possible(self) -> Choice:
        if self.tile is None:
            if self.kernel == "winograd":
                raise ValueError("winograd has no vendor's form")
        elif any(n < 1 or n & (n - 1) for n in (self.tile.rows, self.tile.cols, self.tile.depth, self.tile.warps)):
            raise ValueError(f"sides that are no powers of two: {tuple(self.tile)}")
        return self

    def holds(self, key: Key) -> bool:
        if self.result is None and key.terms > 1:
            return False
        return all(getattr(self, name) in (None, value) for name, value in key._asdict().items())


class Section(_Row):
    """The choices for cards whose name begins with one of `gpus`; of any version where none is named."""

    gpus: tuple[str, ...]
    capability: str
    package: str | None = None
    triton: str | None = None
    choices: tuple[Choice, ...]

    def is_of(self, card: Card) -> bool:
        return card.gpu.startswith(self.gpus) and card.capability == self.capability

    def is_current(self, card: Card) -> bool:
        return self.package in (None, card.package) and self.triton in (None, card.triton)


class _File(_Row):
    sections: tuple[Section, ...]


def choose(key: Key, rule: Tile, device: torch.device) -> Tile | None:
    """The tile for `key` on `device`, by authority; None where the vendor's convolution is faster.

    `rule` is what the kernel itself would take.
    """
    found = _found(key, device)
    tile = rule if found is None else found.tile
    return tile if _answer is None else _answer(key, tile or rule)


@contextmanager
def answering(answer: Answer) -> Iterator[None]:
    """Inside, `answer(key, tile)` chooses: to record what a model asks for, or to force a tile (None: the vendor's)."""
    global _answer
    before, _answer = _answer, answer
    try:
        yield
    finally:
        _answer = before


def use(path: Path) -> None:
    """Reads the user's file, which need not exist. One that is broken is ignored, and a warning names it."""
    global _path, _tuned
    _path, _tuned = path, _read_or_warn(path)
    _sections.cache_clear()
    _found.cache_clear()


def write(path: Path, device: torch.device, chosen: Mapping[Key, Tile | None]) -> None:
    """Adds what was tuned on `device` to the user's file, beside other cards' and in place of other versions'."""
    card = card_of(device)
    new = [Choice(**key._asdict(), tile=tile) for key, tile in chosen.items()]
    others = []
    for section in _read_or_warn(path):
        if not section.is_of(card):
            others.append(section)
        elif section.is_current(card):
            new += [old for old in section.choices if not any(old.holds(key) for key in chosen)]
    mine = Section(
        gpus=(card.gpu,),
        capability=card.capability,
        package=card.package,
        triton=card.triton,
        choices=tuple(new),
    )
    text = _File(sections=(*others, mine)).model_dump_json(indent=1, exclude_unset=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")  # a process that is stopped while writing leaves the file whole
    half.write_text(text + "\n")
    half.replace(path)


@functools.cache
def card_of(device: torch.device) -> Card:
    """The card and the versions a choice on `device` is measured with. The CPU interprets Triton, in tests."""
    gpu, capability = "cpu", ""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return Card(gpu, capability, __version__, importlib.import_module("triton").__version__)


@functools.cache
def _found(key: Key, device: torch.device) -> Choice | None:
    return next((choice for section in _sections(device) for choice in section.choices if choice.holds(key)), None)


@functools.cache
def _sections(device: torch.device) -> list[Section]:
    card = card_of(device)
    mine = [section for section in _tuned if section.is_of(card)]
    current = [section for section in mine if section.is_current(card)]
    if mine and not current:
        text = f"{_path} was tuned with vae-accel {mine[0].package} and Triton {mine[0].triton}, and is ignored: "
        warnings.warn(text + "`vae-accel tune` measures again", stacklevel=4)
    return current + [section for section in _shipped() if section.is_of(card)]


@functools.cache
def _shipped() -> tuple[Section, ...]:
    return _File.model_validate_json(SHIPPED.read_bytes()).sections


def _read_or_warn(path: Path) -> tuple[Section, ...]:
    try:
        return _File.model_validate_json(path.read_bytes()).sections
    except FileNotFoundError:
        return ()
    except (OSError, ValidationError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        warnings.warn(f"{path} holds no tiles and is ignored: {first}", stacklevel=3)
        return ()
