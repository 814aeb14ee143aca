"""Runs whose loss remembers: saved, resumed and planned through the real run; slow towers; the numbers of samples."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from _runs import RECIPE, SMALL, few_samples, losses, newest, segments

from dualenc.cli import main
from dualenc.config import LogitScale, load_recipe
from dualenc.data.batch import Batch
from dualenc.data.dataset import first_numbers
from dualenc.data.loader import Loader
from dualenc.distributed.world import World
from dualenc.encoders import DualEncoder, Tower
from dualenc.memory import SlowModel, SlowTowers
from dualenc.model import build_bundle, load_model
from dualenc.shipped import shipped_recipes

LIST = (
    "loss=[{name: moco, queue: 40, decay: 0.9}, {name: fastclip, rho: 2, weight: 0.5}, "
    "{name: byolip, project: 8, hidden: 8, weight: 0.2}]"
)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_resumed_in_the_middle_is_the_unbroken_one_bit_for_bit(tmp_path: Path, sharded: bool) -> None:
    given = [LIST, few_samples(tmp_path / "data", (60, 36)), "data.workers=0", "checkpoint.every_steps=2"]
    given += ["batch.micro=16", f"checkpoint.sharded={str(sharded).lower()}"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    segments(World(), [[*given, f"out={whole}", "budget.steps=4"]])
    found = segments(World(), [[*given, f"out={cut}", f"budget.steps={n}"] for n in (2, 4)])
    assert [(x["began"], x["ended"]) for x in found] == [(0, 2), (2, 4)]
    assert losses(cut) == losses(whole)
    one, two = (load_file(newest(x) / "memory-00001-of-00001.safetensors") for x in (whole, cut))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert int((one["moco/queue/image-text/a/ids"] >= 0).sum()) == 40
    u = one["fastclip/samples/image-text/log_u_a"]
    assert u.shape == (96,)
    assert u.isfinite().all()  # 4 steps of 32 are a pass and a third
    assert any(k.startswith("slow/byolip__slow_predicted/heads.byolip__predicted.image") for k in one)
    trained = load_model(str(cut)).model.state_dict()
    name = "towers.image.head.weight"
    name = name if name in trained else next(k for k in trained if k.startswith("towers.image") and trained[k].ndim > 1)
    assert not torch.equal(one[f"slow/moco__keys/{name}"].view_as(trained[name]), trained[name])


def test_a_dry_run_says_what_the_loss_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two numbers for each of 3,912 samples, and two queues of 1,000 keys of 32 numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    loss = "loss=[{name: moco, queue: 1000}, fastclip]"
    monkeypatch.setattr(sys, "argv", ["dualenc", "train", str(RECIPE), "--dry-run", *SMALL, loss])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    said = " ".join(capsys.readouterr().out.split())
    where = "in every checkpoint:"
    assert f"keeps moco/queue/image-text/a {where} 132.8 KiB on each of 4 rank(s), the same on all" in said
    assert f"keeps fastclip/samples/image-text {where} 7.6 KiB on each of 4 rank(s), a part on each" in said
    assert f"keeps slow/moco__keys {where} 1.3 MiB on each of 4 rank(s), the same on all" in said


REMEMBERED = {
    "moco": ["queue/image-text/a", "slow/keys"],
    "cocosoda": ["queue/image-text/b", "slow/keys"],
    "fastclip": ["samples/image-text"],
    "sogclr": ["samples/image-text"],
    "isogclr": ["samples/image-text"],
    "beclr": ["beclr/memory/image-text/a", "beclr/clusters/image-text/b", "slow/beclr__slow_predicted"],
    "byolip": ["slow/byolip__slow_predicted"],
    "mode_tokens": [],
}
"""Recipe below recipes/quickstart → what its loss keeps."""


@pytest.mark.parametrize("name", REMEMBERED)
def test_the_recipe_of_every_loss_with_a_memory_is_listed_and_can_be_planned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"quickstart/{name}" in shipped_recipes()
    monkeypatch.setattr(sys, "argv", ["dualenc", "train", f"quickstart/{name}", "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    said = " ".join(capsys.readouterr().out.split())
    for kept in REMEMBERED[name]:
        assert f"keeps {kept} in every checkpoint" in said
    assert said.count(" in every checkpoint: ") >= len(REMEMBERED[name])


class Plain(Tower):
    """A linear tower with a running statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = 3
        self.head = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(1))

    def outputs(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": self.head(x), "pooled": x}


def test_slow_towers_follow_what_is_trained_and_copy_statistics() -> None:
    torch.manual_seed(0)
    model = DualEncoder({m: Plain() for m in ("a", "b", "c")}, [("a", "b")], LogitScale(), lock=["b"])
    slow = SlowModel(model, SlowTowers(0.75), "cpu")
    assert set(slow.model.towers) == {"a", "b"}
    start = {k: x.clone() for k, x in slow.model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
        for x in model.buffers():
            x.add_(1.0)
    for skipped in (True, False):
        slow.follow(lambda name: model.state_dict()[name], torch.tensor(skipped))
        if skipped:
            assert all(torch.equal(x, start[k]) for k, x in slow.model.state_dict().items())
    moved = {k: float((x - start[k]).mean()) for k, x in slow.model.state_dict().items()}
    assert moved["towers.a.head.weight"] == pytest.approx(0.25)
    assert moved["towers.b.head.weight"] == 0  # locked: it is trained by nobody
    assert moved["towers.a.seen"] == moved["towers.b.seen"] == 1
    x = torch.randn(5, 4)
    batch = Batch(5, {"a": x, "b": x[:1]}, {"a": torch.arange(5), "b": torch.arange(0)}, torch.arange(5), [])
    whole, parts = (slow.rows(batch, chunk)["keys"] for chunk in (None, 2))
    assert whole["b"].shape == (1, 3)  # a dummy row
    torch.testing.assert_close(whole["a"], nn.functional.normalize(slow.model.tower("a").head(x), dim=1))
    torch.testing.assert_close(parts["a"], whole["a"])
    assert not whole["a"].requires_grad


def test_numbers_count_all_samples_once_in_every_pass(tmp_path: Path) -> None:
    """Whatever the rank; of two sources the second's come after the first's."""
    assert [x.tolist() for x in first_numbers([[3, 2], [4]])] == [[0, 3], [5]]
    recipe = load_recipe(RECIPE, [*SMALL, few_samples(tmp_path / "data", (20, 12)), "data.workers=0"])
    inputs = build_bundle(recipe).inputs
    found: dict[int, str] = {}
    for rank in range(2):
        loader = Loader(recipe.data, inputs, recipe.pairs, seed=0, batch_size=8, rank=rank, world=2)
        loader.stop_step = 8  # two passes
        for batch in loader:
            assert batch.numbers is not None
            for number, key in zip(batch.numbers.tolist(), batch.keys, strict=True):
                assert found.setdefault(number, key) == key
    assert sorted(found) == list(range(32))
    assert [k.split("/")[1] for _, k in sorted(found.items())] == ["few-000000.tar"] * 20 + ["few-000001.tar"] * 12
