"""The learning rate over samples."""

from __future__ import annotations

import math

from dualenc.config import Schedule

WSD_SHARE = 0.1
"""Length of wsd's decay when ``cooldown_samples`` is 0, as a share of the run (arXiv 2404.06395, section 4)."""


def lr_factor(samples_seen: int, total_samples: int, schedule: Schedule) -> float:
    """The factor on every base learning rate for the step that starts at ``samples_seen``.

    Linear warm-up from 0, then the named shape: ``cosine`` falls to ``final`` over the rest of the run; ``constant``
    stays at 1; ``constant_cooldown`` and ``wsd`` stay at 1 and fall to ``final`` over the last ``cooldown_samples``
    (shape: linear, 1 − sqrt as in arXiv 2405.18392, or cosine). ``wsd`` without a length takes 10 % of the run.
    """
    if samples_seen < schedule.warmup_samples:
        return samples_seen / schedule.warmup_samples
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "cosine":
        start, shape = schedule.warmup_samples, "cosine"
    else:
        length = schedule.cooldown_samples
        if schedule.name == "wsd" and length == 0:
            length = round(WSD_SHARE * total_samples)
        start, shape = max(total_samples - length, schedule.warmup_samples), schedule.cooldown_shape
    if samples_seen <= start:
        return 1.0
    done = min((samples_seen - start) / max(total_samples - start, 1), 1.0)
    return schedule.final + (1 - schedule.final) * _falling(shape, done)


def _falling(shape: str, done: float) -> float:
    """From 1 at ``done`` = 0 to 0 at 1."""
    if shape == "linear":
        return 1 - done
    if shape == "sqrt":
        return 1 - math.sqrt(done)
    return 0.5 * (1 + math.cos(math.pi * done))
