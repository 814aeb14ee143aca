"""Data sets of the Hugging Face ``datasets`` library: a name, a folder in the hub's layout, or one it saved itself.

The tables stay in their memory-mapped files; images and audio are returned as encoded bytes. The library refuses data
sets that need code of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, Field

from dualenc.config import Section
from dualenc.data.sources.columns import LazyRow
from dualenc.data.sources.item import Item, Layout, sources
from dualenc.data.sources.opened import NotThereError
from dualenc.errors import ConfigError, did_you_mean

BLOCK = 100
"""Rows of a column that are read at once; images and audio are read one by one."""


class HubSettings(Section):
    """``path=owner/name`` (load_dataset) or ``path=FOLDER`` (Parquet files, or from save_to_disk), ``split=train``."""

    path: str = Field(description="a data set's name, or a folder")
    split: str | None = Field(None, description="the split; default: all")
    subset: str | None = Field(
        None,
        validation_alias=AliasChoices("subset", "config"),
        description="the data set's configuration, if it has several",
    )
    revision: str | None = Field(None, description="the commit or tag to read")
    class_names: bool = Field(False, description="replace class numbers by their names; negative ones are missing")
    shuffle_seed: int | None = Field(None, description="shuffle the rows of each split; default: their own order")


def read_hub(cfg: HubSettings) -> Iterator[Item]:
    """Rows of one split, or of all.

    Raises:
        NotThereError: the data set cannot be loaded.
        ConfigError: datasets is not installed, or the split is not there.
    """
    try:
        import datasets
    except ImportError as e:
        raise ConfigError("The hf source needs the datasets library: pip install 'dualenc[tools]'") from e
    for split, part in _parts(datasets, cfg).items():
        for name, feature in part.features.items():
            if isinstance(feature, datasets.Image | datasets.Audio):
                part = part.cast_column(name, type(feature)(decode=False))
        if cfg.shuffle_seed is not None:
            part = part.shuffle(seed=cfg.shuffle_seed)
        block = _Split(part, cfg.class_names)
        folder = cfg.path if Path(cfg.path).is_dir() else ""
        for i in range(len(part)):
            name = f"{split or 'row'}-{i:08d}"
            yield Item(f"{split or 'row'}:{i}", fields=LazyRow(block, i), name=name, split=split, folder=folder)


def _parts(datasets: Any, cfg: HubSettings) -> dict[str, Any]:
    loaded = _load(datasets, cfg)
    if isinstance(loaded, datasets.Dataset):
        return {cfg.split or "": loaded}
    parts = {str(k): v for k, v in loaded.items()}
    if cfg.split is not None and cfg.split not in parts:
        raise ConfigError(f"hf.split: the data set has no split {cfg.split!r}. {did_you_mean(cfg.split, parts)}")
    return {k: v for k, v in parts.items() if cfg.split in (None, k)}


def _load(datasets: Any, cfg: HubSettings) -> Any:
    folder = Path(cfg.path).expanduser()
    try:
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(folder))
        name = str(folder) if folder.is_dir() else cfg.path
        return datasets.load_dataset(name, cfg.subset, split=cfg.split, revision=cfg.revision)
    # The library raises its own errors, OSError and ValueError (an unknown split or subset) for a wrong name or
    # setting; their texts say which.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as e:
        said = " ".join(str(e).split())
        raise NotThereError(f"the data set {cfg.path} cannot be read: {said}.") from e


class _Split:
    """The rows of one split, read by columns, a few at a time."""

    def __init__(self, part: Any, class_names: bool) -> None:
        self.columns: Sequence[str] = tuple(map(str, part.column_names))
        self._part, self._class_names = part, class_names
        self._tables: dict[str, Any] = {}
        self._read: dict[str, tuple[int, list[Any]]] = {}

    def cell(self, column: str, row: int) -> Any:
        start, values = self._read.get(column, (-1, []))
        if not start <= row < start + len(values):
            table = self._tables.get(column)
            if table is None:
                table = self._tables[column] = self._part.select_columns([column])
            many = 1 if self.holds_bytes(column) else BLOCK
            start = row - row % many
            values = list(table[start : start + many][column])
            self._read[column] = (start, values)
        value = values[row - start]
        if self._class_names and value is not None and (names := self._names(column)) is not None:
            return [_name(names, v) for v in value] if isinstance(value, list) else _name(names, value)
        return value

    def holds_bytes(self, column: str) -> bool:
        return type(self._part.features[column]).__name__ in ("Image", "Audio")

    def _names(self, column: str) -> Any:
        """The column's class names, also where a cell is a list of classes."""
        feature = self._part.features[column]
        inner = feature.feature if type(feature).__name__ in ("List", "Sequence", "LargeList") else feature
        return inner if type(inner).__name__ == "ClassLabel" else None


def _name(names: Any, value: Any) -> Any:
    return None if value is None or value < 0 else names.int2str(value)


sources.register("hf")(
    Layout(HubSettings, read_hub, "Hugging Face datasets: a name or a saved folder", True, shuffles=True)
)
