"""Where the time of a step goes: ``dualenc train RECIPE --profile N``.

The steps after the warm-up are timed part by part, and recorded by torch's profiler. At each border the host waits for
the device, so that a part's time is its own; a step that is not profiled overlaps more and takes less. A run that is
not asked for a profile builds nothing of this.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from dualenc.engine.protocol import Engine, Outputs, Stepped
from dualenc.files import write_atomically
from dualenc.train.build import Parts

WARM_UP = 3
"""Steps before the first that is timed: the first ones start workers, allocate memory and compile."""
COLLECTIVES = ("gloo:", "nccl:")
"""What torch's profiler calls the work of a collective, on the thread or stream that does it."""


class Profile:
    """Times ``steps`` steps and writes ``profile.json``, ``profile.md`` and ``profile-trace-rank0.json`` (for
    chrome://tracing or Perfetto) into the run folder.

    ``begin`` is called when a batch has come, ``hooked`` after the step, ``end`` after its hooks.
    """

    def __init__(self, parts: Parts, steps: int) -> None:
        self._parts, self._steps = parts, steps
        self._seen = 0
        self._since = 0.0
        self._recorder: Any = None
        self._engine = parts.engine
        self._removable: list[Any] = []
        self.seconds: dict[str, float] = defaultdict(float)

    # --- what the loop calls ----------------------------------------------------------------------------------

    def begin(self, waited_s: float) -> None:
        """A batch has come after waiting ``waited_s`` for it."""
        if self._seen == WARM_UP:
            self._start()
        if self._recorder is not None:
            self.seconds["data wait"] += waited_s
            self._since = self._now()

    def hooked(self) -> None:
        """The step is done; its hooks follow."""
        if self._recorder is not None:
            self.seconds["step"] += self._now() - self._since
            self._since = self._now()

    def end(self) -> None:
        """The hooks have run. After the last step of the profile everything is written, and the run is as before."""
        self._seen += 1
        if self._recorder is None:
            return
        self.seconds["log, save and evaluate"] += self._now() - self._since
        if self._seen == WARM_UP + self._steps:
            self._stop()

    # --- timing -----------------------------------------------------------------------------------------------

    def _now(self) -> float:
        if self._parts.engine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def _timing(self, part: str) -> Iterator[None]:
        began = self._now()
        with torch.profiler.record_function(part):
            yield
            self.seconds[part] += self._now() - began

    def _start(self) -> None:
        p = self._parts
        for m, tower in p.bundle.model.towers.items():
            self._watch(tower, f"forward of {m}")
        self._engine, p.engine = p.engine, _Timed(p.engine, self)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if p.engine.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._recorder = torch.profiler.profile(activities=activities)
        self._recorder.__enter__()

    def _watch(self, tower: nn.Module, part: str) -> None:
        began = [0.0]

        def before(_: nn.Module, __: Any) -> None:
            began[0] = self._now()

        def after(_: nn.Module, __: Any, ___: Any) -> None:
            self.seconds[part] += self._now() - began[0]

        self._removable += [tower.register_forward_pre_hook(before), tower.register_forward_hook(after)]

    def _stop(self) -> None:
        p, recorder = self._parts, self._recorder
        self._recorder, p.engine = None, self._engine
        for handle in self._removable:
            handle.remove()
        recorder.__exit__(None, None, None)
        if p.world.rank != 0:
            return
        recorder.export_chrome_trace(str(p.run_dir / "profile-trace-rank0.json"))
        moved = sum(e.time_range.elapsed_us() for e in recorder.events() if e.name.startswith(COLLECTIVES)) / 1e6
        self.write(moved)

    # --- writing ----------------------------------------------------------------------------------------------

    def rows(self) -> dict[str, float]:
        """Part → seconds a step; together they are the whole step."""
        s = {k: v / self._steps for k, v in self.seconds.items()}
        towers = {k: v for k, v in s.items() if k.startswith("forward of ")}
        timed = {k: s.get(k, 0.0) for k in ("forward", "backward", "optimizer")}
        return {
            "data wait": s["data wait"],
            **towers,
            "forward, the rest": max(timed["forward"] - sum(towers.values()), 0.0),
            "loss, with its gathers": max(s["step"] - sum(timed.values()), 0.0),
            "backward": timed["backward"],
            "optimizer": timed["optimizer"],
            "log, save and evaluate": s["log, save and evaluate"],
        }

    def write(self, collectives_s: float) -> None:
        """The table, on the terminal and in the run folder; ``collectives_s``: of all steps, they run beside others."""
        p, rows = self._parts, self.rows()
        whole = sum(rows.values())
        moved = collectives_s / self._steps
        table = Table(
            "part", "ms a step", "share", title=f"{self._steps} steps of {p.recipe.name}", title_justify="left"
        )
        lines = ["| part | ms a step | share |", "|---|---|---|"]
        for name, seconds in [*rows.items(), ("whole", whole)]:
            cells = (name, f"{1000 * seconds:.1f}", f"{100 * seconds / whole:.0f} %")
            table.add_row(*cells)
            lines.append(f"| {' | '.join(cells)} |")
        note = f"collectives took {1000 * moved:.1f} ms a step, beside and within these parts"
        content: Mapping[str, Any] = {
            "steps": self._steps,
            "after_steps": WARM_UP,
            "seconds_a_step": {**rows, "whole": whole},
            "collectives_s_a_step": moved,
            "samples_per_s": p.recipe.batch.size / whole,
            "world_size": p.world.world_size,
            "device": str(p.engine.device),
        }
        write_atomically(p.run_dir / "profile.json", json.dumps(content, indent=1) + "\n")
        write_atomically(p.run_dir / "profile.md", "\n".join([*lines, "", f"{note[0].upper()}{note[1:]}."]) + "\n")
        p.tracker.console.print(table)
        p.tracker.say(
            f"rank 0 of {p.world.world_size}: {note}; written to {p.run_dir}/profile.json and profile-trace-rank0.json"
        )


class _Timed:
    """An engine whose calls are timed; everything else is the engine's own."""

    def __init__(self, engine: Engine, profile: Profile) -> None:
        self._inner, self._profile = engine, profile

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def forward(self, inputs: Mapping[str, Any]) -> Outputs:
        with self._profile._timing("forward"):
            return self._inner.forward(inputs)

    def backward(self, loss: Tensor) -> None:
        with self._profile._timing("backward"):
            self._inner.backward(loss)

    def step(self) -> Stepped:
        with self._profile._timing("optimizer"):
            return self._inner.step()
