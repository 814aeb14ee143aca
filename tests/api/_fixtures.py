"""A small CLIP in transformers' layout, a SigLIP-like one in open_clip's, and a folder of real images."""

from __future__ import annotations

import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from _shared import ROOT

sys.path.insert(0, str(ROOT / "tests" / "model"))
from test_released_models import SIGLIP_LIKE, write_hf, write_open_clip

DATA = ROOT / "recipes" / "quickstart" / "data"
NAMES = ("cat.jpg", "bike.jpg", "house.jpg", "boat.jpg")


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "clip-vit-base-patch32"
    write_hf(folder, "clip")
    return folder


@pytest.fixture(scope="session")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "siglip"
    write_open_clip(folder, SIGLIP_LIKE, {})
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of the quickstart as JPEG."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("data") / "photos"
    folder.mkdir()
    with tarfile.open(DATA / "val-clipart-000000.tar") as tar:
        members = [m for m in tar if not m.name.endswith(".txt")]
        for name, member in zip(NAMES, members[:: len(members) // len(NAMES)], strict=False):
            raw = tar.extractfile(member)
            assert raw is not None
            Image.open(raw).convert("RGBA").convert("RGB").resize((90, 70)).save(folder / name, quality=95)
    return folder


@pytest.fixture
def workplace(tmp_path: Path, clip: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that docs/python.md speaks of; the working folder is in it."""
    (tmp_path / clip.name).symlink_to(clip)
    shutil.copytree(photos, tmp_path / "photos")
    for i in range(2):
        (tmp_path / f"train-{i:06d}.tar").symlink_to(DATA / f"train-{i:06d}.tar")
    monkeypatch.chdir(tmp_path)
    return tmp_path
