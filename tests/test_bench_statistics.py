"""Statistics of timings: intervals hold what they promise, whatever the distribution."""

import math

import numpy as np
import pytest

from swifti2v.benchmarks.statistics import (
    growth,
    line_fit,
    median,
    median_rank,
    paired_speedup,
    ratio_of_medians,
    tails,
)


@pytest.mark.parametrize(("count", "rank"), [(5, None), (6, 1), (8, 1), (9, 2), (10, 2), (20, 6), (30, 10), (100, 40)])
def test_ranks_are_those_of_the_tables(count: int, rank: int | None):
    assert median_rank(count) == rank


def test_few_samples_have_no_interval():
    few = median([3.0, 1.0, 2.0])
    assert (few.value, few.low, few.high) == (2.0, None, None)
    assert few.as_json() == {"value": 2.0, "interval": None}
    many = median([5, 3, 1, 2, 4, 6, 100, 0])
    assert (many.low, many.value, many.high) == (0, 3.5, 100)


def draw(kind: str, generator: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Samples and the true median of a skewed distribution, or of one with outliers in every tenth sample."""
    if kind == "lognormal":
        return generator.lognormal(0, 1, shape), 1.0
    if kind == "exponential":
        return generator.exponential(1, shape), math.log(2)
    outliers = generator.random(shape) < 0.1
    return np.where(outliers, 50 + generator.random(shape), generator.random(shape)), 0.5 / 0.9


@pytest.mark.parametrize("kind", ["lognormal", "exponential", "outliers"])
@pytest.mark.parametrize("count", [7, 12, 25])
def test_the_interval_holds_the_median_in_95_of_100(kind: str, count: int):
    samples, truth = draw(kind, np.random.default_rng(count), (3000, count))
    intervals = [median(row.tolist()) for row in samples]
    held = [i.low is not None and i.high is not None and i.low <= truth <= i.high for i in intervals]
    assert np.mean(held) >= 0.94, "promises more than it holds"
    assert np.mean(held) < 0.9999, "so wide that it says nothing"


def test_the_interval_of_a_ratio_holds_it():
    generator = np.random.default_rng(1)
    held, paired = 0, 0
    for _ in range(1000):
        base, other = generator.lognormal(0, 0.5, 12), 1.3 * generator.lognormal(0, 0.5, 12)
        ratio = ratio_of_medians(base.tolist(), other.tolist())
        assert ratio.low is not None
        assert ratio.high is not None
        held += ratio.low <= 1.3 <= ratio.high
        noise = generator.lognormal(0, 2, 12)  # of the machine, the same for both of a turn
        speedup = paired_speedup((noise * base).tolist(), (noise * other).tolist())
        assert speedup.low is not None
        assert speedup.high is not None
        paired += speedup.low <= 1 / 1.3 <= speedup.high
    assert held >= 950
    assert paired >= 940


def test_turns_cancel_what_both_suffer():
    noise = np.random.default_rng(0).lognormal(0, 2, 11)
    speedup = paired_speedup((3 * noise).tolist(), noise.tolist())
    assert (speedup.low, speedup.value, speedup.high) == pytest.approx((3, 3, 3))


@pytest.mark.parametrize(
    ("count", "keys"), [(28, []), (29, ["p90"]), (59, ["p90", "p95"]), (299, ["p90", "p95", "p99"])]
)
def test_percentiles_of_the_tail_need_samples_beyond_them(count: int, keys: list[str]):
    assert list(tails(list(range(count)))) == keys


def test_fits():
    slope, intercept, away = line_fit([1, 2, 3], [2, 4, 6])
    assert (slope, intercept) == pytest.approx((2, 0), abs=1e-9)
    assert away < 1e-9
    assert line_fit([1, 2, 3], [2, 5, 6])[2] > 0.05
    assert growth([10, 20, 40], [5, 10, 20]) == pytest.approx(1)
    assert growth([10, 20, 40], [3, 12, 48]) == pytest.approx(2)
