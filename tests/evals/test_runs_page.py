"""The report of a run without results, of several runs, and the live page; charts with one point and with close
values."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from _shared import PYTHONPATH
from typer.testing import CliRunner

from dualenc.cli import app
from dualenc.errors import ConfigError
from dualenc.train.lock import RunLock, is_running
from dualenc_evals.pages.run import is_held_out, read_run, render
from dualenc_evals.pages.runs import write_runs
from dualenc_evals.pages.svg import Chart, Series, compact, distinct, line_chart

KEY = "eval/held/image_to_text_R@1"


def run_folder(folder: Path, lr: float, loss: float, steps: int = 30, name: str = "") -> Path:
    folder.mkdir(parents=True)
    recipe = f"name: {name or folder.name}\noptim: {{lr: {lr}}}\nbatch: {{size: 8}}\n"
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    rows = [
        {"step": s, "samples_seen": 8 * s, "loss": loss / s, "lr": lr, "logit_scale/image-text": 14 + s / 10}
        for s in range(1, steps + 1)
    ]
    rows += [{"step": s, "samples_seen": 8 * s, KEY: s / 40} for s in (10, 20, 30) if s <= steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return folder


def labels(svg: str, cls: str = "tick") -> list[str]:
    return re.findall(rf'<text class="{cls}"[^>]*>([^<]*)</text>', svg)


def test_a_run_without_results_shows_what_it_measured_while_training(tmp_path: Path) -> None:
    html = render(read_run(run_folder(tmp_path / "a", 1e-3, 4.0)))
    assert "75.0<small>%" in html
    assert "at first 25.0 %" in html
    assert "the last time at step 30" in html
    assert "Held-out numbers" not in html


def test_numbers_are_called_held_out_only_where_no_item_was_trained_on() -> None:
    clean = {"count": 0, "of": 40, "complete": True, "unread": []}
    assert is_held_out({"in_training": clean})
    assert not is_held_out({})
    assert not is_held_out({"in_training": {**clean, "count": 3}})
    assert not is_held_out({"in_training": {**clean, "complete": False}})
    assert not is_held_out({"in_training": {**clean, "unread": ["s3://x"]}})
    assert not is_held_out({"in_training": {**clean, "of": 0}})  # nothing was compared


def test_several_runs_have_their_curves_on_one_page(tmp_path: Path) -> None:
    a, b = run_folder(tmp_path / "a", 1e-3, 4.0), run_folder(tmp_path / "b", 3e-3, 5.0, steps=20)
    page = write_runs([a, b], tmp_path / "runs.html").read_text(encoding="utf-8")
    assert page.count('class="line c2 line"') == page.count('class="line c1 line"')
    assert "held: image → text R@1" in page
    assert re.search(r"<b>75\.0</b>.*50\.0", page, re.S)
    assert re.search(r"optim\.lr</code></th><td[^>]*>0\.001</td><td[^>]*>0\.003</td>", page)
    assert "batch.size" not in page
    assert 'http-equiv="refresh"' not in page
    done = CliRunner().invoke(app, ["report", str(a), str(b), "--out", str(tmp_path / "by_command.html")])
    assert done.exit_code == 0
    assert (tmp_path / "by_command.html").read_text(encoding="utf-8") == page


def test_runs_of_one_name_are_told_apart_and_seven_are_too_many(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / str(i), 1e-3, 4.0, name="same") for i in range(7)]
    page = write_runs(folders[:2], tmp_path / "p.html").read_text(encoding="utf-8")
    assert "Nothing but their names." in page
    assert '<span class="ink">0</span>' in page
    with pytest.raises(ConfigError, match="at most 6 runs"):
        write_runs(folders, tmp_path / "p.html")


def test_ticks_never_repeat() -> None:
    close = [0.0012345, 0.0012346, 0.0012347]
    assert len(set(distinct(close, compact))) == 3
    for y in (close, [14.2857, 14.2858, 14.28585], [1e6, 1e6 + 1, 1e6 + 2], [0.99991, 0.99992, 0.99993]):
        for show in (compact, lambda v: f"{100 * v:.3g} %"):
            svg = line_chart(Chart([Series("x", [1.0, 2.0, 3.0], y)], "steps", show))
            ys = re.findall(r'text-anchor="end">([^<]*)<', svg)
            assert len(set(ys)) == len(ys) > 1, (y, ys)
    long_run = line_chart(Chart([Series("x", [1000.0, 1001.0, 1002.0], [1.0, 2.0, 3.0])], "steps"))
    xs = re.findall(r'text-anchor="middle">([^<]*)<', long_run)
    assert len(set(xs)) == len(xs)


def test_a_single_point_stands_in_the_middle_of_its_chart() -> None:
    svg = line_chart(Chart([Series("x", [500.0], [0.4])], "steps", width=440))
    (x,) = re.findall(r'<circle class="dot c1" cx="([\d.]+)"', svg)
    assert float(x) == pytest.approx(52 + (440 - 52 - 16) / 2)
    assert "500" in labels(svg)


def test_watch_rewrites_the_page_until_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path / "a", 1e-3, 4.0)
    assert not is_running(run)
    env = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    page = run / "report.html"
    with RunLock(run):
        assert is_running(run)
        watching = subprocess.Popen(
            [sys.executable, "-m", "dualenc", "report", str(run), "--watch"], env=env, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 120
        while not page.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        live = page.read_text(encoding="utf-8")
    assert 'http-equiv="refresh" content="5"' in live
    assert "running: a" in live
    _, err = watching.communicate(timeout=120)
    assert watching.returncode == 0, err
    assert "(the run has ended)" in err
    assert 'http-equiv="refresh"' not in page.read_text(encoding="utf-8")


def test_watching_a_results_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("{}")
    done = CliRunner().invoke(app, ["report", str(tmp_path / "r.json"), "--watch"])
    assert "give run folders" in str(done.exception)
