"""Items of any source that assigns its contents to modalities → records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, create_model

from dualenc.data.modalities import modalities
from dualenc.data.modalities.modality import of_one_item
from dualenc.data.sources import Content, Item, Layout
from dualenc.data.sources import sources as layouts
from dualenc.errors import DataError
from dualenc_data_tools.sources.named import NamedFields
from dualenc_data_tools.sources.source import (
    Dropped,
    Record,
    SourceConfig,
    SourceKind,
    as_captions,
    fill,
    jsonable,
    shuffled,
)


class ItemsConfig(SourceConfig, NamedFields):
    """Settings of packing, in addition to those of the source."""

    template: str | None = Field(
        None, description="make each text from fields: '{caption}, {class}'; {caption} is each caption in turn"
    )


def item_records(kind: str, cfg: ItemsConfig) -> Iterator[Record | Dropped]:
    """Records of a source's items, in its order."""
    layout: Layout[Any] = layouts[kind]
    items: Iterable[Item] = layout.read(cfg)
    if cfg.shuffle_seed is not None and not layout.shuffles:
        items = shuffled(items, cfg.shuffle_seed)
    for item in items:
        fields = dict(item.fields) if item.label is None else {"class": item.label, **item.fields}
        if cfg.wants(fields):
            yield _record(cfg, item, fields)


def _record(cfg: ItemsConfig, item: Item, fields: dict[str, Any]) -> Record | Dropped:
    name = item.name or item.id
    media: dict[str, bytes | Path] = {}
    texts: list[str] = []
    for modality, contents in item.contents.items():
        if modality != "text" and len(contents) > 1:
            return Dropped(name, f"several of {modality}", f"{len(contents)}; a sample holds one")
        for content in contents:
            try:
                with of_one_item():
                    value = _file_or_bytes(content)
            except DataError as e:
                return Dropped(name, f"broken {modality}", str(e))
            if isinstance(value, str):
                texts += as_captions(value)
            else:
                media[ending_of(modality)] = value
    if cfg.template is not None:
        said = cfg.in_words(fields)
        texts = [t for c in texts or [""] if (t := fill(cfg.template, {**said, "caption": c}))]
    kept = {k: v for k, v in fields.items() if jsonable(v)}
    captions = tuple(cfg.as_words(t) for t in texts)
    return Record(name, media, captions, kept, split=item.split, many=len(captions) > 1)


def _file_or_bytes(content: Content) -> bytes | str | Path:
    whole = (
        content.path and not content.error and content.offset == 0 and content.size < 0 and "://" not in content.path
    )
    return Path(content.path) if whole else content.read()


def ending_of(modality: str) -> str:
    """The member for a modality: its kind if packing checks it, else the first ending that training reads."""
    if modality in ("image", "audio"):
        return modality
    usual = modalities[modality].default_members if modality in modalities else []
    return next((e for e in usual if e.replace(".", "").isalnum()), modality)


def item_kind(name: str) -> SourceKind[Any]:
    """How to pack a source that another package registered: its own settings plus those of packing."""
    layout: Layout[Any] = layouts[name]
    config: Any = create_model(f"{name}_packing", __base__=(layout.settings, ItemsConfig))
    return SourceKind(config, partial(item_records, name), layout.about)
