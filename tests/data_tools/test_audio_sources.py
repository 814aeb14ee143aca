"""Real sounds in the layouts audio sets come in → shards → read back through the audio input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from _shared import DATA as SHARED_DATA

from dualenc.data.modalities.audio import AudioConfig, AudioInput
from dualenc.data.modalities.sound_file import Sound
from dualenc.data.shards.reader import Found, iter_samples
from dualenc.errors import ConfigError, DataError
from dualenc_data_tools.build import build
from dualenc_data_tools.check import check, print_check
from dualenc_data_tools.view import view

DATA = SHARED_DATA / "audio_text"
SHIPPED = Path(__file__).parents[2] / "recipes" / "quickstart" / "data"
SOUND = ["flac", "wav", "ogg", "mp3"]


def rows_of(name: str) -> list[dict[str, Any]]:
    file = DATA / name / "captions.jsonl"
    if not file.is_file():
        pytest.skip(f"the real data set {name} is not at hand ({file})")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read_back(out: Path, **wanted: list[str]) -> list[dict[str, Any]]:
    wanted = {"audio": SOUND, "text": ["json:captions", "txt"], **wanted}
    found = [f for _, f in iter_samples(str(out / "*.tar"), wanted)]
    assert all(isinstance(f, Found) for f in found)
    return [f.values for f in found if isinstance(f, Found)]


def test_esc10_folds_templates_and_a_class_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some of folds 1 and 2 without roosters, resampled; every clip is one the trainer takes."""
    rows = [r for r in rows_of("esc10_folds123") if r["fold"] in (1, 2) and r["label"] != "rooster"]
    options = {
        "path": str(DATA / "esc10_folds123" / "captions.jsonl"),
        "where": {"fold": [1, 2]},
        "unless": {"label": "rooster"},
        "template": ["{label}", "{freesound_title}"],
        "rate": 8000,
        "seconds": 2.0,
        "keep": ["fold", "label"],
    }
    report = build("jsonl", tmp_path, {**options, "limit": 20}, progress=False)
    assert (report.samples, report.dropped) == (20, {})
    got = read_back(tmp_path, label=["json:label"])
    assert [v["label"] for v in got] == [r["label"] for r in rows[:20]]
    assert got[0]["text"] == [rows[0]["label"], rows[0]["freesound_title"]]
    audio = AudioInput(AudioConfig(rate=8000))
    assert {len(audio.eval(audio.decode(v["audio"]))["wave"]) for v in got} == {16000}
    result = check(str(tmp_path / "*.tar"), workers=1, progress=False)
    assert result.ok
    assert result.stats.rates == {8000: 20}
    print_check(result)
    assert "20 at 8,000 Hz" in capsys.readouterr().out


def test_what_needs_no_change_keeps_its_bytes(tmp_path: Path) -> None:
    rows = rows_of("asterisk")[:12]
    path = str(DATA / "asterisk" / "captions.jsonl")
    build("jsonl", tmp_path / "a", path=path, limit=12, rate=8000, progress=False)
    got = read_back(tmp_path / "a")
    assert [v["audio"] for v in got] == [(DATA / "asterisk" / r["audio"]).read_bytes() for r in rows]
    assert got[1]["text"] == [" ".join(rows[1]["transcript"].split())]
    build("jsonl", tmp_path / "b", path=path, limit=2, encode_audio="wav", progress=False)
    again = Sound(read_back(tmp_path / "b", audio=["wav"])[0]["audio"])
    first = Sound(got[0]["audio"])
    assert (again.format, again.frames, again.rate) == ("WAV", first.frames, 8000)


