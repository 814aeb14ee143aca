"""An audio/text model: waveforms in memory give what their files give, folders of sounds are searched."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from _shared import ROOT

import dualenc
from dualenc.errors import ConfigError, DataError

sys.path.insert(0, str(ROOT / "tests" / "model"))
from test_released_clap import write_clap

RATE = 16_000


@pytest.fixture(scope="module")
def clap(tmp_path_factory: pytest.TempPathFactory) -> dualenc.Model:
    folder = tmp_path_factory.mktemp("clap")
    write_clap(folder, fused=False)
    return dualenc.load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def waves() -> list[Any]:
    """A chirp, a beat and noise, one second each, float32 at 16 kHz."""
    t = np.arange(RATE) / RATE
    chirp, beat = np.sin(2 * np.pi * (200 + 2000 * t) * t), np.sin(880 * np.pi * t) * (np.sin(16 * np.pi * t) > 0)
    noise = np.random.default_rng(0).normal(0, 0.2, RATE)
    return [np.float32(0.5 * x) for x in (chirp, beat, noise)]


@pytest.fixture(scope="module")
def folder(waves: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sounds")
    for name, x in zip(("chirp.wav", "beat.wav", "noise.wav"), waves, strict=True):
        soundfile.write(out / name, x, RATE, subtype="FLOAT")
    (out / "notes.txt").write_text("not a sound")
    return out


def test_waveforms_give_what_their_files_give(clap: dualenc.Model, waves: list[Any], folder: Path) -> None:
    files = clap.encode(audio=[folder / n for n in ("chirp.wav", "beat.wav", "noise.wav")])
    assert torch.equal(clap.encode(audio=waves, sample_rate=RATE), files)
    assert torch.equal(clap.encode(audio=[torch.from_numpy(x) for x in waves], sample_rate=RATE), files)
    assert torch.equal(clap.encode(audio=[{"array": x, "sampling_rate": RATE} for x in waves]), files)
    stereo = [np.stack([x, x]) for x in waves]
    torch.testing.assert_close(clap.encode(audio=stereo, sample_rate=RATE), files, rtol=0, atol=1e-5)
    assert torch.equal(clap.encode(audio=waves[0], sample_rate=RATE), clap.encode(audio=folder / "chirp.wav"))


def test_int16_is_its_file(clap: dualenc.Model, waves: list[Any], tmp_path: Path) -> None:
    counts = np.round(waves[0] * 32767).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", counts, RATE, subtype="PCM_16")
    assert torch.equal(clap.encode(audio=counts, sample_rate=RATE), clap.encode(audio=tmp_path / "a.wav"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"audio": np.zeros(RATE, np.float32)}, "a waveform needs its rate: add sample_rate=48000"),
        (
            {"audio": np.zeros((RATE, 2), np.float32), "sample_rate": RATE},
            r"\[T\] or \[channels, T\], got \[16000, 2\]",
        ),
        ({"audio": np.zeros(RATE, np.int64), "sample_rate": RATE}, "or int16, got int64"),
    ],
)
def test_a_waveform_that_is_none(clap: dualenc.Model, given: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        clap.encode(**given)


def test_folders_of_sounds(
    clap: dualenc.Model, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    index = clap.index(folder)
    assert index.modality == "audio"
    assert [Path(str(i)).name for i in index.items] == ["beat.wav", "chirp.wav", "noise.wav"]
    found = clap.classify(folder, ["a siren", "a drum"])
    assert found.probabilities.shape == (3, 2)
    prompts = clap.encode(text=["the sound of a siren", "the sound of a drum"])
    cosines = clap.similarity(index.features, prompts, scaled=True)
    torch.testing.assert_close(found.probabilities, cosines.softmax(1), rtol=0, atol=1e-5)

    from dualenc.cli import main

    monkeypatch.setattr(
        sys, "argv", ["dualenc", "search", str(clap.source), str(folder), "a drum", "-k", "1", "--json"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["file"] == clap.search(index, "a drum", k=1)[0].item


def test_images_are_none_of_this_model_s(clap: dualenc.Model) -> None:
    with pytest.raises(ConfigError, match="no modality 'image' here"):
        clap.encode(image="x.jpg")
