"""Audio → mono waveforms at the encoder's sample rate, ragged; the tower computes the log-mel on the device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from dualenc.config import Positive, Section, Share
from dualenc.data.modalities.modality import DecodeError, modalities

if TYPE_CHECKING:
    from pathlib import Path

    from dualenc.data.modalities.sound_file import Sound

_Positive = Annotated[float, Field(gt=0)]
_NonNegative = Annotated[float, Field(ge=0)]
_Count = Annotated[int, Field(ge=0)]
_Speed = Annotated[float, Field(ge=0.25, le=4)]

EQUALIZER_POINTS = 6
"""Points of an equalizer's curve, from the lowest mel bin to the highest."""


class Features(Section):
    """What the tower computes from a waveform on the device. Defaults: 64 mel bins in dB, for dualenc's own tower."""

    kind: Literal["mel", "waveform"] = Field(default="mel", description="log-mel, or the waveform itself")
    n_fft: Positive = Field(default=1024, description="samples of an FFT")
    win: Positive | None = Field(default=None, description="window length in samples; default: n_fft")
    hop: Positive = Field(default=320, description="samples between frames")
    window: Literal["hann", "hann_symmetric", "povey"] = Field(default="hann", description="window function")
    center: bool = Field(default=True, description="frame k is centred on sample k · hop; the ends are reflected")
    drop_last: bool = Field(default=False, description="leave out the last frame (Whisper)")
    remove_dc: bool = Field(default=False, description="subtract each frame's mean (Kaldi)")
    preemphasis: Share = Field(default=0.0, description="coefficient of the pre-emphasis filter (Kaldi: 0.97); 0: none")
    scale: _Positive = Field(default=1.0, description="factor for the waveform (32768: Kaldi's 16-bit range)")
    mels: Positive = Field(default=64, description="mel bins")
    f_min: _NonNegative = Field(default=50.0, description="lower edge of the lowest bin in Hz")
    f_max: _Positive | None = Field(default=None, description="default: half the rate")
    mel_scale: Literal["htk", "slaney", "kaldi"] = Field(default="slaney", description="formula of the mel scale")
    mel_norm: bool = Field(default=True, description="divide each triangle by its width (Slaney)")
    log: Literal["db", "log10", "ln"] = Field(default="db", description="logarithm of the power; db: 10 · log10")
    floor: _Positive = Field(default=1e-10, description="lower bound of the power before the logarithm")
    span: _Positive | None = Field(default=None, description="clamp the log-mel at this far below the clip's maximum")
    mean: float = Field(default=-40.0, description="subtracted from the log-mel")
    std: _Positive = Field(default=20.0, description="the log-mel is divided by this")
    normalize: Literal["none", "waveform", "bins"] = Field(
        default="none",
        description="normalise each clip to mean 0 and variance 1: its waveform, or each of its mel bins",
    )
    frames: Positive | None = Field(default=None, description="pad with zeros or cut to this many frames (AST)")
    stack: Positive = Field(default=1, description="consecutive frames stacked into one (w2v-BERT: 2)")


class SpecAugment(Section):
    """Ranges of mel bins and of frames set to the clip's mean (Park et al. 2019); shares are of the widest mask."""

    freq_masks: _Count = Field(default=2, description="masks of mel bins")
    freq_share: Share = Field(default=0.2, description="widest mask as a share of the bins")
    time_masks: _Count = Field(default=2, description="masks of frames")
    time_share: Share = Field(default=0.1, description="widest mask as a share of the frames")
    p: Share = Field(default=1.0, description="share of clips that are masked")


