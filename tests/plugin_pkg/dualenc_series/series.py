"""Series as a modality, and a tower for them."""

from __future__ import annotations

import io
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dualenc.config import Positive, Section
from dualenc.data.modalities import DecodeError
from dualenc.encoders import Tower


class SeriesInput:
    """``.series.npy``: float32 [channels, T] → a stretch of ``length`` values of each channel."""

    class Config(Section):
        channels: Positive = 3
        length: Positive = 64

    kind: ClassVar[str] = "gauge"
    default_members: ClassVar[list[str]] = ["series.npy"]

    def __init__(self, config: Config, base_dir: Any = None) -> None:
        self.config = config

    def decode(self, raw: bytes) -> np.ndarray:
        try:
            x = np.load(io.BytesIO(raw), allow_pickle=False)
        except (ValueError, EOFError, OSError) as e:
            raise DecodeError(f"not an .npy file: {e}") from e
        if x.ndim != 2 or len(x) != self.config.channels or x.shape[1] < self.config.length:
            raise DecodeError(
                f"shape {x.shape}, expected ({self.config.channels}, {self.config.length} or more) values"
            )
        return x.astype(np.float32)

    def train(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        start = int(rng.integers(x.shape[1] - self.config.length + 1))
        return x[:, start : start + self.config.length]

    def eval(self, x: np.ndarray) -> np.ndarray:
        start = (x.shape[1] - self.config.length) // 2
        return x[:, start : start + self.config.length]

    def collate(self, rows: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(rows))

    def dummy(self) -> np.ndarray:
        return np.zeros((self.config.channels, self.config.length), np.float32)

    def describe(self) -> dict[str, Any]:
        return {"kind": "gauge", "config": self.config.model_dump(mode="json")}

    @staticmethod
    def preview(raw: bytes) -> dict[str, str]:
        x = np.load(io.BytesIO(raw), allow_pickle=False)
        return {"text": f"{x.shape[0]} channels of {x.shape[1]} values, from {x.min():.2f} to {x.max():.2f}"}


class SeriesCNN(Tower):
    """Two convolutions over time and the mean of what they find."""

    kinds: ClassVar[tuple[str, ...]] = ("gauge",)

    class Config(Section):
        width: Positive = 16

    def __init__(self, config: Config, describe: dict[str, Any], embed_dim: int) -> None:
        super().__init__()
        width = config.width
        self.convolutions = nn.Sequential(
            nn.Conv1d(describe["config"]["channels"], width, 7, stride=2),
            nn.GELU(),
            nn.Conv1d(width, width, 5),
            nn.GELU(),
        )
        self.head = nn.Linear(width, embed_dim, bias=False)

    def pooled(self, x: Tensor) -> Tensor:
        return self.convolutions(x).mean(2)
