"""Text → token ids, ragged in the workers and padded to the batch's longest caption only when collated."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, Field, field_validator
from torch import Tensor

from dualenc.config import Positive, Section
from dualenc.data.modalities.byte_pairs import merged
from dualenc.data.modalities.modality import DecodeError, modalities
from dualenc.errors import ConfigError

_CLIP_VOCAB = 49408
_CLIP_CONTEXT = 77
_SYMBOLS = 512
_SPECIAL = 2
_REMEMBERED = 1 << 15
_UNSET_LENGTH = 100_000
_LONG_WORD = 256
_MAX_BYTES = 1 << 20
_FORMS = "clip, clip-bpe:SIZE, open_clip:MODEL or hf:FOLDER_OR_REPO"


PROBES = (
    "a photo of a cat",
    "Two Dogs RUN, isn't it? (1,234.5 km/h) - really!",
    "Ein Café am Fluß; naïve coöperation — 猫と犬",
    "under_score   and\twhite \n space ",
    "word " * 300,
)
"""Texts whose ids tell tokenizers apart: case, punctuation, accents, scripts, whitespace, truncation."""


class Tokenizer(Protocol):
    """Ids of one text, special tokens included, at most ``context_length`` of them.

    Attributes:
        pad_full: the tower was trained on captions padded to the full context and attends to the padding.
    """

    context_length: int
    vocab_size: int
    pad_id: int
    eot_id: int
    pad_full: bool

    def encode(self, text: str) -> list[int]: ...

    def digest(self) -> str:
        """SHA-256 of the vocabulary and merges: two tokenizers with the same digest give the same ids."""

    def save(self, folder: Path) -> str | None:
        """Write the files it needs; return the ``tokenizer:`` setting that reads them, None if it needs no files."""

    def export(self, folder: Path) -> None:
        """Write it as a tokenizer of the transformers library, whatever it is."""


class TextConfig(Section):
    """Which tokenizer, and how its ids are truncated and padded."""

    tokenizer: str = Field(default="clip", description=_FORMS)
    context_length: Positive | None = Field(default=None, description="default: the tokenizer's own (CLIP: 77)")
    lower: bool | None = Field(default=None, description="lower-case the text first; default: as the tokenizer does")
    bucket: Positive = Field(default=1, description="round the padded length up to a multiple of this")
    pad: Literal["longest", "context"] | None = Field(
        default=None,
        description="pad to the batch's longest caption or to the context; default: as the tokenizer's tower needs",
    )
    templates: list[str] = Field(
        default=[],
        description="training only: one is drawn and the text is put into its {}, such as 'a photo of a {}.'",
    )

    @field_validator("templates")
    @classmethod
    def _one_place(cls, templates: list[str]) -> list[str]:
        for t in templates:
            if t.count("{}") != 1:
                raise ValueError(f"templates: {t!r} must contain exactly one {{}}, where the text goes")
        return templates


@modalities.register("text")
class TextInput:
    """Captions as rows int64 [L]; ``collate`` → ``{"ids": int64 [B, L], "mask": bool [B, L]}`` (mask: real tokens).

    A sample may have several captions (a list in a json member): training draws one, evaluation takes the first.
    """

    Config: ClassVar[type[BaseModel]] = TextConfig
    default_members: ClassVar[list[str]] = ["txt", "text", "caption", "json:caption", "json:captions"]
    prompt: ClassVar[str] = "{}"

    def __init__(self, config: TextConfig, base_dir: str | Path | None = None) -> None:
        self.config, self.base_dir = config, base_dir
        self.tokenizer = build_tokenizer(config.tokenizer, config.context_length, config.lower, base_dir)
        self.context_length = self.tokenizer.context_length
        self.vocab_size = self.tokenizer.vocab_size
        self.pad_id, self.eot_id = self.tokenizer.pad_id, self.tokenizer.eot_id
        # Cleaning and merging dominate the cost of a caption, and those of small data sets and prompts repeat.
        self._row = lru_cache(maxsize=_REMEMBERED)(self._encode)
        self._full = config.pad == "context" or (config.pad is None and self.tokenizer.pad_full)

    def __reduce__(self) -> tuple[type[TextInput], tuple[Any, ...]]:
        # Tokenizers do not all pickle; a worker that is spawned builds its own.
        return TextInput, (self.config, self.base_dir)

    # --- the protocol -----------------------------------------------------------------------------------------

    def decode(self, raw: Any) -> list[str]:
        """UTF-8 bytes, a string, or a list of strings → the captions, stripped.

        Raises:
            DecodeError: if there is no text in it, or it is not UTF-8.
        """
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

    def train(self, x: list[str], rng: np.random.Generator) -> Tensor:
        """Ids of one caption, drawn by ``rng`` where there are several, in a template that is drawn too."""
        text = x[int(rng.integers(len(x)))] if len(x) > 1 else x[0]
        templates = self.config.templates
        return self._row(templates[int(rng.integers(len(templates)))].replace("{}", text) if templates else text)

    def mix(self, a: list[str], b: list[str], rng: np.random.Generator) -> list[str]:
        """One caption of each, joined by "and"; the second with a small first letter."""
        first, second = (x[int(rng.integers(len(x)))] for x in (a, b))
        return [f"{first.rstrip('.')} and {second[:1].lower()}{second[1:]}"]

    def eval(self, x: list[str]) -> Tensor:
        """Ids of the first caption."""
        return self._row(x[0])

    def collate(self, rows: list[Tensor]) -> dict[str, Tensor]:
        """Pad to the longest row, rounded up to ``bucket``, never beyond the context."""
        bucket = self.config.bucket
        longest = max(len(r) for r in rows)
        length = self.context_length if self._full else min(-(-longest // bucket) * bucket, self.context_length)
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.long)
        mask = torch.full((len(rows), length), self._full, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = True
        return {"ids": ids, "mask": mask}

    def dummy(self) -> Tensor:
        """A caption of one word."""
        return self._row("a")

    def as_raw(self, x: Any, rate: int | None = None) -> Any:
        """A string is the text itself, and a list of strings several captions of one item."""
        return x if isinstance(x, str | list | tuple) else None

    def describe(self) -> dict[str, Any]:
        """Settings with the context resolved, and the tokenizer's identity."""
        config = {**self.config.model_dump(mode="json"), "context_length": self.context_length}
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

    def _encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text), dtype=torch.long)


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


