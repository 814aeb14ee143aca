"""Places that cannot be written to, and standard streams that are closed or that nobody reads: train, eval, embed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _shared import ROOT

sys.path.append(str(ROOT / "tests" / "train"))
from _runs import RECIPE, SMALL, environment

from dualenc.cli import main
from dualenc.config import load_recipe
from dualenc.model import build_bundle

SHARD = ROOT / "recipes" / "quickstart" / "data" / "val-clipart-000000.tar"
TRAIN = ["train", str(RECIPE), *SMALL, "budget.steps=1", "batch.size=8", "schedule.warmup_samples=0", "data.workers=0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(load_recipe(RECIPE, SMALL)).save(tmp_path_factory.mktemp("model") / "m")


def command(what: str, model: Path, out: Path | str) -> list[str]:
    return {
        "train": [*TRAIN, f"out={out}"],
        "embed": ["embed", str(model), str(SHARD), "--out", str(out)],
        "eval": ["eval", str(model), "--tasks", "quickstart_val_clipart", "--no-cache", "--out", str(out)],
    }[what]


MADE = {"train": "checkpoints/step-0000000001/manifest.json", "embed": "features.json", "eval": ""}
"""What is there below ``out`` in the end."""


def refusal(words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and last words of a command."""
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["dualenc", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    return int(ended.value.code or 0), " ".join(said.err.split())


@pytest.mark.parametrize("what", ["train", "embed", "eval"])
@pytest.mark.parametrize("place", ["below a file", "in /proc", "in /sys"])
def test_a_place_that_cannot_be_written_to_is_one_sentence(
    what: str,
    place: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """/proc and /sys refuse root too, as a read-only disk does."""
    (tmp_path / "file").write_text("old")
    out = {"below a file": tmp_path / "file" / "out", "in /proc": Path("/proc/out"), "in /sys": Path("/sys/kernel/out")}
    if not out[place].parent.exists():
        pytest.skip(f"there is no {out[place].parent} here")
    code, said = refusal(command(what, model, out[place]), monkeypatch, capfd)
    assert code == 2, said
    assert str(out[place]) in said
    assert any(w in said for w in ("choose another: out=FOLDER", "name another folder", "name another file")), said
    assert said.count("error:") == 1
    assert (tmp_path / "file").read_text() == "old"


def test_results_do_not_replace_a_folder_nor_a_run_a_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("old")
    for what, out in (("train", tmp_path / "file"), ("embed", tmp_path / "file"), ("eval", tmp_path)):
        code, said = refusal(command(what, model, out), monkeypatch, capfd)
        assert (code, "cannot be" in said) == (2, True), (what, said)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train", "embed", "eval"])
def test_a_disk_mounted_read_only(what: str, model: Path, tmp_path: Path) -> None:
    """A file system of its own, in a mount namespace of its own; a run that is there already stays whole."""
    (tmp_path / "disk").mkdir()
    out = tmp_path / "disk" / "out"
    words = [sys.executable, "-m", "dualenc", *command(what, model, out)]
    script = (
        f'mount -t tmpfs none "{tmp_path}/disk" && mkdir "{out}.d" && mount -o remount,ro "{tmp_path}/disk" '
        '&& exec "$@" || exit 77'
    )
    may = ["unshare", "-m", "bash", "-c", script, "bash"]
    if subprocess.run([*may, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine lets nobody mount (unshare -m)")
    done = subprocess.run([*may, *words], env=environment(), capture_output=True, text=True, timeout=250, check=False)
    said = " ".join(done.stderr.split())
    assert done.returncode == 2, said
    assert "Read-only file system" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("words", [["report", "RUN", "--out", "FILE/x.html"], ["shards", "index", "FILE/x.tar"]])
def test_other_commands_say_what_is_wrong_with_a_path(
    words: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "r.json").write_text(json.dumps({"model": {"name": "m"}, "tasks": {}, "environment": {}, "run": {}}))
    given = [w.replace("FILE", str(tmp_path / "file")).replace("RUN", str(tmp_path / "r.json")) for w in words]
    code, said = refusal(given, monkeypatch, capfd)
    assert code in (1, 2, 3), said
    assert "error:" in said
    assert str(tmp_path / "file") in said


def closed(how: str, words: list[str]) -> subprocess.CompletedProcess[bytes]:
    """Run with streams closed by the shell (``2>&-``), or with a reader that has gone (``2>&1 | head -1``)."""
    line = f'exec "$@" {how if "&-" in how else ""}'
    reading, writing = os.pipe()
    os.close(reading)
    pipes = {name: writing if name in how else subprocess.PIPE for name in ("stdout", "stderr")}
    try:
        return subprocess.run(
            ["bash", "-c", line, "bash", sys.executable, "-m", "dualenc", *words],
            env=environment(), timeout=250, check=False, **pipes,
        )  # fmt: skip
    finally:
        os.close(writing)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["2>&-", "<&- >&- 2>&-", "no reader of stdout", "no reader of stderr"])
@pytest.mark.parametrize("what", ["train", "embed", "eval"])
def test_work_goes_on_without_its_streams(what: str, how: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = closed(how, command(what, model, out))
    assert done.returncode == 0, done.stderr
    assert (out / MADE[what] if MADE[what] else out).is_file()
    if what == "eval":
        assert json.loads(out.read_text())["tasks"]["quickstart_val_clipart"]["n"]


@pytest.mark.slow
def test_an_error_without_a_stderr_keeps_its_exit_code(model: Path, tmp_path: Path) -> None:
    for how in ("2>&-", "no reader of stderr"):
        assert closed(how, ["train", str(RECIPE), "loss.name=nothing"]).returncode == 2
        assert closed(how, ["embed", str(model), str(tmp_path / "x.tar"), "--out", str(tmp_path / "o")]).returncode == 3


def test_nothing_that_is_printed_goes_into_a_file_that_took_the_stream_s_number(tmp_path: Path) -> None:
    code = f"""
import os
from dualenc.terminal import open_standard_streams
open_standard_streams()
f = os.open({str(tmp_path / "file")!r}, os.O_CREAT | os.O_WRONLY)
os.write(2, b"a library's warning")
print("a line")
os.write(f, b"weights")
"""
    line = f'exec {sys.executable} -c "$0" <&- >&- 2>&-'
    done = subprocess.run(["bash", "-c", line, code], env=environment(), timeout=100, check=False)
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b"weights"
