"""Regular multichannel time series (wearables, motion, sensors, vitals) → windows of values, ragged in time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from dualenc.config import Positive, Section, Share
from dualenc.data.arrays import read_npy
from dualenc.data.modalities.modality import DecodeError, modalities, npy_of

if TYPE_CHECKING:
    from pathlib import Path

F32 = NDArray[np.float32]
NPY = b"\x93NUMPY"
MAX_BYTES = 256 * 2**20
_NonNegative = Annotated[float, Field(ge=0)]


class SeriesAugment(Section):
    """Training only, each drawn per series (Um et al. 2017, augmentation of wearable sensor data)."""

    jitter: _NonNegative = Field(default=0.0, description="standard deviation of noise, in units of the channel's own")
    scale: _NonNegative = Field(
        default=0.0, description="each channel times a normal factor, mean 1 and this deviation"
    )
    drop_channels: Share = Field(default=0.0, description="chance of each channel to be set to zero; never all of them")
    reverse: Share = Field(default=0.0, description="chance to run backwards")


class SeriesConfig(Section):
    """How a series becomes a row.

    Series longer than ``length`` are cropped: at random in training, in the middle in evaluation. Shorter ones keep
    their length; towers mask the padding of the batch.
    """

    channels: Positive = Field(description="values at each time")
    length: Positive = Field(default=256, description="longest series in times; longer ones are cropped")
    min_length: Positive = Field(default=8, description="shorter series are refused")
    layout: Literal["channels_first", "time_first"] = Field(
        default="channels_first", description="of .npy files: [channels, T] or [T, channels]; .csv has a line a time"
    )
    normalize: Literal["none", "channel", "series"] = Field(
        default="none",
        description="subtract the mean and divide by the deviation of each channel, or of the whole series; none: "
        "mean and std below",
    )
    mean: list[float] = Field(default=[0.0], description="subtracted; one value, or one a channel")
    std: list[Annotated[float, Field(gt=0)]] = Field(
        default=[1.0], description="divided by; one value, or one a channel"
    )
    missing: Literal["refuse", "zero", "hold"] = Field(
        default="refuse", description="NaN: refuse the series, set it to zero, or hold the last value of the channel"
    )
    augment: SeriesAugment = Field(default=SeriesAugment(), description="training only")

    @model_validator(mode="after")
    def _fits(self) -> SeriesConfig:
        if self.min_length > self.length:
            raise ValueError(f"min_length ({self.min_length}) is above length ({self.length})")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(
                    f"{name} has {len(values)} values; write one, or one for each of {self.channels} channels"
                )
        return self


@modalities.register("series")
class SeriesInput:
    """Series as rows float32 [C, T]; ``collate`` → ``{"values": float32 [B, C, T], "length": int64 [B]}``.

    ``values`` is zero beyond ``length``. Members are ``.npy`` (numbers, [C, T] or [T, C], or [T] for one channel) or
    ``.csv`` (a line a time, with or without a header).
    """

    Config: ClassVar[type[BaseModel]] = SeriesConfig
    default_members: ClassVar[list[str]] = ["series.npy", "npy", "series.csv", "csv"]
    prompt: ClassVar[str] = "a recording of {}"

    def __init__(self, config: SeriesConfig, base_dir: str | Path | None = None) -> None:
        self.config = config
        self.mean, self.std = (np.array(v, np.float32)[:, None] for v in (config.mean, config.std))

    def decode(self, raw: Any) -> F32:
        """Bytes → float32 [C, T] without missing values.

        Raises:
            DecodeError: for what is not a table of numbers, another number of channels, too few times, an infinite
                value, or a missing one unless ``missing`` says what to do.
        """
        cfg = self.config
        if not isinstance(raw, bytes | bytearray | memoryview):
            raise DecodeError(f"a series must be the bytes of a .npy or .csv file, got {type(raw).__name__}")
        x = _array(bytes(raw), time_first=cfg.layout == "time_first")
        if x.shape[0] != cfg.channels:
            raise DecodeError(f"has {x.shape[0]} channels of {x.shape[1]} values, expected {cfg.channels} channels")
        if x.shape[1] < cfg.min_length:
            raise DecodeError(f"has {x.shape[1]} times, fewer than min_length ({cfg.min_length})")
        if np.isinf(x).any():
            raise DecodeError("has infinite values")
        gaps = np.isnan(x)
        if gaps.any():
            if cfg.missing == "refuse":
                raise DecodeError(f"{int(gaps.sum())} values are missing; missing: zero or hold keeps the series")
            x = _filled(x, gaps, hold=cfg.missing == "hold")
        return x

    def train(self, x: F32, rng: np.random.Generator) -> F32:
        """A random window, normalised and augmented."""
        room = x.shape[1] - self.config.length
        start = int(rng.integers(room + 1)) if room > 0 else 0
        y = self._normalised(x[:, start : start + self.config.length])
        a = self.config.augment
        if a.scale:
            y = y * rng.normal(1.0, a.scale, (len(y), 1)).astype(np.float32)
        if a.jitter:
            y = y + rng.normal(0.0, a.jitter, y.shape).astype(np.float32) * y.std(1, keepdims=True)
        if a.drop_channels:
            kept = rng.random(len(y)) >= a.drop_channels
            kept[int(rng.integers(len(y)))] = True
            y = y * kept[:, None]
        if a.reverse and rng.random() < a.reverse:
            y = y[:, ::-1]
        return np.ascontiguousarray(y, np.float32)

    def eval(self, x: F32) -> F32:
        """The window in the middle, normalised."""
        start = max(x.shape[1] - self.config.length, 0) // 2
        return np.ascontiguousarray(self._normalised(x[:, start : start + self.config.length]), np.float32)

    def collate(self, rows: list[F32]) -> dict[str, Tensor]:
        """Rows [C, T] → ``{"values": [B, C, longest], "length": [B]}``."""
        lengths = [r.shape[1] for r in rows]
        values = np.zeros((len(rows), self.config.channels, max(lengths)), np.float32)
        for row, out, n in zip(rows, values, lengths, strict=True):
            out[:, :n] = row
        return {"values": torch.from_numpy(values), "length": torch.tensor(lengths)}

    def dummy(self) -> F32:
        """The shortest series there may be, of zeros."""
        return np.zeros((self.config.channels, self.config.min_length), np.float32)

    def describe(self) -> dict[str, Any]:
        """Kind and settings."""
        return {"kind": "series", "config": self.config.model_dump(mode="json")}

    def as_raw(self, x: Any, rate: int | None = None) -> Any:
        """An array or tensor in ``layout`` → the bytes of a ``.npy``; anything else is not a series (None)."""
        return npy_of(x)

    @staticmethod
    def preview(raw: bytes) -> dict[str, str]:
        """Its size and range, for a page."""
        x = _array(bytes(raw), time_first=False)
        known = x[np.isfinite(x)]
        span = f", from {known.min():.3g} to {known.max():.3g}" if known.size else ""
        return {"text": f"{x.shape[0]} × {x.shape[1]} values{span}"}

    def _normalised(self, x: F32) -> F32:
        if self.config.normalize == "none":
            return (x - self.mean) / self.std
        axis = 1 if self.config.normalize == "channel" else None
        mean, deviation = x.mean(axis, keepdims=True), x.std(axis, keepdims=True)
        return np.asarray((x - mean) / np.maximum(deviation, 1e-6), np.float32)


def _array(raw: bytes, time_first: bool) -> F32:
    """The numbers of a .npy or .csv as float32 [C, T]."""
    if len(raw) > MAX_BYTES:
        raise DecodeError(f"has {len(raw):,} bytes; a series has at most {MAX_BYTES:,}")
    if raw.startswith(NPY):
        x = read_npy(raw)
        if x.dtype.kind not in "fiu":
            raise DecodeError(f"holds {x.dtype}, not numbers")
        if x.ndim == 1:
            x = x[:, None] if time_first else x[None]
        if x.ndim != 2 or not x.size:
            raise DecodeError(f"has the shape {list(x.shape)}; a series is [channels, T] or [T, channels]")
        x = x.T if time_first else x
    else:
        x = _csv(raw).T
    with np.errstate(over="ignore"):  # beyond float32 is infinite, which is refused
        return np.ascontiguousarray(x, np.float32)


def _csv(raw: bytes) -> NDArray[Any]:
    """[T, C] from text: commas, semicolons or tabs; a first line that is not numbers is the header."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise DecodeError("is neither a .npy file nor text") from e
    lines = [line for line in text.splitlines() if line.strip()]
    mark = next((m for m in (",", ";", "\t") if lines and m in lines[0]), ",")
    if lines and _numbers(lines[0], mark) is None:
        del lines[0]
    rows = [_numbers(line, mark) for line in lines]
    if not rows:
        raise DecodeError("holds no numbers")
    bad = next((n for n, row in enumerate(rows) if row is None), None)
    if bad is not None:
        raise DecodeError(f"line {bad + 1} of the numbers holds something else: {lines[bad][:40]!r}")
    if len({len(row) for row in rows if row is not None}) > 1:
        raise DecodeError("its lines have different numbers of columns")
    return np.array(rows, np.float64)


def _numbers(line: str, mark: str) -> list[float] | None:
    """The numbers of a line; an empty cell is a missing value."""
    try:
        return [float(cell) if cell.strip() else float("nan") for cell in line.split(mark)]
    except ValueError:
        return None


def _filled(x: F32, gaps: NDArray[np.bool_], hold: bool) -> F32:
    """Missing values as zero, or as the last value before them (the first after them at the beginning)."""
    if not hold:
        return np.where(gaps, np.float32(0), x).astype(np.float32)
    times = np.arange(x.shape[1])
    last = np.maximum.accumulate(np.where(gaps, -1, times), axis=1)
    first = np.argmin(gaps, axis=1)[:, None]  # 0 where everything is missing
    out = np.take_along_axis(x, np.where(last < 0, first, last), axis=1)
    return np.nan_to_num(out, nan=0.0).astype(np.float32)
