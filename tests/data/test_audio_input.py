"""Sound files: what is read, what is refused with a line, crops, memory; broken clips are counted, never a crash."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from _shared import DATA as SHARED_DATA

from dualenc.config import Data, Modality
from dualenc.data.loader import Loader
from dualenc.data.modalities import DecodeError, build_inputs
from dualenc.data.modalities.audio import AudioConfig, AudioInput
from dualenc.errors import ConfigError

AUDIO = SHARED_DATA / "audio_text"


def of(name: str, count: int) -> list[bytes]:
    folder = AUDIO / name
    if not folder.is_dir():
        pytest.skip(f"needs the clips under {folder}")
    return [p.read_bytes() for p in sorted((folder / "audio").iterdir())[:count]]


@pytest.fixture(scope="module")
def bark() -> bytes:
    """A real clip of five seconds, 44.1 kHz Ogg."""
    return of("esc10_folds123", 1)[0]


@pytest.fixture(scope="module")
def samples(bark: bytes) -> Any:
    return soundfile.read(io.BytesIO(bark), dtype="float32")[0]


def write(x: Any, rate: int, format: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, x, rate, format=format, subtype=subtype)
    return file.getvalue()


def make(**settings: Any) -> AudioInput:
    return AudioInput(AudioConfig(**settings))


def heard(source: AudioInput, raw: bytes) -> torch.Tensor:
    return source.eval(source.decode(raw))["wave"]


@pytest.mark.parametrize(
    ("format", "subtype", "rate", "noise"),
    [
        ("WAV", "PCM_16", 44_100, 1e-4),
        ("WAV", "PCM_U8", 44_100, 1e-2),
        ("WAV", "PCM_24", 44_100, 1e-6),
        ("WAV", "FLOAT", 44_100, 1e-7),
        ("FLAC", "PCM_16", 44_100, 1e-4),
        ("OGG", "VORBIS", 44_100, 0.1),
        ("MP3", None, 44_100, 0.1),
        ("AIFF", "PCM_16", 44_100, 1e-4),
    ],
)
def test_formats_and_channels(samples: Any, format: str, subtype: str | None, rate: int, noise: float) -> None:
    """One channel, or two that cancel each other's difference: the same waveform."""
    source = make(rate=16_000)
    plain = heard(source, write(samples, rate, "WAV", "DOUBLE"))
    side = np.linspace(0, 0.05, len(samples), dtype=np.float32)
    for x in (samples * 0.9, np.stack([samples * 0.9 + side, samples * 0.9 - side], 1)):
        wave = heard(source, write(x, rate, format, subtype))
        n = min(len(wave), len(plain))
        assert abs(len(wave) - len(plain)) <= (1200 if format == "MP3" else 0)
        assert wave.dtype == torch.float32
        assert (wave[:n] - 0.9 * plain[:n]).square().mean().sqrt() <= noise


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 96_000])
def test_any_rate(rate: int) -> None:
    """A tone keeps its pitch and loudness at whatever rate it was stored."""
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    wave = heard(make(rate=16_000), write(tone, rate, "WAV", "PCM_24")).numpy()
    assert abs(len(wave) - 16_000) <= 1
    want = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(wave)) / 16_000)
    assert np.abs(wave - want)[500:-500].max() < 1e-3


