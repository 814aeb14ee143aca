"""Learning-rate factors on numbers written out."""

from __future__ import annotations

import math

import pytest

from dualenc.config import Schedule
from dualenc.engine import lr_factor


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ({"name": "cosine", "warmup_samples": 100}, {0: 0.0, 50: 0.5, 100: 1.0, 550: 0.5, 1000: 0.0}),
        ({"name": "cosine", "final": 0.1}, {0: 1.0, 500: 0.55, 250: 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 1000: 0.1}),
        ({"name": "constant", "warmup_samples": 10}, {5: 0.5, 10: 1.0, 999: 1.0}),
        (
            {"name": "constant_cooldown", "warmup_samples": 100, "cooldown_samples": 400, "cooldown_shape": "linear"},
            {50: 0.5, 100: 1.0, 600: 1.0, 700: 0.75, 1000: 0.0},
        ),
        ({"name": "constant_cooldown", "cooldown_samples": 400}, {600: 1.0, 700: 0.5, 1000: 0.0}),
        (
            {"name": "constant_cooldown", "cooldown_samples": 400, "cooldown_shape": "cosine", "final": 0.2},
            {600: 1.0, 800: 0.6, 1000: 0.2},
        ),
        ({"name": "constant_cooldown"}, {1000: 1.0}),
        ({"name": "wsd"}, {0: 1.0, 900: 1.0, 925: 0.5, 1000: 0.0}),
        ({"name": "wsd", "cooldown_samples": 200, "cooldown_shape": "linear"}, {800: 1.0, 900: 0.5}),
    ],
)
def test_factors(schedule: dict[str, object], at: dict[int, float]) -> None:
    for samples, want in at.items():
        assert lr_factor(samples, 1000, Schedule.model_validate(schedule)) == pytest.approx(want, abs=1e-12), samples


def test_a_warmup_longer_than_the_run_only_warms_up() -> None:
    s = Schedule(name="cosine", warmup_samples=4000)
    assert [lr_factor(n, 1000, s) for n in (0, 500, 1000)] == [0.0, 0.125, 0.25]


def test_past_the_end_it_stays_at_the_final_value() -> None:
    assert lr_factor(1100, 1000, Schedule(name="cosine", final=0.1)) == pytest.approx(0.1)
