"""Features that were computed before (of a frozen tower, a sensor, a table) as a modality of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from torch import Tensor

from dualenc.config import Positive, Section
from dualenc.data.arrays import read_npy
from dualenc.data.modalities.modality import DecodeError, modalities, npy_of

if TYPE_CHECKING:
    from pathlib import Path

F32 = NDArray[np.float32]


class VectorConfig(Section):
    """How a vector becomes a row."""

    dim: Positive = Field(description="numbers of a vector")
    normalize: bool = Field(default=True, description="divide by its length, before and after noise")
    noise: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="training only: expected length of Gaussian noise that is added (CLOSE, arXiv 2211.09778); 0: none",
    )


@modalities.register("vector")
class VectorInput:
    """Vectors as rows float32 [W]; ``collate`` → ``{"values": float32 [B, W]}``.

    Members are ``.npy`` of W numbers, [W] or [1, W].
    """

    Config: ClassVar[type[BaseModel]] = VectorConfig
    default_members: ClassVar[list[str]] = ["vector.npy", "npy"]
    prompt: ClassVar[str] = "{}"

    def __init__(self, config: VectorConfig, base_dir: str | Path | None = None) -> None:
        self.config = config

    def decode(self, raw: Any) -> F32:
        """Bytes of a ``.npy`` → float32 [W].

        Raises:
            DecodeError: for what is not W finite numbers, or is zero where it is to be normalised.
        """
        if not isinstance(raw, bytes | bytearray | memoryview):
            raise DecodeError(f"a vector must be the bytes of a .npy file, got {type(raw).__name__}")
        x = read_npy(bytes(raw))
        if x.dtype.kind not in "fiu":
            raise DecodeError(f"holds {x.dtype}, not numbers")
        if x.shape not in ((self.config.dim,), (1, self.config.dim)):
            raise DecodeError(f"has the shape {list(x.shape)}, expected [{self.config.dim}]")
        with np.errstate(over="ignore"):  # beyond float32 is infinite, which is refused
            y = np.ascontiguousarray(x.reshape(-1), np.float32)
        if not np.isfinite(y).all():
            raise DecodeError("has values that are infinite or not a number")
        if self.config.normalize and not y.any():
            raise DecodeError("is zero, which has no direction; normalize: false keeps it")
        return y

    def train(self, x: F32, rng: np.random.Generator) -> F32:
        """The vector, with noise if asked for."""
        y = self._unit(x)
        if not self.config.noise:
            return y
        noise: F32 = rng.normal(0.0, self.config.noise / self.config.dim**0.5, y.shape).astype(np.float32)
        return self._unit(y + noise)

    def eval(self, x: F32) -> F32:
        """The vector."""
        return self._unit(x)

    def collate(self, rows: list[F32]) -> dict[str, Tensor]:
        """Rows [W] → ``{"values": [B, W]}``."""
        return {"values": torch.from_numpy(np.stack(rows))}

    def dummy(self) -> F32:
        """The first unit vector."""
        row = np.zeros(self.config.dim, np.float32)
        row[0] = 1
        return row

    def describe(self) -> dict[str, Any]:
        """Kind and settings."""
        return {"kind": "vector", "config": self.config.model_dump(mode="json")}

    def as_raw(self, x: Any, rate: int | None = None) -> Any:
        """An array or tensor [W] → the bytes of a ``.npy``; anything else is not a vector (None)."""
        return npy_of(x)

    @staticmethod
    def preview(raw: bytes) -> dict[str, str]:
        """Its size and length, for a page."""
        x = np.asarray(read_npy(bytes(raw)), np.float64)
        return {"text": f"{x.size} numbers, length {float(np.sqrt((x * x).sum())):.3g}"}

    def _unit(self, x: F32) -> F32:
        if not self.config.normalize:
            return x
        top = float(np.abs(x).max())  # first, so that no square overflows
        y = x / top
        return np.ascontiguousarray(y / np.sqrt((y * y).sum()), np.float32)
