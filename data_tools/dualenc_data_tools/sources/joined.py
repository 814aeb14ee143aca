"""Rows of a JSON-lines file, each with an image of its class: pairs that were not recorded together.

For evaluations across modalities that share only their text (audio ↔ image in a model of image/text and audio/text).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic import Field

from dualenc.data.shards.reader import Found, iter_samples
from dualenc.data.sources.folder import IMAGE_ENDINGS
from dualenc.errors import ConfigError, DataError
from dualenc_data_tools.sources.from_tables import JsonlConfig, table_records
from dualenc_data_tools.sources.source import Dropped, Record, SourceKind, sources


class JoinedConfig(JsonlConfig):
    """``path=captions.jsonl pictures=train-*.tar by=label``, and in ``keys`` an image for each value of ``by``."""

    pictures: str | list[str] = Field(description="shards that hold the images")
    by: str = Field("label", description="field whose value selects a row's image")
    keys: dict[str, str] = Field(
        min_length=1, description="value → key of the sample with the image; rows with other values are left out"
    )


def joined(cfg: JoinedConfig) -> Iterator[Record | Dropped]:
    """Records with the row's own media and the selected image.

    Raises:
        DataError: an image's key is in none of the shards.
        ConfigError: ``keep`` leaves out the field ``by``.
    """
    pictures = borrowed(cfg.pictures, set(cfg.keys.values()))
    if cfg.caption != cfg.by and (cfg.keep == "none" or (isinstance(cfg.keep, list) and cfg.by not in cfg.keep)):
        raise ConfigError(f"joined.keep: it must include {cfg.by!r}, the field of joined.by")
    for record in table_records("jsonl", cfg):
        if isinstance(record, Dropped):
            yield record
            continue
        value = record.captions[0] if cfg.caption == cfg.by else record.fields.get(cfg.by)
        key = cfg.keys.get(str(value))
        if key is not None:
            fields = {**record.fields, cfg.by: value}  # even if it is the caption: tasks distinguish classes by it
            yield replace(record, media={"image": pictures[key], **record.media}, fields=fields)


def borrowed(shards: str | list[str], keys: set[str]) -> dict[str, bytes]:
    """Key → the bytes of that sample's image.

    Raises:
        DataError: naming a missing key.
    """
    out: dict[str, bytes] = {}
    for name, found in iter_samples(shards, {"image": list(IMAGE_ENDINGS)}):
        key = name.rsplit("/", 1)[-1]
        if key in keys and isinstance(found, Found) and "image" in found.values:
            value: Any = found.values["image"]
            out[key] = bytes(value)
    missing = sorted(keys - set(out))
    if missing:
        raise DataError(f"joined.keys: no sample {missing[0]!r} with an image in {shards} ({len(missing)} missing)")
    return out


sources.register("joined")(
    SourceKind(JoinedConfig, joined, "rows of a JSON-lines file, each with the image of its class from shards")
)
