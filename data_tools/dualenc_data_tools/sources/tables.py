"""JSON-lines and CSV files whose rows name a picture or sound and its text."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from dualenc.errors import DataError
from dualenc_data_tools.sources.row import Row, RowsConfig, grouped, resolve, to_records
from dualenc_data_tools.sources.source import Dropped, Record, SourceKind, need_file, shuffled, sources


class JsonlConfig(RowsConfig):
    """``path=captions.jsonl``: one JSON object a line."""

    path: str = Field(description="the .jsonl file (.gz is read too)")


class CsvConfig(RowsConfig):
    """``path=pairs.csv``: a header line, then rows."""

    path: str = Field(description="the .csv or .tsv file")
    delimiter: str | None = Field(None, min_length=1, max_length=1, description="default: tab for .tsv, else comma")
    header: list[str] | None = Field(None, description="column names, for a file without a header line")


def read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    """(name, object) of every non-empty line.

    Raises:
        DataError: naming file and line, for a line that is no JSON object.
    """
    import gzip

    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise DataError(f"{path}:{number} is not JSON ({e.msg}); every line must be one object") from e
            if not isinstance(row, dict):
                raise DataError(
                    f'{path}:{number} holds {type(row).__name__}; every line must be one object, such as {{"image": …}}'
                )
            yield f"{path.stem}-{number}", row


def read_csv(path: Path, delimiter: str | None, header: list[str] | None) -> Iterator[tuple[str, Row]]:
    """(name, row) of every line of a CSV file.

    Raises:
        DataError: for a row whose number of columns is not the header's.
    """
    with path.open(encoding="utf-8-sig", newline="") as f:
        reader = csv.reader(f, delimiter=delimiter or ("\t" if path.suffix == ".tsv" else ","))
        names = header or next(reader, [])
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise DataError(
                    f"{path}:{reader.line_num} has {len(cells)} columns, the header {len(names)}: {', '.join(names)}"
                )
            yield f"{path.stem}-{reader.line_num}", dict(zip(names, cells, strict=True))


def _records(cfg: RowsConfig, path: Path, rows: Iterator[tuple[str, Row]], where: str) -> Iterator[Record | Dropped]:
    head = list(itertools.islice(rows, 100))
    if not head:
        raise DataError(f"{where}.path: {path} holds no rows")
    # Rows need not all have the same fields: a field counts as known when any of the first hundred has it.
    known = dict.fromkeys(k for _, row in head for k in row)
    cfg = resolve(cfg, known, where)
    ordered = (
        shuffled(itertools.chain(head, rows), cfg.shuffle_seed)
        if cfg.shuffle_seed is not None
        else itertools.chain(head, rows)
    )
    records = to_records(cfg, ordered, path.parent)
    yield from grouped(records) if cfg.group else records


def jsonl(cfg: JsonlConfig) -> Iterator[Record | Dropped]:
    """Records of a JSON-lines file."""
    path = need_file(cfg.path, "jsonl.path", ".jsonl*")
    return _records(cfg, path, read_jsonl(path), "jsonl")


def csv_(cfg: CsvConfig) -> Iterator[Record | Dropped]:
    """Records of a CSV file."""
    path = need_file(cfg.path, "csv.path", ".?sv")
    return _records(cfg, path, read_csv(path, cfg.delimiter, cfg.header), "csv")


sources.register("jsonl")(
    SourceKind(JsonlConfig, jsonl, "one JSON object a line: picture or sound path, caption or list of captions")
)
sources.register("csv")(
    SourceKind(CsvConfig, csv_, "CSV or TSV: a column with picture or sound paths, columns with text")
)
