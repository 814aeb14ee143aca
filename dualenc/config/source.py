"""A recipe's ``data.sources``: shards, their members, and the labels that losses ask for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from dualenc.config.section import Positive, Section


class Value(Section):
    """A label of each sample, for losses that ask for it by name; a bare ``json:KEY`` or ending is its ``member``."""

    member: str = Field(description="where it stands: json:KEY, or the ending of a member of text (cls, speaker.txt)")
    type: Literal["auto", "id", "int", "float", "ids", "ints", "floats", "tree"] = Field(
        default="auto", description="auto: as some samples have it; tree: a list (or a/b/c) from root to leaf"
    )
    width: Positive = Field(default=16, description="most entries of a list, most levels of a tree")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, raw: Any) -> Any:
        return {"member": raw} if isinstance(raw, str) else raw

    @model_validator(mode="after")
    def _one_member(self) -> Value:
        if not self.member or "+" in self.member or "*" in self.member:
            raise ValueError(f"member: {self.member!r} must be one ending or json:KEY, such as cls or json:class")
        return self


class Source(Section):
    """A set of shards. ``weight`` is its share of samples among the sources (relative)."""

    name: str = Field(description="its name in counts, quarantine.jsonl and the model card")
    shards: str | list[str] = Field(description="path, brace pattern, list, pipe:COMMAND, http(s):// or s3:// URL")
    weight: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="share of samples among the sources, relative to the others' weights"
    )
    index: str | None = Field(default=None, description="index file; default: index.json beside the shards")
    selection: str | None = Field(
        default=None,
        description="only these samples, at these weights: NAME.selection.parquet beside the shards, or a path",
    )
    members: dict[str, list[str]] = Field(
        default_factory=dict,
        description="modality → member endings, tried in order; 'json:KEY': a key of the .json; default: the kind's",
    )
    same: str | None = Field(
        default=None,
        description="member ending (txt, json:instance); samples with equal values there are positives of each other",
    )
    values: dict[str, Value] = Field(
        default_factory=dict,
        description="name → json:KEY or ending: labels for losses that ask for them; {member: …, type: …}",
    )

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Recipes without values, or a selection, are written, compared and resumed as before there were any."""
        out: dict[str, Any] = write(self)
        unused = {"values"} if not self.values else set()
        unused |= {"selection"} if self.selection is None else set()
        return {k: v for k, v in out.items() if k not in unused}
