"""What a modality's input is: raw bytes → rows → tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from pydantic import BaseModel
from torch import Tensor

from dualenc.config import Modality, settings_as
from dualenc.data.arrays import npy_bytes
from dualenc.errors import DecodeError as DecodeError
from dualenc.errors import DualencError
from dualenc.registry import Registry


class ModalityInput(Protocol):
    """How one modality's raw bytes become the tensors its tower takes.

    The same object serves training, evaluation and distillation; a checkpoint keeps ``describe()`` to rebuild it.
    ``decode``, ``train`` and ``eval`` raise :class:`DecodeError` where the bytes are bad: a decoder may put work off.

    What ``collate`` returns under ``labels`` (name → integers [n, …]) is not for the tower: losses that take extras
    find it by slot. Optional abilities of a modality are the protocols below: :class:`Mixes`, :class:`NamesPlaces`,
    :class:`FewShapes`, :class:`SavesFiles`, :class:`InFolder`, and ``preview`` (:class:`dualenc.data.show.Previews`).
    """

    config: Any
    """The settings it was built from, an instance of ``Config``."""

    Config: ClassVar[type[BaseModel]]
    """The ``input:`` section of the recipe."""
    default_members: ClassVar[list[str]]
    """Endings tried in turn where a source's ``members`` does not say."""

    def __init__(self, config: Any, base_dir: str | Path | None = None) -> None:
        """``base_dir``: the folder that relative paths in the settings start from (a bundle's folder)."""

    def decode(self, raw: Any) -> Any:
        """Raw bytes (or a value of a json member) → a decoded item."""

    def train(self, x: Any, rng: np.random.Generator) -> Any:
        """A decoded item → an augmented row; everything random is drawn from ``rng``."""

    def eval(self, x: Any) -> Any:
        """A decoded item → a row, always the same."""

    def collate(self, rows: list[Any]) -> Tensor | dict[str, Tensor]:
        """Rows → tensors whose first axis is the row. ``rows`` is not empty."""

    def dummy(self) -> Any:
        """A row for a batch in which nothing has this modality."""

    def describe(self) -> dict[str, Any]:
        """Everything needed to make the same input again: ``config`` plus identities (such as a vocabulary's hash)."""


@runtime_checkable
class FromMemory(Protocol):
    """An input that also takes what a program holds in memory: arrays, tensors, PIL images, decoded audio.

    Optional: a modality without it takes what its ``decode`` takes, and a string is a path or URL.
    """

    prompt: ClassVar[str]
    """The default prompt for a class name, with ``{}`` for the name."""

    def as_raw(self, x: Any, rate: int | None = None) -> Any:
        """An object in memory → what ``decode`` takes, without loss; None if it is not an object of this modality.

        Args:
            rate: samples per second of waveforms that do not say it themselves.

        Raises:
            DecodeError: for an array of another shape or type than the modality's.
        """


@runtime_checkable
class Mixes(Protocol):
    """A modality whose items can be mixed (``data.mix``)."""

    def mix(self, a: Any, b: Any, rng: np.random.Generator) -> Any:
        """Two decoded items → one that ``train`` takes."""


@runtime_checkable
class ReadsBeside(Protocol):
    """A modality that reads a second member of the sample with each of its own, where the sample has it."""

    def beside(self) -> str | None:
        """Its ending (``json:negatives``), or None; ``decode`` is then given both, own first, by ending."""


@runtime_checkable
class NamesPlaces(Protocol):
    """A modality whose rows list places in the scene (:mod:`dualenc.data.driving.places`)."""

    def placed(self, x: Any, rng: np.random.Generator) -> Any:
        """A decoded item with places drawn; ``rng`` is the same for every modality of the sample."""


@runtime_checkable
class DrawsTogether(Protocol):
    """A modality that draws what it takes of an item as the sample's other modalities do."""

    def draws_together(self) -> bool:
        """Whether its settings ask for that."""

    def drawn(self, x: Any, rng: np.random.Generator) -> Any:
        """A decoded item → what is taken of it; ``rng`` is the same for every modality of the sample."""


@runtime_checkable
class FewShapes(Protocol):
    """A modality whose batches differ in length, and can be padded to a few lengths."""

    def few_shapes(self, count: int) -> None:
        """From now on ``collate`` gives at most ``count`` lengths, so that a compiled tower sees few shapes. Settings
        that already say how to pad are kept."""


@runtime_checkable
class SavesFiles(Protocol):
    """A modality that needs files besides its settings, such as a tokenizer's."""

    def save(self, folder: Path) -> dict[str, Any]:
        """Write them into ``folder``; return the ``describe()`` of an input that reads them there."""


@runtime_checkable
class InFolder(Protocol):
    """A modality whose settings name files relative to a folder."""

    base_dir: str | Path | None


@contextmanager
def of_one_item() -> Iterator[None]:
    """Reading, decoding, augmenting or tokenising one item: whatever goes wrong is that item's fault alone.

    Raises:
        DecodeError: for any exception that is not meant for the user already, with a reason that is the same in every
            run. A decoder meets bytes that nobody thought of; none of them may end a run.
    """
    try:
        yield
    except DualencError:
        raise
    except Exception as e:
        raise DecodeError(reason_of(e)) from e


_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{4,}")
_REASON = 200


def reason_of(error: BaseException) -> str:
    """One line that says what an exception says, without what differs from run to run (addresses of objects)."""
    text = _ADDRESS.sub("0x…", " ".join(str(error).split()))[:_REASON]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


modalities: Registry[type[ModalityInput]] = Registry(
    "modality", "dualenc.modalities", needs=("Config", "default_members", "decode", "train", "eval", "collate", "dummy")
)


def rows_of(kind: str) -> str:
    """The kind of rows that towers are asked for: the kind itself, but for a class from outside that has another as
    its attribute ``kind`` (``kind = "image"``: its rows are those of images, and every image tower takes them)."""
    return str(vars(modalities[kind]).get("kind", kind)) if modalities.origin(kind) is not None else kind


def npy_of(x: Any) -> bytes | None:
    """An array or tensor as the bytes of a ``.npy`` (``as_raw`` of kinds that read those); None for anything else."""
    if isinstance(x, Tensor):
        x = x.detach().cpu().numpy()
    return npy_bytes(x) if isinstance(x, np.ndarray) else None


def build_inputs(parts: Mapping[str, Modality], base_dir: str | Path | None = None) -> dict[str, ModalityInput]:
    """The inputs of a recipe's ``modalities`` section.

    Raises:
        ConfigError: for an unknown kind or a setting its ``Config`` refuses.
    """
    out: dict[str, ModalityInput] = {}
    for name, part in parts.items():
        cls = modalities[part.kind or name]
        out[name] = cls(settings_as(cls.Config, part.input, f"modalities.{name}.input"), base_dir)
    return out
