""".ts files: labelled time series as the UCR and UEA archives have them (sktime's and aeon's format).

A header of ``@key value`` lines, ``@data``, then a line a series: the channels separated by ``:``, the values of a
channel by ``,``, and last the class. ``?`` is a missing value. Series may have different lengths; time stamps are not
read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from pydantic import Field

from dualenc.config import Section
from dualenc.data.arrays import npy_bytes
from dualenc.data.sources.item import Content, Item, Layout, captions, sources
from dualenc.data.sources.opened import listed, read_text
from dualenc.errors import DataError


class TsSettings(Section):
    """``path=NAME_TRAIN.ts``, or several."""

    path: str | list[str] = Field(description="the .ts file, or several (patterns too)")
    names: dict[str, str] = Field(
        default_factory=dict, description="class → what to call it in captions: {1: walking}; default: as it is"
    )
    caption: str = Field("{class}", description="the caption, with {class} for the name of the class")


@dataclass(frozen=True, slots=True)
class TsHeader:
    """What the lines before ``@data`` say."""

    labelled: bool
    start: int


def read(settings: TsSettings) -> Iterator[Item]:
    """Series in the files' order, named ``FILE-NUMBER``, with ``{"label", "number"}``."""
    for path in listed(settings.path, "ts.path"):
        lines = read_text(path).splitlines()
        header = _header(lines, str(path))
        name = str(path).replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".ts")
        rows = [line for line in lines[header.start :] if line.strip()]
        for number, line in enumerate(rows):
            channels, label = _split(line, header)
            said = settings.names.get(label, label)
            key = f"{name}-{number:05d}"
            contents = {"series": [Content(key, load=partial(as_npy, channels))]}
            if header.labelled:
                contents["text"] = captions(key, settings.caption.replace("{class}", said))
            yield Item(key, contents, {"label": said, "number": number})


def as_npy(channels: list[str]) -> bytes:
    """Channels as text → the bytes of a .npy, float32 [C, T].

    Raises:
        DataError: channels of different lengths, or something that is not a number.
    """
    try:
        rows = [[float("nan") if v.strip() == "?" else float(v) for v in c.split(",")] for c in channels]
    except ValueError as e:
        raise DataError(f"not numbers: {e}") from e
    if len({len(r) for r in rows}) > 1:
        raise DataError(f"its channels have {sorted({len(r) for r in rows})} values; they must be equally long")
    return npy_bytes(np.array(rows, np.float32))


def _header(lines: list[str], path: str) -> TsHeader:
    labelled = False
    for n, line in enumerate(lines):
        words = line.strip().lower().split()
        if not words or words[0].startswith("#"):
            continue
        if words[0] == "@data":
            return TsHeader(labelled, n + 1)
        if not words[0].startswith("@"):
            break
        if words[0] == "@timestamps" and words[-1] == "true":
            raise DataError(f"{path}: series with time stamps are not read, as they may be irregular")
        if words[0] == "@classlabel":
            labelled = len(words) > 1 and words[1] == "true"
    raise DataError(f"{path} is not a .ts file: there is no @data line after the header")


def _split(line: str, header: TsHeader) -> tuple[list[str], str]:
    parts = line.strip().split(":")
    return (parts[:-1], parts[-1].strip()) if header.labelled else (parts, "")


sources.register("ts")(Layout(TsSettings, read, "labelled time series of the UCR and UEA archives (.ts)"))
