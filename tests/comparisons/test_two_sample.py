"""Distances between samples: closed forms for two Gaussians, zero in expectation for equal laws, and honest errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from comparisons.two_sample import (
    Distance,
    energy_distance,
    maximum_mean_discrepancy,
    median_distance,
    sliced_wasserstein,
    with_floor,
)

UNBIASED = [energy_distance, lambda x, y: maximum_mean_discrepancy(x, y, bandwidth=1.5)]
EVERY = [energy_distance, maximum_mean_discrepancy, sliced_wasserstein]
Z = 4.4  # a z-test beyond this rejects a right answer once in 100 000


def normal(n: int, features: int, seed: int, shift: float = 0.0) -> Tensor:
    x = torch.randn(n, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, 0] += shift
    return x


def estimates(distance: Distance, features: int, shift: float) -> np.ndarray:
    """100 independent values at 60 against 45 points."""
    draws = ((normal(60, features, 2 * i, shift), normal(45, features, 2 * i + 1)) for i in range(100))
    return np.array([distance(x, y) for x, y in draws])


def energy_of_shift(features: int, shift: float) -> float:
    """|X - Y| is sqrt(2) times the root of a (non-central) chi square."""
    apart = stats.ncx2(features, shift**2 / 2).expect(np.sqrt) if shift else stats.chi(features).mean()
    return 2 * math.sqrt(2) * (apart - stats.chi(features).mean())


def mmd_of_shift(features: int, shift: float, h: float) -> float:
    return 2 * (h**2 / (h**2 + 2)) ** (features / 2) * (1 - math.exp(-(shift**2) / (2 * (h**2 + 2))))


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("features", [1, 3])
def test_energy_distance_and_mmd_of_shifted_gaussians(features: int, shift: float) -> None:
    truths = [energy_of_shift(features, shift), mmd_of_shift(features, shift, h=1.5)]
    for distance, truth in zip(UNBIASED, truths, strict=True):
        found = estimates(distance, features, shift)
        assert abs(found.mean() - truth) < Z * stats.sem(found)
        assert stats.sem(found) < 0.05 * (0.2 + truth)  # the test can see a wrong factor


@pytest.mark.parametrize("distance", UNBIASED)
def test_equal_laws_are_at_distance_zero_on_average(distance: Distance) -> None:
    found = estimates(distance, 2, shift=0.0)
    assert abs(found.mean()) < Z * stats.sem(found)
    assert found.min() < 0 < found.max()  # unbiased, hence not always positive


@pytest.mark.parametrize("p", [1, 2])
def test_sliced_wasserstein_of_a_shift(p: int) -> None:
    """Every projection moves by |u.d| exactly; E|u_1| = Gamma(D/2) / (sqrt(pi) Gamma((D+1)/2)) and E u_1^2 = 1/D."""
    x, shift, D = normal(80, 3, seed=0), 2.0, 3
    truth = shift * (math.gamma(D / 2) / (math.sqrt(math.pi) * math.gamma((D + 1) / 2)) if p == 1 else math.sqrt(1 / D))
    moved = x + torch.tensor([shift, 0.0, 0.0])
    assert sliced_wasserstein(moved, x, p, directions=20_000) == pytest.approx(truth, rel=0.02)
    assert sliced_wasserstein(moved, x, p) == sliced_wasserstein(moved, x, p)  # seeded
    assert sliced_wasserstein(moved, x, p) != sliced_wasserstein(moved, x, p, seed=1)


def test_sliced_wasserstein_takes_unequal_numbers() -> None:
    """In one dimension it is scipy's Wasserstein distance; a point repeated is the same law."""
    x, y = normal(35, 1, seed=0, shift=0.3), normal(20, 1, seed=1)
    assert sliced_wasserstein(x, y, p=1) == pytest.approx(stats.wasserstein_distance(x[:, 0], y[:, 0]), rel=1e-12)
    assert sliced_wasserstein(y.repeat(3, 1), y) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("distance", [UNBIASED[0], UNBIASED[1], sliced_wasserstein])
def test_symmetry(distance: Distance) -> None:
    x, y = normal(30, 2, seed=0, shift=1.0), normal(50, 2, seed=1)
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-12)


@pytest.mark.parametrize("distance", EVERY)
def test_chunks_change_nothing(distance: Distance, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(30, 2, seed=0, shift=1.0), normal(50, 2, seed=1)
    whole = distance(x, y)
    monkeypatch.setattr("comparisons.two_sample.CHUNK_ENTRIES", 120)
    assert distance(x, y) == pytest.approx(whole, rel=1e-9)


def test_bandwidth_is_the_median_of_the_data_alone() -> None:
    x, y = 5 * normal(30, 2, seed=0), normal(50, 2, seed=1)
    assert maximum_mean_discrepancy(x, y) == maximum_mean_discrepancy(x, y, bandwidth=median_distance(y))
    assert median_distance(torch.tensor([[0.0], [1.0], [3.0]])) == 2.0
    with pytest.raises(ValueError, match="median"):
        median_distance(torch.zeros(5, 2))


@pytest.mark.parametrize("distance", EVERY)
def test_a_wrong_model_stands_above_the_floor_and_a_right_one_does_not(distance: Distance) -> None:
    data, other, right, wrong = normal(400, 2, 0), normal(400, 2, 1), normal(400, 2, 2), normal(400, 2, 3, shift=0.5)
    judged = with_floor(distance, wrong, data, other)
    assert judged.floor == distance(other, data)
    assert judged.distance > 2.5 * abs(judged.floor)
    assert abs(distance(right, data)) < judged.distance / 2.5


def test_bad_input_is_named() -> None:
    x = normal(10, 2, seed=0)
    with pytest.raises(ValueError, match=r"shape \(n, D\)"):
        energy_distance(x[:, 0], x)
    with pytest.raises(ValueError, match="2 dimensions and data 1"):
        energy_distance(x, x[:, :1])
    with pytest.raises(ValueError, match="1 of 10 samples are not finite"):
        energy_distance(torch.where(x == x[3, 0], torch.nan, x), x)
    with pytest.raises(ValueError, match="p must be 1 or 2"):
        sliced_wasserstein(x, x, p=3)
    with pytest.raises(ValueError, match="10 samples and 5 rows"):
        with_floor(energy_distance, x, x, x[:5])
