"""How the methods stand: means over seeds, ranks, and by how much ours differs from each, with what certainty."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from comparisons.results import Failure, Key, Result
from comparisons.statistics import Interval, Verdict, over_points, over_seeds, paired, verdict
from comparisons.two_sample import WithFloor

OURS = "ours"
LOST = -1e6  # nats: a score below is an overflow in a single point, beside which a mean says nothing of the others

Scores = Mapping[Key, np.ndarray]  # of every cell, the test log-likelihood point by point
Number = Callable[[Result], float | None]


@dataclass(frozen=True)
class Gap:
    """One method minus another in nats per point: above 0 the first is better. Open where `interval` is None."""

    interval: Interval | None
    seeds: int  # that both have; with one the error is over test points alone
    reason: str = ""  # why it is open

    @property
    def verdict(self) -> Verdict | None:
        return None if self.interval is None else verdict(self.interval)


@dataclass(frozen=True)
class Standing:
    """One method on one task, over all its seeds."""

    method: str
    rank: int  # 1 is best; equal means share a rank
    results: Sequence[Result]  # by seed
    failed: int  # seeds that ended in an error
    score: Interval  # over seeds, or over test points where there is one seed; NaN where a point is lost
    gap: Gap | None  # ours minus this one; None for ours, and where ours was not run

    @property
    def task(self) -> str:
        return self.results[0].task

    @property
    def seeds(self) -> int:
        return len(self.results)

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.score.mean)

    def values(self, of: Number) -> list[float]:
        """Of the seeds that have any."""
        return [value for value in map(of, self.results) if value is not None]

    def mean(self, of: Number) -> float | None:
        values = self.values(of)
        return statistics.fmean(values) if values else None

    def median(self, of: Number) -> float | None:
        values = self.values(of)
        return statistics.median(values) if values else None

    def largest(self, of: Number) -> float | None:
        """Over seeds: a guarantee is as good as its worst case. NaN is worse than any number."""
        values = self.values(of)
        return math.nan if any(map(math.isnan, values)) else max(values, default=None)

    def distance(self, name: str) -> WithFloor | None:
        """Mean over the seeds where it could be taken."""
        pairs = [result.distances[name] for result in self.results if name in result.distances]
        if not pairs:
            return None
        return WithFloor(
            statistics.fmean(pair.distance for pair in pairs), statistics.fmean(pair.floor for pair in pairs)
        )


def standings(
    results: Sequence[Result], scores: Scores, groups: np.ndarray | None = None, failures: Sequence[Failure] = ()
) -> list[Standing]:
    """The methods of one task, best mean test log-likelihood first, those that diverged last.

    Args:
        results: of one task; any seeds.
        scores: by the key of every result.
        groups: of test points that depend on each other; errors are then over groups.
        failures: cells of the same task that failed, to be counted.
    """
    runs = by_method(results)
    means = {method: score(chosen, scores, groups) for method, chosen in runs.items()}
    found = [
        Standing(
            method,
            rank=1 + sum(ahead(other, means[method]) for other in means.values()),
            results=chosen,
            failed=sum(failure.method == method for failure in failures),
            score=means[method],
            gap=gap(runs[OURS], chosen, scores, groups) if OURS in runs and method != OURS else None,
        )
        for method, chosen in runs.items()
    ]
    return sorted(found, key=lambda standing: standing.rank)


def by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The seeds of each method in ascending order; methods as they come."""
    ordered = sorted(results, key=lambda result: result.seed)
    names = dict.fromkeys(result.method for result in results)
    return {name: [result for result in ordered if result.method == name] for name in names}


def ahead(a: Interval, b: Interval) -> bool:
    """Whether a ranks before b."""
    return math.isfinite(a.mean) and (not math.isfinite(b.mean) or a.mean > b.mean)


def score(results: Sequence[Result], scores: Scores, groups: np.ndarray | None) -> Interval:
    if not sound(results, scores):
        return Interval(math.nan, math.nan, 1)
    runs = stacked(results, scores)
    return over_seeds(runs) if len(runs) > 1 else over_points(runs, groups)


def gap(ours: Sequence[Result], theirs: Sequence[Result], scores: Scores, groups: np.ndarray | None) -> Gap:
    """Ours minus theirs on the seeds that both have."""
    common = {result.seed for result in ours} & {result.seed for result in theirs}
    if not (sound(ours, scores) and sound(theirs, scores)):
        return Gap(None, len(common), "diverged")
    if not common:
        return Gap(None, 0, "no common seed")
    a, b = (stacked([result for result in both if result.seed in common], scores) for both in (ours, theirs))
    return Gap(paired(a, b, groups).both if len(common) > 1 else over_points(a - b, groups), len(common))


def sound(results: Sequence[Result], scores: Scores) -> bool:
    return all((np.isfinite(scores[result.key]) & (scores[result.key] > LOST)).all() for result in results)


def stacked(results: Sequence[Result], scores: Scores) -> np.ndarray:
    """Shape (seeds, points), in double precision."""
    return np.stack([scores[result.key] for result in results]).astype(float)


# what swapping did -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gain:
    """Swapped twin minus original on one task; times are multiples of the original's."""

    task: str
    original: str
    gap: Gap
    step: float | None
    density: float | None
    sampling: float | None


def gains(
    results: Sequence[Result],
    scores: Scores,
    groups: np.ndarray | None = None,
) -> list[Gain]:
    """Every pair of an original and its swapped twin of which both ran on the task."""
    runs = by_method(results)
    return [
        Gain(
            runs[old][0].task,
            old,
            gap(runs[new], runs[old], scores, groups),
            ratio(runs[new], runs[old], lambda result: result.step_seconds),
            ratio(runs[new], runs[old], lambda result: result.density_seconds),
            ratio(runs[new], runs[old], lambda result: result.sampling_seconds),
        )
        for old in runs
        if (new := f"{old}-swapped") in runs
    ]


def ratio(new: Sequence[Result], old: Sequence[Result], of: Number) -> float | None:
    """Of the medians over seeds."""
    above, below = ([value for value in map(of, side) if value is not None] for side in (new, old))
    return statistics.median(above) / statistics.median(below) if above and below and statistics.median(below) else None


# all tasks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tally:
    """How often ours is ahead, behind, too close to call, and left open."""

    ahead: int = 0
    behind: int = 0
    level: int = 0
    open: int = 0

    @property
    def total(self) -> int:
        return self.ahead + self.behind + self.level + self.open


@dataclass(frozen=True)
class Opponent:
    """One method over all tasks on which it and ours ran."""

    method: str
    gaps: Mapping[str, Gap]  # by task: ours minus theirs

    @property
    def tally(self) -> Tally:
        return tally(self.gaps.values())


def tally(gaps: Iterable[Gap]) -> Tally:
    verdicts = [gap.verdict for gap in gaps]
    return Tally(
        verdicts.count("better"),
        verdicts.count("worse"),
        verdicts.count("within 2 standard errors"),
        verdicts.count(None),
    )


def opponents(tables: Sequence[Sequence[Standing]]) -> list[Opponent]:
    """All methods but ours, over the standings of several tasks, in the order in which they appear."""
    gaps: dict[str, dict[str, Gap]] = {}
    for table in tables:
        for standing in table:
            if standing.gap is not None:
                gaps.setdefault(standing.method, {})[standing.task] = standing.gap
    return [Opponent(method, by_task) for method, by_task in gaps.items()]
