"""Tokenizers: CLIP's byte-pair encoding, those of transformers and those of open_clip's models, behind one protocol."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from dualenc.data.modalities.byte_pairs import merged
from dualenc.errors import ConfigError

_CLIP_VOCAB = 49408
_CLIP_CONTEXT = 77
_SYMBOLS = 512
_SPECIAL_WORDS = ("<start_of_text>", "<end_of_text>")
_SPECIAL = len(_SPECIAL_WORDS)
_WORD_END = "</w>"
_UNSET_LENGTH = 100_000
_LONG_WORD = 64
_KNOWN_WORDS = 1 << 16
_ASCII_WORDS = re.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", re.IGNORECASE | re.ASCII
)
"""CLIP's pattern of words, for ASCII."""
FORMS = "clip, clip-bpe:SIZE, open_clip:MODEL or hf:FOLDER_OR_REPO"


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
    raise ConfigError(f"tokenizer: {name!r} is unknown; write {FORMS}.")


def _of_open_clip(name: str) -> Path:
    """A file of the package open_clip, which is not imported: that brings torchvision, timm and transformers and takes
    longer than everything else before the first step of a run of small towers."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / name


@cache
def _clip_merges() -> list[str]:
    """CLIP's merges, the most frequent first: two symbols with a space between them."""
    with gzip.open(_of_open_clip("bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as f:
        return [line.rstrip("\n") for line in islice(f, 1, 1 + _CLIP_VOCAB - _SYMBOLS - _SPECIAL)]


@cache
def _byte_symbols() -> dict[int, str]:
    """A character for each byte, those that can be seen first: the order of CLIP's vocabulary."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


@cache
def _open_clip_words(clean: str) -> tuple[Callable[[str], str], Any]:
    """open_clip's cleaning and its pattern of words: for text that is not plain ASCII (its import takes 0.2 s)."""
    if "open_clip" in sys.modules:
        module = importlib.import_module("open_clip.tokenizer")
    else:
        spec = importlib.util.spec_from_file_location("dualenc_open_clip_tokenizer", _of_open_clip("tokenizer.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    simple = module.SimpleTokenizer(clean=clean)
    return simple.clean_fn, simple.pat


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
        merges = _clip_merges()[: vocab_size - _SYMBOLS - _SPECIAL]
        symbols = list(_byte_symbols().values())
        vocab = [*symbols, *(s + _WORD_END for s in symbols), *(m.replace(" ", "") for m in merges), *_SPECIAL_WORDS]
        self._ids = {token: i for i, token in enumerate(vocab)}
        self._vocab, self._merges, self._lower = vocab, merges, lower
        self._ranks = {(a, b): i for i, (a, b) in enumerate(m.split(" ") for m in merges)}
        self._words: dict[str, list[int]] = {}
        self._text = "\n".join([*vocab, "merges", *merges, str(lower)])
        self.vocab_size, self.context_length = len(vocab), context_length
        self.sot_id, self.eot_id = vocab_size - 2, vocab_size - 1

    def encode(self, text: str) -> list[int]:
        """As open_clip's ``SimpleTokenizer``; the ids of a word are computed once.

        A caption costs 4 µs where its words are known, 15 on average while they are learnt; open_clip's own loop takes
        50, the tokenizers library (Rust) 37 a call.
        """
        room, words = self.context_length - _SPECIAL, self._words
        ids: list[int] = []
        if text.isascii() and text.isprintable() and "&" not in text:
            # Nothing here for ftfy to mend and no HTML entity: this is what the cleaning comes to.
            text = " ".join(text.split())
            found = _ASCII_WORDS.finditer(text if self._lower is False else text.lower())
        else:
            clean, pattern = _open_clip_words("whitespace" if self._lower is False else "lower")
            found = pattern.finditer(clean(text))
        for match in found:
            word = match.group()
            known = words.get(word)
            ids += self._learnt(word) if known is None else known
            if len(ids) >= room:  # what follows would be cut off
                break
        return [self.sot_id, *ids[:room], self.eot_id]

    def _learnt(self, word: str) -> list[int]:
        """The ids of a word, remembered if it is not too long; what is remembered is bounded."""
        if word in _SPECIAL_WORDS:
            pieces = [word]
        else:
            symbols = [_byte_symbols()[b] for b in word.encode("utf-8")]
            pieces = merged([*symbols[:-1], symbols[-1] + _WORD_END], self._ranks)
        ids = [self._ids[piece] for piece in pieces]
        if len(word) <= _LONG_WORD:
            if len(self._words) >= _KNOWN_WORDS:
                self._words.clear()
            self._words[word] = ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids (special tokens are left out)."""
        byte_of = {symbol: b for b, symbol in _byte_symbols().items()}
        raw = bytes(byte_of[c] for c in "".join(self._vocab[i] for i in ids if i < self.sot_id))
        return raw.decode("utf-8", errors="replace").replace(_WORD_END, " ").strip()

    def digest(self) -> str:
        return hashlib.sha256(self._text.encode()).hexdigest()

    def save(self, folder: Path) -> str | None:
        return None

    def export(self, folder: Path) -> None:
        from tokenizers import normalizers
        from transformers import CLIPTokenizer

        folder.mkdir(parents=True, exist_ok=True)
        names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        vocab = {names.get(k, k): v for k, v in self._ids.items()}
        merges = ["#version: 0.2", *self._merges]
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
        # SigLIP's and CLIPS' tokenizers of open_clip have attributes of their own; its older classes have none
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
