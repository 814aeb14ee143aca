"""Local copies of the data sets of mteb's tasks, in the schema of their repositories on the Hub.

Columns, splits, configurations and kinds of features are those of the repositories; the content is real images, clips
and captions below $DUALENC_DATA.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.loader import DATA

Rows = dict[str, list[Any]]


# --- what lies below $DUALENC_DATA -------------------------------------------------------------------------------


def listed(kind: str, name: str, count: int, file: str = "captions.jsonl") -> list[dict[str, Any]]:
    """``count`` rows of a data set, evenly spaced; ``raw``: the bytes of the image or clip."""
    folder = DATA / kind / name
    rows = [json.loads(line) for line in (folder / file).read_text(encoding="utf-8").splitlines()]
    rows = rows[:: max(1, len(rows) // count)][:count]
    key = "audio" if kind == "audio_text" else "image"
    return [{**r, "raw": (folder / r[key]).read_bytes()} for r in rows]


def files(rows: Sequence[dict[str, Any]]) -> list[Any]:
    """A column of images or clips."""
    return [{"bytes": r["raw"], "path": None} for r in rows]


def captions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A caption of each row."""
    return [r["captions"][0] if "captions" in r else r["caption"] for r in rows]


def numbered(labels: Sequence[str]) -> tuple[list[int], list[str]]:
    """Labels as numbers, and their names."""
    names = sorted(set(labels))
    return [names.index(x) for x in labels], names


# --- the layouts of the Hub --------------------------------------------------------------------------------------


def write(path: Path, split: str, rows: Rows, config: str = "", **kinds: Any) -> None:
    """A parquet file; ``kinds``: datasets' features of the columns that need one."""
    from datasets import ClassLabel, Dataset, Features, Value

    folder = path / config if config else path
    folder.mkdir(parents=True, exist_ok=True)
    file = {"bytes": Value("binary"), "path": Value("string")}
    plain = Dataset.from_dict({k: v for k, v in rows.items() if k not in kinds}).features
    stored = {k: v if isinstance(v, ClassLabel | Value) else file for k, v in kinds.items()}
    features = {**plain, **stored}
    table = Dataset.from_dict(rows, features=Features({k: features[k] for k in rows}))
    for column, kind in kinds.items():  # cast, as encoding audio would need torchcodec
        table = table.cast_column(column, kind)
    table.to_parquet(str(folder / f"{split}.parquet"))


