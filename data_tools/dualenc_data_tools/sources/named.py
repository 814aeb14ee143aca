"""Fields in file names, filters, and the words for values: settings shared by table and folder sources."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field

from dualenc.config import Section
from dualenc_data_tools.sources.source import template_fields

Scalar = str | int | float | bool


class NamedFields(Section):
    """Settings for fields in file names, for filters, and for words."""

    pattern: str | None = Field(
        None, description="fields in the file names, without the ending: '{digit}_{speaker}_{take}'"
    )
    where: dict[str, Scalar | list[Scalar]] = Field(
        default_factory=dict, description="only records whose field has this value or one of these: where.fold=[1,2]"
    )
    unless: dict[str, Scalar | list[Scalar]] = Field(
        default_factory=dict, description="leave out records whose field has this value or one of these"
    )
    words: dict[str, dict[Scalar, str]] = Field(
        default_factory=dict, description="field → value → its word in templates: '{digit: {0: zero, 1: one}}'"
    )
    underscores: Literal["keep", "space"] = Field("keep", description="space: crying_baby is written crying baby")

    def name_fields(self, where: str) -> list[str]:
        """The fields of ``pattern``; ``where`` is its dotted key.

        Raises:
            ConfigError: for anything but plain ``{name}`` fields.
        """
        return template_fields(self.pattern, where) if self.pattern is not None else []

    def fields_of(self, name: str) -> dict[str, str] | None:
        """The fields that ``pattern`` finds in a file name: {} without a pattern, None where the name does not match.

        Fields match as little as possible, so the first separators count.
        """
        if self.pattern is None:
            return {}
        names, regex = [], ""
        for literal, field, _, _ in string.Formatter().parse(self.pattern):
            regex += re.escape(literal)
            if field is not None:
                names.append(field)
                regex += "(.+?)"
        found = re.fullmatch(regex, PurePosixPath(name).stem)
        return None if found is None else dict(zip(names, found.groups(), strict=True))

    def wants(self, row: Mapping[str, Any]) -> bool:
        """Whether ``where`` and ``unless`` keep a record; values are compared as text."""
        for rules, wanted in ((self.where, True), (self.unless, False)):
            for field, value in rules.items():
                allowed = {str(v) for v in (value if isinstance(value, list) else [value])}
                if (str(row.get(field)) in allowed) != wanted:
                    return False
        return True

    def in_words(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with values as they should appear in texts."""
        out = {}
        for field, value in row.items():
            said = {str(k): v for k, v in self.words.get(field, {}).items()}
            out[field] = said.get(str(value), self.as_words(value))
        return out

    def as_words(self, value: Any) -> Any:
        """A string with underscores replaced by spaces if so set; other values unchanged."""
        return value.replace("_", " ") if isinstance(value, str) and self.underscores == "space" else value
