"""Text → token ids, ragged in the workers and padded to the batch's longest caption only when collated."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator
from torch import Tensor

from dualenc.config import Positive, Section
from dualenc.data.modalities.modality import DecodeError, modalities
from dualenc.data.modalities.rewording import Rewording, TextAugment
from dualenc.data.modalities.text_views import TextView, changed, chosen
from dualenc.data.modalities.tokenizing import FORMS, HFTokenizer, build_tokenizer
from dualenc.errors import ConfigError

_REMEMBERED = 1 << 15
_MAX_BYTES = 1 << 20


PROBES = (
    "a photo of a cat",
    "Two Dogs RUN, isn't it? (1,234.5 km/h) - really!",
    "Ein Café am Fluß; naïve coöperation — 猫と犬",
    "under_score   and\twhite \n space ",
    "word " * 300,
)
"""Texts whose ids tell tokenizers apart: case, punctuation, accents, scripts, whitespace, truncation."""


class TextConfig(Section):
    """Which tokenizer, and how its ids are truncated and padded."""

    tokenizer: str = Field(default="clip", description=FORMS)
    context_length: Positive | None = Field(default=None, description="default: the tokenizer's own (CLIP: 77)")
    lower: bool | None = Field(default=None, description="lower-case the text first; default: as the tokenizer does")
    prefix: str | None = Field(
        default=None,
        description="words before every text, in training and in use, with a space between: 'query:', 'a photo of a'",
    )
    bucket: Positive = Field(default=1, description="round the padded length up to a multiple of this")
    pad: Literal["longest", "context"] | None = Field(
        default=None,
        description="pad to the batch's longest caption or to the context; default: as the tokenizer's tower needs",
    )
    templates: list[str] = Field(
        default=[],
        description="training only: one is drawn and the text is put into its {}, such as 'a photo of a {}.'",
    )

    augment: TextAugment | None = Field(
        default=None,
        description="training only: stop words left out, words replaced by synonyms, swapped, left out; null: none",
    )
    view: TextView | None = Field(
        default=None,
        description="training only: one sentence of the text, a crop, a masked span; null: the whole text",
    )
    negatives: str | None = Field(
        default=None,
        description="training only: a member with texts that are wrong for the item (json:negatives); they become "
        "further columns of the loss",
    )
    max_negatives: Positive = Field(default=4, description="wrong texts used of a sample; drawn if it has more")
    domain: str | None = Field(
        default=None,
        description="a member with the domain of the text, such as json:language: it chooses the experts of "
        "own/moe_transformer",
    )
    domains: list[str] = Field(
        default=[], description="with domain: the domains there are; the first is that of texts without one"
    )

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``prefix``, ``augment``, ``view`` and domains where there are none: descriptions are those that were
        saved before they existed."""
        out: dict[str, Any] = write(self)
        return {k: v for k, v in out.items() if k not in ("prefix", "augment", "view", "domain", "domains") or v}

    @field_validator("prefix")
    @classmethod
    def _has_words(cls, prefix: str | None) -> str | None:
        if prefix is not None and not visible(prefix):
            raise ValueError("prefix: it has no words; leave it out")
        return None if prefix is None else prefix.strip()

    @model_validator(mode="after")
    def _domain_and_domains(self) -> Self:
        if (self.domain is None) != (not self.domains):
            raise ValueError("domain and domains: give both, the member with a text's domain and the list of domains")
        if len(set(self.domains)) < len(self.domains):
            raise ValueError(f"domains: {self.domains} lists a domain twice")
        if self.domain is not None and self.negatives is not None:
            raise ValueError("domain and negatives: a text is read with one further member only; leave one of them out")
        return self

    @model_validator(mode="after")
    def _chosen_has_no_negatives(self) -> Self:
        if self.view is not None and self.view.choose is not None and self.negatives is not None:
            raise ValueError(
                f"view.choose: {self.view.choose} and negatives cannot be combined, as the wrong texts belong to a "
                "whole caption; leave one of them out"
            )
        return self

    @field_validator("templates")
    @classmethod
    def _one_place(cls, templates: list[str]) -> list[str]:
        return one_place(templates, "the text")


def one_place(templates: list[str], what: str) -> list[str]:
    """The templates. Raises ValueError for one that does not have a single ``{}`` for ``what``."""
    for t in templates:
        if t.count("{}") != 1:
            raise ValueError(f"templates: {t!r} must contain exactly one {{}}, where {what} goes")
    return templates


