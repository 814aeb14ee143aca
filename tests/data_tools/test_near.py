"""Near duplicates of texts, clips and features; filters by a model; a filter that is stopped."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from _shared import DATA, ROOT
from test_choose import encoded, picture, shard
from typer.testing import CliRunner

from dualenc.cli import app
from dualenc.data.shards.selection import read_scores, read_weights
from dualenc.errors import DataError
from dualenc_data_tools.build import build
from dualenc_data_tools.choose.duplicates import ByFeatures, Items, contamination, duplicates, empty_prints
from dualenc_data_tools.choose.filter import Opened, build_filter, filters, run_filters
from dualenc_data_tools.choose.pairs import close_features

SENTENCES = [
    "A brown dog is running through the snow with a stick in its mouth.",
    "Two children in red jackets climb a wall of grey stone by the sea.",
    "The train to the coast leaves platform four at ten in the morning.",
    "An old man reads the paper on a bench under a very large tree.",
]


def texts(found: Any, pattern: str) -> dict[str, str]:
    opened = Opened.of(pattern)
    return dict(zip((opened.key(i).rsplit("/", 1)[-1] for i in range(opened.total)), found.kind.tolist(), strict=True))


def test_near_texts_are_found_and_unlike_ones_are_not(tmp_path: Path) -> None:
    pytest.importorskip("datasketch", reason="datasketch is not installed: pip install 'dualenc[tools]'")
    rng, words = random.Random(0), " ".join(SENTENCES).split()
    samples = {f"o{i}": {"txt": " ".join(rng.choices(words, k=14)).encode()} for i in range(300)}
    samples |= {f"s{i}": {"txt": s.encode()} for i, s in enumerate(SENTENCES)}
    samples["equal"] = {"txt": SENTENCES[0].upper().encode()}
    samples["comma"] = {"txt": SENTENCES[1].replace("jackets", "jackets,").encode()}
    samples["word"] = {"txt": SENTENCES[2].replace("four", "five").encode()}
    samples["none"] = {"txt": b" "}
    shard(tmp_path / "t.tar", samples)
    pattern = str(tmp_path / "t.tar")
    kinds = texts(duplicates(pattern, of="text", near=True), pattern)
    assert {k: v for k, v in kinds.items() if v != "ok"} == {"equal": "exact", "comma": "near", "word": "near"}
    assert set(texts(duplicates(pattern, of="text"), pattern).values()) == {"ok", "exact"}
    items = empty_prints(2, "text", True)
    items.put(0, "text", SENTENCES[3].replace("bench", "wooden bench"))
    items.put(1, "text", "nothing like any of the others, at all")
    hits, _, _ = contamination(pattern, [Items("text", ["a", "b"], ["task", "task"], items)])
    assert [(h.item, h.sample, h.kind) for h in hits] == [("a", "t.tar/s3", "near")]


def rendered(wave: np.ndarray[Any, Any], rate: int, form: str, subtype: str) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format=form, subtype=subtype)
    return out.getvalue()


def test_a_recording_is_found_re_encoded_quieter_and_cut(tmp_path: Path) -> None:
    folder = DATA / "audio_text" / "asterisk" / "audio"
    if not folder.is_dir():
        pytest.skip(f"needs the prompts under {folder}")
    paths = sorted(folder.glob("demo-*.flac")) + sorted(folder.glob("conf*.flac"))[:22]
    samples = {f"o{i}": {"flac": p.read_bytes(), "txt": b"x"} for i, p in enumerate(paths)}
    long = max(range(len(paths)), key=lambda i: paths[i].stat().st_size)
    wave, rate = soundfile.read(paths[long], dtype="float32")
    samples["quiet"] = {"ogg": rendered(0.5 * wave, rate, "OGG", "VORBIS"), "txt": b"x"}
    samples["cut"] = {"wav": rendered(wave[len(wave) // 3 :], rate, "WAV", "PCM_16"), "txt": b"x"}
    samples["silence"] = {"wav": rendered(0 * wave, rate, "WAV", "PCM_16"), "txt": b"x"}
    shard(tmp_path / "a.tar", samples)
    pattern = str(tmp_path / "a.tar")
    found = duplicates(pattern, of="audio", near=True)
    assert {k: v for k, v in texts(found, pattern).items() if v != "ok"} == {"quiet": "near", "cut": "near"}
    assert {kept for kept, _, _ in found.examples} == {f"a.tar/o{long}"}


def test_close_features_are_those_of_a_whole_product() -> None:
    x = torch.nn.functional.normalize(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    x[120] = x[7]
    wanted = {(i, j) for i, j in torch.nonzero(torch.triu(x @ x.T >= 0.9, 1)).tolist()}
    got = {(i, j) for a, b in close_features(x, 0.9) for i, j in zip(a.tolist(), b.tolist(), strict=True)}
    assert got == wanted
    assert (7, 120) in got


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that has learnt to tell eight colours by their names."""
    folder = tmp_path_factory.mktemp("colours")
    colours(folder / "train-000000.tar", range(192), set())
    small = [
        "modalities.image.encoder.widths=[8,16,32]", "modalities.text.encoder.width=32",
        "modalities.text.encoder.layers=1", "modalities.text.encoder.heads=2",
        "modalities.text.input.tokenizer=clip-bpe:1024", "embed_dim=16", "batch.size=32", "budget.steps=60",
        "engine.threads=1", "engine.device=cpu", "eval.tasks=[]", "data.workers=0", "schedule.warmup_samples=64",
    ]  # fmt: skip
    sources = f"data.sources=[{{name: c, shards: '{folder}/train-000000.tar'}}]"
    recipe = str(ROOT / "recipes" / "quickstart" / "quickstart.yaml")
    out = CliRunner().invoke(app, ["train", recipe, *small, sources, f"out={folder / 'run'}"])
    assert out.exit_code == 0, out.output
    return folder / "run"


