"""Files written whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from dualenc.files import replacing, write_atomically


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "a" / "x.json", "old")
    with pytest.raises(RuntimeError), replacing(path) as hidden:
        hidden.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["x.json"]
    write_atomically(path, "größer".encode())
    assert path.read_text(encoding="utf-8") == "größer"


def test_the_mode_is_the_umask_s(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = write_atomically(tmp_path / "x", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
