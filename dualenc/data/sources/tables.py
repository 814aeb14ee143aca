"""Tables: JSON lines, JSON, CSV and Parquet files whose rows name files (or hold bytes), texts, labels."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, Field

from dualenc.config import Section
from dualenc.data.sources.columns import LazyRow
from dualenc.data.sources.item import Item, Layout, sources
from dualenc.data.sources.opened import NotThereError, is_url, listed, open_binary, read_text
from dualenc.errors import ConfigError, DataError

TableRow = Mapping[str, Any]


class JsonlSettings(Section):
    """``path=captions.jsonl``: one JSON object per line."""

    path: str | list[str] = Field(description="the .jsonl file, or several (patterns too); .gz is read too")


class JsonSettings(Section):
    """``path=pairs.json``: a list of objects, or an object whose values are the rows."""

    path: str | list[str] = Field(description="the .json file, or several (patterns too)")


class CsvSettings(Section):
    """``path=pairs.csv``: a header line, then rows."""

    path: str | list[str] = Field(description="the .csv or .tsv file, or several (patterns too)")
    delimiter: str | None = Field(None, min_length=1, max_length=1, description="default: tab for .tsv, else comma")
    columns: list[str] | None = Field(
        None,
        validation_alias=AliasChoices("columns", "header"),
        description="column names, for a file without a header line",
    )


class ParquetSettings(Section):
    """``path=data.parquet``, or a folder or pattern of them (``path=data/part-*.parquet``)."""

    path: str | list[str] = Field(description="a .parquet file, a folder of them, or a pattern with *")
    shuffle_seed: int | None = Field(
        None, description="shuffle the row groups and the rows inside each; default: the files' own order"
    )


# --- text files --------------------------------------------------------------------------------------------------


def jsonl_rows(path: str) -> Iterator[tuple[int, TableRow]]:
    """(number of the line, object) of every line that is not empty.

    Raises:
        DataError: naming file and line, for a line that is not a JSON object.
    """
    with open_binary(path) as raw:
        binary: Any = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
        try:
            for number, line in enumerate(io.TextIOWrapper(binary, encoding="utf-8-sig", newline="\n"), 1):
                if not line.strip():
                    continue
                row = _parsed(line, f"{path}:{number}", "every line must be one object")
                if not isinstance(row, dict):
                    raise DataError(
                        f"{path}:{number} holds {type(row).__name__}; every line must be one object, such as "
                        '{"image": …}'
                    )
                yield number, row
        except UnicodeDecodeError as e:
            raise DataError(f"{path} is not UTF-8 text: {e}") from e
        except (gzip.BadGzipFile, EOFError) as e:
            raise DataError(f"{path} is not a complete .gz file: {e}") from e


def json_rows(path: str) -> Iterator[tuple[int, TableRow]]:
    """(position from 1, object) of every row of a list of objects, or of an object whose values are objects.

    Raises:
        DataError: for anything else.
    """
    got = _parsed(read_text(path), path, "it must hold a list of objects")
    rows = list(got.values()) if isinstance(got, dict) else got
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise DataError(f"{path} must hold a list of objects, or an object whose values are objects")
    yield from enumerate(rows, 1)


def _parsed(text: str, where: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise DataError(f"{where} is not JSON ({e.msg}); {remedy}") from e
    except RecursionError as e:
        raise DataError(f"{where} is not JSON (nested too deeply); {remedy}") from e


def csv_rows(
    path: str, delimiter: str | None = None, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, TableRow]]:
    """(number of the line, row) of every row of a CSV file.

    Raises:
        DataError: not a CSV table, or a row whose number of columns differs from the header's.
    """
    with open_binary(path) as raw:
        try:
            text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
            reader = csv.reader(text, delimiter=delimiter or ("\t" if path.endswith(".tsv") else ","), strict=True)
            names = list(columns or next(reader, []))
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise DataError(
                        f"{path}:{reader.line_num} has {len(cells)} columns, the header has {len(names)}: "
                        f"{', '.join(names)}"
                    )
                yield reader.line_num, dict(zip(names, cells, strict=True))
        except csv.Error as e:
            raise DataError(f"{path} is not a valid CSV table: {e}") from e
        except UnicodeDecodeError as e:
            raise DataError(f"{path} is not UTF-8 text: {e}") from e


def _items(path: str, rows: Iterator[tuple[int, TableRow]]) -> Iterator[Item]:
    stem, folder = Path(path).stem, path.rpartition("/")[0] or "."
    for position, (number, row) in enumerate(rows, 1):
        yield Item(f"{stem}:{position}", fields=row, name=f"{stem}-{number}", folder=folder)


def read_jsonl(cfg: JsonlSettings) -> Iterator[Item]:
    """Rows of JSON-lines files."""
    for path in listed(cfg.path, "jsonl.path"):
        yield from _items(path, jsonl_rows(path))


def read_json(cfg: JsonSettings) -> Iterator[Item]:
    """Rows of JSON files."""
    for path in listed(cfg.path, "json.path"):
        yield from _items(path, json_rows(path))


def read_csv(cfg: CsvSettings) -> Iterator[Item]:
    """Rows of CSV files."""
    for path in listed(cfg.path, "csv.path"):
        yield from _items(path, csv_rows(path, cfg.delimiter, cfg.columns))


# --- Parquet ------------------------------------------------------------------------------------------------------


def read_parquet(cfg: ParquetSettings) -> Iterator[Item]:
    """Rows of Parquet files; columns are read on access, one row group at a time.

    Raises:
        DataError: a file is missing or not Parquet.
        ConfigError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as e:
        raise ConfigError("The parquet source needs pyarrow: pip install 'dualenc[tools]'") from e
    files = [f for p in ([cfg.path] if isinstance(cfg.path, str) else cfg.path) for f in _parquet_files(p)]
    try:
        groups = [(path, g) for path in files for g in range(pq.ParquetFile(path).num_row_groups)]
    except (OSError, ValueError) as e:
        raise DataError(f"parquet.path: {' '.join(str(e).split())}; expected Parquet files") from e
    rng = random.Random(cfg.shuffle_seed)
    if cfg.shuffle_seed is not None:
        rng.shuffle(groups)
    for path, g in groups:
        block = _RowGroup(path, g)
        order = list(range(pq.ParquetFile(path).metadata.row_group(g).num_rows))
        if cfg.shuffle_seed is not None:
            rng.shuffle(order)
        stem, folder = Path(path).stem, str(Path(files[0]).parent)
        for i in order:
            yield Item(f"{stem}:{g}:{i}", fields=LazyRow(block, i), name=f"{stem}-{g}-{i}", folder=folder)


