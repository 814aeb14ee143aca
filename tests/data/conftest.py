"""Shards of real and of deliberately broken members, written as any tar tool writes them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from _shared import DATA as SHARED_DATA

SHARED = SHARED_DATA
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart" / "data"


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar with these members in this order."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def read_tar(path: Path) -> dict[str, bytes]:
    """Members by name, read with the standard library."""
    out = {}
    with tarfile.open(path) as tar:
        for info in tar:
            f = tar.extractfile(info)
            assert f is not None
            out[info.name] = f.read()
    return out


def numbered(folder: Path, counts: Sequence[int], prefix: str = "s") -> list[Path]:
    """Shards whose samples are two short texts each: for everything about order."""
    out = []
    for i, n in enumerate(counts):
        members = [m for j in range(n) for m in ((f"{i}_{j}.a", f"{i} {j}".encode()), (f"{i}_{j}.b", b"b"))]
        out.append(write_tar(folder / f"{prefix}-{i:03d}.tar", members))
    return out


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """The folder of the quickstart's real shards."""
    for folder in (QUICKSTART, SHARED / "image_text" / "quickstart"):
        if (folder / "train-000000.tar").is_file():
            return folder
    pytest.skip("the quickstart's shards are not here")


@pytest.fixture(scope="session")
def pictures(quickstart: Path) -> list[bytes]:
    """Some real pictures, as WebP bytes."""
    members: Mapping[str, bytes] = read_tar(quickstart / "train-000000.tar")
    return [raw for name, raw in members.items() if name.endswith(".webp")][:40]
