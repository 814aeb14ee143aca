"""A few kills of each cheap kind; ``make kills`` goes on to hundreds, of every kind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from _shared import PYTHONPATH

SCRIPT = Path(__file__).with_name("kill_matrix.py")
KINDS = ["train, 1 rank, with evaluation", "train, 1 rank, during a save", "shards build", "embed, 1 rank"]
KINDS += ["embed, 2 ranks", "eval --resume"]


@pytest.mark.dist
@pytest.mark.slow
def test_after_a_kill_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), "--kills", "12", "--seed", "3", *KINDS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    (last,) = re.findall(r"^(\d+) kills, (\d+) differences\n\d+ s;", done.stdout, re.M)
    assert int(last[0]) >= 12
    assert last[1] == "0"
    for kind in KINDS:
        assert re.search(rf"^{re.escape(kind)} +[1-9]", done.stdout, re.M), done.stdout
