"""The command line as a stranger meets it: one clear sentence, an exit code that means something, no traceback."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "train"))
from _runs import RECIPE, ROOT, environment
from _runs import SMALL as TINY

from dualenc.cli import main

SMALL = [*TINY, "batch.size=16", "data.workers=0", "budget.steps=2", "out=run"]


def dualenc(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = environment(COLUMNS="200")
    cmd = [sys.executable, "-m", "dualenc", *args]
    return subprocess.run(cmd, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


def in_process(pytest_env: tuple[pytest.MonkeyPatch, pytest.CaptureFixture[str]], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command's own entry point, without a new interpreter for each."""
    patch, captured = pytest_env
    patch.setattr(sys, "argv", ["dualenc", *args])
    patch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), *captured.readouterr()


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def png(seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (70, 70), (seed * 9 % 256, 40, 200)).save(out, "PNG")
    return out.getvalue()


def bomb() -> bytes:
    """A valid header of a 30,000 × 30,000 RGB PNG with almost no data: 2.7 GB once decoded."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def good(n: int) -> list[tuple[str, bytes]]:
    return [m for i in range(n) for m in ((f"ok{i}.png", png(i)), (f"ok{i}.txt", f"a blue square {i}".encode()))]


def source(path: Path) -> str:
    return f"data.sources=[{{name: mine, shards: '{path}'}}]"


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        (["optim.lrr=1e-3"], 2, ["optim.lrr", "Did you mean 'lr'?"]),
        (["loss.name=info_nec"], 2, ["info_nec", "Did you mean 'info_nce'?"]),
        (["loss.label_smothing=0.1"], 2, ["label_smothing", "Did you mean 'label_smoothing'?"]),
        (["modalities.image.encoder={name: own/convnett}"], 2, ["own/convnett", "convnet"]),
        (["modalities.image.encoder={name: open_clip/ViT-B-33}"], 2, ["ViT-B-33", "ViT-B-32"]),
        (["modalities.image.input.sizee=3"], 2, ["modalities.image.input.sizee", "Did you mean 'size'?"]),
        ([source(Path("nowhere-{000..002}.tar"))], 3, ["nowhere-000.tar"]),
        (["eval.tasks=[quickstart_val_stile]"], 2, ["quickstart_val_stile", "quickstart_val_style"]),
        (["batch.micro=64"], 2, ["batch.micro (64)", "batch.size (16)"]),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, list) else None,
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    code: int,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    ended, _, err = in_process((monkeypatch, capsys), "train", str(RECIPE), *SMALL, *extra)
    assert ended == code, err
    assert "Traceback" not in err
    text = " ".join(err.split())
    assert all(w in text for w in words), text
    assert len(text) < 600


@pytest.mark.dist
def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = dualenc("train", str(RECIPE), "optim.lrr=1", "--debug", cwd=tmp_path)
    assert "Traceback" in result.stderr


@pytest.mark.dist
def test_empty_shard_and_text_only_sample(tmp_path: Path) -> None:
    empty = dualenc("train", str(RECIPE), *SMALL, source(shard(tmp_path / "empty.tar", [])), cwd=tmp_path)
    assert empty.returncode == 3
    assert "empty.tar" in empty.stderr
    assert "Traceback" not in empty.stderr
    text_only = shard(tmp_path / "text.tar", [(f"t{i}.txt", b"words") for i in range(40)])
    result = dualenc("train", str(RECIPE), *SMALL, source(text_only), cwd=tmp_path)
    assert result.returncode == 3
    assert "no member for image" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


@pytest.mark.dist
def test_hostile_members_are_refused_and_nothing_is_executed_or_written(tmp_path: Path) -> None:
    victim = tmp_path / "executed"
    pickle_bomb = f"cposix\nsystem\n(S'touch {victim}'\ntR.".encode()
    members = [
        *good(60),
        ("evil.pkl", pickle_bomb), ("evil.png", png()), ("evil.txt", b"a picture with a pickle beside it"),
        ("code.pyd", pickle_bomb), ("code.txt", b"only code"),
        ("../outside.png", png()), ("../outside.txt", b"a name that climbs out"),
        ("huge.png", bomb()), ("huge.txt", b"a decompression bomb"),
    ]  # fmt: skip
    hostile = shard(tmp_path / "hostile.tar", members)
    args = [*SMALL, source(hostile), "budget.steps=6", "data.max_bad_share=0.2"]
    before = {p for p in tmp_path.parent.rglob("*") if "run" not in p.parts}
    result = dualenc("train", str(RECIPE), *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert not victim.exists()
    assert {p for p in tmp_path.parent.rglob("*") if "run" not in p.parts} == before
    rows = [json.loads(x) for f in (tmp_path / "run").glob("quarantine*.jsonl") for x in f.read_text().splitlines()]
    reasons = {r["key"]: r["reason"] for r in rows}
    assert "900000000 pixels" in reasons["huge"]
    assert "rejected before decoding" in reasons["huge"]
    assert "no member for image" in reasons["code"]
    assert any("outside" in k for k in reasons)
    assert "evil" not in reasons  # its picture and words are fine; the pickle was never opened


@pytest.mark.dist
def test_dry_run_prints_the_plan_and_leaves_no_run(tmp_path: Path) -> None:
    result = dualenc("train", str(RECIPE), "--dry-run", "out=run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for words in ("samples per epoch: 3,912", "whole model", "info_nce", "steps:"):
        assert words in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["recipes", "encoders", "losses", "terms", "sources", "tasks"])
def test_lists(what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    ended, out, err = in_process((monkeypatch, capsys), "list", what)
    assert ended == 0, err
    expected = {
        "recipes": "quickstart",
        "encoders": "own/",
        "losses": "info_nce",
        "terms": "dcd",
        "sources": "parquet",
        "tasks": "quickstart_val_style",
    }
    assert expected[what] in out


def test_importing_dualenc_is_light() -> None:
    heavy = ("open_clip", "transformers", "timm", "deepspeed", "datasets")
    code = f"import sys, dualenc, dualenc.cli; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