class Captions(list[str]):
    """The captions of an item, and the texts that are wrong for it."""

    def __init__(self, captions: list[str], negatives: list[str]) -> None:
        super().__init__(captions)
        self.negatives = negatives


class OfDomain(list[str]):
    """The captions of an item, and which of ``domains`` they are of."""

    def __init__(self, captions: list[str], domain: int) -> None:
        super().__init__(captions)
        self.domain = domain


class DomainRow(NamedTuple):
    """Token ids of a caption [L], and its domain."""

    ids: Tensor
    domain: int


class TextRow(NamedTuple):
    """Token ids of a caption [L], and of the texts that are wrong for its item."""

    ids: Tensor
    negatives: list[Tensor]


@modalities.register("text")
class TextInput:
    """Captions as rows int64 [L]; ``collate`` → ``{"ids": int64 [B, L], "mask": bool [B, L]}`` (mask: real tokens).

    A sample may have several captions (a list in a json member): training draws one, evaluation takes the first.
    With ``negatives`` every batch also has ``negatives`` of the same kind, [B, K, L], and ``labels`` that say which of
    them there are; the model encodes them with the captions.
    """

    Config: ClassVar[type[BaseModel]] = TextConfig
    default_members: ClassVar[list[str]] = ["txt", "text", "caption", "json:caption", "json:captions"]
    prompt: ClassVar[str] = "{}"

    def __init__(self, config: TextConfig, base_dir: str | Path | None = None) -> None:
        self.config, self.base_dir = config, base_dir
        self._reworded = None if config.augment is None else Rewording(config.augment, base_dir)
        self.tokenizer = build_tokenizer(config.tokenizer, config.context_length, config.lower, base_dir)
        self.context_length = self.tokenizer.context_length
        self.vocab_size = self.tokenizer.vocab_size
        self.pad_id, self.eot_id = self.tokenizer.pad_id, self.tokenizer.eot_id
        # Cleaning and merging dominate the cost of a caption, and those of small data sets and prompts repeat.
        self._row = lru_cache(maxsize=_REMEMBERED)(self._encode)
        self._full = config.pad == "context" or (config.pad is None and self.tokenizer.pad_full)
        self._lengths: tuple[int, ...] = ()

    def __reduce__(self) -> tuple[type[TextInput], tuple[Any, ...], dict[str, Any]]:
        # Tokenizers do not all pickle; a worker that is spawned builds its own.
        return TextInput, (self.config, self.base_dir), {"_lengths": self._lengths}

    # --- the protocol -----------------------------------------------------------------------------------------

    def decode(self, raw: Any) -> list[str]:
        """UTF-8 bytes, a string, or a list of strings → the captions, stripped.

        Raises:
            DecodeError: if there is no text in it, or it is not UTF-8.
        """
        if isinstance(raw, dict) and self.config.negatives in raw:  # of two members, its own first: see beside
            own, wrong = raw.values()
            return Captions(self.decode(own), self.decode(wrong))
        if isinstance(raw, dict) and self.config.domain in raw:
            own, domain = raw.values()
            return OfDomain(self.decode(own), self._domain(domain))
        if isinstance(raw, bytes | bytearray | memoryview):
            if len(raw) > _MAX_BYTES:
                raise DecodeError(f"the text has {len(raw):,} bytes; at most {_MAX_BYTES:,} are allowed")
            try:
                raw = bytes(raw).decode("utf-8-sig")
            except UnicodeDecodeError as e:
                raise DecodeError(f"the text is not UTF-8 ({e.reason} at byte {e.start})") from e
        items = [raw] if isinstance(raw, str) else raw
        if not isinstance(items, list | tuple) or not all(isinstance(t, str) for t in items):
            raise DecodeError(f"a caption must be text or a list of texts, got {type(raw).__name__}")
        if sum(map(len, items)) > _MAX_BYTES:
            raise DecodeError(f"the captions have {sum(map(len, items)):,} letters; at most {_MAX_BYTES:,} are allowed")
        texts = [whole(t).strip() for t in items if visible(t)]
        if not texts:
            raise DecodeError("the caption is empty")
        return texts

    def _domain(self, raw: Any) -> int:
        """A member's bytes or a json value → the number of the domain.

        Raises:
            DecodeError: it is not one of ``domains``.
        """
        name = bytes(raw).decode("utf-8", "replace").strip() if isinstance(raw, bytes | bytearray | memoryview) else raw
        if name not in self.config.domains:
            raise DecodeError(f"the domain {name!r:.80} is not one of input.domains {self.config.domains}")
        return self.config.domains.index(name)

    def train(self, x: list[str], rng: np.random.Generator) -> Tensor | TextRow | DomainRow:
        """Ids of one caption, drawn by ``rng`` where there are several, changed as ``view`` and ``augment`` say, in a
        template that is drawn too."""
        text = x[int(rng.integers(len(x)))] if len(x) > 1 else x[0]
        if self.config.view is not None:
            text = changed(text, self.config.view, rng)
        if self._reworded is not None:
            text = self._reworded(text, rng)
        templates = self.config.templates
        template = templates[int(rng.integers(len(templates)))] if templates else "{}"
        row = self._row(template.replace("{}", text))
        if not isinstance(x, Captions):
            return self._of_domain(row, x)
        wrong, most = x.negatives, self.config.max_negatives
        if len(wrong) > most:
            wrong = [wrong[int(k)] for k in sorted(rng.choice(len(wrong), most, replace=False))]
        return TextRow(row, [self._row(template.replace("{}", t)) for t in wrong])

    def _of_domain(self, row: Tensor, x: list[str]) -> Tensor | DomainRow:
        """The row with its domain, where there are domains."""
        if self.config.domain is None:
            return row
        return DomainRow(row, x.domain if isinstance(x, OfDomain) else 0)

    def draws_together(self) -> bool:
        """Whether ``view.choose`` is set."""
        return self.config.view is not None and self.config.view.choose is not None

    def drawn(self, x: list[str], rng: np.random.Generator) -> list[str]:
        """The text that ``view.choose`` takes, alone."""
        view = self.config.view
        if view is None or view.choose is None:
            return x
        text = [chosen(x, view.choose, rng)]
        return OfDomain(text, x.domain) if isinstance(x, OfDomain) else text

    def beside(self) -> str | None:
        """The member that ``negatives`` or ``domain`` names."""
        return self.config.negatives or self.config.domain

    def mix(self, a: list[str], b: list[str], rng: np.random.Generator) -> list[str]:
        """One caption of each, joined by "and"; the second with a small first letter."""
        first, second = (x[int(rng.integers(len(x)))] for x in (a, b))
        mixed = [f"{first.rstrip('.')} and {second[:1].lower()}{second[1:]}"]
        return OfDomain(mixed, a.domain) if isinstance(a, OfDomain) else mixed

    def eval(self, x: list[str]) -> Tensor | DomainRow:
        """Ids of the first caption."""
        return self._of_domain(self._row(x[0]), x)

    def collate(self, rows: Sequence[Tensor | TextRow | DomainRow]) -> dict[str, Any]:
        """Pad to the longest row, rounded up to ``bucket``, never beyond the context; with domains ``domain`` [B]."""
        if self.config.domain is not None:
            domain = torch.tensor([r.domain if isinstance(r, DomainRow) else 0 for r in rows])
            return {**self._padded([r if isinstance(r, Tensor) else r.ids for r in rows]), "domain": domain}
        if self.config.negatives is None:
            return self._padded([r if isinstance(r, Tensor) else r.ids for r in rows])
        # As many of every row, on every rank and in every batch: a rank without any takes part in gathering them.
        most, nothing = self.config.max_negatives, self.dummy()
        wrong = [r.negatives if isinstance(r, TextRow) else [] for r in rows]
        texts = [r if isinstance(r, Tensor) else r.ids for r in rows]
        texts += [t for own in wrong for t in [*own, *[nothing] * (most - len(own))]]
        padded, n = self._padded(texts), len(rows)
        there = torch.arange(most) < torch.tensor([len(own) for own in wrong])[:, None]
        return {
            **{k: x[:n] for k, x in padded.items()},
            "negatives": {k: x[n:].view(n, most, -1) for k, x in padded.items()},
            "labels": {"negatives_there": there.long()},
        }

    def few_shapes(self, count: int) -> None:
        """Pad to ``count`` lengths, equal steps of the context in multiples of 8; not where ``bucket`` is set."""
        if self.config.bucket == 1 and not self._full:
            steps = (-(-self.context_length * k // (count * 8)) * 8 for k in range(1, count + 1))
            self._lengths = tuple(sorted({min(n, self.context_length) for n in steps}))

    def _padded(self, rows: Sequence[Tensor]) -> dict[str, Tensor]:
        bucket = self.config.bucket
        longest = max(len(r) for r in rows)
        if self._lengths:
            longest = next(n for n in self._lengths if n >= longest)
        length = self.context_length if self._full else min(-(-longest // bucket) * bucket, self.context_length)
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.long)
        mask = torch.full((len(rows), length), self._full, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = True
        return {"ids": ids, "mask": mask}

    @property
    def masks_padding(self) -> bool:
        """Whether ``mask`` leaves padding out; towers that were trained on padding see it."""
        return not self._full

    def dummy(self) -> Tensor:
        """A caption of one word."""
        return self._row("a")

    def as_raw(self, x: Any, rate: int | None = None) -> Any:
        """A string is the text itself, and a list of strings several captions of one item."""
        return x if isinstance(x, str | list | tuple) else None

    def describe(self) -> dict[str, Any]:
        """Settings with the context resolved, and the tokenizer's identity; without wrong texts, ``augment`` and
        ``view``, which are for training only."""
        config = self.config.model_dump(mode="json", exclude={"negatives", "max_negatives", "augment", "view"})
        config["context_length"] = self.context_length
        return {
            "kind": "text",
            "config": config,
            "tokenizer": {
                "name": self.config.tokenizer,
                "vocab_size": self.vocab_size,
                "pad_id": self.pad_id,
                "eot_id": self.eot_id,
                "sha256": self.tokenizer.digest(),
            },
        }

    # --- beyond the protocol ----------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Write the tokenizer's files into ``folder/tokenizer`` (if it has any) and return what ``describe`` says,
        with ``tokenizer`` pointing there: with ``base_dir=folder`` the same input is built, offline."""
        setting = self.tokenizer.save(Path(folder) / "tokenizer")
        if setting is None:
            return self.describe()
        settings = {"tokenizer": "hf:./tokenizer", "context_length": self.context_length}
        if self._full:  # known from the name of an open_clip model, not from its tokenizer's files
            settings["pad"] = "context"
        # rebuilt: the files may describe another class of tokenizer, with another digest
        return TextInput(self.config.model_copy(update=settings), folder).describe()

    def export_tokenizer(self, folder: str | Path, padding_is_seen: bool = False) -> None:
        """Write the tokenizer as transformers' ``AutoTokenizer`` reads it.

        Args:
            padding_is_seen: the tower attends to padding (SigLIP), so its id must be the same too.

        CLIP's cleaning of HTML entities and broken encodings (ftfy) is not part of that format; everything else is.

        Raises:
            ConfigError: if the written tokenizer gives other ids for texts that vary in case, punctuation or length.
        """
        self.tokenizer.export(Path(folder))
        written = HFTokenizer(str(folder), self.context_length, None)
        if padding_is_seen and written.pad_id != self.pad_id:
            raise ConfigError(
                f"tokenizer: {self.config.tokenizer} cannot be exported to transformers: this tower attends to its "
                f"padding, id {self.pad_id}, which is a word there; transformers would pad with {written.pad_id}."
            )
        for text in PROBES:
            expected, got = self.tokenizer.encode(text), written.encode(text)
            if expected != got:
                raise ConfigError(
                    f"tokenizer: {self.config.tokenizer} cannot be exported to transformers: {text[:40]!r} would "
                    f"become {got[:12]} instead of {expected[:12]}."
                )

    def prefix_places(self) -> tuple[int, int]:
        """Where the tokens of ``prefix`` begin in every row, and how many they are."""
        alone, first = self.tokenizer.encode("a"), self.tokenizer.encode("the")[0]
        return int(alone[0] == first), len(self._encode("a")) - len(alone)

    def _encode(self, text: str) -> Tensor:
        whole_text = text if self.config.prefix is None else f"{self.config.prefix} {text}"
        return torch.tensor(self.tokenizer.encode(whole_text), dtype=torch.long)


def visible(text: str) -> bool:
    """Whether a text has a visible character, not only whitespace, control and zero-width characters."""
    return any(not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf", "Cs") for c in text)


def whole(text: str) -> str:
    """The text with lone surrogates (as in the JSON of a caption cut inside an emoji) replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
