"""Series: what is read, what is refused and why, windows, and a tower that no padding reaches."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from dualenc.config import Component, settings_as
from dualenc.data.modalities import DecodeError, modalities
from dualenc.data.modalities.series import SeriesInput
from dualenc.data.sources import iter_source
from dualenc.data.sources.item import sources
from dualenc.encoders import build_tower
from dualenc.errors import ConfigError, DataError

TS = """#Four of us, walking and not.
@problemName Steps
@timeStamps false
@univariate false
@classLabel true walk rest
@data
1,2,3,4,5,6,7,8:0,0,1,0,0,1,0,0:walk
1,1,1,1,1,1,1,1,1,1:?,0,0,0,0,0,0,0,0,0:rest
1,2,3:1,2:walk
"""


def series(**settings: object) -> SeriesInput:
    cls = modalities["series"]
    return cls(settings_as(cls.Config, {"channels": 2, **settings}, "input"))  # type: ignore[return-value]


def npy(x: object) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(x), allow_pickle=False)
    return out.getvalue()


def test_an_npy_and_a_csv_of_the_same_numbers_are_one_series() -> None:
    x = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32)
    text = "\n".join(f"{float(a)!r};{float(b)!r}" for a, b in x.T).encode()
    for raw in (npy(x), text, b"left;right\n" + text):
        assert np.array_equal(series().decode(raw), x)
    assert np.array_equal(series(layout="time_first").decode(npy(x.T)), x)
    assert series(channels=1).decode(npy(np.arange(9, dtype=np.int16))).shape == (1, 9)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (npy(np.zeros((3, 20), np.float32)), "has 3 channels of 20 values, expected 2"),
        (npy(np.zeros((2, 3), np.float32)), "has 3 times, fewer than min_length"),
        (npy(np.full((2, 20), np.inf)), "infinite"),
        (npy(np.full((2, 20), np.nan)), "40 values are missing"),
        (npy(np.zeros((2, 2, 9))), "has the shape"),
        (npy(np.zeros((2, 9), bool)), "holds bool"),
        (b"1,2\n3\n" * 5, "different numbers of columns"),
        (b"\xff\xfe\x00", "neither"),
        (b"", "no numbers"),
        (b"time,x\n", "no numbers"),
        (b"x,y\n1,2\n3,many\n", "line 2 of the numbers holds something else"),
        (npy(np.zeros((2, 64)))[:-8], "needs 1,024 bytes, but it has 1,016"),
    ],
)  # fmt: skip
def test_what_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(DecodeError, match=why):
        series().decode(raw)


def test_missing_values() -> None:
    x = np.arange(20, dtype=np.float32).reshape(2, 10)
    x[0, :2], x[0, 5] = np.nan, np.nan
    zero, hold = series(missing="zero").decode(npy(x)), series(missing="hold").decode(npy(x))
    assert (zero[0, 0], zero[0, 5]) == (0, 0)
    assert hold[0].tolist() == [2, 2, 2, 3, 4, 4, 6, 7, 8, 9]
    assert np.array_equal(hold[1], x[1])


def test_windows_are_seeded_and_evaluation_sees_the_middle() -> None:
    x = np.stack([np.arange(50.0), -np.arange(50.0)]).astype(np.float32)
    source = series(length=10, augment={"jitter": 0.1, "scale": 0.1, "drop_channels": 0.3, "reverse": 0.5})
    one, two = (source.train(x, np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(one, two)
    assert one.shape == (2, 10)
    assert source.eval(x)[0].tolist() == list(range(20, 30))
    starts = {int(series(length=10).train(x, np.random.default_rng(i))[0, 0]) for i in range(300)}
    assert starts == set(range(41))
    silent = series(length=10, augment={"drop_channels": 1.0})
    assert all(np.abs(silent.train(x, np.random.default_rng(i))).sum() > 0 for i in range(20))  # never all channels
    assert abs(series(length=50, normalize="channel").eval(x).mean(1)).max() < 1e-6
    given = series(length=50, mean=[1.0, 0.0], std=[2.0, 1.0]).eval(x)
    assert given[0, 3] == pytest.approx(1.0)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="one for each of 2 channels"):
        series(mean=[0.0, 1.0, 2.0])
    with pytest.raises(ConfigError, match="min_length"):
        series(length=4)


def test_no_padding_reaches_a_feature() -> None:
    torch.manual_seed(0)
    source = series(length=64)
    component = Component(name="own/series_cnn", widths=[8, 16, 16])
    tower = build_tower("series", component, source.describe(), 8, "modalities.series.encoder")
    for p in tower.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tower.eval()
    draw = np.random.default_rng(0)
    rows = [source.eval(draw.normal(size=(2, n)).astype(np.float32)) for n in (8, 9, 31, 64)]
    together = tower.encode(source.collate(rows))
    alone = torch.cat([tower.encode(source.collate([r])) for r in rows])
    assert (together - alone).abs().max() < 2e-6
    loud = source.collate(rows)
    loud["values"][0, :, 8:] = 1e3  # what lies beyond a series' end
    assert torch.equal(tower.encode(loud)[0], together[0])
    with pytest.raises(ConfigError, match="use 5"):
        build_tower("series", Component(name="own/series_cnn", kernel=4), source.describe(), 8, "x")


def test_a_ts_file(tmp_path: Path) -> None:
    file = tmp_path / "Steps_TRAIN.ts"
    file.write_text(TS)
    settings = {"path": str(file), "names": {"walk": "walking"}, "caption": "somebody {class}"}
    items = list(sources["ts"].read(sources["ts"].settings(**settings)))
    assert [i.id for i in items] == ["Steps_TRAIN-00000", "Steps_TRAIN-00001", "Steps_TRAIN-00002"]
    assert [i.fields["label"] for i in items] == ["walking", "rest", "walking"]
    assert items[0].contents["text"][0].text == "somebody walking"
    first = series().decode(items[0].contents["series"][0].read())
    assert first[:, 2].tolist() == [3, 1]
    assert series(missing="hold").decode(items[1].contents["series"][0].read()).shape == (2, 10)
    with pytest.raises(DataError, match="equally long"):
        items[2].contents["series"][0].read()
    got = dict(iter_source("ts", settings))
    assert set(got) == {"Steps_TRAIN-00000", "Steps_TRAIN-00001", "Steps_TRAIN-00002"}
    file.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"is not a \.ts file"):
        next(iter(sources["ts"].read(sources["ts"].settings(path=str(file)))))
