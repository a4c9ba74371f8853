"""Ranks, errors and differences are those of the scores, whatever seeds are missing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from comparisons.results import Failure, Key, Result
from comparisons.standings import Gap, Standing, gains, opponents, standings, tally
from comparisons.statistics import Interval, over_points, over_seeds, paired
from comparisons.two_sample import WithFloor
from tests.comparisons.synthetic import make_result, make_scores

Means = Mapping[tuple[str, int], float]  # by method and seed


def cells(means: Means, task: str = "t") -> tuple[list[Result], dict[Key, np.ndarray]]:
    results = [make_result(method, mean, seed, task) for (method, seed), mean in means.items()]
    pairs = zip(results, means.values(), strict=True)
    return results, {result.key: make_scores(mean, seed=result.seed) for result, mean in pairs}


def ranked(means: Means, **options) -> dict[str, Standing]:
    return {standing.method: standing for standing in standings(*cells(means), **options)}


THREE = {
    ("made", 0): -2.0,
    ("made", 1): -2.1,
    ("ours", 0): -1.0,
    ("ours", 1): -1.2,
    ("nice", 0): -0.5,
    ("nice", 1): -0.6,
}


def test_the_best_mean_ranks_first() -> None:
    found = ranked(THREE)
    assert list(found) == ["nice", "ours", "made"]
    assert [standing.rank for standing in found.values()] == [1, 2, 3]
    assert found["ours"].score.mean == pytest.approx(-1.1)
    assert found["made"].task == "t" and found["made"].seeds == 2


def test_scores_have_the_error_over_seeds_and_differences_that_over_both() -> None:
    results, scores = cells(THREE)
    found = ranked(THREE)
    expected = over_seeds([-1.0, -1.2])
    assert (found["ours"].score.error, found["ours"].score.degrees) == (pytest.approx(expected.error), 1)
    ours, theirs = (np.stack([scores["t", method, seed] for seed in (0, 1)]) for method in ("ours", "made"))
    assert found["made"].gap == Gap(paired(ours, theirs).both, 2)
    assert found["ours"].gap is None
    assert len(results) == 6


def test_one_seed_has_errors_over_points() -> None:
    means = {("ours", 0): -1.0, ("made", 0): -2.0}
    _, scores = cells(means)
    found = ranked(means)
    assert found["ours"].score == over_points(scores["t", "ours", 0])
    assert found["made"].gap == Gap(over_points(scores["t", "ours", 0] - scores["t", "made", 0]), 1)
    assert found["made"].gap and found["made"].gap.verdict == "better"


def test_only_common_seeds_are_compared() -> None:
    means = {("ours", 0): -1.0, ("ours", 1): -1.1, ("made", 1): -2.0, ("made", 2): -2.1, ("nice", 7): -1.0}
    found = ranked(means)
    assert found["made"].gap and found["made"].gap.seeds == 1
    assert found["made"].gap.interval and found["made"].gap.interval.mean == pytest.approx(0.9)
    assert found["made"].score.mean == pytest.approx(-2.05)
    assert found["nice"].gap == Gap(None, 0, "no common seed")


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, -1e17])
def test_who_diverged_ranks_last_and_is_left_open(broken: float) -> None:
    results, scores = cells(THREE)
    scores["t", "nice", 1][3] = broken
    last = standings(results, scores)[-1]
    assert last.method == "nice" and last.rank == 3 and last.diverged
    assert last.gap == Gap(None, 2, "diverged") and Gap(None, 2).verdict is None
    scores["t", "ours", 0][0] = broken
    table = standings(results, scores)
    assert [(standing.method, standing.rank) for standing in table[:1]] == [("made", 1)]
    assert all(standing.gap is None or standing.gap.interval is None for standing in table)


def test_equal_means_share_a_rank() -> None:
    results, scores = cells({("ours", 0): -1.0, ("made", 0): -1.0, ("nice", 0): -2.0})
    scores["t", "made", 0] = scores["t", "ours", 0]
    table = standings(results, scores)
    assert [standing.rank for standing in table] == [1, 1, 3]
    made = next(standing for standing in table if standing.method == "made")
    assert made.gap and made.gap.interval == Interval(0.0, 0.0, 399) and made.gap.verdict == "within 2 standard errors"


def test_groups_widen_the_error() -> None:
    means = {("ours", 0): -1.0, ("made", 0): -2.0}
    results, scores = cells(means)
    copies = {key: np.repeat(values, 4) for key, values in scores.items()}
    grouped = standings(results, copies, np.repeat(np.arange(400), 4))
    apart = standings(results, copies)
    for method in (0, 1):
        assert grouped[method].score.error == pytest.approx(2 * apart[method].score.error, rel=0.01)
    a, b = (table[1].gap for table in (grouped, apart))
    assert a and b and a.interval and b.interval and a.interval.error == pytest.approx(2 * b.interval.error, rel=0.01)


def test_without_ours_there_are_ranks_alone() -> None:
    found = ranked({("made", 0): -1.0, ("nice", 0): -2.0})
    assert [standing.gap for standing in found.values()] == [None, None]


def test_failed_seeds_are_counted() -> None:
    found = ranked(THREE, failures=[Failure("t", "nice", 2, "no"), Failure("t", "nice", 3, "no")])
    assert found["nice"].failed == 2 and found["ours"].failed == 0


def test_over_seeds_costs_are_medians_and_guarantees_the_worst_case() -> None:
    results = [
        make_result("ours", seed=seed, training_seconds=seconds, distances={"d": WithFloor(seconds, 1.0)})
        for seed, seconds in enumerate((1.0, 2.0, 9.0))
    ]
    (standing,) = standings(results, {result.key: make_scores(0.0, seed=result.seed) for result in results})
    assert standing.median(lambda result: result.training_seconds) == 2
    assert standing.largest(lambda result: result.training_seconds) == 9
    assert standing.mean(lambda result: result.training_seconds) == 4
    assert standing.distance("d") == WithFloor(4.0, 1.0)
    assert standing.distance("e") is None and standing.median(lambda result: None) is None
    assert math.isnan(standing.largest(lambda result: math.nan if result.seed == 0 else 1.0) or 0)


def test_gains_are_twin_minus_original() -> None:
    means = {(name, seed): mean for name, mean in (("nice", -1.0), ("nflows-maf", -2.0)) for seed in (0, 1)}
    twins = {("nflows-maf-swapped", seed): -1.5 + 0.001 * seed for seed in (0, 1)}
    (gain,) = gains(*cells(means | twins))
    assert gain.original == "nflows-maf" and gain.gap.interval
    assert gain.gap.interval.mean == pytest.approx(0.5, abs=0.01) and gain.gap.verdict == "better"
    assert gains(*cells(means)) == []


def test_opponents_collect_tasks() -> None:
    tables = [standings(*cells(THREE, task)) for task in ("a", "b")]
    found = {opponent.method: opponent for opponent in opponents(tables)}
    assert set(found) == {"made", "nice"} and list(found["made"].gaps) == ["a", "b"]
    sums = tally([Gap(None, 0, "x"), *found["made"].gaps.values()])
    assert sums.open == 1 and sums.total == 3 and found["made"].tally.total == 2
