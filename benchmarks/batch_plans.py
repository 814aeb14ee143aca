"""What batch plans cost: the arithmetic alone, on made-up samples; what they bring is the study batches.

    python -m benchmarks.batch_plans [N]
    python -m benchmarks.methods batches

Times how long N samples (default 1,000,000) in made-up groups and neighbours take to arrange, to reach a batch far in
the run, and to go on from there.
"""

from __future__ import annotations

import sys
import tempfile
import time

import numpy as np
from numpy.typing import NDArray

from dualenc.config import Data
from dualenc.data.batches import compose
from dualenc.data.batches.mined_files import write_mined
from dualenc.data.order import Plan


def arrange(n: int, size: int = 4096, k: int = 16) -> None:
    """Print what each plan takes in one process: to build, to reach step 10^6 first, and for every later batch."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, max(n // 100, 1), n)
    near = ((np.arange(n)[:, None] + rng.integers(-50, 50, (n, k))) % n).astype(np.int32)

    class Made:
        def values(self, source: int, name: str) -> NDArray[np.int64]:
            return labels

        def ids(self, source: int) -> NDArray[np.int64]:
            return np.arange(n)

    print("| plan | build, s | first batch, s | next batches, ms each | \n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        file = str(write_mined(f"{folder}/near.safetensors", {"ids": np.arange(n), "neighbors": near}, {}))
        for name, settings in (
            ("by_source", {}),
            ("by_value", {"value": "v"}),
            ("groups", {"value": "v", "per_group": 4}),
            ("hard_negatives", {"files": file}),
            ("bags", {"files": file, "sizes": {0: 8}}),
        ):
            raw = {"sources": [{"name": "a", "shards": "a.tar"}], "batches": {"name": name, **settings}}
            began = time.perf_counter()
            plan = compose(Plan(["a"], [[n]], 0), Data.model_validate(raw), size, Made())
            built = time.perf_counter() - began
            plan.local(1_000_000, 0, 1, size)
            first = time.perf_counter() - began - built
            began = time.perf_counter()
            for step in range(1_000_001, 1_000_011):
                plan.local(step, 0, 1, size)
            print(f"| {name} | {built:.2f} | {first:.2f} | {100 * (time.perf_counter() - began):.1f} |", flush=True)


if __name__ == "__main__":
    arrange(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
