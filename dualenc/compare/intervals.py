"""Which differences between methods are noise: a two-way layout of methods and seeds.

Every method is run with every seed, and a seed means the same data order and the same initial weights for all of them,
so seeds are blocks. With the value v_ms of method m at seed s, the residuals

    r_ms = v_ms − mean_s(v_m·) − mean_m(v_·s) + mean(v)

have (M − 1)(S − 1) degrees of freedom, and the difference of two methods' means has the variance 2 σ² / S (Montgomery,
Design and Analysis of Experiments, randomized complete block design). With two methods this is the paired t test.
Intervals hold for all comparisons with the control at once (Bonferroni). They assume that methods spread alike over
seeds: one that spreads much more, or diverges, widens everybody's and is better left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Difference:
    """A method against the control, in the unit of the values.

    Attributes:
        mean: of the differences at equal seeds.
        low, high: ends of the interval; not finite with a single seed.
    """

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, or ``noise``: the interval has 0 in it, or there is none."""
        if not (math.isfinite(self.low) and math.isfinite(self.high)) or self.low <= 0 <= self.high:
            return "noise"
        return "better" if self.mean > 0 else "worse"


def differences(values: Mapping[str, Sequence[float]], control: str) -> dict[str, Difference]:
    """Every other method against ``control``; ``values`` are by method, each in the same order of seeds.

    Raises:
        ValueError: methods with different numbers of seeds, or no control.
    """
    if control not in values:
        raise ValueError(f"there is no method {control}")
    table = np.array(list(values.values()), np.float64)  # [M, S]; refuses rows of different lengths
    m, s = table.shape
    rows = dict(zip(values, table, strict=True))
    half = math.inf
    if m > 1 and s > 1:
        residual = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
        freedom = (m - 1) * (s - 1)
        variance = float((residual**2).sum()) / freedom
        level = 1 - (1 - CONFIDENCE) / 2 / (m - 1)
        half = t_quantile(level, freedom) * math.sqrt(2 * variance / s)
    out = {}
    for name, row in rows.items():
        if name != control:
            mean = float((row - rows[control]).mean())
            out[name] = Difference(mean, mean - half, mean + half)
    return out


def t_quantile(share: float, freedom: int) -> float:
    """The value below which a Student t variable is with probability ``share`` (0.5 < share < 1).

    >>> round(t_quantile(0.975, 2), 3), round(t_quantile(0.975, 30), 3)
    (4.303, 2.042)
    """
    low, high = 0.0, 1.0
    while t_share(high, freedom) < share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def t_share(x: float, freedom: int) -> float:
    """P(T ≤ x) for x ≥ 0, a finite sum of powers of cos θ, tan θ = x / √ν (Abramowitz & Stegun 26.7.3–4)."""
    theta = math.atan(x / math.sqrt(freedom))
    c, sine = math.cos(theta), math.sin(theta)
    odd = freedom % 2 == 1
    term = c if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= c * c * (k - 1) / k
        total += term
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return (1 + inside) / 2
