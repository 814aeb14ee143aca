"""Audio files: WAV, FLAC, OGG, MP3 → a section of mono samples at the requested rate.

Only that section is decoded, in blocks: a three-hour file needs no more memory than a short one.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dualenc.data.modalities.modality import DecodeError, reason_of
from dualenc.data.modalities.sound_length import missing_bytes

FORMATS = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3", "MPEG")
_RATES = (1_000, 1_000_000)
_BLOCK = 1 << 20  # samples of all channels decoded at once
_UNKNOWN = 1 << 40  # libsndfile reports an absurd count where the header states no length
_LOUDEST = 1 << 16  # floating-point files may hold 16-bit counts, nothing larger; its square still fits fp32
# MPEG and Ogg headers may be off by a codec frame or two, and some decoders drop the last one.
_LOSSY_SLACK = 4 * 1152
_CHANNELS = 64
_AV_SECONDS = 600  # FFmpeg's containers are decoded completely, so ten minutes at most


class Sound:
    """An opened audio file: its header has been read, its samples have not.

    Attributes:
        rate: samples per second.
        frames: samples of each channel; None where the header does not say.
        channels: their number.

    Raises:
        DecodeError: if it is not an audio file, is empty, or has an implausible sample rate.
    """

    def __init__(self, raw: bytes) -> None:
        import soundfile

        if not raw:
            raise DecodeError("the file is empty (0 bytes)")
        if raw[4:8] == b"ftyp" or raw.startswith(b"\x1aE\xdf\xa3"):
            raw = _through_av(raw)
        try:
            self._file = soundfile.SoundFile(io.BytesIO(raw))
        except Exception as e:
            raise DecodeError(f"not an audio file that libsndfile reads ({len(raw):,} bytes: {_said(e)})") from e
        self.format, self.rate, self.channels = self._file.format, int(self._file.samplerate), int(self._file.channels)
        if self.format not in FORMATS:
            raise DecodeError(f"{self.format} files are not read; use WAV, FLAC, OGG or MP3")
        if not _RATES[0] <= self.rate <= _RATES[1]:
            raise DecodeError(f"the sample rate {self.rate:,} Hz is not between {_RATES[0]:,} and {_RATES[1]:,}")
        if self.channels < 1:
            raise DecodeError("the file has no audio channel")
        frames = int(self._file.frames)
        self.frames = None if frames >= _UNKNOWN else frames
        if self.frames is not None and self.frames < 1:
            raise DecodeError("the file holds no samples")
        lost = missing_bytes(raw)
        if lost:
            raise DecodeError(
                "the audio is cut short: its last page is missing"
                if self.format == "OGG"
                else f"the audio is cut short: {lost:,} bytes of its samples are missing"
            )

    @property
    def seconds(self) -> float:
        """How long it is; infinity where the header does not say."""
        return math.inf if self.frames is None else self.frames / self.rate

    def read(self, start: int, count: int, rate: float) -> NDArray[np.float32]:
        """Samples from ``start`` on: channels averaged, then resampled.

        Args:
            start: first frame, in the file's own rate.
            count: frames, in the file's own rate; fewer are returned where the file ends earlier.
            rate: of the result.

        Returns:
            float32 [T], full scale at ±1.

        Raises:
            DecodeError: if the data is damaged, cut short, or holds NaN or infinite samples.
        """
        mono = self._mono(start, count)
        peak = float(np.abs(mono).max())
        if not math.isfinite(peak):
            raise DecodeError("the audio holds NaN or infinite samples")
        if peak > _LOUDEST:
            raise DecodeError(f"a sample has the value {peak:.3g}, far beyond full scale (1)")
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
        except Exception as e:
            raise DecodeError(f"the audio is damaged or cut short ({_said(e)})") from e
        if self.frames is not None:
            missing = min(count, self.frames - start) - got
            if missing > (_LOSSY_SLACK if self.format in ("OGG", "MP3", "MPEG") else 0):
                raise DecodeError(f"the audio is cut short: {missing:,} of its {self.frames:,} samples are missing")
        if not got:
            raise DecodeError("no samples could be decoded")
        return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))


def wav_of(x: Any, rate: int | None) -> bytes | None:
    """The bytes of a float WAV with the same samples; None where ``x`` is not a waveform.

    Args:
        x: a NumPy array or tensor [T] or [channels, T], float with full scale ±1 or int16; or the mapping
            ``{"array": …, "sampling_rate": …}`` of the Hugging Face datasets library.
        rate: samples per second; a mapping brings its own.

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
    return reason_of(e).rstrip(".")


def _through_av(raw: bytes) -> bytes:
    """MP4, M4A, WebM, Matroska → the first audio track as the bytes of a float WAV, decoded by FFmpeg's libraries.

    Raises:
        DecodeError: without the av extra, or a file without audio.
    """
    import numpy as np
    import soundfile

    if importlib.util.find_spec("av") is None:
        raise DecodeError("m4a, mp4 and webm audio needs a package: pip install 'dualenc[av]'")
    import av

    try:
        with av.open(io.BytesIO(raw), "r") as container:
            if not container.streams.audio:
                raise DecodeError("the file has no audio track")
            stream = container.streams.audio[0]
            rate, parts, total = stream.rate, [], 0
            layout = av.AudioResampler(format="flt", layout=stream.layout, rate=rate)
            for frame in container.decode(stream):
                for piece in layout.resample(frame):
                    parts.append(piece.to_ndarray().reshape(-1, len(stream.layout.channels)))
                    total += len(parts[-1])
                    if total > _AV_SECONDS * rate:
                        raise DecodeError(
                            f"the audio is longer than {_AV_SECONDS:,} s; convert it to FLAC, which is read in parts"
                        )
            wave = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
    except DecodeError:
        raise
    except Exception as e:
        raise DecodeError(f"the audio is damaged or cut short ({_said(e)})") from e
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format="WAV", subtype="FLOAT")
    return out.getvalue()
