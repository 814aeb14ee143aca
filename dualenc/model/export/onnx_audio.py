"""The log-mel front-end in operators that ONNX has: waveforms of one length and where each ends, no loop over clips.

The numbers are those of :class:`~dualenc.encoders.audio_front.FrontEnd`: the Fourier transform is a product with sines
and cosines, in fp64 as there; ends are mirrored and clips repeated by gathering.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dualenc.encoders.audio_front import FrontEnd, Heard, reflected


class GraphFront(nn.Module):
    """``{"wave": [n, T], "length": [n]}``, T samples for every clip → what ``front`` makes of the clips alone.

    Fusion (CLAP's crops of longer clips) is not among what it can do.
    """

    waves: Tensor
    filters: Tensor

    def __init__(self, front: FrontEnd) -> None:
        super().__init__()
        self.front = front
        if front.f["kind"] == "mel":
            low, high = front.bins
            bins = torch.arange(low, high, dtype=torch.float64)
            angle = torch.arange(front.n_fft, dtype=torch.float64)[:, None] * bins * (2 * math.pi / front.n_fft)
            # The front-end's window may be shorter than the transform, which pads it behind.
            window = nn.functional.pad(front.window, (0, front.n_fft - len(front.window)))
            waves = torch.cat([angle.cos(), -angle.sin()], 1) * window[:, None]
            self.register_buffer("waves", waves[: len(front.window)].contiguous(), persistent=False)
            self.register_buffer("filters", front.filters[::2].contiguous(), persistent=False)

    @torch.no_grad()
    def forward(self, x: Mapping[str, Tensor]) -> Heard:
        """As the front-end's."""
        front, wave, length = self.front, x["wave"], x["length"]
        if front.f["kind"] == "waveform":
            return front._waveform(wave, length)
        values, frames = front._finish(*self._log_mel(wave, length))
        if front.pad == "zeros":
            frames = torch.minimum(frames, front._frames_of(length))
        mask = torch.arange(values.shape[1]) < frames[:, None]
        return Heard(values, mask, torch.zeros_like(length, dtype=torch.bool))

    def _log_mel(self, wave: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        front, f = self.front, self.front.f
        own = length
        if front.pad != "none":
            wave, own = self._filled(wave, length)
        wave = wave * f["scale"]
        if f["center"]:
            wave = _mirrored(wave, own, front.n_fft // 2)
        size = front.n_fft if f["center"] else front.win
        frames = wave.unfold(1, size, front.hop)
        frames = (frames[:, :-1] if f["drop_last"] else frames).double()
        if f["remove_dc"]:
            frames = frames - frames.mean(-1, keepdim=True)
        if f["preemphasis"]:
            frames = frames - f["preemphasis"] * torch.cat([frames[..., :1], frames[..., :-1]], -1)
        real, imaginary = (frames @ self.waves).chunk(2, -1)
        mel = (real.square() + imaginary.square()).float() @ self.filters
        mel = mel.clamp(min=f["floor"])
        mel = mel.log() if f["log"] == "ln" else mel.log() * ((10 if f["log"] == "db" else 1) / math.log(10))
        return mel, front._frames_of(own)

    def _filled(self, wave: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        front = self.front
        full = torch.full_like(length, front.samples)
        if front.pad == "zeros":
            return wave, full
        at = torch.arange(front.samples)[None]
        out = wave.gather(1, at % length[:, None])
        if front.pad != "repeat":
            whole = full // length * length
            out = torch.where(at < whole[:, None], out, torch.zeros_like(out))
        return out, full


def _mirrored(wave: Tensor, length: Tensor, n: int) -> Tensor:
    """As :func:`~dualenc.encoders.audio_front.mirrored`, by one gather; samples beyond a clip's mirror are zero."""
    at = torch.arange(-n, wave.shape[1] + n)[None]
    out = wave.gather(1, reflected(at, length))
    return torch.where(at < (length + n)[:, None], out, torch.zeros_like(out))


__all__ = ["GraphFront"]
