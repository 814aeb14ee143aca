"""Run damaged inputs against one target in a process of its own, under bounds of memory and time.

``python _run.py TARGET FIRST COUNT`` prints the number of every case before it runs; :func:`attack` starts it, and
starts it again behind a case that hung or ended the process.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

MEMORY = 12 << 30
"""Address space of a process, torch's own mappings included."""
GROWTH = 1 << 30
"""Resident memory that one case may add to what the process had before its first."""
SLOW_S = 10.0


@dataclass
class Outcome:
    """What became of the cases of one target: names of cases that went wrong, and how."""

    cases: int = 0
    refused: int = 0
    escapes: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    grown_mb: int = 0


def attack(target: str, first: int, count: int, out: Path) -> Outcome:
    """Run cases ``first … first + count − 1`` of a target."""
    total, at = Outcome(), first
    while at < first + count:
        report = out / f"{target}-{at}.json"
        command = [sys.executable, __file__, target, str(at), str(first + count - at), str(report)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        last = [at, time.monotonic()]
        errors: list[str] = []

        def listen(process: subprocess.Popen[str] = process, last: list[float] = last) -> None:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("case "):
                    last[:] = [int(line.split()[1]), time.monotonic()]

        def drain(process: subprocess.Popen[str] = process, errors: list[str] = errors) -> None:
            assert process.stderr is not None
            errors.extend(process.stderr.readlines()[-20:])

        threads = [threading.Thread(target=f, daemon=True) for f in (listen, drain)]
        for t in threads:
            t.start()
        started, hung = last[0], False
        while process.poll() is None:
            patience = SLOW_S + (60 if last[0] == started else 0)  # the first case waits for imports
            if time.monotonic() - last[1] > patience:
                process.kill()
                hung = True
            time.sleep(0.05)
        for t in threads:
            t.join()
        if report.exists():
            said = json.loads(report.read_text(encoding="utf-8"))
            total.refused += said["refused"]
            total.escapes += said["escapes"]
            total.hangs += said["slow"]
            total.grown_mb = max(total.grown_mb, said["grown_mb"])
            total.cases += said["cases"]
            break
        where = f"{target}:{int(last[0])}"
        (total.hangs if hung else total.escapes).append(
            f"{where} {'hung' if hung else f'ended the process ({process.returncode}): ' + ''.join(errors)[-400:]}"
        )
        total.cases += int(last[0]) - at + 1
        at = int(last[0]) + 1
    return total


def main() -> None:
    target, first, count, report = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    sys.path.insert(0, str(Path(__file__).parent))
    from _mutate import mutated
    from _targets import TARGETS

    from dualenc.errors import DualencError

    samples, use = TARGETS[target]()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    use(samples[0])  # whole inputs are taken; what they load is no growth
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, escapes, slow = 0, [], []
    for case in range(first, first + count):
        print("case", case, flush=True)
        raw = mutated(case, samples)
        begin = time.monotonic()
        try:
            use(raw)
        except DualencError:
            refused += 1
        except Exception as e:  # noqa: BLE001 – what must not happen, written down with the case's number
            escapes.append(f"{target}:{case} {type(e).__name__}: {e}"[:300])
        if time.monotonic() - begin > SLOW_S:
            slow.append(f"{target}:{case} took {time.monotonic() - begin:.0f} s")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    said = {"cases": count, "refused": refused, "escapes": escapes, "slow": slow, "grown_mb": grown}
    report.write_text(json.dumps(said), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
