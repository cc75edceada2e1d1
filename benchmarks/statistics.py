"""Statistics of repeated timings without assuming a distribution: order statistics only.

Timings are skewed and have outliers, so means and standard deviations say little about them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LEVEL = 0.95
PERCENTILES = (90, 95, 99)


@dataclass(frozen=True)
class Interval:
    """A value and the interval that holds the true one with at least 95 %; no ends where samples are too few."""

    value: float
    low: float | None = None
    high: float | None = None

    def as_json(self) -> dict[str, object]:
        ends = None if self.low is None or self.high is None else [self.low, self.high]
        return {"value": self.value, "interval": ends}


@lru_cache
def median_rank(count: int, level: float = LEVEL) -> int | None:
    """The rank r (from 1) for which the r-th smallest and r-th largest of `count` samples hold the median.

    They do so with at least `level`, whatever the distribution: each sample is above the median with probability 1/2.
    None where even the extremes do not (fewer than 6 samples at 95 %).
    """
    rank, below = 0, 0.0  # below: probability of fewer than rank + 1 samples under the median
    while True:
        below += math.comb(count, rank) / 2**count
        if 1 - 2 * below < level:
            return rank or None
        rank += 1


def median(samples: Sequence[float], level: float = LEVEL) -> Interval:
    """The median of at least one sample and its distribution-free interval."""
    ordered = sorted(samples)
    rank = median_rank(len(ordered), level)
    value = float(np.median(ordered))
    return Interval(value) if rank is None else Interval(value, ordered[rank - 1], ordered[-rank])


def tails(samples: Sequence[float]) -> dict[str, float]:
    """Percentiles in the tail, each only where a sample lies beyond it with 95 % (p90: 29 samples, p99: 299)."""
    kept = [p for p in PERCENTILES if 1 - (p / 100) ** len(samples) >= LEVEL]
    return {f"p{p}": float(np.percentile(samples, p)) for p in kept}


def paired_speedup(base: Sequence[float], other: Sequence[float]) -> Interval:
    """How many times faster `other` is than `base`, from runs taken in turns: the median of the ratios of each turn.

    What slows the machine down for a while slows both of a turn, so this is steadier than a ratio of medians.
    """
    return median([a / b for a, b in zip(base, other, strict=True)])


def ratio_of_medians(base: Sequence[float], other: Sequence[float]) -> Interval:
    """median(other) / median(base) of two separate runs, with at least 95 %: each median is held with 97.5 %."""
    level = 1 - (1 - LEVEL) / 2
    a, b = median(base, level), median(other, level)
    value = b.value / a.value
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Interval(value)
    return Interval(value, b.low / a.high, b.high / a.low)


def line_fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Least-squares line through points: slope, intercept, and the largest distance from it relative to its value."""
    slope, intercept = np.polyfit(x, y, 1)
    line = slope * np.asarray(x, dtype=float) + intercept
    return float(slope), float(intercept), float(np.max(np.abs(np.asarray(y) - line) / np.abs(line)))


def growth(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent p of y ~ x^p, fitted through all points: 1 is linear, 2 quadratic."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