COLOURS = {
    "red": (220, 30, 30), "green": (30, 190, 40), "blue": (30, 50, 220), "yellow": (230, 220, 40),
    "black": (10, 10, 10), "white": (245, 245, 245), "orange": (240, 140, 20), "purple": (130, 30, 160),
}  # fmt: skip


def colours(path: Path, numbers: range, swapped: set[int]) -> Path:
    """Squares of a colour with its name; those of ``swapped`` have another's."""
    from PIL import Image

    samples = {}
    for i in numbers:
        noise = np.random.default_rng(i).integers(-25, 26, (64, 64, 3))
        pixels = np.clip(np.array(list(COLOURS.values())[i % 8]) + noise, 0, 255).astype(np.uint8)
        said = list(COLOURS)[(i + 3 * (i in swapped)) % 8]
        samples[f"k{i}"] = {"png": encoded(Image.fromarray(pixels)), "txt": f"a {said} square".encode()}
    return shard(path, samples)


@pytest.mark.slow
def test_swapped_captions_have_the_lowest_clip_scores_and_highest_losses(model: Path, tmp_path: Path) -> None:
    swapped = {203, 211, 222, 230, 239, 247}
    pattern = str(colours(tmp_path / "s.tar", range(200, 264), swapped))
    settings = {n: {"model": str(model)} for n in ("clip_score", "model_loss")}
    got = run_filters(pattern, ["clip_score", "model_loss"], settings)
    order = np.argsort(got["clip_score"][1])[:6]
    assert len({200 + int(i) for i in order} & swapped) >= 5
    order = np.argsort(-got["model_loss"][1])[:6]
    assert len({200 + int(i) for i in order} & swapped) >= 5
    opened = Opened.of(pattern)
    clip = build_filter("clip_score", settings["clip_score"])
    rows = [r for part in opened.rows(0, clip.reads) for r in part]
    alone = [clip.score([r])["clip_score"][0] for r in rows[:4]]
    assert alone == pytest.approx(got["clip_score"][1][:4].tolist(), abs=1e-5)

    out = CliRunner().invoke(app, ["embed", str(model), pattern, "--out", str(tmp_path / "features")])
    assert out.exit_code == 0, out.output
    found = duplicates(pattern, features=ByFeatures(tmp_path / "features", 0.99999), of="image")
    assert found.count("near") < 60
    every = duplicates(pattern, features=ByFeatures(tmp_path / "features", -1.0), of="image")
    assert every.count("near") == 63
    shard(tmp_path / "other.tar", {"x": {"png": encoded(picture(1)), "txt": b"x"}})
    with pytest.raises(DataError, match="no feature is of a sample of these shards"):
        duplicates(str(tmp_path / "other.tar"), features=ByFeatures(tmp_path / "features"), of="image")


