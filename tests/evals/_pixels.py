"""A deterministic embedder without training: pictures by their downscaled pixels, strings by their hashed words."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dualenc.data.modalities import DecodeError

D = 64
SIDE = 8


class Pixels:
    """Counts its calls, so that tests see what a cache saves."""

    modalities = ("image", "text")

    def __init__(self) -> None:
        self.projection = torch.randn(SIDE * SIDE * 3, D, generator=torch.Generator().manual_seed(0))
        self.embedded: list[int] = []

    def embed(self, modality: str, items: Sequence[Any], batch_size: int = 64) -> Tensor:
        self.embedded.append(len(items))
        row = self._picture if modality == "image" else self._words
        return torch.nn.functional.normalize(torch.stack([row(x) for x in items]), dim=1)

    def describe(self) -> dict[str, Any]:
        return {"name": "pixels", "weights_sha256": "0" * 64}

    def _picture(self, raw: bytes) -> Tensor:
        try:
            image = Image.open(io.BytesIO(raw)).convert("RGB").resize((SIDE, SIDE))
        except OSError as e:
            raise DecodeError(f"the image is damaged ({e})") from e
        x = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255 - 0.5)
        return (x.flatten() @ self.projection) + 1e-3

    def _words(self, text: str) -> Tensor:
        out = torch.full((D,), 1e-3)
        for word in text.lower().split():
            seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "little")
            out += torch.randn(D, generator=torch.Generator().manual_seed(seed))
        return out


def run(world: Any, tasks: list[str], out: str | None = None) -> str:
    """Evaluate on every rank; the results without their date, as JSON."""
    from dualenc_evals.catalog import load_task
    from dualenc_evals.harness import evaluate

    results = evaluate(
        Pixels(),
        [load_task(t) for t in tasks],
        world=world,
        out=Path(out) if out else None,
        batch_size=7,
        progress=False,
    )
    return plain(results)


def plain(results: dict[str, Any]) -> str:
    """Results as text, without the one thing that may differ between equal runs."""
    kept = {k: v for k, v in results.items() if k != "run"}
    return json.dumps(kept, sort_keys=True)


def missing_on_one_rank(world: Any, here: str, gone: str) -> str:
    """Rank 1 cannot find its file; what each rank then says."""
    from dualenc.errors import DualencError
    from dualenc_evals.catalog import load_task
    from dualenc_evals.harness import evaluate

    try:
        evaluate(Pixels(), [load_task(gone if world.rank == 1 else here)], world=world, progress=False)
    except DualencError as e:
        return str(e)
    return "no error"


def from_path(name: str, path: Path) -> types.ModuleType:
    """Import a helper of another test folder."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Dies(Pixels):
    """Kills its own process, as the system would, at the call after ``calls``."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def embed(self, modality: str, items: Sequence[Any], batch_size: int = 64) -> Tensor:
        if len(self.embedded) == self.calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().embed(modality, items, batch_size)


def interrupted(tasks: list[str], out: str, cache: str, calls: int) -> None:
    """Evaluate until the kill; called in a process of its own."""
    from dualenc_evals.catalog import load_task
    from dualenc_evals.harness import evaluate

    loaded = [load_task(t) for t in tasks]
    evaluate(Dies(calls), loaded, out=Path(out), cache_dir=Path(cache), batch_size=2, progress=False)


if __name__ == "__main__":
    interrupted(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
