"""Runs with a list of losses: trained parts, labels and the second view, from start to resume and report."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import _runs
from _runs import RECIPE, SMALL, few_samples, losses, newest, rows, segments
from _spawn import spawn

from dualenc.cli import main
from dualenc.data.shards.reader import iter_samples
from dualenc.distributed.world import World
from dualenc.model import load_model
from dualenc_data_tools.writer import ShardWriter
from dualenc_evals.pages.run import small_curves

LIST = (
    "loss=[info_nce, {name: barlip, project: 16, hidden: 16}, {name: koleo, weight: 0.1}, "
    "{name: swalip, weight: 0.2, prototypes: 8}]"
)


def test_trained_parts_of_losses_are_saved_resumed_and_left_out_of_the_model(tmp_path: Path) -> None:
    given = [LIST, few_samples(tmp_path / "data", (96,)), "data.workers=0", "checkpoint.every_steps=2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    segments(World(), [[*given, f"out={whole}", "budget.steps=4"]])
    found = segments(World(), [[*given, f"out={cut}", f"budget.steps={n}"] for n in (2, 4)])
    assert [(x["began"], x["ended"]) for x in found] == [(0, 2), (2, 4)]
    assert losses(cut) == losses(whole)
    saves = [newest(x) for x in (whole, cut)]
    one, two = ({k: x for p in s.rglob("*.safetensors") for k, x in load_file(p).items()} for s in saves)
    heads = sorted(k for k in one if k.startswith("heads."))
    assert "heads.swalip__prototypes.every.weight" in heads
    assert "heads.barlip__projected.image.0.weight" in heads
    assert all(torch.equal(one[k], two[k]) for k in one)
    bundle = load_model(str(cut))
    assert not any(k.startswith("heads.") for k in bundle.model.state_dict())
    logged = rows(cut / "metrics.jsonl")
    terms = ("info_nce", "barlip", "koleo", "swalip")
    assert all(f"loss/{t}/image-text" in logged[0] for t in terms)
    titles = [c["title"] for c in small_curves(logged)]
    assert "Loss koleo image – text" in titles


@pytest.mark.dist
def test_two_ranks_with_a_second_view_and_heads_are_one(tmp_path: Path) -> None:
    """SLIP's pair, a projector, and micro-batches on one side only."""
    view = "modalities.view={shares: image, input: {size: 64, augment: {scale: [0.5, 1.0]}}}"
    listed = (
        "loss=[{name: info_nce, pairs: [[image, text]]}, {name: info_nce, pairs: [[image, view]], weight: 0.3}, "
        "{name: siamlip, weight: 0.5, project: 8, hidden: 8}]"
    )
    given = [view, "pairs=[[image, text], [image, view]]", listed, few_samples(tmp_path / "data", (96,))]
    given += ["data.workers=0", "optim.name=sgd", "budget.steps=3"]
    one, two = tmp_path / "one", tmp_path / "two"
    segments(World(), [[*given, f"out={one}", "batch.micro=8"]])
    spawn(_runs.__file__, "segments", 2, {"parts": [[*given, f"out={two}"]]})
    for a, b in zip(rows(one / "metrics.jsonl"), rows(two / "metrics.jsonl"), strict=True):
        for key in ("loss", "loss/siamlip/image-view", "loss/info_nce0/image-text"):
            assert a.get(key) == pytest.approx(b.get(key), rel=1e-4), key
        assert "loss/info_nce0/image-view" not in a


def labelled(folder: Path) -> str:
    """The quickstart's first samples with their real metadata as json."""
    data = RECIPE.parent / "data"
    with gzip.open(data / "metadata.jsonl.gz", "rt", encoding="utf-8") as f:
        about = {row["key"]: row for row in map(json.loads, f)}
    with ShardWriter(folder) as writer:
        for k, (key, found) in enumerate(
            iter_samples(str(data / "train-000000.tar"), {"i": ["webp"], "t": ["txt"]}, only=[0])
        ):
            if k == 64:
                break
            name = key.rsplit("/", 1)[1]
            doc = about[name] | {"length": len(about[name]["caption"])}
            writer.write(name, {"webp": found.values["i"], "txt": found.values["t"], "json": json.dumps(doc).encode()})
    return f"data.sources=[{{name: some, shards: '{folder}/train-000000.tar', values: {{depth: 'json:length'}}}}]"


def test_a_loss_with_a_label_trains_on_real_json(tmp_path: Path) -> None:
    given = ["loss={name: supremix, label: depth, window: 10}", labelled(tmp_path / "data"), "data.workers=0"]
    segments(World(), [[*given, "budget.steps=3", f"out={tmp_path / 'run'}"]])
    logged = rows(tmp_path / "run" / "metrics.jsonl")
    assert [r["labelled/image-text"] for r in logged if "loss" in r] == [1.0, 1.0, 1.0]


def test_dry_run_names_the_label_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def said(code: int, *items: str) -> str:
        short = ["schedule.warmup_samples=0", "budget.steps=2"]
        monkeypatch.setattr(sys, "argv", ["dualenc", "train", str(RECIPE), "--dry-run", *SMALL, *short, *items])
        with pytest.raises(SystemExit) as ended:
            main()
        out = capfd.readouterr()
        assert (ended.value.code or 0) == code, out.err
        return " ".join((out.err if code else out.out).split())

    loss = "loss=[info_nce, {name: supremix, label: depth}]"
    assert "needs the value 'depth', which no source has. Write data.sources.0.values: {depth: json:KEY}" in said(
        2, loss
    )
    source = labelled(tmp_path / "data")
    wrong = source.replace("json:length", "json:lenght")
    assert "no sample that was looked at has it; the json of its first sample has" in said(3, loss, wrong)
    assert "samples per epoch: 64" in said(0, loss, source)