def describe(path: Path, splits: dict[str, Sequence[str]]) -> None:
    """README.md with the configurations of a repository."""
    configs = [
        {"config_name": c, "data_files": [{"split": s, "path": f"{c}/{s}.parquet"} for s in names]}
        for c, names in splits.items()
    ]
    (path / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n", encoding="utf-8")


def retrieval(path: Path, corpus: Rows, queries: Rows, pairs: Sequence[tuple[int, int]], **kinds: Any) -> None:
    """corpus, queries and qrels; ``pairs``: (query, document) that belong together, by position."""
    parts: dict[str, Rows] = {"corpus": corpus, "queries": queries}
    for config, rows in parts.items():
        n = len(next(iter(rows.values())))
        here = {k: v for k, v in kinds.items() if k in rows}
        write(path, "test", {"id": [f"{config[0]}{i}" for i in range(n)], **rows}, config, **here)
    qrels: Rows = {"query-id": [f"q{q}" for q, _ in pairs], "corpus-id": [f"c{d}" for _, d in pairs]}
    write(path, "test", {**qrels, "score": [1] * len(pairs)}, "qrels")
    describe(path, {"corpus": ["test"], "queries": ["test"], "qrels": ["test"]})


def ranked(path: Path, lists: dict[int, list[int]]) -> None:
    """Candidates of each query, for reranking."""
    rows: Rows = {"query-id": [f"q{q}" for q in lists], "corpus-ids": [[f"c{d}" for d in ds] for ds in lists.values()]}
    write(path, "test", rows, "top_ranked")
    describe(path, {c: ["test"] for c in ("corpus", "queries", "qrels", "top_ranked")})


# --- one function a repository -----------------------------------------------------------------------------------


def classes(path: Path, rows: list[dict[str, Any]], label: str, splits: Sequence[str], columns: str) -> None:
    """Items with a class; ``columns``: those of item and label. With several splits, rows are dealt out."""
    from datasets import Audio, ClassLabel, Image

    item, target = columns.split()
    _, names = numbered([r[label] for r in rows])
    kind = Image() if "image" in rows[0] else Audio()
    for k, split in enumerate(splits):
        part = rows[k :: len(splits)]
        given: Rows = {item: files(part), target: [names.index(r[label]) for r in part]}
        write(path, split, given, **{item: kind, target: ClassLabel(names=names)})


def cifar10(path: Path) -> None:
    """CIFAR-10, 60 images a class."""
    classes(path, listed("image_text", "cifar10", 600, "labels.jsonl"), "label", ("train", "test"), "img label")


def stl10(path: Path) -> None:
    """The same pictures in the schema of STL-10."""
    rows = [r for r in listed("image_text", "cifar10", 400, "labels.jsonl") if r["label"] != "frog"]
    classes(path, rows, "label", ("train", "test"), "image label")


def voc2007(path: Path) -> None:
    """Products with their category and sort: several labels."""
    from datasets import Image

    rows = listed("image_text", "fashion", 240)
    for k, split in enumerate(("train", "test")):
        part = rows[k::2]
        write(path, split, {"image": files(part), "classes": [[r["master"], r["sub"]] for r in part]}, image=Image())


def tiny_imagenet(path: Path) -> None:
    """Products by sort."""
    classes(path, listed("image_text", "fashion", 200), "sub", ("valid",), "image label")
    configs = [{"config_name": "default", "data_files": [{"split": "valid", "path": "valid.parquet"}]}]
    (path / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n", encoding="utf-8")


def image_and_text(path: Path, rows: list[dict[str, Any]], query: str, none: bool = False) -> None:
    """Images and captions; ``none``: queries have a column of images without any, as some repositories do."""
    from datasets import Image, Value

    texts, images = {"text": captions(rows)}, {"image": files(rows)}
    pairs = [(i, i) for i in range(len(rows))]
    extra: Rows = {"modality": [query] * len(rows)}
    if query == "image":
        retrieval(path, texts, {**images, **extra}, pairs, image=Image())
        return
    given = {**texts, **extra, **({"image": [None] * len(rows)} if none else {})}
    retrieval(path, images, given, pairs, image=Image(), text=Value("string"))


def cub200(path: Path) -> None:
    """Images → images of the same class."""
    from datasets import Image

    rows = listed("image_text", "cifar10", 150, "labels.jsonl")
    found, asked = rows[::2], rows[1::2]
    pairs = [(q, d) for q, a in enumerate(asked) for d, b in enumerate(found) if a["label"] == b["label"]]
    retrieval(path, {"image": files(found)}, {"image": files(asked)}, pairs, image=Image())


def cirr(path: Path) -> None:
    """An image and a text → an image."""
    from datasets import Image

    rows = listed("image_text", "fashion", 120)
    found, asked = rows[::2], rows[1::2]
    both: Rows = {"image": files(asked), "text": [f"in {r['colour']}" for r in asked]}
    retrieval(path, {"image": files(found)}, both, [(i, i) for i in range(len(asked))], image=Image())


def sugar_crepe(path: Path) -> None:
    """An image, its caption and another one."""
    from datasets import Image

    rows = listed("image_text", "coco_cc", 60)
    texts = captions(rows)
    given: Rows = {"images": files(rows), "caption": texts, "negative_caption": [*texts[1:], texts[0]]}
    write(path, "train", given, images=Image())


def aro_order(path: Path) -> None:
    """A caption and four orders of its words."""
    from datasets import Image

    rows = listed("image_text", "coco_cc", 60)
    rng = np.random.default_rng(0)
    given: Rows = {"images": files(rows), "correct_caption": captions(rows)}
    for k in range(1, 5):
        given[f"hard_text_{k}"] = [" ".join(rng.permutation(t.split())) for t in captions(rows)]
    write(path, "test", given, images=Image())


def rendered_sts(path: Path) -> None:
    """Pairs of sentences as pictures."""
    from datasets import Image
    from PIL import Image as Pictures
    from PIL import ImageDraw

    def drawn(text: str) -> dict[str, Any]:
        picture, file = Pictures.new("RGB", (240, 40), "white"), io.BytesIO()
        ImageDraw.Draw(picture).text((4, 12), text[:40], fill="black")
        picture.save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    rows = _pairs()
    given: Rows = {k: [drawn(t) for t in rows[k]] for k in ("sentence1", "sentence2")}
    write(path, "test", {**given, "score": rows["score"]}, sentence1=Image(), sentence2=Image())


def fsdd(path: Path) -> None:
    """Spoken digits."""
    classes(path, listed("audio_text", "fsdd", 240), "label", ("train", "test"), "audio label")


def esc50(path: Path) -> None:
    """ESC-10 in the schema of ESC-50; candidates of the zero-shot task are in the order of ``target``."""
    from datasets import Audio

    rows = listed("audio_text", "esc10_folds123", 240)
    given: Rows = {"audio": files(rows), "target": [_ESC[r["label"]] for r in rows]}
    write(path, "train", {**given, "category": [r["label"] for r in rows]}, audio=Audio())


_ESC = {"dog bark": 0, "rooster": 1, "rain": 10, "sea waves": 11, "fire crackling": 12, "baby cry": 20}
_ESC |= {"person sneeze": 21, "clock tick": 38, "helicopter": 40, "chainsaw": 41}
"""Labels of ESC-50's classes as the release of ESC-10 writes them."""


def esc50_pairs(path: Path) -> None:
    """Two clips, of one class or not."""
    from datasets import Audio

    rows = listed("audio_text", "esc10_folds123", 120)
    a, b = rows[::2], rows[1::2]
    b = b[: len(b) // 2] + b[: len(b) // 2 - 1 : -1]  # half of them are with a clip of another class
    same = [int(x["label"] == y["label"]) for x, y in zip(a, b, strict=True)]
    given: Rows = {"audio1": files(a), "audio2": files(b), "label": same}
    write(path, "test", given, audio1=Audio(), audio2=Audio())


def esc50_reranking(path: Path) -> None:
    """Clips → clips of the same class among candidates."""
    from datasets import Audio

    rows = listed("audio_text", "esc10_folds123", 120)
    found, asked = rows[::2], rows[1::2]
    pairs = [(q, d) for q, a in enumerate(asked) for d, b in enumerate(found) if a["label"] == b["label"]]
    retrieval(path, {"audio": files(found)}, {"audio": files(asked)}, pairs, audio=Audio())
    lists = {}
    for q in sorted({q for q, _ in pairs}):
        mine = [d for p, d in pairs if p == q][:3]
        lists[q] = mine + [d for d in range(len(found)) if (q, d) not in set(pairs)][:9]
    ranked(path, lists)


def clotho(path: Path) -> None:
    """Clips and captions; the task walks over the rows, so a copy says that clips are not decoded."""
    from datasets import Audio

    rows = listed("audio_text", "tuxpaint", 60)
    texts = [r["caption"].replace(".", "").strip() for r in rows]
    given: Rows = {"index": [str(i) for i in range(len(rows))], "audio": files(rows), "text": texts}
    write(path, "test", given, audio=Audio(decode=False))


def _pairs() -> Rows:
    """Captions of one image are near, of two images far, and a caption is nearest to itself."""
    rows = [r["captions"] for r in listed("image_text", "coco_cc", 60)]
    first, second, score = [], [], []
    for i, mine in enumerate(rows):
        other = rows[(i + 1) % len(rows)]
        for text, value in ((mine[0], 5.0), (mine[1], 4.0 - i % 3 * 0.5), (other[0], 0.5 + i % 4 * 0.25)):
            first.append(mine[0])
            second.append(text)
            score.append(value)
    return {"sentence1": first, "sentence2": second, "score": score}


def sts(path: Path) -> None:
    """Pairs of sentences with a score."""
    write(path, "test", _pairs())


def sts17(path: Path) -> None:
    """The same in the languages of STS17."""
    import mteb

    rows, names = _pairs(), list(mteb.get_task("STS17").hf_subsets)
    cut = [slice(k, k + 60) for k in range(len(names))]
    given = {c: [x for at in cut for x in values[at]] for c, values in rows.items()}
    write(path, "test", {**given, "lang": [n for n in names for _ in range(60)]})


def newsgroups(path: Path) -> None:
    """Captions by category: one row is a whole clustering."""
    rows = listed("image_text", "tuxpaint", 900)
    labels, _ = numbered([r["category"] for r in rows])
    cut = [slice(k, None, 2) for k in range(2)]
    write(path, "test", {"sentences": [captions(rows)[c] for c in cut], "labels": [labels[c] for c in cut]})


def texts_and_texts(path: Path) -> None:
    """Captions → other captions of the same image; documents have titles."""
    rows = [r["captions"] for r in listed("image_text", "coco_cc", 80)]
    corpus: Rows = {"text": [r[1] for r in rows], "title": ["" if i % 2 else f"photo {i}" for i in range(len(rows))]}
    retrieval(path, corpus, {"text": [r[0] for r in rows]}, [(i, i) for i in range(len(rows))])


def banking(path: Path) -> None:
    """Names of products with their sort."""
    rows = listed("image_text", "fashion", 600)
    labels, _ = numbered([r["sub"] for r in rows])
    texts = [r["caption"] for r in rows]
    for k, split in enumerate(("train", "test")):
        write(path, split, {"text": texts[k::2], "label": labels[k::2]})


def ask_ubuntu(path: Path) -> None:
    """Texts → texts among candidates."""
    texts_and_texts(path)
    n = 80
    ranked(path, {q: [q, *((q + 7 * k) % n for k in range(1, 10))] for q in range(n)})


def sprint(path: Path) -> None:
    """Pairs of questions, the same or not; one row holds all of them."""
    rows = _pairs()
    same = [int(s > 3) for s in rows["score"]]
    write(path, "test", {"sent1": [rows["sentence1"]], "sent2": [rows["sentence2"]], "labels": [same]})


TASKS: dict[str, Callable[[Path], None]] = {
    "CIFAR10": cifar10,
    "CIFAR10Clustering": cifar10,
    "CIFAR10ZeroShot": cifar10,
    "STL10": stl10,
    "STL10ZeroShot": stl10,
    "VOC2007": voc2007,
    "TinyImageNetClustering": tiny_imagenet,
    "Flickr30kT2IRetrieval": lambda p: image_and_text(p, listed("image_text", "flickr8k", 120), "text"),
    "Flickr30kI2TRetrieval": lambda p: image_and_text(p, listed("image_text", "flickr8k", 120), "image"),
    "MSCOCOT2IRetrieval": lambda p: image_and_text(p, listed("image_text", "coco_cc", 80), "text", none=True),
    "MSCOCOI2TRetrieval": lambda p: image_and_text(p, listed("image_text", "coco_cc", 80), "image"),
    "Fashion200kT2IRetrieval": lambda p: image_and_text(p, listed("image_text", "fashion", 120), "text"),
    "CUB200I2IRetrieval": cub200,
    "CIRRIT2IRetrieval": cirr,
    "SugarCrepe": sugar_crepe,
    "AROCocoOrder": aro_order,
    "STS12VisualSTS": rendered_sts,
    "FSDD": fsdd,
    "ESC50": esc50,
    "ESC50_Zeroshot": esc50,
    "ESC50Clustering": esc50,
    "ESC50PairClassification": esc50_pairs,
    "ESC50AudioReranking": esc50_reranking,
    "ClothoA2TRetrieval": clotho,
    "ClothoT2ARetrieval": clotho,
    "STSBenchmark": sts,
    "SICK-R": sts,
    "STS17": sts17,
    "TwentyNewsgroupsClustering.v2": newsgroups,
    "NFCorpus": texts_and_texts,
    "Banking77Classification": banking,
    "AskUbuntuDupQuestions": ask_ubuntu,
    "SprintDuplicateQuestions": sprint,
}
"""A task of mteb → what writes its repository."""


def copies(data: Path, names: Sequence[str]) -> None:
    """Local copies of the data sets of tasks: ``data``/ORG/NAME."""
    import mteb

    for name in names:
        path = data / str(mteb.get_task(name).metadata.dataset["path"])
        if not path.exists():
            TASKS[name](path)
