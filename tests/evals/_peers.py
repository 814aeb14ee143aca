"""The same random ViT-B/32 and the same real photos for us and for others: open_clip itself, clip-benchmark.

``python tests/evals/_peers.py FOLDER [CLASSIFIED CAPTIONED]`` writes them, and ``python tests/evals/_peers.py
time ours|peer FOLDER cifar|coco`` times features + metrics of one whole process (docs/evaluation.md).
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import torch
from _shared import DATA as SHARED_DATA

ROOT = Path(__file__).parents[2]
SHARED = SHARED_DATA / "image_text"
MODEL = "ViT-B-32"
TEMPLATES = ["a photo of a {}.", "a blurry photo of a {}.", "a drawing of a {}."]


def write_weights(path: Path) -> Path:
    """Random weights with a fixed seed, in the file format that open_clip reads."""
    import open_clip

    torch.manual_seed(0)
    torch.save(open_clip.create_model(MODEL).state_dict(), path)
    return path


def photos_with_classes(n: int) -> tuple[list[tuple[Path, int]], list[str]]:
    """``n`` CIFAR-10 photos, the classes in turn; (file, class number), and the classes' names."""
    rows = [json.loads(line) for line in (SHARED / "cifar10/labels.jsonl").open(encoding="utf-8")]
    names = sorted({r["label"] for r in rows})
    by_class = {c: [r for r in rows if r["label"] == c] for c in names}
    turns = [by_class[c][i] for i in range(max(map(len, by_class.values()))) for c in names if i < len(by_class[c])]
    return [(SHARED / "cifar10" / r["image"], names.index(r["label"])) for r in turns[:n]], names


def photos_with_captions(n: int) -> list[tuple[Path, list[str]]]:
    """``n`` COCO photos with five sentences each."""
    rows = [json.loads(line) for line in (SHARED / "coco_cc/captions.jsonl").open(encoding="utf-8")]
    return [(SHARED / "coco_cc" / r["image"], [c.strip() for c in r["captions"]]) for r in rows[:n]]


def write_classification(folder: Path, n: int) -> Path:
    """clip-benchmark's exported layout, which both sides read, and a task file of ours that names it."""
    photos, names = photos_with_classes(n)
    members = [
        (f"s{i:06d}.{ending}", raw)
        for i, (path, label) in enumerate(photos)
        for ending, raw in (("jpg", path.read_bytes()), ("cls", str(label).encode()))
    ]
    _write(folder, members)
    (folder / "classnames.txt").write_text("\n".join(names))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(t.format("{c}") for t in TEMPLATES))
    return _task(folder, "classification")


def write_retrieval(folder: Path, n: int) -> Path:
    """The same for photos with captions."""
    members = [
        (f"s{i:06d}.{ending}", raw)
        for i, (path, captions) in enumerate(photos_with_captions(n))
        for ending, raw in (("jpg", path.read_bytes()), ("txt", "\n".join(captions).encode()))
    ]
    _write(folder, members)
    (folder / "dataset_type.txt").write_text("retrieval")
    return _task(folder, "retrieval")


def accuracy(logits: torch.Tensor, labels: torch.Tensor, topk: tuple[int, ...] = (1, 5)) -> list[float]:
    """Both peers' own ``accuracy``, whose last line (``float`` of an array with one element) numpy 2.4 refuses."""
    found = logits.topk(max(topk), 1, True, True)[1] == labels[:, None]
    return [int(found[:, :k].sum()) / len(labels) for k in topk]


def _write(folder: Path, members: list[tuple[str, bytes]]) -> None:
    (folder / "test").mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    (folder / "test" / "nshards.txt").write_text("1")


def _task(folder: Path, kind: str) -> Path:
    import yaml

    path = folder.with_suffix(".yaml")
    source: dict[str, Any] = {"kind": "clip_benchmark", "path": f"./{folder.name}"}
    path.write_text(yaml.safe_dump({"kind": kind, "source": source}))
    return path


def _time(who: str, folder: Path, name: str) -> None:
    """One evaluation in this process, loading apart: wall and CPU seconds (workers too) and samples a second."""
    import resource
    import time

    def used() -> float:
        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return sum(resource.getrusage(k).ru_utime + resource.getrusage(k).ru_stime for k in kinds)

    run, n = (_ours if who == "ours" else _theirs)(folder, name)
    wall, cpu = time.perf_counter(), used()
    metrics = run()
    wall, cpu = time.perf_counter() - wall, used() - cpu
    print(json.dumps({"who": who, "task": name, "wall_s": wall, "cpu_s": cpu, "samples_per_s": n / wall, **metrics}))


def _count(folder: Path, name: str) -> int:
    with tarfile.open(folder / name / "test" / "0.tar") as tar:
        return sum(m.name.endswith(".jpg") for m in tar)


def _ours(folder: Path, name: str) -> tuple[Any, int]:
    from dualenc.model import load_model
    from dualenc_evals.catalog import load_task
    from dualenc_evals.harness import evaluate

    model = load_model(f"open_clip:{MODEL}/{folder / 'vit.pt'}").embedder()
    task = load_task(folder / f"{name}.yaml")
    return lambda: evaluate(model, [task], progress=False)["tasks"][name]["metrics"], _count(folder, name)


def _theirs(folder: Path, name: str) -> tuple[Any, int]:
    """As clip-benchmark's command builds it, in batches of 64; one worker a shard (more is an error), and no autocast,
    which changes the numbers."""
    from clip_benchmark.datasets.builder import build_dataset
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
    from clip_benchmark.models import load_clip

    zeroshot_classification.accuracy = accuracy
    model, transform, tokenizer = load_clip("open_clip", MODEL, str(folder / "vit.pt"), None, "cpu")
    model.eval()
    data = build_dataset(f"wds/{name}", root=str(folder / name), transform=transform, split="test", task="")
    batches: Any = torch.utils.data.DataLoader(data.batched(64), batch_size=None, shuffle=False, num_workers=1)
    if data.classes is None:
        return lambda: zeroshot_retrieval.evaluate(model, batches, tokenizer, "cpu", False, [1, 5, 10]), _count(
            folder, name
        )
    batches.dataset.classes = data.classes
    given = (model, batches, tokenizer, data.classes, data.templates, "cpu")
    return lambda: zeroshot_classification.evaluate(*given, amp=False), _count(folder, name)


if __name__ == "__main__":
    if sys.argv[1] == "time":
        _time(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    else:
        where = Path(sys.argv[1])
        where.mkdir(parents=True, exist_ok=True)
        classified, captioned = (int(a) for a in (sys.argv[2:4] if len(sys.argv) > 3 else ("1000", "81")))
        write_weights(where / "vit.pt")
        print(write_classification(where / "cifar", classified), write_retrieval(where / "coco", captioned))
