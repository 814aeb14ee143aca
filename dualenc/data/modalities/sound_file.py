"""Sound files: WAV, FLAC, OGG, MP3 → a stretch of mono samples at the wanted rate.

Only the stretch that is asked for is decoded, in blocks: a three-hour file costs no more memory than a short one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dualenc.data.modalities.modality import DecodeError

FORMATS = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3", "MPEG")
_RATES = (1_000, 1_000_000)
_BLOCK = 1 << 20  # samples of all channels decoded at once
_UNKNOWN = 1 << 40  # a header that does not know its length says something absurd
_LOUDEST = 1 << 16  # floating-point files may hold 16-bit counts, nothing larger; its square still fits fp32
# MPEG and Ogg headers may be off by a codec frame or two, and some decoders drop the last one.
_LOSSY_SLACK = 4 * 1152
_CHANNELS = 64


class Sound:
    """An opened sound file: its header is read, its samples not yet.

    Attributes:
        rate: samples a second.
        frames: samples of each channel; None where the header does not say.
        channels: how many.

    Raises:
        DecodeError: if it is no sound file, holds nothing, or has an absurd rate.
    """

    def __init__(self, raw: bytes) -> None:
        import soundfile

        self._errors = (soundfile.SoundFileError, RuntimeError, OSError, ValueError)
        if not raw:
            raise DecodeError("the file is empty (0 bytes)")
        try:
            self._file = soundfile.SoundFile(io.BytesIO(raw))
        except (*self._errors, TypeError) as e:
            raise DecodeError(f"no sound file that libsndfile reads ({len(raw):,} bytes: {_said(e)})") from e
        self.format, self.rate, self.channels = self._file.format, int(self._file.samplerate), int(self._file.channels)
        if self.format not in FORMATS:
            raise DecodeError(f"{self.format} files are not read; use WAV, FLAC, OGG or MP3")
        if not _RATES[0] <= self.rate <= _RATES[1]:
            raise DecodeError(f"a rate of {self.rate:,} Hz is none of sound ({_RATES[0]:,} to {_RATES[1]:,})")
        if self.channels < 1:
            raise DecodeError("it has no channel")
        frames = int(self._file.frames)
        self.frames = None if frames >= _UNKNOWN else frames
        if self.frames is not None and self.frames < 1:
            raise DecodeError("it holds no samples")

    @property
    def seconds(self) -> float:
        """How long it is; infinity where the header does not say."""
        return math.inf if self.frames is None else self.frames / self.rate

    def read(self, start: int, count: int, rate: int) -> NDArray[np.float32]:
        """Samples from ``start`` on, mean of the channels, resampled.

        Args:
            start: first frame, in the file's own rate.
            count: frames, in the file's own rate; fewer come where the file ends before.
            rate: of the result.

        Returns:
            float32 [T], full scale at ±1.

        Raises:
            DecodeError: if the data is damaged, cut short, or holds NaN or infinite samples.
        """
        mono = self._mono(start, count)
        peak = float(np.abs(mono).max())
        if not math.isfinite(peak):
            raise DecodeError("it holds NaN or infinite samples")
        if peak > _LOUDEST:
            raise DecodeError(f"a sample of {peak:.3g} is no sound (full scale is 1)")
        if rate == self.rate:
            return mono
        import soxr

        out: NDArray[np.float32] = soxr.resample(mono, self.rate, rate, quality="HQ")
        return out

    def _mono(self, start: int, count: int) -> NDArray[np.float32]:
        block = max(1, _BLOCK // self.channels)
        parts, got = [], 0
        try:
            if start or self._file.tell():
                self._file.seek(start)
            while got < count:
                x = self._file.read(min(block, count - got), dtype="float32", always_2d=True)
                if not len(x):
                    break
                parts.append(x[:, 0] if self.channels == 1 else x.mean(axis=1, dtype=np.float32))
                got += len(x)
        except self._errors as e:
            raise DecodeError(f"the sound is damaged or cut short ({_said(e)})") from e
        if self.frames is not None:
            missing = min(count, self.frames - start) - got
            if missing > (_LOSSY_SLACK if self.format in ("OGG", "MP3", "MPEG") else 0):
                raise DecodeError(f"the sound is cut short: {missing:,} of its {self.frames:,} samples are missing")
        if not got:
            raise DecodeError("no samples could be decoded")
        return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))


def wav_of(x: Any, rate: int | None) -> bytes | None:
    """The bytes of a float WAV with the same samples; None where ``x`` is no waveform.

    Args:
        x: a NumPy array or tensor [T] or [channels, T], float with full scale ±1 or int16; or the mapping
            ``{"array": …, "sampling_rate": …}`` of the Hugging Face datasets library.
        rate: samples per second; a mapping says it itself.

    Raises:
        DecodeError: an array of another shape or type, or no rate.
    """
    import soundfile

    if isinstance(x, Mapping) and "array" in x:
        x, rate = x["array"], x.get("sampling_rate", rate)
    if isinstance(x, Tensor):
        x = x.detach().cpu().numpy()
    if not isinstance(x, np.ndarray):
        return None
    if x.ndim not in (1, 2) or x.size == 0 or (x.ndim == 2 and x.shape[0] > min(x.shape[1], _CHANNELS)):
        raise DecodeError(f"a waveform must be [T] or [channels, T], got {list(x.shape)}; give a batch as list(batch)")
    if x.dtype == np.int16:
        x = x.astype(np.float32) / 32768
    if x.dtype.kind != "f":
        raise DecodeError(f"a waveform must be float with full scale ±1, or int16, got {x.dtype}")
    if rate is None:
        raise DecodeError("a waveform needs its rate: add sample_rate=48000, or whatever it is")
    out = io.BytesIO()
    soundfile.write(out, x.T.astype(np.float32), int(rate), format="WAV", subtype="FLOAT")
    return out.getvalue()


def _said(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0].rstrip(".")