def test_fsdd_folder_whose_names_say_everything(tmp_path: Path) -> None:
    rows = rows_of("fsdd")
    digits = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    words = {str(i): w for i, w in enumerate(digits)}
    options: dict[str, Any] = {
        "path": str(DATA / "fsdd" / "audio"),
        "pattern": "{digit}_{speaker}_{take}",
        "template": ["{digit}", "the digit {digit}"],
        "words": {"digit": words},
        "unless": {"speaker": "theo"},
    }
    report = build("folder", tmp_path / "a", options, progress=False)
    others = sorted((r for r in rows if r["speaker"] != "theo"), key=lambda r: r["audio"])
    got = read_back(tmp_path / "a", speaker=["json:speaker"], digit=["json:digit"])
    assert report.samples == len(others)
    assert [(v["text"][0], v["speaker"]) for v in got] == [(r["label"], r["speaker"]) for r in others]
    assert got[0]["text"] == [others[0]["label"], f"the digit {others[0]['label']}"]
    with pytest.raises(ConfigError, match=r"template: there is no field 'diggit'. Did you mean 'digit'\?"):
        build("folder", tmp_path / "b", {**options, "template": "{diggit}"}, progress=False)
    with pytest.raises(DataError, match="name does not fit"):
        build(
            "folder", tmp_path / "b", {"path": options["path"], "pattern": "{a}+{b}", "template": "{a}"}, progress=False
        )


def test_csv_layouts_of_esc50_clotho_and_audiocaps(tmp_path: Path) -> None:
    """The published column names and folders, filled with real clips."""
    rows = rows_of("esc10_folds123")[:6]
    for folder in ("audio", "development", "caps"):
        (tmp_path / folder).mkdir()

    def table(name: str, columns: list[str], cells: list[list[str]]) -> str:
        with (tmp_path / name).open("w", newline="") as f:
            csv.writer(f).writerows([columns, *cells])
        return str(tmp_path / name)

    esc, clotho, caps = [], [], []
    for i, r in enumerate(rows):
        name, raw = Path(r["audio"]).name, (DATA / "esc10_folds123" / r["audio"]).read_bytes()
        for folder, file in (("audio", name), ("development", f"the clip {i}.ogg"), ("caps", f"id{i}.ogg")):
            (tmp_path / folder / file).write_bytes(raw)
        esc.append([name, str(1 + i % 5), "crying_baby"])
        clotho.append([f"the clip {i}.ogg", *(f"sentence {k} of {i}" for k in range(1, 6))])
        caps += [[f"{i}{k}", f"id{i}", "30", f"caption {k} of {i}"] for k in range(2)]
    plain = {"verify": False, "progress": False}
    path = table("esc50.csv", ["filename", "fold", "category"], esc)
    more: dict[str, Any] = {"audio": "filename", "caption": "category", "underscores": "space"}
    build("csv", tmp_path / "e", path=path, root=str(tmp_path / "audio"), where={"fold": [1, 2]}, **more, **plain)
    assert [v["text"] for v in read_back(tmp_path / "e")] == [["crying baby"]] * 3
    path = table("clotho.csv", ["file_name", *(f"caption_{k}" for k in range(1, 6))], clotho)
    fields = [f"caption_{k}" for k in range(1, 6)]
    build(
        "csv", tmp_path / "c", path=path, audio="file_name", root=str(tmp_path / "development"), caption=fields, **plain
    )
    assert read_back(tmp_path / "c")[2]["text"] == [f"sentence {k} of 2" for k in range(1, 6)]
    path = table("audiocaps.csv", ["audiocap_id", "youtube_id", "start_time", "caption"], caps)
    build("csv", tmp_path / "a", path=path, audio="{youtube_id}.ogg", root=str(tmp_path / "caps"), group=True, **plain)
    got = read_back(tmp_path / "a")
    assert [v["text"] for v in got] == [[f"caption 0 of {i}", f"caption 1 of {i}"] for i in range(6)]
    assert got[5]["audio"] == (DATA / "esc10_folds123" / rows[5]["audio"]).read_bytes()
    with pytest.raises(ConfigError, match=r"csv.audio: the data has no field 'youtubeid'. Did you mean 'youtube_id'\?"):
        build("csv", tmp_path / "x", path=path, audio="{youtubeid}.ogg", **plain)