class AudioAugment(Section):
    """Training only. ``gain_db``: range of a random gain; ``mix_db``: how much louder the first of two mixed clips is
    than the second (``data.mix`` says how many are mixed). ``speed`` plays a clip faster or slower, pitch included;
    ``equalizer_db`` filters it with a random smooth curve. ``crop`` keeps a random stretch of a clip, ``roll`` starts
    it at a random place of that stretch. ``hide`` is for towers that hide spans of a clip from themselves
    (own/audio_transformer) and losses that ask what is there (``masked_units``)."""

    gain_db: tuple[float, float] | None = Field(default=None, description="range of a random gain in dB; null: none")
    mix_db: tuple[float, float] = Field(
        default=(-5.0, 5.0), description="range in dB of how much louder the first of two mixed clips is"
    )
    spec: SpecAugment | None = Field(default=None, description="masking of the log-mel; null: none")
    speed: tuple[_Speed, _Speed] | None = Field(
        default=None, description="range of a random speed; 2: twice as fast and an octave higher; null: none"
    )
    equalizer_db: _NonNegative = Field(
        default=0.0, description="largest gain and loss in dB of a random smooth curve over the mel bins; 0: none"
    )
    crop: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="least share of a clip that is kept; between it and 1 the share is drawn"
    )
    roll: bool = Field(
        default=False, description="start the clip at a random place; what was before it comes at the end"
    )
    hide: _Count = Field(default=0, description="spans of a clip that the tower hides from itself")

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the newer settings at their defaults, as descriptions were before these existed."""
        out: dict[str, Any] = write(self)
        newer = ("speed", "equalizer_db", "crop", "roll", "hide")
        idle = {name for name in newer if out[name] == type(self).model_fields[name].default}
        return {k: v for k, v in out.items() if k not in idle}


class AudioConfig(Section):
    """How a clip becomes a row.

    Clips longer than ``max_s`` are cropped: at random in training, as ``eval_crop`` says in evaluation. ``pad``: none
    keeps each clip's length (towers mask the batch's padding); the others fill up to ``max_s`` on the device: zeros;
    repeat: copies of the clip, the last one cut; repeatpad: as many whole copies as fit, then zeros.
    """

    rate: Positive = Field(default=16_000, description="samples per second; other rates are resampled")
    max_s: _Positive = Field(default=10.0, description="longest clip in seconds; longer ones are cropped")
    min_s: _NonNegative = Field(default=0.05, description="shorter clips are refused: they would not fill a window")
    eval_crop: Literal["start", "center"] = Field(
        default="center", description="which part of a long clip evaluation sees"
    )
    pad: Literal["none", "zeros", "repeat", "repeatpad"] = Field(
        default="none", description="how short clips are filled up to max_s"
    )
    long: Literal["crop", "fusion"] = Field(
        default="crop",
        description="for clips longer than max_s; fusion (CLAP): the whole clip shrunk, and three crops of it",
    )
    fusion_s: _Positive = Field(default=60.0, description="fusion uses at most this many seconds of a clip")
    ship: Literal["float32", "int16"] = Field(
        default="float32",
        description="how samples leave the workers; int16: half the memory, noise at −98 dB of full scale",
    )
    features: Features = Field(default=Features(), description="what is computed from the waveform on the device")
    augment: AudioAugment = Field(default=AudioAugment(), description="training only")

    @model_validator(mode="after")
    def _fits(self) -> AudioConfig:
        f = self.features
        if f.f_max is not None and f.f_max > self.rate / 2:
            raise ValueError(f"features.f_max ({f.f_max:g} Hz) is above half the rate ({self.rate / 2:g})")
        if (f.win or f.n_fft) > f.n_fft:
            raise ValueError(f"features.win ({f.win}) must not be above n_fft ({f.n_fft})")
        if self.long == "fusion" and (self.pad == "none" or f.kind != "mel"):
            raise ValueError("long: fusion needs features.kind: mel and a pad (CLAP's is repeatpad)")
        if self.augment.equalizer_db and (f.kind != "mel" or self.long == "fusion"):
            raise ValueError("augment.equalizer_db acts on mel bins: it needs features.kind: mel and long: crop")
        if self.augment.speed is not None and self.augment.speed[0] > self.augment.speed[1]:
            raise ValueError(f"augment.speed: {list(self.augment.speed)} must be [slowest, fastest]")
        if self.min_s > self.max_s:
            raise ValueError(f"min_s ({self.min_s:g}) is above max_s ({self.max_s:g})")
        return self


@modalities.register("audio")
class AudioInput:
    """Clips as rows ``{"wave": [T], …}``; ``collate`` → ``{"wave": float32 | int16 [B, T], "length": int64 [B], …}``.

    ``wave`` is mono at ``rate``, full scale ±1 (int16: ±32767), zero beyond ``length``. With SpecAugment ``spec``
    float32 [B, K, 2]: start and width of each mask as shares, frequency masks first. With ``augment.equalizer_db``,
    ``equalizer`` float32 [B, P]: gains in dB at points from the lowest mel bin to the highest. With fusion ``crops``
    float32 [B, 3]: where in its third of the clip each crop lies. With ``augment.hide``, ``hide`` float32 [B, S]: where
    the spans that the tower hides begin, as shares.

    float16 is not offered: its noise follows the loud parts at −72 dB and drowns the quiet bands.
    """

    Config: ClassVar[type[BaseModel]] = AudioConfig
    default_members: ClassVar[list[str]] = ["flac", "wav", "ogg", "mp3", "opus"]
    prompt: ClassVar[str] = "the sound of {}"

    def __init__(self, config: AudioConfig, base_dir: str | Path | None = None) -> None:
        self.config = config
        self.samples = round(config.max_s * config.rate)

    # --- the protocol -----------------------------------------------------------------------------------------

    def decode(self, raw: Any) -> Sound:
        """Read the header; samples are decoded when a view asks for them.

        Raises:
            DecodeError: if it is not an audio file, or shorter than ``min_s``.
        """
        from dualenc.data.modalities.sound_file import Sound

        if not isinstance(raw, bytes | bytearray | memoryview):
            raise DecodeError(f"audio must be the bytes of a file, got {type(raw).__name__}")
        sound = Sound(bytes(raw))
        if sound.seconds < self.config.min_s:
            raise DecodeError(
                f"{sound.frames} samples at {sound.rate} Hz are shorter than min_s ({self.config.min_s:g} s)"
            )
        return sound

    def mix(self, a: Sound, b: Sound, rng: np.random.Generator) -> tuple[Sound, Sound]:
        """Two clips that ``train`` crops separately and adds."""
        return a, b

    def train(self, x: Sound | tuple[Sound, Sound], rng: np.random.Generator) -> dict[str, Tensor]:
        """A random crop at a random speed and gain, the equalizer's curve, and the masks of SpecAugment."""
        augment = self.config.augment
        sounds = x if isinstance(x, tuple) else (x,)
        waves = [self._varied(self._played(s, rng), rng) for s in sounds]
        wave = waves[0] if len(waves) == 1 else mixed(waves[0], waves[1], rng.uniform(*augment.mix_db))
        if augment.gain_db is not None:
            wave = wave * np.float32(10 ** (rng.uniform(*augment.gain_db) / 20))
        row = {"wave": self._shipped(wave)}
        if augment.spec is not None:
            row["spec"] = _masks(augment.spec, rng)
        if augment.equalizer_db:
            gains = rng.uniform(-augment.equalizer_db, augment.equalizer_db, EQUALIZER_POINTS)
            row["equalizer"] = torch.from_numpy(gains.astype(np.float32))
        if self.config.long == "fusion":
            row["crops"] = torch.from_numpy(rng.random(3, dtype=np.float32))
        if augment.hide:
            row["hide"] = torch.from_numpy(rng.random(augment.hide, dtype=np.float32))
        return row

    def eval(self, x: Sound) -> dict[str, Tensor]:
        """The clip, or always the same stretch of a long one."""
        middle = self.config.eval_crop == "center"
        row = {"wave": self._shipped(self._stretch(x, lambda room: room // 2 if middle else 0))}
        if self.config.long == "fusion":
            row["crops"] = torch.full((3,), 0.5)
        return row

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pad to the longest row of the batch."""
        length = torch.tensor([len(r["wave"]) for r in rows])
        wave = torch.zeros(len(rows), int(length.max()), dtype=rows[0]["wave"].dtype)
        for i, row in enumerate(rows):
            wave[i, : len(row["wave"])] = row["wave"]
        more = {k: torch.stack([r[k] for r in rows]) for k in rows[0] if k != "wave"}
        return {"wave": wave, "length": length, **more}

    def dummy(self) -> dict[str, Tensor]:
        """A tenth of a second of quiet noise, always the same: silence would have zero variance."""
        noise = np.random.default_rng(0).normal(0, 0.01, max(self.config.rate // 10, self.config.features.n_fft))
        row = {"wave": self._shipped(noise.astype(np.float32)[: self.samples])}
        if self.config.augment.spec is not None:
            row["spec"] = torch.zeros(self.config.augment.spec.freq_masks + self.config.augment.spec.time_masks, 2)
        if self.config.augment.equalizer_db:
            row["equalizer"] = torch.zeros(EQUALIZER_POINTS)
        if self.config.long == "fusion":
            row["crops"] = torch.full((3,), 0.5)
        if self.config.augment.hide:
            row["hide"] = torch.zeros(self.config.augment.hide)
        return row

    def as_raw(self, x: Any, rate: int | None = None) -> bytes | None:
        """A waveform [T] or [channels, T] (float, full scale ±1; int16), with its rate, → the bytes of a float WAV."""
        from dualenc.data.modalities.sound_file import wav_of

        return wav_of(x, rate)

    def describe(self) -> dict[str, Any]:
        """The kind and its settings."""
        return {"kind": "audio", "config": self.config.model_dump(mode="json")}

    # --- parts ------------------------------------------------------------------------------------------------

    def _played(self, x: Sound, rng: np.random.Generator) -> NDArray[np.float32]:
        """A random stretch of a long clip, at a random speed (``augment.speed``; log-uniform)."""
        speed = self.config.augment.speed
        pace = 1.0 if speed is None else math.exp(rng.uniform(math.log(speed[0]), math.log(speed[1])))
        return self._stretch(x, lambda room: int(rng.integers(0, room + 1)), pace)

    def _stretch(self, x: Sound, place: Any, speed: float = 1.0) -> NDArray[np.float32]:
        """At most ``max_s`` (with fusion ``fusion_s``) of a clip; ``place(room)`` picks the first frame.

        A clip that is resampled to a lower rate and taken for one at ``config.rate`` is played faster.
        """
        config = self.config
        keep = self.samples
        if config.long == "fusion":
            keep = max(keep, round(config.fusion_s * config.rate))
        rate = config.rate / speed
        want = math.ceil(keep * x.rate / rate)
        # Where the length is unknown, the clip is read from its start.
        room = 0 if x.frames is None else max(x.frames - want, 0)
        wave = x.read(place(room) if room else 0, want, rate)[:keep]
        if len(wave) < 1:
            raise DecodeError(f"no sample is left after resampling to {config.rate} Hz")
        return wave

    def _varied(self, wave: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
        """A random stretch of a clip (``augment.crop``), beginning anywhere in it (``augment.roll``)."""
        augment = self.config.augment
        if augment.crop < 1:
            least = min(len(wave), max(math.ceil(self.config.min_s * self.config.rate), self.config.features.n_fft))
            keep = max(round(len(wave) * rng.uniform(augment.crop, 1)), least)
            start = int(rng.integers(0, len(wave) - keep + 1))
            wave = wave[start : start + keep]
        return np.roll(wave, int(rng.integers(len(wave)))) if augment.roll else wave

    def _shipped(self, wave: NDArray[np.float32]) -> Tensor:
        if self.config.ship == "int16":
            wave = np.round(np.clip(wave, -1, 1) * 32767).astype(np.int16)  # type: ignore[assignment]
        return torch.from_numpy(np.ascontiguousarray(wave))


def mixed(a: NDArray[np.float32], b: NDArray[np.float32], db: float) -> NDArray[np.float32]:
    """Add two clips, the first ``db`` dB louder (RMS); the sum is as loud as the first and as long as the longer."""
    rms_a, rms_b = (float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) for x in (a, b))
    out = np.zeros(max(len(a), len(b)), np.float32)
    out[: len(a)] += a
    if rms_a > 0 and rms_b > 0:
        share = rms_a / rms_b * 10 ** (-db / 20)
        out[: len(b)] += np.float32(share) * b
        out /= np.float32(math.sqrt(1 + 10 ** (-db / 10)))
    else:  # one of them is silent, so there is no ratio to set
        out[: len(b)] += b
    return out


def _masks(spec: SpecAugment, rng: np.random.Generator) -> Tensor:
    """Start and width of each mask as shares of the whole, float32 [K, 2]; frequency masks first."""
    widest = np.repeat([spec.freq_share, spec.time_share], [spec.freq_masks, spec.time_masks])
    width = rng.random(len(widest)) * widest * (rng.random() < spec.p)
    start = rng.random(len(widest)) * (1 - width)
    return torch.from_numpy(np.stack([start, width], 1).astype(np.float32))
