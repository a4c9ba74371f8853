"""Toys: samplers, log densities and entropies are of one and the same density."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from comparisons.tasks import load
from comparisons.tasks.toys import TOYS, BlurredCurve, Toy, rings
from tests.comparisons.tasks.helpers import generator

CURVES = {name: toy for name, toy in TOYS.items() if isinstance(toy, BlurredCurve)}


def nearest_neighbour_entropy(x: np.ndarray, k: int = 4) -> float:
    """Kozachenko and Leonenko 1987: nothing but distances between samples."""
    distance = NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, k]
    return float(special.digamma(len(x)) - special.digamma(k) + np.log(np.pi) + 2 * np.log(distance).mean())


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_a_toy_is_seeded_and_finite(toy: Toy) -> None:
    x = toy.sample(500, generator(3))
    assert x.shape == (500, 2) and x.dtype == torch.float32 and torch.isfinite(x).all()
    assert torch.equal(x, toy.sample(500, generator(3)))
    assert not torch.equal(x, toy.sample(500, generator(4)))


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_the_entropy_is_that_of_the_samples(toy: Toy) -> None:
    """By the log density at samples, and by their distances alone (biased by about 0.02 at edges)."""
    surprise = -toy.log_density(toy.sample(4000, generator(0))).double()
    error = surprise.std().item() / math.sqrt(len(surprise))
    assert abs(surprise.mean().item() - toy.entropy()) < 4 * error + 1e-3  # the pinwheel's tails cost 6e-4
    assert nearest_neighbour_entropy(toy.sample(30_000, generator(1)).numpy()) == pytest.approx(toy.entropy(), abs=0.04)


def expected_share(toy: BlurredCurve, edges: Tensor) -> Tensor:
    """The probability of each square of a grid, by 10 x 10 points in each."""
    step = (edges[1] - edges[0]) / 10
    axis = edges[0] + step * (torch.arange(10 * (len(edges) - 1), dtype=torch.float64) + 0.5)
    cells = len(edges) - 1
    return toy.density_on_grid(axis, axis).reshape(cells, 10, cells, 10).sum(dim=(1, 3)) * step**2


@pytest.mark.parametrize("toy", CURVES.values(), ids=CURVES)
def test_samples_fall_into_squares_as_the_density_says(toy: BlurredCurve) -> None:
    """Chi-square on squares with at least ten points expected, the others as one; a right toy fails one seed in 1e6."""
    n, edges = 100_000, torch.linspace(-5, 5, 41, dtype=torch.float64)
    x = toy.sample(n, generator(5)).numpy()
    seen = np.histogram2d(x[:, 0], x[:, 1], bins=(edges.numpy(), edges.numpy()))[0]
    expected = n * expected_share(toy, edges).numpy()
    often = expected >= 10
    seen, expected = (np.append(counts[often], n - counts[often].sum()) for counts in (seen, expected))
    statistic = ((seen - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert stats.chi2.sf(statistic, len(expected) - 1) > 1e-6


@pytest.mark.parametrize("toy", CURVES.values(), ids=CURVES)
def test_log_density_is_the_log_of_the_density_on_a_grid(toy: BlurredCurve) -> None:
    axis = torch.linspace(-4, 4, 30, dtype=torch.float64)
    density = toy.density_on_grid(axis, axis).flatten()
    log_density = toy.log_density(torch.cartesian_prod(axis, axis))
    seen = density > 1e-200
    torch.testing.assert_close(log_density[seen], density[seen].log())
    assert torch.isfinite(log_density).all()  # in the tails too, where the density itself underflows


def test_rings_against_the_closed_form() -> None:
    """A blurred circle has the density exp(-(ρ² + r²) / 2σ²) I0(ρ r / σ²) / 2πσ² at radius ρ."""
    radius = torch.linspace(0, 4, 50, dtype=torch.float64)
    circle, variance = 0.75 * torch.arange(1, 5, dtype=torch.float64)[:, None], 0.08**2
    bessel = torch.special.i0e(radius * circle / variance)  # scaled by exp(-ρ r / σ²)
    exact = (-((radius - circle) ** 2) / (2 * variance)).exp() * bessel / (2 * math.pi * variance)
    x = torch.stack([radius, torch.zeros_like(radius)], dim=1)
    torch.testing.assert_close(BlurredCurve("", rings, 0.08).log_density(x), exact.mean(0).log())


def test_the_checkerboard_is_uniform_on_its_dark_squares() -> None:
    toy = TOYS["checkerboard"]
    x = toy.sample(200_000, generator(0))
    square = ((x + 4) / 2).long().clamp(0, 3)
    count = torch.bincount(4 * square[:, 0] + square[:, 1], minlength=16).double()
    dark = count > 100  # rounding may put a point or two over an edge
    assert dark.sum() == 8 and (square.sum(dim=1) % 2 == 0).double().mean() > 0.9999
    assert stats.chisquare(count[dark].numpy()).pvalue > 1e-6
    inside = x - (x - (2 * square - 3)) * 1e-3  # a little towards the centre of the square
    assert torch.equal(toy.log_density(inside).unique(), torch.tensor([-math.log(32)]))
    assert toy.log_density(torch.tensor([[1.0, 3.0], [9.0, 1.0], [1.0, -1.0]])).isinf().all()


def test_told_which_moon_the_entropy_is_lower() -> None:
    task = load("two-moons-conditional")
    told, untold = task.entropy, load("two-moons").entropy
    assert told is not None and untold is not None and task.log_density is not None
    assert told < untold < told + math.log(2)
    points = task.test[:3000]
    surprise = -task.log_density(points).double()
    assert abs(surprise.mean().item() - told) < 4 * surprise.std().item() / math.sqrt(3000)
    assert points.context is not None
    assert torch.equal(points.context.unique(), torch.tensor([0.0, 1.0]))
    swapped = -task.log_density(type(points)(points.x, 1 - points.context)).double()
    assert swapped.mean() > told + 1
