"""Damaged bytes in front of every reader: refused by name or used, never a traceback, a hang, or a flood of memory.

``make fuzz`` runs for an hour: ``python tests/fuzz/test_fuzz.py SECONDS`` goes on with new cases until then.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from _mutate import mutated
from _run import GROWTH, Outcome, attack
from _targets import TARGETS

CASES = {"checkpoint_description": 60, "checkpoint_weights": 60, "task": 150, "recipe": 150, "shard_read": 200}
"""Cases of a target in the ordinary tests, where they are dear; 400 of the others."""


def wrong(outcome: Outcome) -> list[str]:
    grown = [f"memory grew by {outcome.grown_mb} MiB"] if outcome.grown_mb > GROWTH >> 20 else []
    return outcome.escapes + outcome.hangs + grown


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_no_damage_escapes(name: str, tmp_path: Path) -> None:
    count = CASES.get(name, 400)
    outcome = attack(name, 0, count, tmp_path)
    assert not wrong(outcome)
    assert outcome.cases == count
    assert outcome.refused > 0, "no case was refused: the damage does not reach the reader"


def test_damage_is_the_same_every_time() -> None:
    samples = [bytes(range(256)), b"abc" * 100]
    assert [mutated(i, samples) for i in range(50)] == [mutated(i, samples) for i in range(50)]
    assert len({mutated(i, samples) for i in range(50)}) > 40


def main() -> None:
    until, first, cases, bad = time.monotonic() + float(sys.argv[1]), 0, 0, []
    names = sys.argv[2:] or sorted(TARGETS)
    while time.monotonic() < until:
        for name in names:
            count = 5 * CASES.get(name, 400)
            outcome = attack(name, first, count, Path(tempfile.mkdtemp()))
            cases += outcome.cases
            bad += wrong(outcome)
            print(
                f"{name:24} {outcome.cases:6} cases, {outcome.refused:6} refused, +{outcome.grown_mb} MiB", flush=True
            )
            for line in wrong(outcome):
                print("  ", line, flush=True)
            if time.monotonic() > until:
                break
        first += 100_000
    print(f"{cases:,} cases, {len(bad)} escapes or hangs")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
