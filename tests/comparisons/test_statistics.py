"""Intervals cover as often as they say: simulated, with a binomial test that rejects a right one 1 in 100 000 times."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from comparisons.statistics import Interval, over_points, over_seeds, paired, sum_of_errors, verdict

RUNS = 1500
ALPHA = 1e-5
TRUTH = 0.3


def covered(simulate: Callable[[np.random.Generator], Interval], truth: float = TRUTH) -> int:
    """In how many of `RUNS` simulations the interval holds the truth."""
    random = np.random.default_rng(0)
    return sum(simulate(random).covers(truth) for _ in range(RUNS))


def consistent(count: int, rate: float) -> bool:
    return stats.binomtest(count, RUNS, rate).pvalue > ALPHA


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_coverage_over_seeds(seeds: int) -> None:
    assert consistent(covered(lambda random: over_seeds(TRUTH + random.normal(size=seeds))), 0.95)


def test_coverage_over_points() -> None:
    assert consistent(covered(lambda random: over_points(TRUTH + random.normal(size=40))), 0.95)


def grouped(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """40 images of 5 patches, half of a patch's variance being its image's."""
    images = np.repeat(np.arange(40), 5)
    return TRUTH + random.normal(size=40)[images] + random.normal(size=200), images


def test_coverage_of_groups_and_what_ignoring_them_costs() -> None:
    assert consistent(covered(lambda random: over_points(*grouped(random))), 0.95)
    assert covered(lambda random: over_points(grouped(random)[0])) < 0.85 * RUNS


def test_groups_of_one_are_points() -> None:
    x = np.random.default_rng(0).normal(size=30)
    assert over_points(x, np.random.default_rng(1).permutation(30)).error == pytest.approx(over_points(x).error)
    assert over_points(x).error == pytest.approx(stats.sem(x))


def scores(random: np.random.Generator, seeds: int = 4, points: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Two methods, `TRUTH` apart: hard points are hard for both; runs, points and both together differ."""
    common = 10 * random.normal(size=points)
    ours, theirs = (
        common
        + 0.1 * random.normal(size=(seeds, 1))
        + 0.5 * random.normal(size=points)
        + 0.1 * random.normal(size=(seeds, points))
        for _ in range(2)
    )
    return ours + TRUTH, theirs


def test_coverage_of_paired_differences() -> None:
    """Over both: 95 %, or a little more. Points alone, or seeds alone, miss what the other source adds."""
    both, points, seeds = (
        covered(lambda random, name=name: getattr(paired(*scores(random)), name))
        for name in ("both", "points", "seeds")
    )
    assert stats.binomtest(both, RUNS, 0.95, "less").pvalue > ALPHA and both < 0.99 * RUNS
    assert points < 0.92 * RUNS and seeds < 0.92 * RUNS


def test_degrees_of_freedom_of_a_sum() -> None:
    """Two equal errors have twice the degrees of one; an error of zero adds none; the smaller one hardly counts."""
    assert sum_of_errors(Interval(0, 1, 3), Interval(0, 1, 3)).degrees == pytest.approx(6)
    assert sum_of_errors(Interval(0, 1, 3), Interval(0, 0, 50)).degrees == pytest.approx(3)
    assert sum_of_errors(Interval(0, 3, 3), Interval(0, 4, 1e9)) == Interval(0, 5, pytest.approx(25**2 / (81 / 3)))


def test_pairing_removes_what_is_common() -> None:
    ours, theirs = scores(np.random.default_rng(0))
    apart = sum_of_errors(over_points(ours), over_points(theirs)).error
    assert paired(ours, theirs).points.error < apart / 5


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_equal_methods_are_told_apart_as_often_as_stated(seeds: int) -> None:
    random = np.random.default_rng(0)
    verdicts = [verdict(over_seeds(random.normal(size=seeds))) for _ in range(RUNS)]
    assert consistent(RUNS - verdicts.count("within 2 standard errors"), 2 * stats.norm.sf(2.0))
    assert consistent(verdicts.count("better"), stats.norm.sf(2.0))


def test_verdicts() -> None:
    assert verdict(Interval(2.1, 1.0, 1e9)) == "better"
    assert verdict(Interval(-2.1, 1.0, 1e9)) == "worse"
    assert verdict(Interval(1.9, 1.0, 1e9)) == "within 2 standard errors"
    assert verdict(Interval(2.1, 1.0, 2)) == "within 2 standard errors"  # three seeds
    assert verdict(Interval(0.0, 0.0, 2)) == "within 2 standard errors"
    assert verdict(Interval(1e-9, 0.0, 2)) == "better"


def test_reach_of_the_interval() -> None:
    assert [round(Interval(0, 1, n - 1).reach, 1) for n in (2, 3, 5)] == [12.7, 4.3, 2.8]
    assert Interval(1.0, 0.0, 3).low == 1.0 == Interval(1.0, 0.0, 3).high


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="over seeds needs at least 2 of them, got 1"):
        over_seeds(np.ones((1, 10)))
    with pytest.raises(ValueError, match="groups of test points needs at least 2"):
        over_points(np.ones(10), np.zeros(10))
    with pytest.raises(ValueError, match="each of the 10 points, got 9"):
        over_points(np.ones(10), np.zeros(9))
    with pytest.raises(ValueError, match=r"\(3, 10\) and \(2, 10\)"):
        paired(np.ones((3, 10)), np.ones((2, 10)))
    with pytest.raises(ValueError, match="No verdict on nan"):
        verdict(over_seeds([1.0, np.nan]))
