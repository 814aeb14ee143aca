"""Cross-encoders as teachers: ViLT's real architecture with random weights in the released layout, on real photos.

No trained ViLT can be had here, so these tests show that scores are the network's and reach the student, not that they
teach it well.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _distill_runs import loss_rows, shards_fixture, student_recipe  # noqa: F401

from dualenc.config import Teacher
from dualenc.data.loader import Loader
from dualenc.distill.teachers.cross_encoder import FusionTeacher
from dualenc.distill.terms.dcd import choose
from dualenc.distill.terms.term import Columns, PairInputs, TeacherSide
from dualenc.errors import ConfigError
from dualenc.model import build_bundle
from dualenc.train.loop import train


@pytest.fixture(scope="module")
def vilt(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder as transformers writes it: config, safetensors, BERT tokenizer."""
    from transformers import BertTokenizerFast, ViltConfig, ViltForImageAndTextRetrieval

    out = tmp_path_factory.mktemp("vilt")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a the in of dog man woman girl boy is on and with two white black"
    letters = "abcdefghijklmnopqrstuvwxyz"
    lines = [*words.split(" "), *letters, *(f"##{c}" for c in letters)]
    (out / "vocab.txt").write_text("\n".join(lines), encoding="utf-8")
    BertTokenizerFast(str(out / "vocab.txt")).save_pretrained(str(out))
    torch.manual_seed(0)
    config = ViltConfig(
        vocab_size=80, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=20, image_size=32, patch_size=16,
    )  # fmt: skip
    ViltForImageAndTextRetrieval(config).save_pretrained(str(out))
    return f"vilt:{out}"


def distill(model: str, term: dict[str, Any]) -> dict[str, Any]:
    return {"teachers": [{"model": model, "fusion": 5, "logit_scale": 30.0}], "terms": [term], "hard": 0.5}


def test_scores_are_the_networks_and_reach_the_candidates(shards: str, vilt: str, tmp_path: Path) -> None:
    recipe = student_recipe(shards, tmp_path, distill=distill(vilt, {"name": "dcd"}), batch={"size": 12})
    bundle = build_bundle(recipe)
    teacher = FusionTeacher(0, Teacher(model=vilt, fusion=5), recipe, bundle.inputs, torch.device("cpu"), "x")
    loader = Loader(recipe.data, bundle.inputs, recipe.pairs, 0, 12, views=teacher.views)
    batch = next(iter(loader))
    loader.close()
    batch.ids[3], batch.ids[7] = batch.ids[2], -1
    scores = teacher.features(batch).scores
    ab, ba = scores["image", "text"], scores["text", "image"]
    pictures = teacher.scorer.encode("image", batch.views["teacher0/image"])
    captions = teacher.scorer.encode("text", batch.views["teacher0/text"])
    for i in range(12):
        scored = torch.nonzero(~ab[i].isneginf()).flatten().tolist()
        positives = [j for j in range(12) if batch.ids[j] == batch.ids[i]]
        assert scored == [] if i == 7 else set(positives) <= set(scored)
        assert i == 7 or len(scored) == 5 + len(positives)
        assert 7 not in scored
        for j in scored:  # one pair at a time
            alone = teacher.scorer.score(pictures[i : i + 1], captions[j : j + 1])
            assert abs(float(ab[i, j] - alone)) <= 1e-5
        for j in torch.nonzero(~ba[i].isneginf()).flatten().tolist():
            assert abs(float(ba[i, j] - teacher.scorer.score(pictures[j : j + 1], captions[i : i + 1]))) <= 1e-5
    x = PairInputs(
        *(torch.nn.functional.normalize(torch.randn(12, 4), dim=-1) for _ in "ab"), batch.ids, torch.ones(1), None,
        Columns(torch.randn(12, 4), torch.randn(12, 4)), TeacherSide(scores_ab=ab, scores_ba=ba),
    )  # fmt: skip
    for d in x.directions():
        where, member = choose(d, 31, None)
        chosen = torch.zeros(11, 11, dtype=torch.bool).scatter(1, where, member)
        assert torch.equal(chosen, ~d.teacher_rows.isneginf())


def test_which_pairs_are_scored_does_not_depend_on_ranks(shards: str, vilt: str, tmp_path: Path) -> None:
    recipe = student_recipe(shards, tmp_path, distill=distill(vilt, {"name": "dcd"}))
    bundle = build_bundle(recipe)
    teacher = FusionTeacher(0, Teacher(model=vilt, fusion=5), recipe, bundle.inputs, torch.device("cpu"), "x")
    ids = torch.randint(0, 2**62, (40,), generator=torch.Generator().manual_seed(0))
    ids[9] = -1
    whole = set(zip(*(x.tolist() for x in teacher.chosen(ids, ids, 3)), strict=True))
    order = torch.cat([torch.arange(0, 40, 2), torch.arange(1, 40, 2)])  # as two ranks hold them
    split = set()
    for r in range(2):
        rows, columns = teacher.chosen(ids[r::2], ids[order], 3)
        split |= {(int(order[20 * r + i]), int(order[j])) for i, j in zip(rows.tolist(), columns.tolist(), strict=True)}
    assert split == whole
    assert set(zip(*(x.tolist() for x in teacher.chosen(ids, ids, 4)), strict=True)) != whole


@pytest.mark.parametrize("name", ["dcd", "soft_labels"])
def test_a_run_learns_from_scores(shards: str, vilt: str, tmp_path: Path, name: str) -> None:
    runs = [
        train(
            student_recipe(
                shards, tmp_path / str(micro), distill=distill(vilt, {"name": name}), batch={"size": 20, "micro": micro}
            )
        )
        for micro in (None, 7)
    ]
    whole, parts = (loss_rows(r) for r in runs)
    assert len(whole) == 4
    assert all(r[f"distill_{name}/image-text"] > 0 for r in whole)
    for a, b in zip(whole, parts, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_terms_on_features_are_refused(shards: str, vilt: str, tmp_path: Path) -> None:
    for term in ({"name": "feature"}, {"name": "affinity", "within": True}, {"name": "soft_sigmoid"}):
        with pytest.raises(ConfigError, match="is a fusion teacher, which has only scores; write dcd or soft_labels"):
            train(student_recipe(shards, tmp_path, distill=distill(vilt, term)))
    with pytest.raises(ConfigError, match="is not a known cross-encoder"):
        train(student_recipe(shards, tmp_path, distill=distill("open_clip:RN50", {"name": "dcd"})))
