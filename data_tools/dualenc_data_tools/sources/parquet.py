"""Parquet files with pictures as bytes or as paths (needs pyarrow: the ``tools`` extra)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from dualenc.errors import ConfigError, DataError
from dualenc_data_tools.sources.row import Row, RowsConfig, grouped, resolve, to_records
from dualenc_data_tools.sources.source import Dropped, Record, SourceKind, need_file, sources


class ParquetConfig(RowsConfig):
    """``path=data.parquet``, or a folder or pattern of them (``path=data/part-*.parquet``)."""

    path: str = Field(description="a .parquet file, a folder of them, or a pattern with *")


def parquet(cfg: ParquetConfig) -> Iterator[Record | Dropped]:
    """Records of Parquet files, one row group in memory at a time.

    With ``shuffle_seed`` the row groups are shuffled and the rows inside each; training shuffles further.

    Raises:
        DataError: a file is missing or not Parquet.
        ConfigError: pyarrow is not installed.
    """
    files = _files(cfg.path)
    pq = _pyarrow()
    try:
        names = [str(n) for n in pq.read_schema(files[0]).names]
    except (OSError, ValueError) as e:
        raise DataError(f"parquet.path: {files[0]} is not a Parquet file ({e})") from e
    resolved = resolve(cfg, names, "parquet")
    records = to_records(resolved, _rows(pq, files, cfg.shuffle_seed), files[0].parent)
    return grouped(records) if cfg.group else records


def _files(path: str) -> list[Path]:
    p = Path(path).expanduser()
    if p.is_dir():
        found = sorted(p.glob("*.parquet"))
    elif "*" in p.name:
        found = sorted(p.parent.glob(p.name))
    else:
        return [need_file(path, "parquet.path", ".parquet")]
    if not found:
        raise DataError(f"parquet.path: nothing matches {p}{'/*.parquet' if p.is_dir() else ''}")
    return found


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError as e:
        raise ConfigError("The parquet source needs pyarrow: pip install 'dualenc[tools]'") from e
    return pq


def _rows(pq: Any, files: list[Path], seed: int | None) -> Iterator[tuple[str, Row]]:
    groups = [(path, g) for path in files for g in range(pq.ParquetFile(path).num_row_groups)]
    rng = random.Random(seed)
    if seed is not None:
        rng.shuffle(groups)
    for path, g in groups:
        table = pq.ParquetFile(path).read_row_group(g)
        order = list(range(table.num_rows))
        if seed is not None:
            rng.shuffle(order)
        for i in order:
            row = {name: table.column(c)[i].as_py() for c, name in enumerate(table.column_names)}
            yield f"{path.stem}-{g}-{i}", row


sources.register("parquet")(SourceKind(ParquetConfig, parquet, "Parquet: pictures and sounds as bytes or as paths"))