def broken(samples: Any) -> dict[str, tuple[bytes, str]]:
    """Name → file, the words of its line."""
    whole = write(samples, 44_100, "FLAC")
    nan = samples[:20_000].copy()
    nan[777] = np.nan
    big = samples[:20_000].copy()
    big[3] = 1e30
    header = bytearray(write(samples, 44_100))
    header[22:24] = struct.pack("<H", 0)
    slow = bytearray(write(samples, 44_100))
    slow[24:28] = struct.pack("<I", 3)
    return {
        "garbage": (bytes(range(256)) * 40, "not an audio file that libsndfile reads"),
        "text": (b"The file you asked for is not here.", "not an audio file"),
        "nothing": (b"", "empty (0 bytes)"),
        "no_samples": (write(samples[:0], 44_100), "holds no samples"),
        "no_channel": (bytes(header), "not an audio file"),
        "one_sample": (write(samples[:1], 44_100), "1 samples at 44100 Hz are shorter than min_s"),
        "nan": (write(nan, 44_100, subtype="FLOAT"), "NaN or infinite"),
        "infinite": (write(np.where(np.isnan(nan), np.inf, nan), 44_100, subtype="FLOAT"), "NaN or infinite"),
        "too_loud": (write(big, 44_100, subtype="DOUBLE"), "1e+30, far beyond full scale"),
        "slow": (bytes(slow), "3 Hz is not between"),
        "flac_cut": (whole[: len(whole) // 2], "cut short"),
        "flac_hole": (whole[:9_000] + b"\0" * 30_000 + whole[39_000:], "damaged|cut short"),
    }


@pytest.mark.parametrize("name", list(broken(np.zeros(30_000, np.float32))))
def test_what_cannot_be_used_is_refused_with_a_line(samples: Any, name: str) -> None:
    raw, words = broken(samples)[name]
    with pytest.raises(DecodeError) as e:
        heard(make(), raw)
    assert any(w in str(e.value) for w in words.split("|")), str(e.value)
    assert "\n" not in str(e.value)


def test_a_loader_counts_them_and_goes_on(samples: Any, bark: bytes, tmp_path: Path) -> None:
    bad = broken(samples)
    members = [(f"good{i}.ogg", bark) for i in range(4)] + [(f"bad_{n}.wav", raw) for n, (raw, _) in bad.items()]
    members = [m for name, raw in members for m in ((name, raw), (name.rsplit(".", 1)[0] + ".txt", b"a sound"))]
    path = tmp_path / "s-000.tar"
    with tarfile.open(path, "w") as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    parts = {
        "audio": Modality.model_validate({"encoder": {"name": "x"}}),
        "text": Modality.model_validate({"encoder": {"name": "x"}, "input": {"tokenizer": "clip-bpe:600"}}),
    }
    data = Data.model_validate({"workers": 0, "max_bad_share": 1, "sources": [{"name": "s", "shards": str(path)}]})
    loader = Loader(data, build_inputs(parts), [("audio", "text")], seed=0, batch_size=len(bad) + 4)
    loader.stop_step = 1
    (batch,) = list(loader)
    assert sorted(b.key for b in batch.bad) == sorted(f"bad_{n}" for n in bad)
    assert all(b.member.endswith(".wav") and b.reason for b in batch.bad)
    assert batch.inputs["audio"]["wave"].shape == (4, 80_016)
    assert batch.rows["audio"].tolist() == batch.rows["text"].tolist()


def test_an_mp3_or_ogg_that_is_cut_keeps_what_is_there_or_is_refused(samples: Any) -> None:
    for format in ("OGG", "MP3"):
        raw = write(samples, 44_100, format)
        try:
            wave = heard(make(), raw[: len(raw) // 2])
        except DecodeError:
            continue
        assert 0 < len(wave) < 80_000
        assert torch.isfinite(wave).all()


LONG = """
import sys
import numpy as np
from pathlib import Path
from dualenc.data.modalities.audio import AudioConfig, AudioInput
source = AudioInput(AudioConfig())

def peak():  # not ru_maxrss, which a child inherits from its parent
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmHWM"))

short = Path(sys.argv[1]).read_bytes()
source.train(source.decode(short), np.random.default_rng(0))  # libraries are loaded
for path in sys.argv[2:]:
    raw = Path(path).read_bytes()
    before = peak()
    for seed in range(3):
        row = source.train(source.decode(raw), np.random.default_rng(seed))
        assert row["wave"].shape == (160_000,)
    source.eval(source.decode(raw))
    print(len(raw) >> 20, (peak() - before) >> 10, int(row["wave"].abs().sum() > 0))
"""


def test_three_hours_cost_no_more_memory_than_ten_seconds(tmp_path: Path) -> None:
    """8 kHz: 164 MiB of WAV, 329 MiB as float32. Only the crop is decoded."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("needs /proc to see the peak of a process")
    rate, hours = 8_000, 3
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / "short.wav")]
    soundfile.write(paths[0], rng.normal(0, 0.1, 12 * 48_000), 48_000)
    for format in ("FLAC", "WAV"):  # the peak only grows, so the smaller file first
        path = tmp_path / f"long.{format.lower()}"
        with soundfile.SoundFile(path, "w", rate, 1, format=format, subtype="PCM_16") as f:
            minute = rng.integers(-3000, 3000, 60 * rate, dtype=np.int16)
            for _ in range(hours * 60):
                f.write(minute)
        paths.append(str(path))
    whole = hours * 3600 * rate * 4 >> 20
    # Not in this process: its peak so far would hide the growth.
    done = subprocess.run([sys.executable, "-c", LONG, *paths], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        size, grown, sound = map(int, line.split())
        print(f"a file of {size} MiB ({whole} MiB decoded): {grown} MiB more")
        # decode() copies nothing; read() holds ten seconds
        assert grown < 40
        assert sound


def test_crops(samples: Any) -> None:
    raw = write(samples, 44_100, "WAV", "FLOAT")
    source = make(rate=44_100, max_s=1.0)
    sound = source.decode(raw)
    middle = (len(samples) - 44_100) // 2
    assert torch.equal(source.eval(sound)["wave"], torch.from_numpy(samples[middle : middle + 44_100]))
    assert torch.equal(source.eval(sound)["wave"], source.eval(sound)["wave"])
    start = make(rate=44_100, max_s=1.0, eval_crop="start")
    assert torch.equal(heard(start, raw), torch.from_numpy(samples[:44_100]))
    # A ramp says where a crop began.
    ramp = np.arange(len(samples), dtype=np.float32) / 2**18
    raw = write(ramp, 44_100, "WAV", "FLOAT")
    starts = []
    for seed in range(6):
        wave = source.train(source.decode(raw), np.random.default_rng(seed))["wave"]
        assert torch.equal(wave, source.train(source.decode(raw), np.random.default_rng(seed))["wave"])
        starts.append(round(float(wave[0]) * 2**18))
        assert np.array_equal(ramp[starts[-1] : starts[-1] + 44_100], wave.numpy())
    assert len(set(starts)) == 6


def test_augmentation_is_seeded_and_only_in_training(bark: bytes) -> None:
    source = make(augment={"gain_db": [-6, -6], "spec": {"freq_masks": 2, "time_masks": 3, "time_share": 0.2}})
    plain = heard(make(), bark)
    row = source.train(source.decode(bark), np.random.default_rng(1))
    again = source.train(source.decode(bark), np.random.default_rng(1))
    other = source.train(source.decode(bark), np.random.default_rng(2))
    assert torch.allclose(row["wave"], plain * 10 ** (-6 / 20), atol=1e-6)
    assert row["spec"].shape == (5, 2)
    assert torch.equal(row["spec"], again["spec"])
    assert not torch.equal(row["spec"], other["spec"])
    assert (row["spec"].sum(1) <= 1).all()
    assert (row["spec"][2:, 1] <= 0.2).all()
    assert set(source.eval(source.decode(bark))) == {"wave"}


def test_random_stretches_that_begin_anywhere_in_the_clip() -> None:
    ramp = np.arange(1, 16_001, dtype=np.float32) / 2**15
    raw = write(ramp, 16_000, "WAV", "FLOAT")
    crop, roll = make(augment={"crop": 0.25}), make(augment={"roll": True})
    lengths, starts = [], []
    for seed in range(20):
        x = crop.train(crop.decode(raw), np.random.default_rng(seed))["wave"].numpy()
        first = int(np.flatnonzero(ramp == x[0])[0])
        assert np.array_equal(x, ramp[first : first + len(x)])
        lengths.append(len(x))
        y = roll.train(roll.decode(raw), np.random.default_rng(seed))["wave"].numpy()
        starts.append(int(np.flatnonzero(ramp == y[0])[0]))
        assert np.array_equal(y, np.roll(ramp, -starts[-1]))
    assert 4_000 <= min(lengths) < 8_000 < 13_000 < max(lengths) <= 16_000
    assert len(set(starts)) > 15
    assert torch.equal(heard(crop, raw), torch.from_numpy(ramp))
    told = make(augment={"hide": 3})
    assert told.train(told.decode(raw), np.random.default_rng(0))["hide"].shape == (3,)
    assert "hide" not in told.eval(told.decode(raw))
    assert not {"crop", "roll", "hide"} & make().describe()["config"]["augment"].keys()


def test_a_random_speed_moves_length_and_pitch_together() -> None:
    seconds = np.arange(8_000) / 8_000
    raw = write(0.5 * np.sin(2 * np.pi * 400 * seconds).astype(np.float32), 8_000, "WAV", "FLOAT")

    def pitch(wave: np.ndarray) -> float:
        return float(np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 1 << 17)).argmax()) * 16_000 / (1 << 17)

    source = make(max_s=2.0, augment={"speed": [0.8, 1.25]})
    lengths = []
    for seed in range(12):
        x = source.train(source.decode(raw), np.random.default_rng(seed))["wave"].numpy()
        speed = 16_000 / len(x)  # resampled to 16 kHz, the clip has that many samples at speed 1
        assert pitch(x) == pytest.approx(400 * speed, rel=2e-3)
        lengths.append(len(x))
    assert 12_800 <= min(lengths) < 14_500 < 17_500 < max(lengths) <= 20_000
    assert np.exp(np.mean(np.log(lengths))) == pytest.approx(16_000, rel=0.1)
    assert torch.equal(heard(source, raw), heard(make(max_s=2.0), raw))  # evaluation plays it as it is
    slow = make(max_s=1.0, augment={"speed": [0.5, 0.5]})
    x = slow.train(slow.decode(raw), np.random.default_rng(0))["wave"].numpy()
    assert len(x) == 16_000  # never longer than max_s
    assert pitch(x) == pytest.approx(200, rel=2e-3)
    same = make(augment={"speed": [1, 1]})
    assert torch.equal(same.train(same.decode(raw), np.random.default_rng(0))["wave"], heard(same, raw))


def test_an_equalizer_is_a_few_gains_for_the_tower() -> None:
    raw = write(np.full(16_000, 0.1, np.float32), 16_000, "WAV", "FLOAT")
    source = make(augment={"equalizer_db": 6})
    rows = [source.train(source.decode(raw), np.random.default_rng(seed))["equalizer"] for seed in range(8)]
    assert torch.stack(rows).abs().amax() <= 6
    assert torch.stack(rows).std() > 2
    assert torch.equal(rows[3], source.train(source.decode(raw), np.random.default_rng(3))["equalizer"])
    assert source.collate([source.dummy()])["equalizer"].eq(0).all()
    assert source.eval(source.decode(raw)).keys() == {"wave"}
    assert not {"speed", "equalizer_db"} & make().describe()["config"]["augment"].keys()
    for more in ({"features": {"kind": "waveform"}}, {"long": "fusion", "pad": "repeatpad"}):
        with pytest.raises(ValueError, match=r"equalizer_db acts on mel bins: it needs features\.kind: mel"):
            make(augment={"equalizer_db": 6}, **more)
    with pytest.raises(ValueError, match=r"augment.speed: \[1.2, 0.9\] must be \[slowest, fastest\]"):
        make(augment={"speed": [1.2, 0.9]})


def test_int16_and_the_batch(bark: bytes) -> None:
    short = of("fsdd", 1)[0]
    for ship, dtype in (("float32", torch.float32), ("int16", torch.int16)):
        source = make(ship=ship)
        rows = [source.eval(source.decode(x)) for x in (bark, short)]
        batch = source.collate([*rows, source.dummy()])
        assert batch["wave"].dtype == dtype
        assert batch["wave"].shape == (3, int(batch["length"].max()))
        n = int(batch["length"][1])
        assert n == len(rows[1]["wave"]) < int(batch["length"][0])
        assert not batch["wave"][1, n:].any()
    exact, coarse = heard(make(), bark), heard(make(ship="int16"), bark)
    assert (coarse / 32767 - exact.clamp(-1, 1)).abs().max() <= 0.51 / 32767


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"features": {"f_max": 9000}}, "above half the rate"),
        ({"long": "fusion"}, "needs features.kind: mel and a pad"),
        ({"min_s": 20}, "above max_s"),
        ({"features": {"win": 2000}}, "must not be above n_fft"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    part = Modality.model_validate({"encoder": {"name": "x"}, "input": settings})
    with pytest.raises(ConfigError, match=words):
        build_inputs({"audio": part})


def test_described_settings_make_the_same_input() -> None:
    source = make(rate=8_000, pad="repeat", augment={"spec": {}})
    said = json.loads(json.dumps(source.describe()))
    assert AudioInput(AudioConfig.model_validate(said["config"])).describe() == source.describe()


# --- mixing ------------------------------------------------------------------------------------------------------


def digits(tmp_path: Path, **data: Any) -> tuple[Loader, list[tuple[bytes, str]]]:
    """A loader over twelve spoken digits, captioned "Clip a." … and but for the last in three groups; every batch has
    all of them."""
    clips = [(raw, f"Clip {'abcdefghijkl'[i]}.") for i, raw in enumerate(of("fsdd", 12))]
    path = tmp_path / "d-000.tar"
    with tarfile.open(path, "w") as tar:
        for i, (raw, text) in enumerate(clips):
            group = [("cls", b"%d" % (i % 3))] if i < 11 else []
            for ending, x in (("wav", raw), ("txt", text.encode()), *group):
                info = tarfile.TarInfo(f"{i:02d}.{ending}")
                info.size = len(x)
                tar.addfile(info, io.BytesIO(x))
    parts = {
        "audio": Modality.model_validate({"encoder": {"name": "x"}, "input": {"rate": 8_000, "features": {}}}),
        "text": Modality.model_validate({"encoder": {"name": "x"}, "input": {"tokenizer": "clip-bpe:600"}}),
    }
    source = {"name": "d", "shards": str(path), "values": {"group": "cls"} if "mix_label" in data else {}}
    config = Data.model_validate({"workers": 0, "sources": [source], **data})
    return Loader(config, build_inputs(parts), [("audio", "text")], seed=0, batch_size=12), clips


def test_mixing_adds_sounds_and_joins_captions(tmp_path: Path) -> None:
    loader, clips = digits(tmp_path, mix=0.5)
    loader.stop_step = 4
    batches, again = list(loader), list(loader)
    text: Any = loader._steps.inputs["text"]
    waves = {t: soundfile.read(io.BytesIO(raw), dtype="float32")[0] for raw, t in clips}
    joined = 0
    for batch, same in zip(batches, again, strict=True):
        assert torch.equal(batch.inputs["audio"]["wave"], same.inputs["audio"]["wave"])
        assert torch.equal(batch.inputs["text"]["ids"], same.inputs["text"]["ids"])
        for row, (key, ids) in enumerate(zip(batch.keys, batch.inputs["text"]["ids"], strict=True)):
            own = f"clip {'abcdefghijkl'[int(key.rsplit('/', 1)[1])]}"
            said = text.tokenizer.decode(ids[batch.inputs["text"]["mask"][row]].tolist())
            n = int(batch.inputs["audio"]["length"][row])
            got = batch.inputs["audio"]["wave"][row, :n].numpy()
            a = waves[own.capitalize() + "."]
            if " and " not in said:
                assert np.array_equal(got, a)
                continue
            joined += 1
            first, second = said.replace(" .", "").split(" and ")
            assert first == own
            b = waves[second.capitalize() + "."]
            assert n == max(len(a), len(b))
            both = np.zeros((2, n))
            both[0, : len(a)], both[1, : len(b)] = a, b
            # What was heard is a sum of the two that its caption names, and both are in it.
            weights, rest, *_ = np.linalg.lstsq(both.T, got, rcond=None)
            if first != second:
                assert float(rest[0]) < 1e-6
                assert (weights > 0).all()
    assert 12 < joined < 36
    plain, _ = digits(tmp_path)
    plain.stop_step = 1
    assert not any(" and " in text.tokenizer.decode(ids.tolist()) for b in plain for ids in b.inputs["text"]["ids"])


def test_mixing_within_a_label(tmp_path: Path) -> None:
    loader, _ = digits(tmp_path, mix=1.0, mix_label="group")
    loader.stop_step = 4
    text: Any = loader._steps.inputs["text"]
    partners: dict[int, set[int]] = {i: set() for i in range(12)}
    for batch in loader:
        for row, (key, ids) in enumerate(zip(batch.keys, batch.inputs["text"]["ids"], strict=True)):
            said = (
                text.tokenizer.decode(ids[batch.inputs["text"]["mask"][row]].tolist()).replace(" .", "").split(" and ")
            )
            own, *others = ("abcdefghijkl".index(x.strip()[-1]) for x in said)
            assert own == int(key.rsplit("/", 1)[1])
            partners[own].update(others)
    assert not partners.pop(11)  # it has no label
    assert all(others and all(i % 3 == own % 3 and i != own for i in others) for own, others in partners.items())
    assert max(len(others) for others in partners.values()) > 1
    data = loader._data.model_dump()
    assert data["mix_label"] == "group"
    assert "mix_label" not in digits(tmp_path)[0]._data.model_dump()
    with pytest.raises(ValueError, match="mix_label: no source reads a value 'kind'; its values are group"):
        Data.model_validate({**data, "mix_label": "kind"})


def test_pictures_are_not_mixed(tmp_path: Path) -> None:
    loader, _ = digits(tmp_path)
    parts = {m: Modality.model_validate({"encoder": {"name": "x"}}) for m in ("image", "text")}
    config = loader._data.model_copy(update={"mix": 0.1})
    with pytest.raises(ConfigError, match=r"data\.mix: 0\.1 .* 'image' cannot"):
        Loader(config, build_inputs(parts), [("image", "text")], seed=0, batch_size=4)