def _parquet_files(path: str) -> list[str]:
    p = Path(path).expanduser()
    if p.is_dir():
        found = sorted(str(f) for f in p.glob("*.parquet"))
        if not found:
            raise NotThereError(f"parquet.path: the folder {p} holds no .parquet file")
        return found
    found = listed(path, "parquet.path")
    for f in found:
        if is_url(f):
            raise DataError(f"parquet.path: {f}: Parquet files are read from local folders; download it first")
        open_binary(f).close()
    return found


class _RowGroup:
    """The rows of one row group of a file."""

    def __init__(self, path: str, group: int) -> None:
        import pyarrow.parquet as pq

        self.path, self.group = path, group
        schema = pq.read_schema(path)
        self.columns: Sequence[str] = tuple(str(n) for n in schema.names)
        self._bytes = {name for name, kind in zip(self.columns, schema.types, strict=True) if _is_bytes(kind)}

    def cell(self, column: str, row: int) -> Any:
        return _column(self.path, self.group, column)[row].as_py()

    def holds_bytes(self, column: str) -> bool:
        return column in self._bytes


_KEPT_BYTES = 128e6
_kept: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
_kept_lock = threading.Lock()


def _column(path: str, group: int, column: str) -> Any:
    """A column of a row group. Those read last are kept, up to 128 MB, and all of the row group being read: rows come
    group by group, and one of images may be large."""
    import pyarrow.parquet as pq

    key = (path, group, column)
    with _kept_lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    read = pq.ParquetFile(path).read_row_group(group, columns=[column]).column(column)
    with _kept_lock:
        _kept[key] = read
        for old in [k for k in _kept if k[:2] != key[:2]]:
            if sum(c.nbytes for c in _kept.values()) <= _KEPT_BYTES:
                break
            del _kept[old]
    return read


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


sources.register("jsonl")(
    Layout(
        JsonlSettings, read_jsonl, "one JSON object per line: image or audio path, caption or list of captions", True
    )
)
sources.register("json")(
    Layout(JsonSettings, read_json, "a JSON list of objects, or an object whose values are objects", True)
)
sources.register("csv")(
    Layout(CsvSettings, read_csv, "CSV or TSV: a column with image or audio paths, columns with text", True)
)
sources.register("parquet")(
    Layout(ParquetSettings, read_parquet, "Parquet: images and audio as bytes or as paths", True, shuffles=True)
)
