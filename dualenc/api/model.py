"""A loaded model: encode, compare, classify, search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit

from dualenc.api.items import RawItems, chunks, found, known, many, name_of
from dualenc.api.search_index import FoundInIndex, Hit, SearchIndex
from dualenc.config import Recipe, apply_override, pair_name, parse
from dualenc.data.modalities import FromMemory
from dualenc.encoders import DualEncoder
from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc.features.disk_index import load_index as load_disk_index
from dualenc.model import Bundle, Embedder
from dualenc.model import load_model as load_bundle

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TOGETHER = 16
"""Batches that are read and decoded as one stretch of an iterator."""


def load_model(spec: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "fp32") -> Model:
    """Load a model to encode, compare, classify and search with.

    Args:
        spec: a run folder, a checkpoint or bundle folder, ``open_clip:NAME/TAG``, ``hf:REPO``, ``laion_clap:FILE.pt``,
            or a folder in open_clip's or transformers' layout.
        device: auto (CUDA where there is one), cpu or cuda.
        dtype: how towers compute: fp32, or under autocast bf16 or fp16 (weights stay fp32).

    Raises:
        ConfigError: there is no such model, device or dtype.
        CheckpointError: naming the field, if the model is damaged or would not give the features it was saved with.
    """
    where = str(Path(spec).expanduser().resolve()) if Path(spec).expanduser().exists() else str(spec)
    return Model(load_bundle(str(spec), device=device), dtype, where)


@dataclass(frozen=True)
class Predictions:
    """The result of :meth:`Model.classify` for each item.

    Attributes:
        names: the classes, in the order they were given.
        probabilities: [n, C] over the classes: the softmax of the scaled cosines; of a model with a logit bias
            (SigLIP) the sigmoid of each logit, which need not add up to 1.
        items: how each item is called: its path, else its position.
        skipped: item → reason of those that could not be read; they have no row.
    """

    names: list[str]
    probabilities: Tensor
    items: list[str | int]
    skipped: dict[str | int, str]

    @property
    def best(self) -> list[str]:
        """The most probable class of each item."""
        return [self.names[i] for i in self.probabilities.argmax(1).tolist()]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """The ``k`` most probable classes of each item with their probabilities."""
        values, order = self.probabilities.topk(min(k, len(self.names)), dim=1)
        rows = zip(order.tolist(), values.tolist(), strict=True)
        return [[(self.names[i], v) for i, v in zip(r, p, strict=True)] for r, p in rows]


@dataclass(frozen=True, slots=True)
class _Options:
    batch_size: int = 64
    normalize: bool = True
    progress: bool = False
    sample_rate: int | None = None


class Model:
    """A dual encoder with the inputs of its modalities.

    Wherever items are taken: one item, or a list, iterator or generator of them. An item is a path, a URL, bytes, an
    open file, or what the modality knows: PIL images and uint8 arrays [H, W, 3] (image), waveforms [T] or
    [channels, T] with ``sample_rate`` (audio), float arrays [n, ≥ 3] (lidar). For text a string is the text itself.

    Attributes:
        bundle: the model, its inputs, and where it came from.
        embedder: what ``dualenc eval`` embeds with.
        source: what it was loaded from; None for a model that was built.
    """

    def __init__(self, bundle: Bundle, dtype: str | torch.dtype = "fp32", source: str | None = None) -> None:
        self.bundle, self.embedder, self.source = bundle, bundle.embedder(), source
        self._plain = Embedder.from_bundle(bundle, forward=self._unnormalised)
        self._dtype = _dtype(dtype)

    # --- what it is ------------------------------------------------------------------------------------------------

    @property
    def module(self) -> DualEncoder:
        """The torch module: ``module(model.batch(image=…, text=…))`` gives features with gradient."""
        return self.bundle.model

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities it encodes."""
        return self.bundle.modalities

    @property
    def embed_dim(self) -> int:
        """D, the width of the shared space."""
        return self.bundle.embed_dim

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.bundle.device

    def describe(self) -> dict[str, Any]:
        """Provenance: hash of the weights, inputs, architectures, versions, temperature."""
        return self.embedder.describe()

    def save(self, folder: str | Path) -> Path:
        """Save the model as a folder that :func:`load_model` reads; returns the folder."""
        return self.bundle.save(folder)

    def recipe(
        self,
        shards: str | Sequence[str],
        *,
        steps: int,
        batch_size: int = 64,
        lr: float = 1e-5,
        name: str = "finetuned",
        overrides: Iterable[str] = (),
    ) -> Recipe:
        """A recipe to train this model further: ``dualenc.train(model.recipe("my-{000..099}.tar", steps=1000))``.

        Args:
            shards: path, brace pattern or URL of webdataset shards, or several.
            steps: of the global batch, ``batch_size``.
            lr: the peak learning rate.
            name: the run folder is runs/NAME.
            overrides: anything else, ``key.sub=value``, as on the command line: ``modalities.image.lock=true``.

        Raises:
            ConfigError: naming the key, its value and what to write instead; or the model was not loaded from anywhere.
        """
        if self.source is None:
            raise ConfigError("recipe: training starts from a saved model; save this one and load it from there")
        kept = ("kind", "input", "encoder", "lock", "shares", "stream")
        given = [shards] if isinstance(shards, str) else list(shards)
        raw: dict[str, Any] = {
            "name": name,
            "modalities": {m: p.model_dump(mode="json", include=set(kept)) for m, p in self.bundle.parts.items()},
            "pairs": [list(p) for p in self.module.pairs],
            "embed_dim": self.embed_dim,
            "logit_scale": self.bundle.scale.model_dump(mode="json"),
            "data": {"sources": [{"name": f"source{i}", "shards": s} for i, s in enumerate(given)]},
            "batch": {"size": batch_size},
            "budget": {"steps": steps},
            "optim": {"lr": lr},
            "checkpoint": {"init_from": self.source},
        }
        origin: dict[str, str] = {}
        for item in overrides:
            apply_override(raw, item, origin)
        return parse(Recipe, raw, origin, "model.recipe")

    def __repr__(self) -> str:
        return f"<dualenc.Model {self.bundle.name}: {', '.join(self.modalities)} → {self.embed_dim}, {self.device}>"

    # --- encoding --------------------------------------------------------------------------------------------------

    def encode(
        self,
        *,
        batch_size: int = 64,
        normalize: bool = True,
        dtype: str | torch.dtype = "fp32",
        device: str | torch.device = "cpu",
        progress: bool = False,
        sample_rate: int | None = None,
        skipped: dict[int, str] | None = None,
        **items: Any,
    ) -> Tensor:
        """Encode items of one modality: ``model.encode(image=["a.jpg", "b.jpg"])``, ``model.encode(text="a cat")``.

        An iterator is read as it is encoded: it may be longer than memory, its features may not.

        Args:
            batch_size: items on the device at once.
            normalize: L2-normalise the features; False: as the tower's head gives them.
            dtype: of the returned features.
            device: of the returned features.
            progress: show a bar on stderr.
            sample_rate: of waveforms given as arrays, in Hz.
            skipped: filled with position → reason for unusable items, which get no row. Default: such an item is an
                error.
            items: the modality and its items.

        Returns:
            [n, D], also for one item.

        Raises:
            ConfigError: no or several modalities, or one that the model does not have.
            DataError: naming the item that cannot be used.
        """
        if len(items) != 1:
            said = " and ".join(f"{m}=" for m in items) or "none"
            raise ConfigError(f"encode takes one modality at a time, such as encode(image=[…]); got {said}")
        ((modality, given),) = items.items()
        options = _Options(batch_size, normalize, progress, sample_rate)
        return self._encoded(modality, given, options, skipped).to(device=device, dtype=_dtype(dtype))

    def batch(self, *, sample_rate: int | None = None, **items: Any) -> dict[str, Any]:
        """Items as the tensors that :attr:`module` takes, on its device, as evaluation sees them (no augmentation).

        Returns:
            modality → tensors whose first axis is the item.

        Raises:
            ConfigError: a modality the model does not have.
            DataError: naming the item that cannot be used.
        """
        out: dict[str, Any] = {}
        for m, given in items.items():
            raw = RawItems(self.bundle.inputs[known(m, self.bundle.inputs)], list(many(given)), sample_rate)
            if not raw:
                raise ConfigError(f"batch: {m} has no items")
            (out[m],) = self.embedder.batches(m, raw, len(raw))
        return out

    # --- comparing -------------------------------------------------------------------------------------------------

    def similarity(self, a: Tensor, b: Tensor, *, scaled: bool = False, pair: str | None = None) -> Tensor:
        """Cosines of features [n, D] and [m, D] → [n, m], fp32.

        Args:
            scaled: as the model was trained to compare them: ``logit_scale · cosine + logit_bias``.
            pair: whose scale, such as ``image-text``; needed where the model has several pairs.

        Raises:
            ConfigError: features of different widths, or no such pair.
        """
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
            raise ConfigError(
                f"similarity compares features [n, D] and [m, D], got {list(a.shape)} and {list(b.shape)}"
            )
        cosine = unit(a.float(), dim=1) @ unit(b.to(a.device).float(), dim=1).T
        return self._logits(cosine, self._pair(pair)) if scaled else cosine

    def classify(
        self,
        items: Any,
        names: Sequence[str] | Mapping[str, str | Sequence[str]],
        templates: str | Sequence[str] | None = None,
        *,
        modality: str | None = None,
        text: str = "text",
        batch_size: int = 64,
        progress: bool = False,
        sample_rate: int | None = None,
        skip: bool = False,
    ) -> Predictions:
        """Zero-shot classification: which of ``names`` fits each item best.

        Args:
            items: see the class; a folder stands for the files of the modality below it.
            names: the classes; or class → the word or words the model is given for it.
            templates: with ``{}`` for the name, such as ``"a photo of a {}."``; several are averaged (CLIP, arXiv
                2103.00020, 3.1.4). Default: the modality's own.
            modality: of the items; default: told by the files' endings, else the model's first beside ``text``.
            text: the modality of the names.
            skip: leave out items that cannot be read, and name them in ``skipped``; else they are an error.

        Raises:
            ConfigError: fewer than two names, a template without ``{}``, or a modality the model does not have.
            DataError: an item that cannot be used.
        """
        modality, given = found(many(items), self._beside(text), modality)
        weights = self.classifier(names, templates, modality=modality, text=text)
        x, called, skipped = self._named(modality, given, _Options(batch_size, True, progress, sample_rate), skip)
        pair = self._pair_of(modality, text)
        logits = self._logits(x @ weights.T, pair)
        biased = self.embedder.logit_bias(pair) is not None
        return Predictions(list(names), logits.sigmoid() if biased else logits.softmax(1), called, skipped)

    def classifier(
        self,
        names: Sequence[str] | Mapping[str, str | Sequence[str]],
        templates: str | Sequence[str] | None = None,
        *,
        modality: str | None = None,
        text: str = "text",
    ) -> Tensor:
        """The [C, D] unit weights of a zero-shot classifier; the arguments are those of :meth:`classify`."""
        from dualenc.model.zero_shot import classifier
        from dualenc_evals.kinds.classification import check_templates

        if isinstance(names, str) or len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(f'names: give two or more different classes, such as ["cat", "dog"], got {names!r}')
        if templates is None:
            source = self.bundle.inputs[modality or next(iter(self._beside(text)))]
            templates = source.prompt if isinstance(source, FromMemory) else "{}"
        wordings = [templates] if isinstance(templates, str) else list(templates)
        try:
            check_templates(wordings)
        except ValueError as e:
            raise ConfigError(str(e)) from e
        words = [names[n] if isinstance(names, Mapping) else n for n in names]
        owners, prompts = [], []
        for c, own in enumerate(words):
            for word in [own] if isinstance(own, str) else own:
                prompts += [t.replace("{}", word) for t in wordings]
                owners += [c] * len(wordings)
        return classifier(self._encoded(text, prompts, _Options()), torch.tensor(owners), len(words))

    # --- searching -------------------------------------------------------------------------------------------------

    def index(
        self,
        items: Any,
        *,
        modality: str | None = None,
        text: str = "text",
        batch_size: int = 64,
        progress: bool = False,
        sample_rate: int | None = None,
        skip: bool = True,
    ) -> SearchIndex:
        """Encode items to search among them; the arguments are those of :meth:`classify`.

        An iterator of objects in memory is read whole; give paths where there are many.
        """
        possible = self._beside(text) if modality is None else self.bundle.inputs
        modality, given = found(many(items), possible, modality)
        x, called, skipped = self._named(modality, given, _Options(batch_size, True, progress, sample_rate), skip)
        return SearchIndex(modality, called, x, skipped)

    def search(self, index: SearchIndex, query: Any, k: int = 5, *, modality: str = "text") -> list[Hit]:
        """The ``k`` items of an index nearest to one query, best first.

        Args:
            query: a text; with ``modality="image"`` an image, and so on. For many queries at once:
                ``index.nearest(model.encode(text=queries), k)``.

        Raises:
            ConfigError: no modality of that name, or a list of queries.
            DataError: a query that cannot be used.
        """
        features = self._encoded(modality, query, _Options())
        if len(features) != 1:
            raise ConfigError(f"search takes one query, got {len(features)}; use index.nearest(model.encode(…), k)")
        return index.nearest(features, k)[0]

    def search_index(self, folder: Path, query: Any, k: int = 5, *, modality: str = "text") -> FoundInIndex:
        """The ``k`` items nearest to one query in an index that ``dualenc index`` wrote.

        Raises:
            ConfigError: the index was made with another model, or with usearch, which is not installed.
            DataError: the index is damaged, or the query cannot be used.
        """
        index = load_disk_index(folder)
        made, here = index.about["model"].get("weights"), self.describe()["weights"]
        if made != here:
            raise ConfigError(
                f"{folder} was built with the weights {str(made)[:12]}…, but this model's are {str(here)[:12]}…; embed "
                "and index the items again"
            )
        features = self._encoded(modality, query, _Options())
        if len(features) != 1:
            raise ConfigError(f"search_index takes one query, got {len(features)}")
        scores, rows = index.search(features, k)
        hits = [Hit(index.items[r], s, r) for s, r in zip(scores[0].tolist(), rows[0].tolist(), strict=True)]
        return FoundInIndex(hits, len(index), index.modality)

    # --- parts -----------------------------------------------------------------------------------------------------

    def _encoded(self, modality: str, items: Any, options: _Options, skipped: dict[int, str] | None = None) -> Tensor:
        """As :meth:`encode`: fp32 [n, D] on the CPU."""
        source = self.bundle.inputs[known(modality, self.bundle.inputs)]
        embedder, batch_size = self.embedder if options.normalize else self._plain, options.batch_size
        if batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size} must be at least 1")
        listed, out, done = many(items), [torch.zeros(0, self.embed_dim)], 0
        total = len(listed) if isinstance(listed, Sequence) else None
        with _progress(options.progress, f"encoding {modality}", total) as advance, self._autocast():
            for chunk in chunks(listed, batch_size * (2 if options.progress else _TOGETHER)):
                bad: dict[int, str] = {}
                x = embedder.embed(modality, RawItems(source, chunk, options.sample_rate), batch_size, bad)
                if bad and skipped is None:
                    i, why = min(bad.items())
                    name = name_of(chunk[i], done + i)
                    raise DataError(f"{modality} item {done + i} ({name}) cannot be encoded: {why}")
                if skipped is not None:
                    skipped.update({done + i: why for i, why in bad.items()})
                out.append(x)
                done += len(chunk)
                advance(done)
        return torch.cat(out)

    def _named(
        self, modality: str, items: list[Any], options: _Options, skip: bool
    ) -> tuple[Tensor, list[str | int], dict[str | int, str]]:
        """Features, the names of their items, and the items that were skipped."""
        bad: dict[int, str] = {}
        x = self._encoded(modality, items, options, bad if skip else None)
        called = [name_of(item, i) for i, item in enumerate(items)]
        return x, [c for i, c in enumerate(called) if i not in bad], {called[i]: why for i, why in sorted(bad.items())}

    def _beside(self, text: str) -> dict[str, Any]:
        return {m: x for m, x in self.bundle.inputs.items() if m != known(text, self.bundle.inputs)}

    def _pair_of(self, a: str, b: str) -> str:
        """The key of a pair in either order; only trained pairs have a logit scale."""
        for pair in (pair_name((a, b)), pair_name((b, a))):
            if pair in self._pairs():
                return pair
        raise ConfigError(f"this model was not trained on pairs of {a} and {b}, only on {', '.join(self._pairs())}")

    def _pair(self, pair: str | None) -> str:
        names = self._pairs()
        if pair is None and len(names) == 1:
            return names[0]
        if pair is None:
            raise ConfigError(f"pair: the model has several logit scales; choose one of {', '.join(names)}")
        if pair not in names:
            raise ConfigError(f"pair: the model has no pair {pair!r}. {did_you_mean(pair, names)}")
        return pair

    def _pairs(self) -> list[str]:
        return [pair_name(p) for p in self.bundle.model.pairs]

    def _logits(self, cosine: Tensor, pair: str) -> Tensor:
        return self.embedder.logit_scale(pair) * cosine + (self.embedder.logit_bias(pair) or 0.0)

    def _unnormalised(self, inputs: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        return {"features": {m: self.bundle.model.outputs_of(m, x)["features"] for m, x in inputs.items()}}

    def _autocast(self) -> torch.autocast:
        reduced = self._dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self._dtype if reduced else None, enabled=reduced)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    known_dtypes = {**_DTYPES, **{str(v): v for v in _DTYPES.values()}}
    if str(dtype) not in known_dtypes:
        raise ConfigError(f"unknown dtype {str(dtype)!r}; use fp32, bf16 or fp16")
    return known_dtypes[str(dtype)]


@contextmanager
def _progress(shown: bool, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of items done."""
    if not shown:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


__all__ = ["Model", "Predictions", "load_model"]
