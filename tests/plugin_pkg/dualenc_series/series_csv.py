"""A source for ``dualenc shards build``: a folder of .csv files, a column a channel, the first line their caption."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dualenc_data_tools.sources import Dropped, Record, SourceConfig, SourceKind


class SeriesCsvConfig(SourceConfig):
    path: str


def records(config: SeriesCsvConfig) -> Iterator[Record | Dropped]:
    for file in sorted(Path(config.path).glob("*.csv")):
        caption, *lines = file.read_text(encoding="utf-8").splitlines()
        try:
            x = np.loadtxt(lines, np.float32, delimiter=",", ndmin=2)
        except ValueError as e:
            yield Dropped(file.name, "not numbers", str(e))
            continue
        out = io.BytesIO()
        np.save(out, np.ascontiguousarray(x.T), allow_pickle=False)
        yield Record(file.name, {}, (caption.removeprefix("# "),), members={"series.npy": out.getvalue()})


SERIES_CSV = SourceKind(SeriesCsvConfig, records, "a folder of .csv files: a caption, then a column a channel")
