"""Side by side with open_clip itself and with clip-benchmark: same weights, same photos, equal numbers."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dualenc.model import load_model
from dualenc_evals.catalog import load_task
from dualenc_evals.harness import evaluate

sys.path.insert(0, str(Path(__file__).parent))
import _peers as peers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not peers.SHARED.exists(), reason=f"the real data are not below {peers.SHARED}"),
]
PHOTOS, CAPTIONED = 30, 12


class Kept:
    """Our embedder, with the features it gave: modality → raw item → row."""

    def __init__(self, weights: Path) -> None:
        self.inner = load_model(f"open_clip:{peers.MODEL}/{weights}").embedder()
        self.modalities, self.given = self.inner.modalities, {}  # type: ignore[var-annotated]

    def embed(self, modality: str, items: Any, batch_size: int = 64) -> Tensor:
        x = self.inner.embed(modality, items, batch_size)
        self.given |= dict(zip(items, x, strict=True))
        return x

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("peers")
    peers.write_weights(where / "vit.pt")
    peers.write_classification(where / "cifar", PHOTOS)
    peers.write_retrieval(where / "coco", CAPTIONED)
    return where


@pytest.fixture(scope="module")
def ours(folder: Path) -> tuple[dict[str, Any], Kept]:
    model = Kept(folder / "vit.pt")
    tasks = [load_task(folder / "cifar.yaml"), load_task(folder / "coco.yaml")]
    return evaluate(model, tasks, progress=False, batch_size=16)["tasks"], model


def test_open_clips_own_zero_shot_code_gives_the_same(folder: Path, ours: tuple[dict[str, Any], Kept]) -> None:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(peers.MODEL, pretrained=str(folder / "vit.pt"))
    model.eval()
    tokenizer = open_clip.get_tokenizer(peers.MODEL)
    photos, names = peers.photos_with_classes(PHOTOS)
    weights = open_clip.build_zero_shot_classifier(model, tokenizer, names, peers.TEMPLATES)
    raws = [path.read_bytes() for path, _ in photos]
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(io.BytesIO(raw))) for raw in raws])
        x = model.encode_image(pixels, normalize=True)
    top1, top5 = peers.accuracy(100.0 * x @ weights, torch.tensor([c for _, c in photos]))
    got, kept = ours[0]["cifar"]["metrics"], ours[1].given
    assert float((torch.stack([kept[r] for r in raws]) - x).abs().max()) < 1e-5
    assert got["top1"] == round(top1, 6)
    assert got["top5"] == round(top5, 6)


def test_clip_benchmark_gives_the_same(
    folder: Path, ours: tuple[dict[str, Any], Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("clip_benchmark", reason="the peer is optional: pip install clip-benchmark")
    from clip_benchmark.datasets.builder import build_dataset
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
    from clip_benchmark.models import load_clip

    monkeypatch.setattr(zeroshot_classification, "accuracy", peers.accuracy)
    weights = str(folder / "vit.pt")
    model, transform, tokenizer = load_clip("open_clip", peers.MODEL, weights, None, "cpu")
    model.eval()

    def loader(name: str, task: str) -> Any:
        data = build_dataset(f"wds/{name}", root=str(folder / name), transform=transform, split="test", task=task)
        return data, torch.utils.data.DataLoader(data.batched(16), batch_size=None, shuffle=False, num_workers=0)

    data, batches = loader("cifar", "zeroshot_classification")
    # Their loop asks the loader's dataset for its classes; batched() of webdataset does not carry them over.
    batches.dataset.classes = data.classes
    theirs = zeroshot_classification.evaluate(model, batches, tokenizer, data.classes, data.templates, "cpu", amp=False)
    got = ours[0]["cifar"]["metrics"]
    assert got["top1"] == round(theirs["acc1"], 6)
    assert got["top5"] == round(theirs["acc5"], 6)
    assert got["mean_per_class_recall"] == round(float(theirs["mean_per_class_recall"]), 6)

    _, batches = loader("coco", "zeroshot_retrieval")
    theirs = zeroshot_retrieval.evaluate(model, batches, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    got = ours[0]["coco"]["metrics"]
    for k in (1, 5, 10):
        assert got[f"text_to_image_R@{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert got[f"image_to_text_R@{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)
    captions = [c for _, texts in peers.photos_with_captions(CAPTIONED) for c in texts]
    with torch.no_grad():
        y = torch.nn.functional.normalize(model.encode_text(tokenizer(captions)), dim=-1)
    assert np.abs(torch.stack([ours[1].given[c] for c in captions]) - y).max() < 1e-5
