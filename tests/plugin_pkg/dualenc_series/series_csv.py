"""A source: a folder of .csv files, a column a channel, the first line their caption."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from dualenc.config import Section
from dualenc.data.sources import Content, Item, Layout, captions
from dualenc.data.sources.opened import need_folder
from dualenc.errors import DataError


class SeriesCsv(Section):
    """``path=FOLDER``"""

    path: str


def as_npy(file: Path) -> bytes:
    """Everything below the first line as float32 [channels, T], the bytes that ``SeriesInput`` decodes."""
    try:
        x = np.loadtxt(file, np.float32, delimiter=",", ndmin=2, skiprows=1)
    except ValueError as e:
        raise DataError(f"not numbers: {e}") from e
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(x.T), allow_pickle=False)
    return out.getvalue()


def read(settings: SeriesCsv) -> Iterator[Item]:
    for file in sorted(need_folder(settings.path, "series_csv.path").glob("*.csv")):
        with file.open(encoding="utf-8") as f:
            caption = f.readline().removeprefix("# ").strip()
        series = Content(file.name, load=partial(as_npy, file))
        yield Item(file.name, {"series": [series], "text": captions(file.name, caption)})


SERIES_CSV = Layout(SeriesCsv, read, "a folder of .csv files: a caption, then a column a channel")
