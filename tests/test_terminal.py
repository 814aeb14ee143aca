"""What people see on a terminal, in a file and behind the Tab key."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from _shared import PYTHONPATH
from rich.cells import cell_len
from typer.testing import CliRunner

from dualenc.cli import app, names
from dualenc.cli.finished import finished
from dualenc.errors import ConfigError

QUICK = {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def said(*words: str, **env: str) -> str:
    done = CliRunner().invoke(app, [*words], env={"NO_COLOR": "1", **env}, terminal_width=int(env.get("COLUMNS", 80)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("columns", ["80", "200"])
@pytest.mark.parametrize("what", ["recipes", "losses", "terms", "sources", "tasks"])
def test_tables_keep_names_whole(what: str, columns: str) -> None:
    table = said("list", what, COLUMNS=columns)
    first = [m[1].strip() for m in re.finditer(r"^[│┃]([^│┃]*)[│┃]", table, re.M)]
    listed = {n for n in first if n}
    if what == "recipes":
        assert {"distill/flickr8k_dcd_static", "audio_text/image_audio_text_locked", "photos"} <= listed
    if what == "losses":
        assert {"info_nce", "point_contrast"} <= listed
    assert all(cell_len(line) <= int(columns) for line in table.splitlines())


def test_a_filter_leaves_what_contains_it_and_refuses_what_nothing_does() -> None:
    assert "finetune/clip_lora" in said("list", "recipes", "lora", COLUMNS="100")
    assert "quickstart" not in said("list", "recipes", "lora", COLUMNS="100")
    encoders = said("list", "encoders", "siglip2-384")
    assert "open_clip/ViT-B-16-SigLIP2-384" in encoders
    assert "timm/resnet50" not in encoders
    with pytest.raises(ConfigError, match="nothing has 'zzz'"):
        said("list", "losses", "zzz")


def test_lists_in_a_pipe_are_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    env = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | QUICK
    done = subprocess.run(
        [sys.executable, "-m", "dualenc", "list", "recipes"], env=env, capture_output=True, text=True, check=True
    )
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert ["finetune/clip", "a released CLIP fine-tuned on your pairs, all weights"] in rows


def test_build_help_shows_the_settings_of_that_source() -> None:
    general = said("shards", "build", "--help", COLUMNS="100")
    assert "dualenc shards build SOURCE --help" in general
    assert "hold_out" not in general
    csv = said("shards", "build", "csv", "--help", COLUMNS="100")
    assert csv.index("path=…") < csv.index("delimiter=null") < csv.index("Settings of every source")
    assert "hold_out=null" in csv
    assert "shard_samples=1000" in csv
    nuscenes = said("shards", "build", "nuscenes", "--help", COLUMNS="100")
    assert "unit=keyframes" in nuscenes
    with pytest.raises(ConfigError, match="Did you mean 'folder'"):
        said("shards", "build", "foldr", "--help")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train photo", ["photos"]),
        ("train quickstart loss.name=inf", ["loss.name=info_nce"]),
        ("train quickstart optim.weight", ["optim.weight_decay="]),
        ("eval runs/x --tasks quickstart_val_s", ["quickstart_val_style"]),
        ("eval runs/x --tasks quickstart_val_style,quickstart_val_c", ["quickstart_val_style,quickstart_val_clipart"]),
        ("list enc", ["encoders"]),
        ("shards build nusc", ["nuscenes"]),
    ],
)
def test_the_shell_completes_names(line: str, expected: list[str]) -> None:
    words = line.split()
    env = os.environ | QUICK | {"COMP_WORDS": f"dualenc {line}", "COMP_CWORD": str(len(words))}
    env["_DUALENC_COMPLETE"] = "complete_bash"
    code = "import sys; sys.argv[0] = 'dualenc'; from dualenc.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == expected, done.stderr


def test_completion_and_help_do_not_import_torch() -> None:
    code = (
        "import sys; from dualenc.cli import names; names.recipes('q'); names.tasks('q'); names.losses('i'); "
        "names.overrides('optim.'); import dualenc.cli; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | QUICK, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_models_are_completed_from_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a" / "b" / "checkpoints").mkdir(parents=True)
    (tmp_path / "mine.yaml").write_text("name: x")
    assert names.models("runs/") == ["runs/a/b"]
    assert "mine.yaml" in names.recipes("mi")


def test_a_finished_run_names_the_model_its_best_numbers_and_the_next_command(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for part in ("manifest.json", "model/dualenc.json"):
        file = run / "checkpoints" / "step-0000000020" / part
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    rows = [{"step": s, "eval/t/image_to_text_R@1": v, "eval/t/median_rank": 3.0} for s, v in ((10, 0.5), (20, 0.4))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    lines = finished(run, ["t"])
    assert lines[0] == f"model: {run} (step-0000000020)"
    assert lines[1] == "t: image → text R@1 50.0 % (at step 10; 40.0 % at the end)"
    assert lines[2] == f"next: dualenc report {run}    or: dualenc eval {run} --tasks t"
    assert finished(tmp_path, []) == []


def test_logs_in_a_file_have_a_line_a_step(tmp_path: Path) -> None:
    """No bar, no wrapping at 80 columns."""
    sys.path.insert(0, str(Path(__file__).parent / "train"))
    from _runs import SMALL

    small = [*SMALL, "batch.size=16", "data.workers=0", "budget.steps=3", "eval.tasks=[quickstart_val_style]"]
    env = os.environ | QUICK | {"COLUMNS": "60", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "dualenc", "train", "quickstart", *small],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stderr.splitlines()
    assert [line.split()[1] for line in lines if re.match(r"step \d+/3 ", line)] == ["1/3", "2/3", "3/3"]
    assert any(re.match(r"step 3  quickstart_val_style: .*R@1 .*R@10 .*R@1 .*R@10 ", line) for line in lines), lines
    assert lines[-1].startswith("next: dualenc report runs/quickstart")
    assert "\x1b" not in done.stderr
