"""Features that take less room: prefixes (Matryoshka), int8 with calibrated ranges, one bit a dimension; and rescoring.

prefix   the first d dimensions, of length 1 again (Kusupati et al. 2022, arXiv 2205.13147): 4 d bytes
int8     each dimension by a range of its own, from quantiles of a calibration set: d bytes
binary   the sign of each dimension less its median: d / 8 bytes, compared by Hamming distance; the best
         ``k · rescore`` by Hamming are ordered again by the float query on the bits (Shakir et al. 2024)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dualenc.encoders.dual_encoder import prefix
from dualenc.errors import ConfigError, did_you_mean

Precision = Literal["float", "int8", "binary"]
_BLOCK = 1 << 24
"""Scores that exist at one time."""


@dataclass(frozen=True)
class DimRanges:
    """What int8 and binary codes are made with, [D] each: lowest and highest value, the median, and the mean distance
    from it, by which a bit is read back.

    Values outside of a range are clipped to it.
    """

    low: Tensor
    high: Tensor
    middle: Tensor
    spread: Tensor

    @classmethod
    def calibrate(cls, x: Tensor, clip: float = 0.0005) -> DimRanges:
        """Ranges from the features [n, D] of a calibration set, those of the gallery itself for one.

        Args:
            clip: the share of values beyond the range at either end.

        Raises:
            ConfigError: fewer than two features.
        """
        if len(x) < 2:
            raise ConfigError(f"calibration needs at least 2 features, got {len(x)}")
        ordered = x.float().sort(dim=0).values
        last = len(x) - 1
        low, high = ordered[int(clip * last)], ordered[last - int(clip * last)]
        middle = ordered[last // 2]
        return cls(low, torch.maximum(high, low + 1e-6), middle, (x.float() - middle).abs().mean(0))

    def int8(self, x: Tensor) -> Tensor:
        """[n, D] → int8 [n, D]: ``low`` is −127, ``high`` 127."""
        share = (x.float() - self.low) / (self.high - self.low)
        return (share.clamp(0, 1) * 254 - 127).round().to(torch.int8)

    def from_int8(self, codes: Tensor) -> Tensor:
        """int8 [n, D] → fp32 [n, D]."""
        return (codes.float() + 127) / 254 * (self.high - self.low) + self.low

    def binary(self, x: Tensor) -> Tensor:
        """[n, D] → uint8 [n, ⌈D / 8⌉]: one bit a dimension, whether it is above its median; the last bits are 0."""
        bits = x.float() > self.middle
        bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8))
        powers = 2 ** torch.arange(7, -1, -1, device=x.device)
        return (bits.view(len(bits), -1, 8) * powers).sum(-1).to(torch.uint8)

    def from_binary(self, codes: Tensor) -> Tensor:
        """uint8 [n, ⌈D / 8⌉] → fp32 [n, D]: the median, and the mean distance from it up or down."""
        return self.middle + self.signs(codes) * self.spread

    def signs(self, codes: Tensor) -> Tensor:
        """uint8 [n, ⌈D / 8⌉] → −1 and 1, fp32 [n, D]: their products rank as Hamming distances do."""
        shifts = torch.arange(7, -1, -1, device=codes.device)
        bits = (codes[..., None] >> shifts) & 1
        return bits.flatten(1)[:, : len(self.low)].float() * 2 - 1


@dataclass(frozen=True)
class Gallery:
    """Features to be searched, as they are stored.

    Attributes:
        codes: fp32 [n, d], int8 [n, d] or uint8 [n, ⌈d / 8⌉].
        ranges: of int8 and binary codes; None for float.
        dim: d.
    """

    codes: Tensor
    precision: Precision
    ranges: DimRanges | None
    dim: int

    @classmethod
    def of(
        cls, x: Tensor, dim: int | None = None, precision: str = "float", calibration: Tensor | None = None
    ) -> Gallery:
        """Compress features [n, D].

        Args:
            dim: keep the first ``dim`` dimensions.
            precision: float, int8 or binary.
            calibration: features [m, D] that ranges are taken from; default: ``x`` itself.

        Raises:
            ConfigError: an unknown precision, or a width that the features do not have.
        """
        if precision not in get_args(Precision):
            raise ConfigError(f"unknown precision {precision!r}. {did_you_mean(precision, get_args(Precision))}")
        y = prefix(x, dim)
        if precision == "float":
            return cls(y, "float", None, y.shape[1])
        ranges = DimRanges.calibrate(y if calibration is None else prefix(calibration, dim))
        if precision == "int8":
            return cls(ranges.int8(y), "int8", ranges, y.shape[1])
        return cls(ranges.binary(y), "binary", ranges, y.shape[1])

    @property
    def bytes(self) -> int:
        """What the codes take."""
        return self.codes.numel() * self.codes.element_size()

    def decoded(self, codes: Tensor | None = None) -> Tensor:
        """fp32 [n, d] that queries are multiplied with."""
        codes = self.codes if codes is None else codes
        if self.ranges is None:
            return codes
        return self.ranges.from_int8(codes) if self.precision == "int8" else self.ranges.from_binary(codes)

    def rescored(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` best of each query's candidates ``rows`` [q, c], by the float query [q, d] times these codes."""
        exact = (queries[:, None] * self.decoded(self.codes[rows.flatten()]).view(*rows.shape, -1)).sum(-1)
        scores, order = torch.topk(exact, min(k, rows.shape[1]), dim=1)
        return scores, rows.gather(1, order)

    def search(self, queries: Tensor, k: int, rescore: int = 4, finer: Gallery | None = None) -> tuple[Tensor, Tensor]:
        """The ``k`` best of each query [q, D or d], best first.

        Args:
            rescore: binary only: ``k · rescore`` are found by Hamming distance, then ordered by the float query times
                the bits; 0: Hamming distance alone.
            finer: the same items at another precision (int8 beside binary), by which candidates are ordered instead.

        Returns:
            Scores fp32 [q, k'] (float and int8: cosines up to the codes' rounding) and rows int64 [q, k'].
        """
        asked = prefix(queries.float(), self.dim)
        k = min(k, len(self.codes))
        scores, rows = [], []
        decoded = self.ranges.signs(self.codes) if self.precision == "binary" and self.ranges else self.decoded()
        for some in torch.split(asked, max(1, _BLOCK // max(len(self.codes), 1))):
            if self.precision != "binary":
                s, r = torch.topk(some @ decoded.T, k, dim=1)
            else:
                assert self.ranges is not None
                signs = self.ranges.signs(self.ranges.binary(some))
                s, r = torch.topk(signs @ decoded.T, min(max(k, k * rescore), len(self.codes)), dim=1)
                if rescore:
                    s, r = (finer or self).rescored(some, r, k)
            scores.append(s[:, :k])
            rows.append(r[:, :k])
        return torch.cat(scores), torch.cat(rows)
