"""Replayed exemplars and labels out of scores: one rank, two ranks across a resume, and plain captions agree."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from _runs import few_samples, losses, order, segments
from _spawn import spawn

from dualenc.data.shards.selection import write_scores
from dualenc.distributed.world import World
from dualenc.errors import DualencError
from dualenc.features.exemplars import keep_exemplars
from dualenc_data_tools.choose.filter import Opened

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def test_replay_and_scores_on_one_and_two_ranks_and_across_a_resume(tmp_path: Path) -> None:
    few_samples(tmp_path / "old", (60,))
    few_samples(tmp_path / "new", (70, 50))
    keep_exemplars(f"{tmp_path}/old/few-*.tar", "txt", 1, "memory")
    opened = Opened.of(f"{tmp_path}/new/few-*.tar")
    rows = [r for shard in range(2) for some in opened.rows(shard, {"text": ["txt"]}) for r in some]
    said = np.array([r.captions[0] for r in rows], object)
    path = tmp_path / "new" / "said.scores.parquet"
    write_scores(path, opened.shards, opened.index_of, said)

    def given(text: str) -> list[str]:
        value = {"label": {"member": text, "type": "id"}}
        new = {"name": "new", "shards": f"{tmp_path}/new/few-*.tar", "members": {"image": ["webp"], "text": [text]}}
        old = {"name": "old", "shards": f"{tmp_path}/old/few-*.tar", "selection": "memory"}
        sources = [new | {"weight": 3, "values": value}, old | {"values": {"label": {"member": "txt", "type": "id"}}}]
        return [f"data.sources={json.dumps(sources)}", "data.workers=0", "loss={name: supcon, label: label}"]

    parts = [[*given("scores:said"), f"budget.steps={n}", f"out={tmp_path}/parts"] for n in (3, 6)]
    spawn(Path(__file__).with_name("_runs.py"), "segments", 2, {"parts": parts})
    for text in ("scores:said", "txt"):
        segments(World(), [[*given(text), "budget.steps=6", f"out={tmp_path}/{text.split(':')[0]}"]])
    read = order(tmp_path / "scores")
    assert order(tmp_path / "parts") == order(tmp_path / "txt") == read
    replayed = {i for step in read for i in step if i.startswith("old/")}
    assert 0 < len(replayed) <= len(set(said[:60]))
    assert losses(tmp_path / "scores") == losses(tmp_path / "txt")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "scores"), rel=2e-5)
    said[0] = "another caption"
    write_scores(path, opened.shards, opened.index_of, said)
    with pytest.raises(DualencError, match="data"):
        segments(World(), [[*given("scores:said"), "budget.steps=9", f"out={tmp_path}/scores"]])
