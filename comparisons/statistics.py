"""What a difference between two methods is worth: errors over seeds, over test points, and over both.

Scores have shape (S, N): one row per training seed, one column per test point, the same points and seeds for all
methods. Three errors are kept apart:

- over test points, for the models at hand: another test set would give another mean;
- over seeds, for the test set at hand: another training run would;
- over both: their squares add.

Points that come in groups (patches of one image) are correlated. Their error is then that of independent groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

CONFIDENCE = 0.95

Verdict = Literal["better", "worse", "within 2 standard errors"]


@dataclass(frozen=True)
class Interval:
    """A mean, its standard error, and the t-interval of the given confidence by `degrees` degrees of freedom."""

    mean: float
    error: float
    degrees: float
    confidence: float = CONFIDENCE

    @property
    def low(self) -> float:
        return self.mean - self.reach

    @property
    def high(self) -> float:
        return self.mean + self.reach

    @property
    def reach(self) -> float:
        """Half the width: 12.7 standard errors for two seeds, 4.3 for three, 2.8 for five, 1.96 for very many."""
        return float(stats.t.ppf((1 + self.confidence) / 2, self.degrees)) * self.error if self.error else 0.0

    def covers(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs, in nats per point, with its three errors around the same mean."""

    points: Interval
    seeds: Interval
    both: Interval


def over_points(scores: ArrayLike, groups: ArrayLike | None = None) -> Interval:
    """The mean over test points, by the central limit theorem for points, or for whole groups of them.

    With groups the error is the cluster-robust one (Liang and Zeger 1986), sqrt(G/(G-1) sum_g u_g^2) / N with u_g the
    sum of a group's deviations from the mean.

    Args:
        scores: shape (N,) for one model; (S, N) means the average over S seeds at every point.
        groups: shape (N,), which group a point belongs to, such as the image of a patch; None: every point its own.
    """
    points = np.atleast_2d(np.asarray(scores, float)).mean(0)
    labels = np.arange(len(points)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if len(labels) != len(points):
        raise ValueError(f"groups must name the group of each of the {len(points)} points, got {len(labels)} labels.")
    sums = np.bincount(labels, weights=points - points.mean())
    _at_least_two(len(sums), "groups of test points" if groups is not None else "test points")
    variance = len(sums) / (len(sums) - 1) * (sums**2).sum() / len(points) ** 2
    return Interval(float(points.mean()), math.sqrt(variance), len(sums) - 1)


def over_seeds(scores: ArrayLike) -> Interval:
    """The mean over training seeds with its t-interval, for the test set at hand.

    Args:
        scores: shape (S,), one mean per seed, or (S, N), averaged over the points.
    """
    runs = np.asarray(scores, float)
    means = runs.reshape(len(runs), -1).mean(1)
    _at_least_two(len(means), "seeds")
    return Interval(float(means.mean()), float(stats.sem(means)), len(means) - 1)


def paired(ours: ArrayLike, theirs: ArrayLike, groups: ArrayLike | None = None) -> Difference:
    """Ours minus theirs on the same test points with the same seeds: what both have in common cancels.

    `both` adds the squared errors over seeds and over points, with the degrees of freedom of Welch and Satterthwaite.
    It is slightly too wide: noise of single points in single runs counts in both errors.

    Args:
        ours, theirs: shape (S, N), row s of both trained with seed s.
        groups: as for `over_points`.
    """
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    if ours.shape != theirs.shape or ours.ndim != 2:
        raise ValueError(
            f"Paired scores must both have shape (seeds, points), got {ours.shape} and {theirs.shape}; "
            "keep the seeds and the points that both methods have."
        )
    gain = ours - theirs
    points, seeds = over_points(gain, groups), over_seeds(gain)
    return Difference(points, seeds, sum_of_errors(points, seeds))


def sum_of_errors(a: Interval, b: Interval) -> Interval:
    """The interval around the mean of `a` when both errors are at work, independently (Satterthwaite 1946)."""
    variance = a.error**2 + b.error**2
    spread = a.error**4 / a.degrees + b.error**4 / b.degrees
    return Interval(a.mean, math.sqrt(variance), variance**2 / spread if spread else a.degrees + b.degrees)


def verdict(difference: Interval) -> Verdict:
    """Whether a difference, where more is better, stands out: 2 standard errors, or as many as are worth 2.

    With few seeds an error is itself uncertain; the limit is then raised (4.5 standard errors for three seeds, 2.9 for
    five) so that equal methods are told apart by mistake in 4.6 % of cases, however many seeds there are.
    """
    if not math.isfinite(difference.mean + difference.error):
        raise ValueError(f"No verdict on {difference.mean} ± {difference.error}: look for scores that are not finite.")
    limit = float(stats.t.isf(stats.norm.sf(2.0), difference.degrees)) * difference.error
    if abs(difference.mean) <= limit:
        return "within 2 standard errors"
    return "better" if difference.mean > 0 else "worse"


def _at_least_two(count: int, what: str) -> None:
    if count < 2:
        raise ValueError(f"A standard error over {what} needs at least 2 of them, got {count}.")
