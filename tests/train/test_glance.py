"""What a dry run learns from the data: endings that no shard has, and with --probe what two real steps take."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from _shared import DATA

sys.path.insert(0, str(Path(__file__).parent))
from _runs import RECIPE, SMALL, environment

from dualenc.cli import main
from dualenc.config import load_recipe
from dualenc.engine.optim import build_optimizers
from dualenc.model import build_bundle
from dualenc.train.probe import standing_bytes

FAULTS = DATA.parent / "faults"
QUICK = [*SMALL, "batch.size=16", "budget.steps=4", "schedule.warmup_samples=0", "data.workers=0", "out=run"]
RAW = b"nothing that a dry run decodes"


def shard(path: Path, members: list[str], samples: int = 20) -> Path:
    with tarfile.open(path, "w") as tar:
        for i in range(samples):
            for ending in members:
                info = tarfile.TarInfo(f"{i:03d}.{ending}")
                info.size = len(RAW)
                tar.addfile(info, io.BytesIO(RAW))
    return path


def dry_run(patch: pytest.MonkeyPatch, captured: pytest.CaptureFixture[str], *items: str) -> tuple[int, str]:
    patch.setenv("COLUMNS", "300")
    patch.setattr(sys, "argv", ["dualenc", "train", str(RECIPE), "--dry-run", *QUICK, *items])
    with pytest.raises(SystemExit) as ended:
        main()
    said = captured.readouterr()
    return int(ended.value.code or 0), " ".join((said.out + said.err).split())


def source(shards: object, members: str = "{}") -> str:
    return f"data.sources=[{{name: mine, shards: '{shards}', members: {members}}}]"


def test_endings_that_no_shard_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    one = shard(tmp_path / "one.tar", ["left.png", "caption.txt"])
    code, said = dry_run(monkeypatch, capfd, source(one))
    assert code == 3, said
    assert "training would use none of the 20 samples of 'mine'" in said
    assert ".left.png (20), .caption.txt (20)" in said
    assert "members: {image: [left.png], text: [caption.txt]}" in said
    assert "Traceback" not in said
    code, said = dry_run(monkeypatch, capfd, source(one, "{image: [left.png], text: [caption.txt]}"))
    assert code == 0, said
    code, said = dry_run(monkeypatch, capfd, source(one, "{image: [left.png], text: [right.txt]}"))
    assert code == 3, said
    # Found in one of several shards: that is a source like others. The dry run looks at all of few.
    shard(tmp_path / "two.tar", ["png", "txt"])
    code, said = dry_run(monkeypatch, capfd, source(tmp_path / "{one,two}.tar"))
    assert code == 0, said
    json = shard(tmp_path / "three.tar", ["png", "json"])
    assert dry_run(monkeypatch, capfd, source(json, "{image: [png], text: [json:title]}"))[0] == 0
    code, said = dry_run(monkeypatch, capfd, source(one, "{image: [left.png+right.png], text: [caption.txt]}"))
    assert code == 3, said


def test_a_modality_that_no_sample_has_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where other pairs are left the run would go on without a word; the dry run has one."""
    monkeypatch.chdir(tmp_path)
    path = shard(tmp_path / "one.tar", ["png", "txt"])
    third = [
        "modalities.title={kind: text, input: {tokenizer: 'clip-bpe:1024'}, "
        "encoder: {name: own/transformer, width: 32, layers: 1, heads: 2}}",
        "pairs=[[image, text], [image, title]]",
    ]
    members = "{image: [png], text: [txt], title: [title.txt]}"
    code, said = dry_run(monkeypatch, capfd, source(path, members), *third)
    assert code == 0, said
    assert "data.sources.0.members.title: none of the 20 samples looked at has title.txt; there are .png, .txt" in said


def test_names_with_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    if not (FAULTS / "dots_version.tar").is_file():
        pytest.skip(f"needs {FAULTS}")
    monkeypatch.chdir(tmp_path)
    code, said = dry_run(monkeypatch, capfd, source(FAULTS / "dots_version.tar"))
    assert code == 3, said
    assert ".0.jpg (1)" in said
    assert "pack them again with other names" in said


