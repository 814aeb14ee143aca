"""Training with a selection: exactly its samples, on one and two ranks, across a resume; another one is refused."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from _runs import few_samples, losses, order, segments
from _spawn import spawn

from dualenc.distributed.world import World
from dualenc.errors import DualencError
from dualenc_data_tools.choose.filter import Opened, run_filters
from dualenc_data_tools.choose.select import select

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def test_a_selection_on_one_and_two_ranks_and_across_a_resume(tmp_path: Path) -> None:
    few_samples(tmp_path / "few", (70, 50, 60))
    shards = f"{tmp_path}/few/few-*.tar"
    run_filters(shards, ["caption_length"])
    select(shards, "top 96 by caption_chars", "long")
    opened = Opened.of(shards)
    selected = {f"few/{row['shard']}/{row['key']}" for row in _rows(tmp_path / "few" / "long.selection.parquet")}
    assert len(selected) == 96
    assert opened.total == 180
    source = {"name": "few", "shards": shards, "selection": "long"}
    data = [f"data.sources=[{json.dumps(source)}]", "data.workers=0"]
    whole = [*data, "budget.epochs=4", f"out={tmp_path}/whole"]
    parts = [[*data, f"budget.steps={n}", f"out={tmp_path}/parts"] for n in (5, 12)]
    assert spawn(Path(__file__).with_name("_runs.py"), "segments", 2, {"parts": parts})[0][1]["began"] == 5
    assert segments(World(), [whole])[0]["ended"] == 12  # four epochs of 96 in batches of 32
    read = order(tmp_path / "whole")
    assert order(tmp_path / "parts") == read
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=2e-5)
    for epoch in range(4):
        assert Counter(i for step in read[3 * epoch : 3 * epoch + 3] for i in step) == Counter(selected)
    select(shards, "top 97 by caption_chars", "long")
    with pytest.raises(DualencError, match="data"):
        segments(World(), [[*data, "budget.epochs=6", f"out={tmp_path}/whole"]])


def _rows(path: Path) -> list[dict[str, str]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, str]] = pq.read_table(path).to_pylist()
    return rows
