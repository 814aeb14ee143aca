"""The comparison of several models, how items are shown, and the counting under exact ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualenc.data.modalities import DecodeError
from dualenc.data.show import SOUND_BYTES, preview, sound_uri
from dualenc.errors import ConfigError, DataError
from dualenc_evals.catalog import load_task
from dualenc_evals.harness import evaluate
from dualenc_evals.kinds.examples import worst
from dualenc_evals.metrics.scores import count_below
from dualenc_evals.pages.models import write_comparison
from dualenc_evals.pages.run import write_report

sys.path.insert(0, str(Path(__file__).parent))
from _pixels import Pixels
from _shared import DATA as SHARED_DATA
from _shared import PYTHONPATH
from test_eval_harness import pairs, small
from test_eval_tasks import picture

SOUNDS = SHARED_DATA / "audio_text/esc10_folds123/audio"


class Noisy(Pixels):
    """Another model on the same items."""

    def embed(self, modality: str, items: Any, batch_size: int = 64) -> Tensor:
        x = super().embed(modality, items, batch_size)
        noise = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(3))
        return torch.nn.functional.normalize(x + noise, dim=1)


class Hears(Pixels):
    """Sounds by how often each byte occurs in them."""

    modalities = ("audio", "text")

    def embed(self, modality: str, items: Any, batch_size: int = 64) -> Tensor:
        if modality == "text":
            return super().embed("text", items, batch_size)
        counts = [np.bincount(np.frombuffer(raw, np.uint8), minlength=256)[:64] + 1.0 for raw in items]
        return torch.nn.functional.normalize(torch.tensor(np.stack(counts), dtype=torch.float32), dim=1)


def kinds(tmp: Path) -> str:
    for kind in ("cat", "dog", "owl"):
        (tmp / "f" / kind).mkdir(parents=True)
        for i in range(4):
            (tmp / "f" / kind / f"{i}.png").write_bytes(picture((60 * i, len(kind) * i, ord(kind[0]))))
    source = {"kind": "folder", "path": "./f"}
    path = tmp / "kinds.yaml"
    path.write_text(yaml.safe_dump({"kind": "classification", "source": source, "templates": ["a {}"]}))
    return str(path)


def save(tmp: Path, name: str, model: Any, tasks: list[str]) -> Path:
    out = tmp / f"{name}.json"
    evaluate(model, [load_task(t) for t in tasks], out=out, progress=False)
    return out


def loads_nothing(html: str) -> None:
    assert not re.findall(r"<(?:link|iframe|object|embed|base)\b|<script[^>]*\bsrc|@import|url\(", html)
    assert all(src.startswith(("data:image/", "data:audio/")) for src in re.findall(r'\bsrc="([^"]*)"', html))
    assert all(href.startswith("#") for href in re.findall(r'\bhref="([^"]*)"', html))


def test_several_models_on_one_page(tmp_path: Path) -> None:
    members = pairs(30)
    members[3] = ("001.txt", b"<script>alert(1)</script>")
    tasks = [small(tmp_path, members), kinds(tmp_path)]
    files = [save(tmp_path, "first", Pixels(), tasks), save(tmp_path, "second", Noisy(), tasks[:1])]
    html = write_comparison(files, tmp_path / "page.html").read_text(encoding="utf-8")
    loads_nothing(html)
    assert "<script>alert" not in html
    for text in ("pixels (first)", "pixels (second)", "Confusion", "Worst mistakes", "the same queries, every model"):
        assert text in html, text
    values = [json.loads(f.read_text())["tasks"]["small"]["metrics"]["text_to_image_R@5"] for f in files]
    assert all(f">{100 * v:.1f}</b>" in html for v in values)
    # The second model was not asked for the second task: a dash, not an error.
    assert "–</span>" in html
    assert "their numbers are not comparable" not in html


def test_other_data_are_said_and_wrong_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = save(tmp_path / "a", "results", Pixels(), [small(tmp_path / "a", pairs(12))])
    other = save(tmp_path / "b", "results", Pixels(), [small(tmp_path / "b", pairs(13))])
    html = write_comparison([one, tmp_path / "b"], tmp_path / "p.html").read_text()
    assert "not measured on the same data: their numbers are not comparable" in html
    assert "pixels (a)" in html
    with pytest.raises(ConfigError, match="compares 1 to 6 results, got 7"):
        write_comparison([one] * 7, tmp_path / "p.html")
    with pytest.raises(DataError, match="holds no results"):
        write_comparison([tmp_path], tmp_path / "p.html")
    other.write_text("{}")
    with pytest.raises(DataError, match="has no 'model' and 'tasks'"):
        write_comparison([other], tmp_path / "p.html")


@pytest.mark.skipif(not SOUNDS.exists(), reason=f"the sounds are not at {SOUNDS}")
def test_sounds_can_be_played(tmp_path: Path) -> None:
    files = sorted(SOUNDS.rglob("*.*"))[:6]
    rows = [{"audio": p.relative_to(SOUNDS).as_posix(), "caption": f"sound {i}"} for i, p in enumerate(files)]
    for p, r in zip(files, rows, strict=True):
        (tmp_path / r["audio"]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / r["audio"]).write_bytes(p.read_bytes())
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = tmp_path / "sounds.yaml"
    source = {"kind": "jsonl", "path": "./list.jsonl", "members": {"audio": ["file:audio"], "text": ["caption"]}}
    task.write_text(yaml.safe_dump({"kind": "retrieval", "modalities": ["audio", "text"], "source": source}))
    out = save(tmp_path, "results", Hears(), [str(task)])
    for page in (write_comparison([out], tmp_path / "p.html"), write_report(tmp_path, tmp_path / "r.html")):
        html = page.read_text()
        loads_nothing(html)
        assert "media-src data:" in html
        assert html.count('<audio preload="none" src="data:audio/') >= 6


def test_a_long_recording_is_cut() -> None:
    import io

    soundfile = pytest.importorskip("soundfile")
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(0).normal(0, 0.1, (44100 * 20, 2)), 44100, format="WAV")
    assert len(out.getvalue()) > SOUND_BYTES
    uri = sound_uri(out.getvalue())
    assert uri.startswith("data:audio/flac;base64,")
    assert len(uri) < SOUND_BYTES
    assert preview(out.getvalue())["sound"] == uri
    with pytest.raises(DecodeError):
        sound_uri(b"RIFF1234WAVE" + bytes(SOUND_BYTES))
    with pytest.raises(DecodeError):
        preview(b"neither")


def test_a_modality_says_how_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from dualenc.data.modalities.image import ImageInput

    monkeypatch.setattr(ImageInput, "preview", staticmethod(lambda raw: {"text": f"{len(raw)} bytes"}), raising=False)
    assert preview(b"123", "image") == {"text": "3 bytes"}
    assert "picture" in preview(picture((1, 2, 3)), "camera")


def test_the_worst_come_first() -> None:
    assert worst(np.array([5, 9, 1, 9, 7]), np.array([True, True, False, True, False]), 3) == [1, 3, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5000), st.integers(0, 2**31))
def test_counting_equals_a_plain_sum(n: int, columns: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (n, columns), generator=g).float()
    scores[torch.rand(n, columns, generator=g) < 0.05] = torch.nan
    limits = torch.randint(-3, 5, (n,), generator=g).float()
    assert torch.equal(count_below(scores, limits), (scores < limits[:, None]).sum(1))


def test_counting_where_every_byte_is_full() -> None:
    assert count_below(torch.zeros(2, 2040 * 3 + 5), torch.ones(2)).tolist() == [2040 * 3 + 5] * 2


@pytest.mark.slow
def test_ranks_need_no_square_of_scores() -> None:
    """A process of its own, whose peak is its own: 30,000² scores would be 3.4 GiB (docs/evaluation.md has 100,000)."""
    command = [sys.executable, "-m", "benchmarks.losses", "ranks", "--size", "30000", "--dim", "32"]
    env = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    text = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=200).stdout
    assert int(re.findall(r"peak (\d+) MiB", text)[0]) < 1500, text