@pytest.mark.parametrize("optim", ["adamw", "muon", "sgd"])
def test_the_estimate_of_memory_is_what_the_model_and_its_optimizer_hold(optim: str) -> None:
    recipe = load_recipe(RECIPE, [*QUICK, f"optim.name={optim}", "modalities.text.lock=true"])
    model = build_bundle(recipe).model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = build_optimizers(model, recipe.optim)
    for p in trained:
        p.grad = torch.ones_like(p)
    for o in optimizers:
        o.step()
    states = [x for o in optimizers for s in o.state.values() for x in s.values() if torch.is_tensor(x) and x.dim()]
    held = {
        "weights": sum(x.nbytes for x in (*model.parameters(), *model.buffers())),
        "gradients": sum(p.grad.nbytes for p in trained if p.grad is not None),
        "optimizer states": sum(x.nbytes for x in states),
    }
    assert held["gradients"] < held["weights"]
    assert standing_bytes(model, recipe, 1) == held
    assert standing_bytes(model, recipe, 4) == held  # DDP: each rank holds all of it


def test_what_engines_share_among_ranks_is_counted_once() -> None:
    def of(ranks: int, *items: str) -> dict[str, int]:
        recipe = load_recipe(RECIPE, [*QUICK, *items])
        return standing_bytes(build_bundle(recipe).model, recipe, ranks)

    whole = of(1)
    assert of(4, "engine.parallel=fsdp2") == {k: n // 4 for k, n in whole.items()}
    states = (whole["optimizer states"] + whole["gradients"]) // 4  # with ZeRO's own copy of the weights
    for stage, (weights, gradients) in {1: (1, 1), 2: (1, 4), 3: (4, 4)}.items():
        found = of(4, "engine.kind=deepspeed", f"engine.zero_stage={stage}")
        want = {"weights": whole["weights"] // weights, "gradients": whole["gradients"] // gradients}
        assert found == {**want, "optimizer states": states}, stage


def test_a_dry_run_prints_the_estimate(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    code, said = dry_run(monkeypatch, capfd)
    assert code == 0, said
    size = r"[\d,.]+ (?:MiB|GiB)"
    parts = rf"weights {size} \+ gradients {size} \+ optimizer states {size} = {size}"
    assert re.search(rf"memory per rank, estimate for 4 rank\(s\): {parts}", said), said


def test_a_dry_run_counts_what_the_loss_trains(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def trained(*items: str) -> int:
        code, said = dry_run(monkeypatch, capfd, *items)
        assert code == 0, said
        found = re.search(r"whole model\D+[\d,]+\D+([\d,]+)", said)
        assert found is not None, said
        return int(found[1].replace(",", ""))

    d = load_recipe(RECIPE, QUICK).embed_dim
    projector = d * 32 + 32 + 2 * 32 + 32 * 64 + 64
    assert trained("loss={name: barlip, project: 64, hidden: 32}") - trained() == 2 * projector


PROBED = re.compile(
    r"measured on 2 steps, (\d) rank\(s\): at most ([\d,]+) MiB of main memory(, [\d,]+ MiB for each data worker)? a "
    r"rank; ([\d.e-]+) s a step, so \d+ (s|min) for 1,000 steps"
)


def test_the_probe_takes_two_steps_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = dry_run(monkeypatch, capfd, "--probe")
    assert code == 0, said
    found = PROBED.search(said)
    assert found, said
    assert found[1] == "1"
    assert 200 < int(found[2].replace(",", "")) < 8000  # what Python and torch take, and a small model
    assert 0 < float(found[4]) < 60
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(sys, "argv", ["dualenc", "train", str(RECIPE), "--probe"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--dry-run --probe" in capfd.readouterr().err


@pytest.mark.dist
@pytest.mark.slow
def test_the_probe_on_two_ranks_with_workers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dualenc", "launch", "--nproc", "2", "train", str(RECIPE), "--dry-run", "--probe"]
    env = environment(COLUMNS="300")
    done = subprocess.run(
        [*command, *QUICK, "data.workers=1"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (found,) = PROBED.finditer(done.stdout)
    assert found[1] == "2"
    assert found[3]
    assert list(tmp_path.iterdir()) == []