# --- tokenizers --------------------------------------------------------------------------------------------------


def build_tokenizer(
    name: str, context_length: int | None = None, lower: bool | None = None, base_dir: str | Path | None = None
) -> Tokenizer:
    """The tokenizer of a recipe's ``tokenizer:`` setting.

    Raises:
        ConfigError: if the name has no known form, or its files cannot be loaded.
    """
    form, _, rest = name.partition(":")
    if name == "clip":
        return ClipBPE(_CLIP_VOCAB, context_length or _CLIP_CONTEXT, lower)
    if form == "clip-bpe":
        if not rest.isdigit() or not _SYMBOLS + _SPECIAL < int(rest) <= _CLIP_VOCAB:
            raise ConfigError(
                f"tokenizer: {name!r} needs a size in {_SYMBOLS + _SPECIAL + 1}…{_CLIP_VOCAB}, such as clip-bpe:8192."
            )
        return ClipBPE(int(rest), context_length or _CLIP_CONTEXT, lower)
    if form == "open_clip" and rest:
        return _open_clip(rest, context_length, lower)
    if form == "hf" and rest:
        return HFTokenizer(rest, context_length, lower, base_dir)
    raise ConfigError(f"tokenizer: {name!r} is unknown; write {_FORMS}.")


@cache
def _open_clip_tokenizers() -> Any:
    """open_clip's tokenizer module without the rest of the package: that imports torchvision, timm and transformers,
    which takes longer than everything else before the first step of a run of small towers."""
    if "open_clip" in sys.modules:
        return importlib.import_module("open_clip.tokenizer")
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.origin is not None
    spec = importlib.util.spec_from_file_location(
        "dualenc_open_clip_tokenizer", Path(package.origin).parent / "tokenizer.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class ClipBPE:
    """CLIP's byte-pair encoding (Radford et al. 2021) with the first merges only.

    The vocabulary is the 512 byte symbols, ``vocab_size - 514`` merges in CLIP's order, start and end of text. With
    49,408 entries it is CLIP's own. Merges are ranked by how much text they cover, so a prefix of them is again a
    byte-pair encoding: a small tower needs no 49k embedding, and no tokenizer has to be trained.
    """

    pad_id = 0
    pad_full = False

    def __init__(self, vocab_size: int, context_length: int, lower: bool | None = None) -> None:
        if context_length < 3:
            raise ConfigError(f"context_length ({context_length}) leaves no room between start and end of text.")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        bpe = _open_clip_tokenizers().SimpleTokenizer(clean="whitespace" if lower is False else "lower")
        merges = list(bpe.bpe_ranks)[: vocab_size - _SYMBOLS - _SPECIAL]
        vocab = [*list(bpe.encoder)[: _SYMBOLS + len(merges)], "<start_of_text>", "<end_of_text>"]
        bpe.bpe_ranks = {m: i for i, m in enumerate(merges)}
        bpe.encoder = {token: i for i, token in enumerate(vocab)}
        bpe.decoder = dict(enumerate(vocab))
        self._bpe, self._lower = bpe, lower
        self._text = "\n".join([*vocab, "merges", *(" ".join(m) for m in merges), str(lower)])
        self.vocab_size, self.context_length = len(vocab), context_length
        self.sot_id, self.eot_id = vocab_size - 2, vocab_size - 1

    def encode(self, text: str) -> list[int]:
        room, bpe = self.context_length - _SPECIAL, self._bpe
        ids: list[int] = []
        for word in bpe.pat.finditer(bpe.clean_fn(text)):
            symbols = "".join(bpe.byte_encoder[b] for b in word.group().encode("utf-8"))
            if len(symbols) > _LONG_WORD:
                pieces = merged([*symbols[:-1], symbols[-1] + "</w>"], bpe.bpe_ranks)
            else:
                pieces = bpe.bpe(symbols).split(" ")
            ids += [bpe.encoder[piece] for piece in pieces]
            if len(ids) >= room:  # what follows would be cut off
                break
        return [self.sot_id, *ids[:room], self.eot_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids (special tokens are left out)."""
        text: str = self._bpe.decode([i for i in ids if i < self.sot_id])
        return text.strip()

    def digest(self) -> str:
        return hashlib.sha256(self._text.encode()).hexdigest()

    def save(self, folder: Path) -> str | None:
        return None

    def export(self, folder: Path) -> None:
        from tokenizers import normalizers
        from transformers import CLIPTokenizer

        folder.mkdir(parents=True, exist_ok=True)
        names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        vocab = {names.get(k, k): v for k, v in self._bpe.encoder.items()}
        merges = ["#version: 0.2", *(" ".join(m) for m in self._bpe.bpe_ranks)]
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
        tok = CLIPTokenizer.from_pretrained(folder)
        if self._lower is False:
            space = normalizers.Replace(_regex(r"\s+"), " ")
            tok.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), space])
        _write(tok, folder, self.context_length)


class HFTokenizer:
    """A tokenizer of the transformers library, from a folder or the Hub; code in the repository is never run."""

    def __init__(
        self, name: str, context_length: int | None, lower: bool | None, base_dir: str | Path | None = None
    ) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import AutoTokenizer

        path = name
        if base_dir is not None and name.startswith(("./", "../")):
            path = str(Path(base_dir) / name)
        if path.startswith((".", "/", "~")):
            path = os.path.expanduser(path)
            if not Path(path).is_dir():
                raise ConfigError(f"tokenizer: there is no folder {path} (hf:{name}).")
        try:
            tok = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError) as e:
            raise ConfigError(f"tokenizer: hf:{name} cannot be loaded: {str(e).splitlines()[0]}") from e
        self._wrap(tok, context_length, bool(lower))

    def _wrap(self, tok: Any, context_length: int | None, lower: bool) -> None:
        tok.padding_side = tok.truncation_side = "right"
        known = int(min(tok.model_max_length, _UNSET_LENGTH))
        self.context_length = context_length or (known if known < _UNSET_LENGTH else _CLIP_CONTEXT)
        self._tok, self._lower = tok, lower
        self.vocab_size = len(tok)
        ends = [i for i in (tok.eos_token_id, tok.sep_token_id) if i is not None]
        self.eot_id = int(ends[0]) if ends else -1
        self.pad_id = int(tok.pad_token_id if tok.pad_token_id is not None else max(self.eot_id, 0))
        self.pad_full = False

    def encode(self, text: str) -> list[int]:
        text = text.lower() if self._lower else text
        ids: list[int] = self._tok(text, truncation=True, max_length=self.context_length)["input_ids"]
        return ids

    def digest(self) -> str:
        backend = _backend(self._tok)
        # Calls with truncation leave their setting in the backend's text; that is not part of the identity.
        doc = json.loads(backend.to_str()) if backend is not None else sorted(self._tok.get_vocab().items())
        if isinstance(doc, dict):
            doc = {k: v for k, v in doc.items() if k not in ("truncation", "padding")}
        text = json.dumps([doc, self._lower], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, folder: Path) -> str | None:
        self._tok.save_pretrained(folder)
        return f"hf:{folder}"

    def export(self, folder: Path) -> None:
        _write(self._tok, folder, self.context_length, "lower" if self._lower else "")


class OpenClipTokenizer:
    """A tokenizer of an open_clip model that is not CLIP's BPE (SigLIP, CLIPA, multilingual towers)."""

    def __init__(self, tok: Any, context_length: int | None, lower: bool | None, pad_full: bool) -> None:
        self._tok, self._lower = tok, bool(lower)
        self.context_length = int(context_length or tok.context_length)
        inner = tok.tokenizer
        self.vocab_size = len(inner)
        self.pad_id = int(inner.pad_token_id)
        self.eot_id = int(inner.eos_token_id if inner.eos_token_id is not None else inner.sep_token_id)
        self.pad_full = pad_full

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tok([text.lower() if self._lower else text], self.context_length)[0].tolist()
        # The end-of-text id may be the padding id too (SigLIP): one of them stays.
        end = len(ids)
        while (
            end > 1 and ids[end - 1] == self.pad_id and not (self.pad_id == self.eot_id and ids[end - 2] != self.pad_id)
        ):
            end -= 1
        return ids[:end]

    def digest(self) -> str:
        text = json.dumps([type(self._tok).__name__, sorted(self._tok.tokenizer.get_vocab().items()), self._lower])
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, folder: Path) -> str | None:
        self.export(folder)
        return f"hf:{folder}"

    def export(self, folder: Path) -> None:
        if getattr(self._tok, "tokenizer_mode", "") or getattr(self._tok, "strip_sep_token", False):
            raise ConfigError(
                "tokenizer: open_clip's mode 'clips' and strip_sep_token have no equivalent in transformers."
            )
        clean = getattr(getattr(self._tok, "clean_fn", None), "__name__", "canonicalize").removeprefix("_clean_")
        _write(self._tok.tokenizer, folder, self.context_length, "lower" if self._lower else clean)


def _write(tok: Any, folder: Path, context_length: int, clean: str = "") -> None:
    """Save a transformers tokenizer with its maximum length, and the cleaning that preceded it as its normaliser."""
    from tokenizers import normalizers

    backend = _backend(tok)
    steps: list[Any] = []
    if clean == "canonicalize":  # big_vision's, as open_clip does it: "_" is a space, other punctuation is dropped
        steps += [normalizers.Replace("_", " "), normalizers.Replace(_regex(r"[!-/:-@\[-`{-~]"), "")]
    if clean in ("canonicalize", "lower"):
        steps.append(normalizers.Lowercase())
    if clean in ("canonicalize", "whitespace"):
        steps += [normalizers.Replace(_regex(r"\s+"), " "), normalizers.Strip()]
    before, length = (backend.normalizer if backend is not None else None), tok.model_max_length
    if backend is not None and steps:
        backend.normalizer = normalizers.Sequence([*steps, *([before] if before is not None else [])])
    tok.model_max_length = context_length
    try:
        tok.save_pretrained(folder)
    finally:
        tok.model_max_length = length
        if backend is not None and steps:
            backend.normalizer = before


def _backend(tok: Any) -> Any:
    """The tokenizers library's object inside a fast tokenizer; None inside a slow one, written in Python."""
    return tok.backend_tokenizer if tok.is_fast else None


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def _open_clip(model: str, context_length: int | None, lower: bool | None) -> Tokenizer:
    import open_clip

    known = open_clip.list_models()
    if model not in known and not model.startswith(("hf-hub:", "local-dir:")):
        from dualenc.errors import did_you_mean

        raise ConfigError(f"tokenizer: open_clip has no model {model!r}. {did_you_mean(model, known)}")
    try:
        tok = open_clip.get_tokenizer(model)
    except OSError as e:
        raise ConfigError(f"tokenizer: open_clip:{model} cannot be loaded: {str(e).splitlines()[0]}") from e
    text_cfg = (open_clip.get_model_config(model) or {}).get("text_cfg", {})
    # A tower without a causal mask, or one that pools the last position, sees the padding: keep that of its training.
    sees_padding = "hf_model_name" not in text_cfg and bool(
        text_cfg.get("no_causal_mask") or text_cfg.get("pool_type") == "last"
    )
    if isinstance(tok, open_clip.SimpleTokenizer):
        bpe = ClipBPE(_CLIP_VOCAB, context_length or tok.context_length or _CLIP_CONTEXT, lower)
        bpe.pad_full = sees_padding
        return bpe
    return OpenClipTokenizer(tok, context_length, lower, sees_padding)
