"""README.md of an export: what the model is, how to use it, what it was trained on and how it scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualenc.config import Recipe, Source
from dualenc.data.shards.index import load_index
from dualenc.errors import ConfigError, DualencError
from dualenc.model.bundle import Bundle

_USE = {
    "hf": """from transformers import AutoModel, AutoProcessor
model, processor = AutoModel.from_pretrained("FOLDER"), AutoProcessor.from_pretrained("FOLDER")""",
    "open_clip": """import open_clip
model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")""",
    "sentence-transformers": """from dualenc.sentence_transformers import load
model = load("FOLDER")  # or SentenceTransformer("FOLDER", trust_remote_code=True): towers of dualenc are its classes
features = model.encode(["a cat"])""",
    "safetensors": """from dualenc.model import load_model
embedder = load_model("FOLDER").embedder()""",
    "onnx": """import json, onnxruntime
sheet = json.load(open("FOLDER/preprocess.json"))  # how pixels and ids are made
image = onnxruntime.InferenceSession("FOLDER/image.onnx")
features = image.run(None, {"pixels": pixels})[0]  # float32 [n, 3, S, S], RGB in 0…1; mean and std are in the graph""",
}


def write_card(bundle: Bundle, layout: str, folder: Path, source: Path | None, results: Path | None) -> Path:
    """Write ``folder/README.md``.

    Args:
        layout: as of :func:`dualenc.model.export.export.export`.
        source: the run or checkpoint folder with recipe.yaml, metrics.jsonl and results.json; None if unknown.
        results: a results.json of ``dualenc eval``; default: the run's.

    Raises:
        ConfigError: if ``results`` cannot be read, or is not a results.json.
    """
    recipe = _find(source, "recipe.yaml")
    measured = results or _find(source, "results.json")
    parts = [
        _front(bundle, layout, measured),
        f"# {bundle.name}\n\n{_what(bundle)}",
        f"## Use\n\n```python\n{_USE[layout]}\n```",
        f"## Inputs\n\n{_inputs(bundle)}",
        f"## Training\n\n{_training(bundle, recipe)}",
        f"## Evaluation\n\n{_evaluation(measured, _find(source, 'metrics.jsonl'))}",
    ]
    path = folder / "README.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _find(source: Path | None, name: str) -> Path | None:
    """A file of a run, given the run folder, a checkpoint (RUN/checkpoints/STEP) or the bundle in it."""
    if source is None:
        return None
    around = [source, *list(source.resolve().parents)[:3]]
    return next((p / name for p in around if (p / name).is_file()), None)


def _front(bundle: Bundle, layout: str, results: Path | None) -> str:
    """The YAML that the Hub reads: library, task, examples to try, and the evaluation as its ``model-index``."""
    import yaml

    kinds = {p.kind or m for m, p in bundle.parts.items()}
    said: dict[str, Any] = {
        "library_name": {"hf": "transformers", "safetensors": "dualenc"}.get(layout, layout),
        "pipeline_tag": _pipeline(kinds, layout),
        "tags": ["dualenc", "contrastive", "feature-extraction", *sorted(kinds)],
    }
    origin = str(bundle.provenance.get("source", ""))
    if origin.startswith("hf:") and not Path(origin.removeprefix("hf:")).exists():
        said["base_model"] = origin.removeprefix("hf:")
    if said["pipeline_tag"].startswith("zero-shot-image"):
        said["widget"] = [{"src": _EXAMPLE_IMAGE, "candidate_labels": "two cats, a dog, a car"}]
    elif "text" in kinds:
        said["widget"] = [{"source_sentence": "a red bike", "sentences": ["a bicycle", "a boat", "two cats"]}]
    if results is not None:
        said["model-index"] = [{"name": bundle.name, "results": _index(_read(results))}]
    return f"---\n{yaml.safe_dump(said, sort_keys=False, allow_unicode=True)}---"


_EXAMPLE_IMAGE = "https://huggingface.co/datasets/mishig/sample_images/resolve/main/cat-dog-music.png"


def _pipeline(kinds: set[str], layout: str) -> str:
    if layout == "sentence-transformers":
        return "sentence-similarity"
    if kinds == {"image", "text"}:
        return "zero-shot-image-classification"
    return "zero-shot-audio-classification" if kinds == {"audio", "text"} else "feature-extraction"


