"""Items of any source by its name and settings, as (key, raw values): what embedding reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import AliasChoices, Field

from dualenc.config import Positive, Section, settings_as
from dualenc.data.sources.columns import check_members, contents_of, value_of, with_short_members
from dualenc.data.sources.item import Content, Item, Layout, sources
from dualenc.errors import ConfigError, DataError, did_you_mean

HEAD = 100
"""Rows may have different columns: a column is known if one of the first hundred rows has it."""


class CommonSettings(Section):
    """Settings of any source, in addition to its own."""

    members: dict[str, list[str]] = Field(
        default_factory=dict, description="tables: modality → columns, see dualenc.data.sources.columns"
    )
    files: str = Field(
        "",
        validation_alias=AliasChoices("files", "root"),
        description="tables: the folder that paths start from; default: the table's own",
    )
    where: dict[str, Any] = Field(
        default_factory=dict, description="only items whose field has this value, or one of these"
    )
    limit: Positive | None = Field(None, description="only the first so many items")


def accepted(section: type[Section]) -> set[str]:
    """Every key that the settings accept."""
    keys = set(section.model_fields)
    for field in section.model_fields.values():
        if isinstance(field.validation_alias, AliasChoices):
            keys |= {c for c in field.validation_alias.choices if isinstance(c, str)}
    return keys


def open_layout(kind: str, settings: Mapping[str, Any]) -> tuple[Layout[Any], Any, CommonSettings]:
    """The layout of a name, its checked settings, and the common settings.

    Raises:
        ConfigError: an unknown source or key (with the nearest), or a wrong value.
    """
    layout: Layout[Any] = sources[kind]
    own = accepted(layout.settings)
    settings = with_short_members(settings, own) if layout.table else settings
    common = accepted(CommonSettings) - own
    unknown = [k for k in settings if k not in own | common]
    if unknown:
        raise ConfigError(f"{kind}.{unknown[0]}: unknown key. {did_you_mean(unknown[0], own | common)}")
    wanted = settings_as(CommonSettings, {k: v for k, v in settings.items() if k in common}, kind)
    return layout, settings_as(layout.settings, {k: v for k, v in settings.items() if k in own}, kind), wanted


def iter_source(
    kind: str, settings: Mapping[str, Any], modalities: Sequence[str] = ("image", "text")
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every item of a source once, in its order: (key, modality → raw value).

    A raw value is the bytes of an image, audio clip, point cloud …, or a string; a list of them where there are several
    (captions); a DataError, not raised, where it cannot be read. A modality that an item lacks is not in its values.
    Keys are unique and the same every time.

    Args:
        kind: a name in :data:`dualenc.data.sources.sources`.
        settings: of the source, and ``members``, ``files``, ``where``, ``limit`` (:class:`CommonSettings`).
        modalities: which to read; others stay unread.

    Raises:
        ConfigError: an unknown source, key or column.
        DataError: the data set is missing or damaged; no item has any of the modalities.
    """
    for key, contents in iter_contents(kind, settings, modalities):
        yield key, {m: raw_of(got) for m, got in contents.items()}


def iter_contents(
    kind: str, settings: Mapping[str, Any], modalities: Sequence[str] = ("image", "text")
) -> Iterator[tuple[str, dict[str, list[Content]]]]:
    """As :func:`iter_source`, before anything is read: (key, modality → contents, which :func:`raw_of` reads).

    Raises:
        ConfigError, DataError: as :func:`iter_source`.
    """
    layout, own, wanted = open_layout(kind, settings)
    found = False
    for item in itertools.islice(_chosen(layout, own, wanted, modalities), wanted.limit):
        contents = {m: got for m in modalities if (got := _contents(layout, item, m, wanted))}
        found = found or bool(contents)
        yield item.id, contents
    if not found:
        raise DataError(f"{kind}: no item has any of {', '.join(modalities)}; name their columns in members")


def _chosen(layout: Layout[Any], own: Any, wanted: CommonSettings, modalities: Sequence[str]) -> Iterator[Item]:
    items: Iterable[Item] = iter(layout.read(own))
    head = list(itertools.islice(items, HEAD))
    if layout.table:
        known = list(dict.fromkeys(k for item in head for k in item.fields))
        for m in modalities:
            check_members(wanted.members, m, known, f"members.{m}")
    for item in itertools.chain(head, items):
        if all(matches(value_of(item.fields, k), allowed) for k, allowed in wanted.where.items()):
            yield item


def matches(value: Any, allowed: Any) -> bool:
    """Whether a field has the value, or one of the values, that ``where`` names; compared as text."""
    return str(value) in {str(v) for v in (allowed if isinstance(allowed, list) else [allowed])}


def _contents(layout: Layout[Any], item: Item, modality: str, wanted: CommonSettings) -> list[Content]:
    if layout.table:
        try:
            return contents_of(item, modality, wanted.members, wanted.files)
        except DataError as e:  # a path outside the folder: only that item is affected
            return [Content(item.id, error=str(e))]
    return list(item.contents.get(modality, []))


def raw_of(contents: Sequence[Content]) -> Any:
    """The raw value of a modality, read now: see :func:`iter_source`."""
    values = [_read(c) for c in contents]
    return values[0] if len(values) == 1 else values


def _read(content: Content) -> bytes | str | DataError:
    from dualenc.data.modalities.modality import of_one_item  # torch is imported with it

    try:
        with of_one_item():
            read: bytes | str = content.read()
            return read
    except DataError as e:
        return e
