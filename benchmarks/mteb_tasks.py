"""``python -m benchmarks.mteb_tasks``: mteb's own tasks on local copies, our scores beside those of stock mteb.

The data are local copies (:mod:`benchmarks.mteb_copies`). Ours: ``dualenc eval --tasks mteb:…``
(:func:`dualenc.mteb.evaluate_mteb`). Stock: ``mteb.evaluate`` of the same model exported as a SentenceTransformer,
through mteb's own wrapper; where that needs torchcodec (audio) or takes one modality at a time (image and text
together), through a plain encoder of a few lines. Markdown on stdout.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.matrix import OWN, SOUND, WORDS, built
from benchmarks.mteb_copies import TASKS, copies
from dualenc.model import Bundle


def model() -> Bundle:
    """A small model of images, audio and texts, random weights."""
    import torch

    torch.manual_seed(0)
    return built(24, image=OWN, text=WORDS, audio=SOUND)


class Plain:
    """An encoder for mteb by a SentenceTransformer: clips decoded by soundfile, modalities added up."""

    def __init__(self, transformer: Any) -> None:
        from mteb.models.model_meta import ModelMeta

        self.transformer = transformer
        self.mteb_model_meta = ModelMeta.create_empty({"name": "plain/plain", "revision": "1"})

    def encode(self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, **_: Any) -> Any:
        """mteb's EncoderProtocol."""
        import soundfile

        items: dict[str, list[Any]] = {}
        for batch in inputs:
            for kind in ("text", "image", "audio"):
                items.setdefault(kind, []).extend(batch.get(kind, []))
        total: Any = 0
        for kind, given in items.items():
            if kind == "audio" and given:
                decoded = [soundfile.read(io.BytesIO(x["bytes"]), dtype="float32") for x in given]
                given = [{"array": wave.T, "sampling_rate": rate} for wave, rate in decoded]
            total = total + (self.transformer.encode(given, batch_size=8) if given else 0)
        return total / np.linalg.norm(total, axis=1, keepdims=True)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines."""
        return self.transformer.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines of pairs."""
        return self.transformer.similarity_pairwise(embeddings1, embeddings2)


def stock(transformer: Any, name: str, data: Path) -> dict[str, list[dict[str, Any]]]:
    """Scores of ``mteb.evaluate``."""
    import mteb
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

    from dualenc.mteb import find_task, load_data

    task = find_task(name, data)
    plain = "audio" in task.metadata.modalities or task.metadata.category.startswith("it")
    if "audio" in task.metadata.modalities:
        load_data(task)
    given: Any = Plain(transformer) if plain else SentenceTransformerEncoderWrapper(transformer)
    given.mteb_model_meta = given.mteb_model_meta.model_copy(update={"modalities": list(transformer.modalities)})
    options: Any = {"batch_size": 8, "show_progress_bar": False}
    done = mteb.evaluate(
        given, task, cache=None, co2_tracker=False, show_progress_bar=False, encode_kwargs=options, public_only=False
    )
    scores: dict[str, list[dict[str, Any]]] = done.task_results[0].scores  # type: ignore[assignment]
    return scores


def difference(a: dict[str, list[dict[str, Any]]], b: dict[str, list[dict[str, Any]]]) -> float:
    """The largest difference of a main score over splits and subsets."""
    rows = [(x, y) for split in a for x, y in zip(a[split], b[split], strict=True)]
    return max(abs(float(x["main_score"]) - float(y["main_score"])) for x, y in rows)


def quiet() -> None:
    """mteb, datasets and scikit-learn talk a lot."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import datasets

    datasets.disable_progress_bars()


def compare(names: Sequence[str], folder: Path) -> dict[str, tuple[float, float, float]]:
    """Task → (our main score, stock's, the largest difference over splits and subsets)."""
    from dualenc.model.export.export import export
    from dualenc.mteb import evaluate_mteb
    from dualenc.sentence_transformers import load

    bundle = model()
    copies(folder / "data", names)
    transformer = load(export(bundle, "sentence-transformers", folder / "st"), "cpu")
    found = {}
    for name in names:
        out = folder / "ours" / name.replace("/", "_")
        evaluate_mteb(bundle, [name], out, data=folder / "data", batch_size=8, cache_dir=folder / "cache")
        (file,) = out.rglob(f"{name}.json")
        ours, theirs = json.loads(file.read_text())["scores"], stock(transformer, name, folder / "data")
        mean = [
            float(np.mean([r["main_score"] for r in itertools.chain(*scores.values())])) for scores in (ours, theirs)
        ]
        found[name] = (mean[0], mean[1], difference(ours, theirs))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="task names, comma-separated")
    args = parser.parse_args()
    quiet()
    names = [n for n in args.only.split(",") if n] or list(TASKS)
    print("| task | ours | stock mteb | difference |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            ((ours, theirs, apart),) = compare([name], Path(folder) / name).values()
            print(f"| {name} | {ours:.4f} | {theirs:.4f} | {apart:.1e} |", flush=True)


if __name__ == "__main__":
    main()
