"""Builds with steps, over several processes, stopped and resumed: always the same bytes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from _shared import PYTHONPATH, ROOT
from PIL import Image

from dualenc.data.shards.reader import Found, iter_samples
from dualenc.errors import ConfigError, DataError
from dualenc_data_tools.build import BuildReport, build

CAPTIONS = ["a dog on a beach", "IMG_0001.JPG", "eine Katze schläft auf dem Sofa", "two dogs", "see www.shop.com"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Eighty pictures of 20 … 59 px, each with two captions, in two splits; every seventh equals the one before."""
    rng = np.random.default_rng(0)
    rows = []
    (tmp_path / "in").mkdir()
    for i in range(80):
        name = f"{i}.png"
        if i % 7 != 6:
            pixels = rng.integers(0, 256, (20 + i % 40, 20 + i % 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / name)
        captions = [CAPTIONS[i % 5], f"{CAPTIONS[(i + 1) % 5]} {i}"]
        rows.append({"image": name, "captions": captions, "split": "b" if i % 3 == 1 else "a"})
    path = tmp_path / "in" / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def make(table: Path, out: Path, **more: Any) -> BuildReport:
    options = {"path": str(table), "encode": "webp", "shard_samples": 4}
    return build("jsonl", out, {**options, **more}, progress=False)


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


def documents(out: Path) -> dict[str, dict[str, Any]]:
    found = iter_samples(str(out / "*.tar"), {"json": ["json"]})
    return {k.rsplit("/", 1)[-1]: json.loads(f.values["json"]) for k, f in found if isinstance(f, Found)}


def test_steps_filter_and_note_and_repeats_are_left_out(table: Path, tmp_path: Path) -> None:
    steps = [
        {"filter": "caption_rules", "each": "caption", "set": {"min_words": 2}},
        {"filter": "size", "keep": "shorter >= 25 and aspect == 1", "note": True},
    ]
    report = make(table, tmp_path / "out", steps=steps, distinct="image", origin="drawn")
    assert report.dropped == {"repeated image": 10, "not shorter >= 25 and aspect == 1": 10}
    got = documents(tmp_path / "out")
    assert len(got) == report.samples == 60
    assert got["5"] == {"captions": ["a dog on a beach"], "width": 25, "height": 25, "shorter": 25, "aspect": 1,
                        "source": "drawn"}  # fmt: skip
    assert "IMG_0001.JPG" not in str(got)
    dropped = [json.loads(x)["name"] for x in (tmp_path / "out" / "dropped-train.jsonl").read_text().splitlines()]
    assert dropped[:10] == [f"{i}.png" for i in (0, 1, 2, 3, 4, 6, 13, 20, 27, 34)]
    again = make(table, tmp_path / "again", steps=steps, distinct="image", origin="drawn", processes=2)
    assert again.written == report.written
    assert files(tmp_path / "again") == files(tmp_path / "out")


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"filter": "caption_rule"}, r"no filter 'caption_rule'\. Did you mean 'caption_rules'"),
        ({"filter": "caption_length"}, r"steps\.0\.keep: caption_length only measures .*such as keep: 'captions >= 3'"),
        ({"filter": "size", "keep": "top 3 by width"}, "top needs all samples; here each is judged alone"),
        ({"filter": "size", "keep": "widht > 3"}, r"no selection or score 'widht'\. Did you mean 'width'"),
        ({"filter": "concept_balance", "set": {"concepts": "x"}}, "concept"),
        ({"filter": "size", "kep": "x"}, r"Did you mean 'keep'"),
    ],
)
def test_a_wrong_step_says_what_to_write(table: Path, tmp_path: Path, step: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        make(table, tmp_path / "out", steps=[step])
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_stopped_build_resumes_and_refuses_another_source(table: Path, tmp_path: Path) -> None:
    lines = table.read_text().splitlines() * 2  # the first hundred rows are read before any is packed
    table.write_text("\n".join(lines) + "\n")
    make(table, tmp_path / "whole")
    table.write_text("\n".join([*lines[:150], "{broken", *lines[150:]]) + "\n")
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"rows.jsonl:151 is not JSON.* complete shards are kept; run the same command"):
        make(table, out, limit=None)
    journal = (out / ".build-train.jsonl").read_bytes()
    assert not list(out.glob("*.tar"))
    with pytest.raises(ConfigError, match=r"unfinished build with another quality: run it again .* overwrite=true"):
        make(table, out, quality=50)
    table.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=r"the source has changed since this build was stopped \(record \d+"):
        make(table, out)
    table.write_text("\n".join(lines) + "\n")
    (out / ".build-train.jsonl").write_bytes(journal + b'{"split": "a", "sh')  # torn by a kill
    report = make(table, out, processes=2)
    assert report.resumed > 2
    assert files(out) == files(tmp_path / "whole")
    with pytest.raises(ConfigError, match="already holds"):
        make(table, out)


def test_ogg_is_written_with_the_same_bytes_every_time(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    wave = 0.5 * np.sin(np.arange(24_000) / 15)
    soundfile.write(tmp_path / "in" / "a.wav", wave, 24_000)
    (tmp_path / "in" / "a.txt").write_text("a tone")
    for ending in ("ogg", "opus"):
        made = []
        for k in range(2):
            build("folder", tmp_path / f"{ending}{k}", path=str(tmp_path / "in"), encode_audio=ending, progress=False)
            (found,) = [f for _, f in iter_samples(str(tmp_path / f"{ending}{k}" / "*.tar"), {"audio": [ending]})]
            assert isinstance(found, Found)
            made.append(found.values["audio"])
        assert made[0] == made[1]
        (tmp_path / f"x.{ending}").write_bytes(made[0])
        read, rate = soundfile.read(tmp_path / f"x.{ending}")
        assert rate == {"ogg": 24_000, "opus": 48_000}[ending]
        assert abs(len(read) / rate - 1) < 0.01
        assert np.sqrt((read**2).mean()) == pytest.approx(0.5 / 2**0.5, abs=0.02)


def killed(tmp_path: Path, *options: str, python: str = sys.executable) -> str:
    env = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [python, str(ROOT / "tests" / "faults" / "kill_builds.py"), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert re.search(r"^(\d+) kills, 0 differences", done.stdout, re.M), done.stdout
    return done.stdout


@pytest.mark.dist
@pytest.mark.slow
def test_killed_builds_end_in_the_same_bytes(tmp_path: Path) -> None:
    assert killed(tmp_path, "--kills", "3", "--samples", "120").count("equal") == 5


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.timeout(3600)
def test_ten_kills_of_five_thousand_samples(tmp_path: Path) -> None:
    killed(tmp_path, "--kills", "10", "--samples", "5000")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.timeout(3600)
def test_ray_builds_the_same_bytes_and_resumes(tmp_path: Path) -> None:
    """On a cluster that every build starts on this machine, with 2 and with 4 actors."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'dualenc[ray]'")
    assert killed(tmp_path, "--kills", "2", "--samples", "150", "--engine", "ray").count("equal") == 4


def test_an_unknown_engine_and_a_missing_ray_are_said(table: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown engine 'spark'; use local or ray"):
        build("jsonl", tmp_path / "out", path=str(table), engine="spark", progress=False)
    if importlib.util.find_spec("ray") is None:
        with pytest.raises(ConfigError, match="needs ray: pip install 'dualenc\\[ray]'"):
            build("jsonl", tmp_path / "out", path=str(table), engine="ray", progress=False)