def _index(tasks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Results as the Hub's ``model-index`` lists them."""
    out = []
    for name, result in tasks.items():
        metrics = [
            {"type": k, "name": k.replace("_", " "), "value": float(v)}
            for k, v in result.get("metrics", {}).items()
            if isinstance(v, int | float)
        ]
        if metrics:
            about = {"type": str(result.get("kind", "evaluation")), "name": str(result.get("kind", "evaluation"))}
            dataset = {"type": name, "name": str(result.get("description") or name)}
            out.append({"task": about, "dataset": dataset, "metrics": metrics})
    return out


def _what(bundle: Bundle) -> str:
    rows = []
    for m, part in bundle.parts.items():
        count = sum(p.numel() for p in bundle.model.tower(m).parameters())
        rows.append(f"| {m} | `{part.encoder.name}` | {count:,} |{' locked |' if part.lock else ' trained |'}")
    table = "| modality | tower | parameters | in training |\n|---|---|---|---|\n" + "\n".join(rows)
    log = {p: float(v.detach().exp()) for p, v in bundle.model.logit_scale.items()}
    scale = ", ".join(f"{p}: {v:.4g}" for p, v in log.items())
    head = f"A dual encoder with {bundle.embed_dim}-dimensional features, compared by cosine similarity."
    return f"{head}\n\n{table}\n\nLogit scale: {scale}."


def _inputs(bundle: Bundle) -> str:
    described = {m: x.describe() for m, x in bundle.inputs.items()}
    shown = {}
    for m, d in described.items():
        shown[m] = {k: v for k, v in d["config"].items() if k not in ("augment", "max_pixels", "tokenizer")}
        if "tokenizer" in d:
            shown[m]["vocabulary"] = d["tokenizer"]["vocab_size"]
    return f"```json\n{json.dumps(shown, indent=1, ensure_ascii=False)}\n```"


def _training(bundle: Bundle, recipe: Path | None) -> str:
    known = {k: v for k, v in bundle.provenance.items() if k not in ("clap_logit_scales",)}
    lines = [f"- {k}: {v}" for k, v in known.items() if k != "source"] or ["- its origin is not recorded"]
    if recipe is None:
        return "\n".join(
            [*lines, "", "No recipe is stored with the model: it was trained elsewhere, or its folder was moved."]
        )
    import yaml

    text = recipe.read_text(encoding="utf-8")
    parsed = Recipe.model_validate(yaml.safe_load(text))
    rows = [f"| {s.name} | {_count(s)} | {s.weight:g} |" for s in parsed.data.sources]
    table = "| source | samples in its index | weight |\n|---|---|---|\n" + "\n".join(rows)
    return "\n".join([*lines, "", table, "", "The recipe:", "", f"```yaml\n{text.strip()}\n```"])


def _count(source: Source) -> str:
    """Samples of a source by its index; "unknown" if the index can no longer be read."""
    first = source.shards if isinstance(source.shards, str) else source.shards[0]
    try:
        return f"{load_index(source.index or str(Path(first).parent / 'index.json')).total:,}"
    except (DualencError, OSError) as e:
        return f"unknown ({type(e).__name__}: its index cannot be read)"


def _evaluation(results: Path | None, metrics: Path | None) -> str:
    rows: list[tuple[str, str, Any]] = []
    if results is not None:
        said = _read(results)
        rows = [(t, k, v) for t, r in said.items() for k, v in r.get("metrics", {}).items()]
        head = f"From {results.name}, written by `dualenc eval`."
    elif metrics is not None:
        last: dict[str, Any] = {}
        for line in metrics.read_text(encoding="utf-8").splitlines():
            found = {k: v for k, v in json.loads(line).items() if "/" in k and not k.startswith(("lost/", "time/"))}
            last |= found
        rows = [(*k.rsplit("/", 1), v) for k, v in last.items()]  # type: ignore[misc]
        head = "The last values of the run's own evaluation (metrics.jsonl)."
    if not rows:
        return "No evaluation is stored with the model. `dualenc eval FOLDER --tasks …` runs one."
    body = "\n".join(f"| {t} | {k} | {v:.4g} |" for t, k, v in rows if isinstance(v, int | float))
    return f"{head}\n\n| task | metric | value |\n|---|---|---|\n{body}"


def _read(path: Path) -> Mapping[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"--results: {path} cannot be read ({e})") from e
    if not isinstance(said, dict) or not isinstance(said.get("tasks"), dict):
        raise ConfigError(f"--results: {path} has no tasks; give a results.json written by dualenc eval --out.")
    return dict(said["tasks"])
