"""mteb, both ways: a model for ``mteb.evaluate``, and mteb's tasks on all ranks (``dualenc eval --tasks mteb:NAME``).

mteb (Muennighoff et al. 2023, arXiv 2210.07316; images: MIEB, audio: MAEB) loads data and computes scores; features are
made here, each content once, shared by the ranks and kept by content, so a run that is killed resumes. Audio is handed
over as the bytes of its files and decoded as everywhere here, so torchcodec is not needed.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dualenc.data.modalities import FromMemory
from dualenc.data.sources.item import Content
from dualenc.distributed.world import World
from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc.files import write_atomically
from dualenc.model import Bundle, load_model
from dualenc.model.bundle import kind_of
from dualenc_evals.features import Store
from dualenc_evals.harness import Checker
from dualenc_evals.ranks import Ranks, ranks_of

PREFIX = "mteb:"
_MODALITIES = ("text", "image", "audio")


class MtebEncoder:
    """A model as mteb's ``EncoderProtocol``: text, images and audio, compared by cosine.

    Inputs of several modalities at once are the normalised sum of their features, as in MIEB's CLIP models.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        bundle: Bundle | None = None,
        store: Store | None = None,
        **_: Any,
    ) -> None:
        """``model_name``: a MODEL; ``bundle``, ``store``: the model, and where its features are kept, if they exist."""
        self.bundle = load_model(model_name, device or "cpu") if bundle is None else bundle
        self.store = store or Store(self.bundle.embedder(), Ranks(), lambda modality, raw: None)
        kinds = {kind_of(m, part): m for m, part in reversed(self.bundle.parts.items())}
        self.names = {kind: m for kind, m in kinds.items() if kind in _MODALITIES}
        self.about = self.store.embedder.describe()

    @property
    def mteb_model_meta(self) -> Any:
        """mteb's description of the model; the revision is the beginning of the weights' hash."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        said = {
            "name": f"dualenc/{self.bundle.name.replace('/', '_')}",
            "revision": str(self.about["weights"])[:12],
            "modalities": [k for k in _MODALITIES if k in self.names],
            "embed_dim": self.bundle.embed_dim,
            "n_parameters": sum(p.numel() for p in self.bundle.model.parameters()),
            "framework": ["PyTorch"],
            "similarity_fn_name": ScoringFunction.COSINE,
        }
        return ModelMeta.create_empty(said)

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **_: Any,
    ) -> Any:
        """Batches of ``{"text": […], "image": […], "audio": […]}`` → fp32 [n, D], unit rows.

        Raises:
            ConfigError: none of the modalities is the model's.
            DataError: naming an item that cannot be used.
        """
        items: dict[str, list[Any]] = {}
        for batch in inputs:
            for kind in [k for k in _MODALITIES if k in batch and k in self.names]:
                items.setdefault(kind, []).extend(batch[kind])
        if not items:
            raise ConfigError(f"task {task_metadata.name} has no {' or '.join(self.names)}, which this model encodes")
        whole = sum(self._features(kind, given) for kind, given in items.items())
        assert isinstance(whole, Tensor)
        return normalize(whole, dim=1).numpy() if len(items) > 1 else whole.numpy()

    def _features(self, kind: str, given: Sequence[Any]) -> Tensor:
        m = self.names[kind]
        source = self.bundle.inputs[m]
        contents = []
        for i, x in enumerate(given):
            if kind == "text":
                contents.append(Content(str(i), text=str(x)))
                continue
            raw = _file(x)
            if raw is None:
                raw = source.as_raw(_plain(x)) if isinstance(source, FromMemory) else x
            if raw is None:
                raise DataError(f"{kind} item {i} is a {type(x).__name__}, which cannot be read")
            contents.append(Content(str(i), load=lambda raw=raw: raw))  # type: ignore[misc]
        found = self.store.inspect(m, contents)
        for i, why in found.bad.items():
            raise DataError(f"{kind} item {i} of {len(contents)} cannot be embedded: {why}")
        return self.store.features(m, contents, found.digests)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines [n, m]."""
        a, b = (_unit(x) for x in (embeddings1, embeddings2))
        return a @ b.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines [n] of rows at the same place."""
        a, b = (_unit(x) for x in (embeddings1, embeddings2))
        return (a * b).sum(1)


def wrap(model: str | Bundle, device: str | None = None) -> MtebEncoder:
    """A MODEL for stock mteb: ``mteb.evaluate(dualenc.mteb.wrap("runs/mine"), mteb.get_tasks(["ESC50"]))``.

    Raises:
        ConfigError: there is no such model.
    """
    if isinstance(model, Bundle):
        return MtebEncoder(model.name, bundle=model, device=device)
    return MtebEncoder(model, device=device)


def evaluate_mteb(
    bundle: Bundle,
    names: Sequence[str],
    out: Path,
    world: World | None = None,
    cache_dir: Path | None = None,
    batch_size: int = 64,
    data: Path | None = None,
    precision: str = "fp32",
) -> dict[str, dict[str, float]]:
    """Run mteb's tasks; every rank of ``world`` must call this.

    Rank 0 writes mteb's own JSON, ``out``/MODEL/REVISION/TASK.json with model_meta.json beside; tasks that have theirs
    are not run again. Times and dates are left out of it, so that the same command writes the same bytes.

    Args:
        names: names of mteb's tasks or benchmarks (``MIEB(lite)``), or ``pkg.mod:Class`` of a task from elsewhere, with
            or without ``mteb:``.
        cache_dir: features are kept here by content, so a killed run resumes within a task.
        data: a folder with local copies of data sets: ``data``/ORG/NAME stands in for ORG/NAME of the Hub.

    Returns:
        Task → split → main score (the mean over subsets).

    Raises:
        ConfigError: mteb is not installed, or has no such task.
        DataError: the data of a task cannot be loaded.
    """
    ranks = ranks_of(world)
    embedder = bundle.embedder(precision=precision)
    store = Store(embedder, ranks, Checker(embedder), batch_size, cache_dir)
    model = MtebEncoder(bundle.name, bundle=bundle, store=store)
    meta = model.mteb_model_meta
    folder = out / meta.name.replace("/", "__") / meta.revision
    scores: dict[str, dict[str, float]] = {}
    for task in find_tasks([n.removeprefix(PREFIX) for n in names], data):
        file = folder / f"{task.metadata.name}.json"
        kept = ranks.share(lambda file=file: file.read_text(encoding="utf-8") if file.is_file() else None)  # type: ignore[misc]
        if kept is None:
            load_data(task)
            kept = _run(model, task, batch_size)
            if ranks.is_main:
                write_atomically(folder / "model_meta.json", meta.model_dump_json(indent=1) + "\n")
                write_atomically(file, kept)
        said = json.loads(kept)["scores"]
        scores[task.metadata.name] = {
            split: sum(float(r["main_score"]) for r in rows) / len(rows) for split, rows in said.items()
        }
    return scores


def _run(model: MtebEncoder, task: Any, batch_size: int) -> str:
    import mteb

    options: Any = {"batch_size": batch_size, "show_progress_bar": False}
    done = mteb.evaluate(
        model, task, cache=None, co2_tracker=False, show_progress_bar=False, encode_kwargs=options, public_only=False
    )
    (result,) = done.task_results
    timeless = result.model_copy(update={"date": None, "evaluation_time": None, "evaluation_phases": None})
    return str(timeless.model_dump_json(indent=1)) + "\n"


def find_tasks(names: Sequence[str], data: Path | None = None) -> list[Any]:
    """Tasks by their names and those of the benchmarks that are named, each once.

    Raises:
        ConfigError: mteb is not installed, or there is no such task or benchmark.
    """
    found: dict[str, Any] = {}
    known = [b.name for b in _mteb().get_benchmarks()]
    for name in names:
        tasks = _benchmark(name, known, data) if "(" in name or name in known else [find_task(name, data)]
        for task in tasks:
            found.setdefault(task.metadata.name, task)
    return list(found.values())


def _mteb() -> Any:
    try:
        return importlib.import_module("mteb")
    except ImportError as e:
        raise ConfigError(f"tasks of mteb need mteb: pip install 'dualenc[mteb]' ({e})") from e


def _benchmark(name: str, known: Sequence[str], data: Path | None) -> list[Any]:
    if name not in known:
        raise ConfigError(f"mteb has no benchmark {name!r}. {did_you_mean(name, known)}")
    return [_localised(task, data) for task in _mteb().get_benchmark(name).tasks]


def load_data(task: Any) -> None:
    """Load a task's data, audio as the bytes of its files.

    Raises:
        DataError: it cannot be loaded.
    """
    try:
        with _clips_as_files():
            task.load_data()
    except (OSError, ValueError, ImportError, KeyError) as e:
        path = str(task.metadata.dataset["path"])
        advice = "" if Path(path).is_absolute() else f"; a copy may be put at $DUALENC_DATA/mteb/{path}"
        raise DataError(f"the data of task {task.metadata.name} ({path}) cannot be loaded: {e}{advice}") from e
    for name in _PARTS:
        _as_files(vars(task).get(name))


@contextmanager
def _clips_as_files() -> Iterator[None]:
    """Tasks that look at rows while they load get clips as files where datasets lacks torchcodec to decode them."""
    from datasets import Audio, config

    if config.TORCHCODEC_AVAILABLE:
        yield
        return
    decode = Audio.decode_example
    Audio.decode_example = lambda self, value, token_per_repo_id=None: value  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Audio.decode_example = decode  # type: ignore[method-assign]


_PARTS = ("dataset", "corpus", "queries")
"""Where a task keeps data: ``dataset`` by split (and subset), retrieval tasks of the old form the other two."""


def _as_files(x: Any) -> None:
    """Audio in a mapping of datasets, or of such mappings, is no longer decoded."""
    from datasets import Audio, Dataset

    if not isinstance(x, dict):
        return
    for key, value in x.items():
        if isinstance(value, Dataset):
            audio = [c for c, kind in value.features.items() if isinstance(kind, Audio) and kind.decode]
            for column in audio:
                value = value.cast_column(column, Audio(decode=False))
            x[key] = value
        else:
            _as_files(value)


def find_task(name: str, data: Path | None = None) -> Any:
    """One of mteb's tasks, its data taken from ``data`` where it lies there.

    Raises:
        ConfigError: mteb is not installed, or there is no such task.
    """
    mteb = _mteb()
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            task = vars(importlib.import_module(module))[attribute]()
        except (ImportError, KeyError) as e:
            raise ConfigError(f"mteb:{name}: there is no {attribute} in {module} ({e})") from e
    elif name not in (known := importlib.import_module(mteb.get_tasks.__module__)._TASKS_REGISTRY):
        raise ConfigError(f"mteb has no task {name!r}. {did_you_mean(name, list(known))}")
    else:
        task = mteb.get_task(name)
    return _localised(task, data)


def _localised(task: Any, data: Path | None) -> Any:
    place = None if data is None else data / str(task.metadata.dataset["path"])
    if place is not None and place.is_dir():
        local = {**task.metadata.dataset, "path": str(place)}
        task.metadata = task.metadata.model_copy(update={"dataset": local})
    return task


def _file(x: Any) -> bytes | None:
    """The bytes of a file that datasets did not decode; None for anything else."""
    if not isinstance(x, Mapping) or not {"bytes", "path"} <= x.keys():
        return None
    return bytes(x["bytes"]) if x["bytes"] is not None else Path(x["path"]).read_bytes()


def _plain(x: Any) -> Any:
    """Audio that is decoded when it is asked for (torchcodec, datasets) as an array with its rate."""
    decode = dict(vars(type(x))).get("get_all_samples")
    if decode is None:
        return x
    samples = decode(x)
    return {"array": samples.data.numpy(), "sampling_rate": int(samples.sample_rate)}


def _unit(x: Any) -> Tensor:
    y = torch.as_tensor(x).float()
    return normalize(y if y.ndim == 2 else y[None], dim=1)


__all__ = ["MtebEncoder", "evaluate_mteb", "find_task", "find_tasks", "load_data", "wrap"]