@pytest.mark.slow
def test_a_build_drops_by_clip_score_whichever_engine_holds_the_model(model: Path, tmp_path: Path) -> None:
    """Local with one and two processes; on Ray where it is installed."""
    source = colours(tmp_path / "s.tar", range(200, 264), {203, 211, 222, 230, 239, 247})
    (tmp_path / "in").mkdir()
    with tarfile.open(source) as tar:
        for member in tar:
            raw = tar.extractfile(member)
            assert raw is not None
            (tmp_path / "in" / member.name).write_bytes(raw.read())
    step = {"filter": "clip_score", "set": {"model": str(model)}, "keep": "clip_score > 0.4", "note": True}
    runs = [("local", 1), ("local", 2)] + [("ray", 2)] * (importlib.util.find_spec("ray") is not None)
    made = []
    for k, (engine, processes) in enumerate(runs):
        out = tmp_path / f"out{k}"
        settings = {"path": str(tmp_path / "in"), "steps": [step], "shard_samples": 20}
        report = build("folder", out, settings, processes=processes, engine=engine, address="local", progress=False)
        assert 0 < report.dropped["not clip_score > 0.4"] < 40
        made.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert all(m == made[0] for m in made)
    wrong = [json.loads(x)["name"] for x in (tmp_path / "out0" / "dropped-train.jsonl").read_text().splitlines()]
    assert {f"k{i}.png" for i in (203, 211, 222, 230, 239, 247)} & set(wrong)


def test_a_stopped_filter_resumes_after_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for s in range(3):
        shard(tmp_path / f"s-{s}.tar", {f"k{s}{i}": {"txt": b"some words " * (s + i + 1)} for i in range(4)})
    pattern = f"{tmp_path}/s-*.tar"
    whole = run_filters(pattern, ["caption_length"])["caption_words"][1].tolist()
    (tmp_path / "caption_words.scores.parquet").unlink()
    scored: list[str] = []
    stop = ["k2"]
    real = filters["caption_length"].score

    def score(self: Any, rows: Any) -> Any:
        scored.extend(r.key for r in rows)
        if stop and stop[0] in rows[0].key:
            raise KeyboardInterrupt
        return real(self, rows)

    monkeypatch.setattr(filters["caption_length"], "score", score)
    with pytest.raises(KeyboardInterrupt):
        run_filters(pattern, ["caption_length"])
    (kept,) = tmp_path.glob(".caption_length-*.scores.jsonl")
    with kept.open("ab") as f:
        f.write(b'{"shard": ["s-2.t')  # torn by a kill
    shard(tmp_path / "s-1.tar", {f"k1{i}": {"txt": b"a"} for i in range(4)})  # a shard that has changed is scored again
    scored.clear()
    stop.clear()
    again = run_filters(pattern, ["caption_length"])["caption_words"][1].tolist()
    assert [k.split("/")[0] for k in scored[::4]] == ["s-1.tar", "s-2.tar"]
    assert again == [*whole[:4], 1, 1, 1, 1, *whole[8:]]
    assert not list(tmp_path.glob(".caption_length*"))
    opened = Opened.of(pattern)
    assert read_scores("caption_words", opened.shards).tolist() == again
    assert CliRunner().invoke(app, ["shards", "duplicates", pattern, "--of", "text"]).exit_code == 0
    assert read_weights("distinct", opened.shards).sum() < 12