def test_hugging_face_audio_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets, pa = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = rows_of("fsdd")[:10]
    raw = [(DATA / "fsdd" / r["audio"]).read_bytes() for r in rows]
    # The column is made as Arrow stores it: encoding one would need torchcodec, reading its bytes does not.
    sounds = pa.StructArray.from_arrays(
        [pa.array(raw, pa.binary()), pa.nulls(len(raw), pa.string())], ["bytes", "path"]
    )
    features = datasets.Features({"audio": datasets.Audio(), "text": datasets.Value("string")})
    info = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    table = pa.table({"audio": sounds, "text": [r["label"] for r in rows]}).replace_schema_metadata(info)
    saved = datasets.Dataset(datasets.table.InMemoryTable(table))
    assert isinstance(saved.features["audio"], datasets.Audio)
    saved.save_to_disk(str(tmp_path / "set"))
    build("hf", tmp_path / "out", path=str(tmp_path / "set"), progress=False)
    got = read_back(tmp_path / "out")
    assert [v["audio"] for v in got] == raw
    assert [v["text"].decode() for v in got] == [r["label"] for r in rows]


def test_broken_sounds_are_named_and_left_out(tmp_path: Path) -> None:
    rows = rows_of("fsdd")[:8]
    folder = tmp_path / "in"
    folder.mkdir()
    for i, r in enumerate(rows):
        raw = (DATA / "fsdd" / r["audio"]).read_bytes()
        (folder / f"{i}.wav").write_bytes(raw if i > 1 else (b"RIFF no sound at all" if i else b""))
        (folder / f"{i}.txt").write_text(r["label"])
    report = build("folder", tmp_path / "out", path=str(folder), max_dropped_share=0.5, progress=False)
    assert (report.samples, report.dropped) == (6, {"broken sound": 2})
    assert report.dropped_file is not None
    assert '"name": "0.wav"' in report.dropped_file.read_text()
    with pytest.raises(DataError, match="more than max_dropped_share"):
        build("folder", tmp_path / "x", path=str(folder), progress=False)


def test_a_picture_and_a_sound_of_one_name_are_one_sample(tmp_path: Path) -> None:
    rows = rows_of("fsdd")[:2]
    picture = next(iter_samples(str(SHIPPED / "val-clipart-000000.tar"), {"image": ["webp"]}))[1]
    assert isinstance(picture, Found)
    folder = tmp_path / "in"
    folder.mkdir()
    for i, r in enumerate(rows):
        (folder / f"{i}.wav").write_bytes((DATA / "fsdd" / r["audio"]).read_bytes())
        (folder / f"{i}.txt").write_text(r["label"])
    (folder / "0.webp").write_bytes(picture.values["image"])
    build("folder", tmp_path / "out", path=str(folder), progress=False)
    got = read_back(tmp_path / "out", image=["webp"])
    assert [sorted(v) for v in got] == [["audio", "image", "text"], ["audio", "text"]]
    page = view(str(tmp_path / "out" / "*.tar"), tmp_path / "page.html").read_text()
    assert page.count("<audio controls") == 2


@pytest.mark.parametrize("caption", [{"template": "{label}"}, {"caption": "label"}])
def test_sounds_with_the_picture_of_their_class(tmp_path: Path, caption: dict[str, str]) -> None:
    rows = [r for r in rows_of("esc10_folds123") if r["label"] in ("dog bark", "rooster")]
    options: dict[str, Any] = {
        "path": str(DATA / "esc10_folds123" / "captions.jsonl"),
        **caption,
        "pictures": str(SHIPPED / "val-style-000000.tar"),
        "keys": {"dog bark": "fluent3d_1f415", "rooster": "fluent3d_1f413"},
        "verify": False,
    }
    build("joined", tmp_path / "out", options, progress=False)
    got = read_back(tmp_path / "out", image=["webp"], label=["json:label"])
    assert [v["label"] for v in got] == [r["label"] for r in rows]
    assert len({v["image"] for v in got}) == 2
    assert len({(v["image"], v["label"]) for v in got}) == 2
    with pytest.raises(DataError, match="no sample 'fluent3d_zzz'"):
        build("joined", tmp_path / "x", {**options, "keys": {"rooster": "fluent3d_zzz"}}, progress=False)
