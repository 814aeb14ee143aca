"""Waveforms → log-mel features, batched, on the device; the same numbers as the feature extractors of released towers.

A clip's features do not depend on what else is in the batch: ends are mirrored, silence is cut and statistics are
taken at each clip's own length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualenc.errors import ConfigError

_CPU_FRAMES = 256  # frames at once: their spectra stay in the cache
_DEVICE_FRAMES = 1 << 16
_TINY = 1e-7


class Heard(NamedTuple):
    """Features of n clips.

    Attributes:
        values: [n, F, M] frames of M mel bands; with fusion [n, 4, F, M]; waveforms [n, T].
        mask: bool [n, F] or [n, T]: what is sound and not padding.
        longer: bool [n]: fusion only, the clip was longer than the tower's ``max_s``.
    """

    values: Tensor
    mask: Tensor
    longer: Tensor


class FrontEnd(nn.Module):
    """Collated audio rows → :class:`Heard`. No parameters, no gradient; its buffers are not part of the weights.

    Args:
        describe: what the audio input says of itself (``AudioInput.describe()``).
    """

    window: Tensor
    filters: Tensor
    one_by_one = True
    """On the CPU. Elsewhere, and where this is False, a batch is one call: the same numbers but for rounding."""

    def __init__(self, describe: Mapping[str, Any]) -> None:
        super().__init__()
        config = describe["config"]
        self.f: dict[str, Any] = config["features"]
        self.rate, self.pad, self.fusion = int(config["rate"]), config["pad"], config["long"] == "fusion"
        self.samples = round(config["max_s"] * config["rate"])
        spec = (config.get("augment") or {}).get("spec")
        self.freq_masks = int(spec["freq_masks"]) if spec else 0
        if self.f["kind"] == "mel":
            self.n_fft, self.hop = int(self.f["n_fft"]), int(self.f["hop"])
            self.win = int(self.f["win"] or self.n_fft)
            filters = mel_filters(
                self.rate,
                self.n_fft,
                self.f["mels"],
                self.f["f_min"],
                self.f["f_max"] or self.rate / 2,
                self.f["mel_scale"],
                self.f["mel_norm"],
            )
            used = np.flatnonzero(filters.any(1))
            self.bins = (int(used[0]), int(used[-1]) + 1)
            # One row for the real and one for the imaginary part of each bin: squares go straight into the product.
            twice = np.repeat(filters[self.bins[0] : self.bins[1]], 2, axis=0)
            self.register_buffer("filters", torch.from_numpy(twice).float(), persistent=False)
            self.register_buffer("window", self._window(), persistent=False)

    @property
    def width(self) -> int:
        """Numbers of a frame."""
        return int(self.f["mels"]) * int(self.f["stack"])

    @torch.no_grad()
    def forward(self, x: Mapping[str, Tensor]) -> Heard:
        """``{"wave": [n, T], "length": int64 [n], …}`` → features."""
        wave, length = x["wave"], x["length"]
        with torch.autocast(wave.device.type, enabled=False):
            wave = wave.float() / 32767 if wave.dtype == torch.int16 else wave.float()
            if self.f["kind"] == "waveform":
                return self._waveform(wave, length)
            if self.fusion:
                return self._fused(wave, length, x["crops"])
            values, frames = self._finish(*self._log_mel(wave, length, equalizer=x.get("equalizer")))
            if self.pad == "zeros":
                frames = torch.minimum(frames, self._frames_of(length))
            mask = torch.arange(values.shape[1], device=wave.device) < frames[:, None]
            if "spec" in x:
                values = self._masked(values, mask, x["spec"])
            return Heard(values, mask, torch.zeros_like(length, dtype=torch.bool))

    # --- waveforms --------------------------------------------------------------------------------------------

    def _waveform(self, wave: Tensor, length: Tensor) -> Heard:
        mask = torch.arange(wave.shape[1], device=wave.device) < length[:, None]
        if self.f["normalize"] == "waveform":
            wave = standardised(wave, mask, ddof=0)
        return Heard(wave, mask, torch.zeros_like(length, dtype=torch.bool))

    def _filled(self, wave: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Fill up to ``max_s`` as ``pad`` says: [n, T], lengths → [n, N], all of length N."""
        if self.pad == "none":
            return wave, length
        wave = wave[:, : self.samples]
        if self.pad == "zeros":
            out = nn.functional.pad(wave, (0, self.samples - wave.shape[1]))
        else:
            out = wave.new_zeros(len(wave), self.samples)
            for row, filled, n in zip(wave, out, length.clamp(max=self.samples).tolist(), strict=True):
                whole = self.samples // n * n
                filled[:whole].view(-1, n).copy_(row[:n].expand(whole // n, n))
                if self.pad == "repeat":
                    filled[whole:] = row[: self.samples - whole]
        return out, torch.full_like(length, self.samples)

    # --- mel --------------------------------------------------------------------------------------------------

    def _log_mel(
        self, wave: Tensor, length: Tensor, fill: bool = True, equalizer: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[n, T] → log-mel [n, F, M] and the number of frames of each clip; ``fill``: up to ``max_s`` first.

        ``equalizer`` [n, P]: gains in dB, linear between points from the lowest mel bin to the highest.
        """
        if wave.device.type == "cpu" and self.one_by_one:
            # One by one: each at its own length, and buffers small enough to be used again.
            rows = [self._mels(wave[i : i + 1, :n], length[i : i + 1], fill)[0] for i, n in enumerate(length.tolist())]
            mel = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        else:
            mel = self._mels(wave, length, fill)
        if equalizer is not None:
            curve = nn.functional.interpolate(equalizer[:, None], mel.shape[2], mode="linear", align_corners=True)
            mel *= 10 ** (curve / 10)
        mel.clamp_(min=self.f["floor"])
        mel = {"db": lambda m: 10 * m.log10(), "log10": torch.log10, "ln": torch.log}[self.f["log"]](mel)
        filled = fill and self.pad != "none"
        return mel, self._frames_of(torch.full_like(length, self.samples) if filled else length)

    def _mels(self, wave: Tensor, length: Tensor, fill: bool) -> Tensor:
        """[n, T] → power in mel bands [n, F, M]."""
        if fill:
            wave, length = self._filled(wave, length)
        wave = wave * self.f["scale"] if self.f["scale"] != 1 else wave
        size = self.n_fft if self.f["center"] else self.win
        wave = mirrored(wave, length, size // 2) if self.f["center"] else wave
        if wave.shape[1] < size:
            wave = nn.functional.pad(wave, (0, size - wave.shape[1]))
        frames = wave.unfold(1, size, self.hop)
        frames = frames[:, :-1] if self.f["drop_last"] else frames
        mel = wave.new_empty(*frames.shape[:2], self.filters.shape[1])
        self._into(mel, frames)
        return mel

    def _into(self, mel: Tensor, frames: Tensor) -> None:
        """Write the mel bands of some frames into ``mel``, a part at a time."""
        at_once = _CPU_FRAMES if mel.device.type == "cpu" else _DEVICE_FRAMES
        rows = max(1, at_once // max(1, frames.shape[1]))
        for i in range(0, len(frames), rows):
            for k in range(0, frames.shape[1], at_once):
                mel[i : i + rows, k : k + at_once] = self._mel(frames[i : i + rows, k : k + at_once])

    def _frames_of(self, length: Tensor) -> Tensor:
        if self.f["center"]:
            count = length // self.hop + (0 if self.f["drop_last"] else 1)
        else:
            count = 1 + (length - self.win).clamp(min=0) // self.hop - (1 if self.f["drop_last"] else 0)
        return count.clamp(min=1)

    def _mel(self, frames: Tensor) -> Tensor:
        """Frames [n, k, win] → power in each band [n, k, M].

        In evaluation in fp64: in fp32 a Fourier transform's error is that of the loudest bin in all bins, up to 0.01 dB
        in quiet bands. Training does not notice, and runs twice as fast.
        """
        dtype = torch.float32 if self.training or frames.device.type == "mps" else torch.float64
        if self.f["remove_dc"]:
            frames = frames.to(dtype)
            frames = frames - frames.mean(-1, keepdim=True)
        if self.f["preemphasis"]:
            a = self.f["preemphasis"]
            before = torch.cat([frames[..., :1], frames[..., :-1]], -1)
            frames = frames - a * before
        spectrum = torch.view_as_real(torch.fft.rfft(frames * self.window.to(dtype), n=self.n_fft)).flatten(-2)
        low, high = self.bins
        power = spectrum[..., 2 * low : 2 * high].square_()
        return power.to(self.filters.dtype) @ self.filters

    def _finish(self, mel: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Cut silence, normalise, pad and stack frames: [n, F, M] → [n, F', M']."""
        f = self.f
        mask = torch.arange(mel.shape[1], device=mel.device) < count[:, None]
        if f["span"] is not None:
            top = mel.masked_fill(~mask[..., None], -torch.inf).amax((1, 2), keepdim=True)
            mel = torch.maximum(mel, top - f["span"])
        if f["normalize"] == "bins":
            mel = standardised(mel, mask[..., None], ddof=1)
        mel = mel.masked_fill(~mask[..., None], 0.0)
        if f["frames"] is not None:
            mel = nn.functional.pad(mel[:, : f["frames"]], (0, 0, 0, max(0, f["frames"] - mel.shape[1])))
            count = count.clamp(max=f["frames"])
        if f["mean"] != 0 or f["std"] != 1:
            mel = (mel - f["mean"]) / f["std"]
        if f["stack"] > 1:
            mel = nn.functional.pad(mel, (0, 0, 0, -mel.shape[1] % f["stack"]))
            mel = mel.reshape(len(mel), -1, mel.shape[2] * f["stack"])
            count = (count // f["stack"]).clamp(min=1)
        return mel, count

    def _masked(self, values: Tensor, mask: Tensor, spec: Tensor) -> Tensor:
        """SpecAugment: what the masks cover becomes the clip's mean."""
        frames, bands = values.shape[1:]
        count = mask.sum(1)
        band = (torch.arange(bands, device=values.device) + 0.5) / bands
        frame = (torch.arange(frames, device=values.device) + 0.5) / count[:, None]
        start, end = spec[..., 0], spec.sum(-1)
        k = self.freq_masks
        in_band = ((band >= start[:, :k, None]) & (band < end[:, :k, None])).any(1)
        in_time = ((frame[:, None] >= start[:, k:, None]) & (frame[:, None] < end[:, k:, None])).any(1)
        mean = (values * mask[..., None]).sum((1, 2), keepdim=True) / (count * bands)[:, None, None]
        return torch.where(in_band[:, None] | in_time[..., None], mean, values)

    # --- fusion -----------------------------------------------------------------------------------------------

    def _fused(self, wave: Tensor, length: Tensor, crops: Tensor) -> Heard:
        """CLAP's four views (Wu et al. 2023): the clip shrunk to ``max_s``, and a crop of each third; [n, 4, F, M]."""
        chunk = self.samples // self.hop + 1
        short, _ = self._log_mel(wave[:, : self.samples], length.clamp(max=self.samples))
        views = short[:, None].repeat(1, 4, 1, 1)
        longer = torch.zeros_like(length, dtype=torch.bool)
        for i, n in enumerate(length.tolist()):
            if n <= self.samples:
                continue
            whole, _ = self._log_mel(wave[i : i + 1, :n], length[i : i + 1], fill=False)
            total = whole.shape[1]
            if total == chunk:
                views[i] = whole
                continue
            shrunk = nn.functional.interpolate(
                whole[:, None], size=(chunk, whole.shape[2]), mode="bilinear", align_corners=False
            )
            starts = [third_start(total - chunk + 1, part, float(u)) for part, u in enumerate(crops[i].tolist())]
            views[i] = torch.cat([shrunk[0], *(whole[:, s : s + chunk] for s in starts)])
            longer[i] = True
        mean, std = self.f["mean"], self.f["std"]
        return Heard((views - mean) / std, torch.ones_like(views[:, 0, :, 0], dtype=torch.bool), longer)

    def _window(self) -> Tensor:
        name, n = self.f["window"], self.win
        window = torch.hann_window(n, periodic=name == "hann", dtype=torch.float64)
        window = window**0.85 if name == "povey" else window
        left = (self.n_fft - n) // 2 if self.f["center"] else 0
        return nn.functional.pad(window, (left, self.n_fft - n - left if self.f["center"] else 0))


def mel_front(name: str, describe: Mapping[str, Any]) -> FrontEnd:
    """The front-end of a tower of ours, which takes log-mel frames of one crop.

    Raises:
        ConfigError: the input makes something else; names the tower.
    """
    if describe["config"]["features"]["kind"] != "mel" or describe["config"]["long"] == "fusion":
        raise ConfigError(f"{name}: it needs input.features.kind: mel and input.long: crop.")
    return FrontEnd(describe)


def third_start(places: int, part: int, share: float) -> int:
    """The start of a crop in third ``part`` of ``places`` starts, at ``share`` (in [0, 1)) of it; an empty third: 0."""
    third = np.array_split(np.arange(places), 3)[part]
    return int(third[int(share * len(third))]) if len(third) else 0


def mirrored(wave: Tensor, length: Tensor, n: int) -> Tensor:
    """Add ``n`` mirrored samples before each clip and after its own end: [B, T] → [B, n + T + n]."""
    out = nn.functional.pad(wave, (n, n))
    k = torch.arange(n, device=wave.device)
    out[:, :n] = wave.gather(1, reflected(k - n, length))
    end = length[:, None] + k
    out.scatter_(1, end + n, wave.gather(1, reflected(end, length)))
    return out


def reflected(at: Tensor, length: Tensor) -> Tensor:
    """Places outside of a clip → the places inside that mirrors at its first and last sample show: [B, n]."""
    turn = (2 * (length - 1)).clamp(min=1)[:, None]
    at = at % turn
    return torch.minimum(at, turn - at).minimum((length - 1)[:, None])


def standardised(x: Tensor, mask: Tensor, ddof: int) -> Tensor:
    """Each clip to mean 0 and variance 1 over axis 1, where ``mask`` is true; 0 elsewhere."""
    mask = mask.expand_as(x)
    n = mask.sum(1, keepdim=True)
    mean = (x * mask).sum(1, keepdim=True) / n
    y = (x - mean) * mask
    return y / (y.square().sum(1, keepdim=True) / (n - ddof).clamp(min=1) + _TINY).sqrt()


# --- mel scale ---------------------------------------------------------------------------------------------------

_BREAK_HZ, _BREAK_MEL, _LOG_STEP = 1000.0, 15.0, math.log(6.4) / 27


def to_mel(hz: NDArray[np.float64], scale: str) -> NDArray[np.float64]:
    """Hertz → mel. ``slaney``: linear below 1 kHz, logarithmic above; the others: the logarithm of 1 + f / 700."""
    if scale == "slaney":
        above = _BREAK_MEL + np.log(np.maximum(hz, _BREAK_HZ) / _BREAK_HZ) / _LOG_STEP
        return np.where(hz < _BREAK_HZ, hz * (_BREAK_MEL / _BREAK_HZ), above)
    return 2595 * np.log10(1 + hz / 700) if scale == "htk" else 1127 * np.log1p(hz / 700)


def from_mel(mel: NDArray[np.float64], scale: str) -> NDArray[np.float64]:
    """Mel → hertz."""
    if scale == "slaney":
        above = _BREAK_HZ * np.exp((np.maximum(mel, _BREAK_MEL) - _BREAK_MEL) * _LOG_STEP)
        return np.where(mel < _BREAK_MEL, mel * (_BREAK_HZ / _BREAK_MEL), above)
    return 700 * (10 ** (mel / 2595) - 1) if scale == "htk" else 700 * np.expm1(mel / 1127)


def mel_filters(
    rate: int, n_fft: int, mels: int, f_min: float, f_max: float, scale: str, norm: bool
) -> NDArray[np.float64]:
    """Triangles over the bins of a spectrum, [n_fft // 2 + 1, mels].

    ``kaldi`` draws them straight in mel, the others in hertz. ``norm`` gives each the area of a mel band (Slaney).
    """
    ends = to_mel(np.array([f_min, f_max], dtype=np.float64), scale)
    corners = np.linspace(ends[0], ends[1], mels + 2)
    bins = np.arange(n_fft // 2 + 1) * rate / n_fft
    hz = from_mel(corners, scale)
    x, c = (to_mel(bins, scale), corners) if scale == "kaldi" else (bins, hz)
    rise = (x[:, None] - c[:-2]) / (c[1:-1] - c[:-2])
    fall = (c[2:] - x[:, None]) / (c[2:] - c[1:-1])
    out = np.clip(np.minimum(rise, fall), 0, None)
    return out * (2 / (hz[2:] - hz[:-2])) if norm else out
