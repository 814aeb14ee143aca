"""Data sets of the Hugging Face ``datasets`` library: a saved folder, or a name it can load (the ``tools`` extra)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc_data_tools.sources.row import Row, RowsConfig, grouped, resolve, to_records
from dualenc_data_tools.sources.source import Dropped, Record, SourceKind, sources


class HfConfig(RowsConfig):
    """``path=FOLDER`` (save_to_disk) or ``path=owner/name`` (load_dataset), then ``split=train``."""

    path: str = Field(description="a folder written by save_to_disk, or a data set's name")
    config: str | None = Field(None, description="the data set's configuration, where it has several")
    revision: str | None = None


def hf(cfg: HfConfig) -> Iterator[Record | Dropped]:
    """Records of a data set. Pictures and sounds are taken undecoded, so that their bytes are kept.

    Raises:
        DataError: the data set cannot be loaded.
        ConfigError: datasets is not installed, or the split is not there.
    """
    try:
        import datasets
    except ImportError as e:
        raise ConfigError("The hf source needs the datasets library: pip install 'dualenc[tools]'") from e
    loaded = _load(datasets, cfg)
    if isinstance(loaded, datasets.Dataset):
        parts = {cfg.split or "": loaded}
    else:
        parts = {str(k): v for k, v in loaded.items()}
        if cfg.split is not None and cfg.split not in parts:
            raise ConfigError(f"hf.split: the data set has no split {cfg.split!r}. {did_you_mean(cfg.split, parts)}")
        parts = {k: v for k, v in parts.items() if cfg.split in (None, k)}
    return _records(datasets, cfg, parts)


def _records(datasets: Any, cfg: HfConfig, parts: dict[str, Any]) -> Iterator[Record | Dropped]:
    for split, part in parts.items():
        # The split is a property of the part here, not a field of its rows.
        own = resolve(cfg.model_copy(update={"split": None, "split_field": None}), part.column_names, "hf")
        for name, feature in part.features.items():
            for kind in (datasets.Image, datasets.Audio):
                if isinstance(feature, kind):
                    part = part.cast_column(name, kind(decode=False))
        if cfg.shuffle_seed is not None:
            part = part.shuffle(seed=cfg.shuffle_seed)
        records = to_records(own, _rows(part, split or "row"), Path(cfg.path))
        for r in grouped(records) if cfg.group else records:
            if isinstance(r, Record):
                r.split = split
            yield r


def _rows(part: Any, prefix: str) -> Iterator[tuple[str, Row]]:
    for i, row in enumerate(part):
        yield f"{prefix}-{i:08d}", row


def _load(datasets: Any, cfg: HfConfig) -> Any:
    folder = Path(cfg.path).expanduser()
    if folder.is_dir() and not ((folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()):
        raise DataError(
            f"hf.path: {folder} was not written by save_to_disk (no dataset_info.json, no dataset_dict.json)"
        )
    try:
        if folder.is_dir():
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(cfg.path, cfg.config, revision=cfg.revision)
    except (OSError, ValueError) as e:
        # Covers what the library raises for unknown names, no network, and damaged folders.
        raise DataError(f"hf.path: cannot load {cfg.path!r}: {' '.join(str(e).split())[:300]}") from e


sources.register("hf")(SourceKind(HfConfig, hf, "Hugging Face datasets: a saved folder or a name"))
