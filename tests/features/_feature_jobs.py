"""A tiny model, shards of texts and pictures, and an embedding that is killed while it writes."""

from __future__ import annotations

import io
import os
import signal
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dualenc.config import Recipe
from dualenc.features import writer
from dualenc.features.of_shards import embed_shards
from dualenc.files import write_atomically
from dualenc.model import Bundle, build_bundle, load_model

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "modalities": {
        "image": {"input": {"size": 64}, "encoder": {"name": "own/convnet", "widths": [8, 16, 32]}},
        "text": {
            "input": {"tokenizer": "clip-bpe:1024", "context_length": 32},
            "encoder": {"name": "own/transformer", "width": 32, "layers": 1, "heads": 2},
        },
    },
    "embed_dim": 16,
    "data": {"sources": [{"name": "x", "shards": "x.tar"}]},
    "batch": {"size": 8},
    "budget": {"steps": 1},
}


def tiny() -> Bundle:
    return build_bundle(Recipe.model_validate(RECIPE))


def shard(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def texts(folder: Path, shards: int = 3, each: int = 5, prefix: str = "t") -> str:
    """Shards of captions; the pattern that names them."""
    for k in range(shards):
        shard(
            folder / f"{prefix}-{k}.tar", [(f"s{k}{i}.txt", f"caption {i} of shard {k}".encode()) for i in range(each)]
        )
    return str(folder / f"{prefix}-*.tar")


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def killed(bundle: Bundle, shards: str, out: Path, after: int) -> int:
    """Embed in a process of its own that kills itself in the midst of the write after ``after`` writes; its status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done = 0

    def dying(path: Path, content: bytes) -> Path:
        nonlocal done
        if done == after:
            path.with_name(f".{path.name}.1.tmp").write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return write_atomically(path, content)

    writer.write_atomically = dying  # type: ignore[assignment]
    embed_shards(bundle, shards, out, ["text"])
    os._exit(0)


def at_every_write(model: str, shards: str, folder: Path) -> None:
    """Killed at each write in turn and started again: the same folder as an unbroken run's, byte for byte."""
    torch.set_num_threads(1)
    bundle = load_model(model)
    kills = 0
    for after in range(100):
        out = folder / f"killed-{after}"
        if killed(bundle, shards, out, after) == 0:
            break
        kills += 1
        report = killed(bundle, shards, out, 1000)
        assert report == 0
    whole = files(folder / f"killed-{kills}")
    assert kills == len(whole) + 1, (kills, list(whole))  # features.json is written twice
    for after in range(kills):
        assert files(folder / f"killed-{after}") == whole, after
    print(kills)


if __name__ == "__main__":
    at_every_write(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
