"""Toys and tasks: shapes, seeds, the entropy that is claimed, and the standardisation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from comparisons.data import DataNotFoundError
from torch import Tensor

from comparisons import toys
from comparisons.tasks import TASKS, Task

TOYS = [toys.checkerboard, toys.two_spirals, toys.rings, toys.pinwheel]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("toy", TOYS)
def test_a_toy_is_seeded_and_finite(toy: Callable[..., Tensor]) -> None:
    x = toy(500, generator(3))
    assert x.shape == (500, 2) and x.dtype == torch.float32 and torch.isfinite(x).all()
    assert torch.equal(x, toy(500, generator(3)))
    assert not torch.equal(x, toy(500, generator(4)))


def test_the_checkerboards_entropy_is_that_of_its_squares() -> None:
    """Squares of side 1/8, so that cells lie wholly in or out: the plug-in entropy of their counts is the density's."""
    n, per_unit = 2_000_000, 8
    x = toys.checkerboard(n, generator(0))
    assert x.min() >= -4 and x.max() <= 4
    cell = ((x + 4) * per_unit).long().clamp(max=8 * per_unit - 1)
    share = torch.bincount(cell[:, 0] * 8 * per_unit + cell[:, 1]).double() / n
    share = share[share > 5 / n]  # rounding may put a point or two over an edge
    assert len(share) == 32 * per_unit**2  # half of the board is empty
    entropy = -(share * (share * per_unit**2).log()).sum().item() + len(share) / (2 * n)  # Miller-Madow
    assert entropy == pytest.approx(toys.CHECKERBOARD_ENTROPY, abs=1e-3)


def test_rings_lie_at_their_radii() -> None:
    radius = toys.rings(100_000, generator(0)).norm(dim=1)
    nearest = (radius / 0.75).round().clamp(1, 4) * 0.75
    assert (radius - nearest).std().item() == pytest.approx(0.08, rel=0.05)


def test_the_pinwheel_has_five_blades() -> None:
    x = toys.pinwheel(50_000, generator(0))
    turned = x @ torch.tensor(
        [[math.cos(0.4 * math.pi), math.sin(0.4 * math.pi)], [-math.sin(0.4 * math.pi), math.cos(0.4 * math.pi)]]
    )
    count = [torch.histogramdd(y, bins=[20, 20], range=[-4, 4, -4, 4]).hist / len(x) for y in (x, turned)]
    assert (count[0] - count[1]).abs().sum() < 0.08


@pytest.mark.parametrize("name", TASKS)
def test_a_task_draws_batches_like_its_test_points(name: str) -> None:
    try:
        task: Task = TASKS[name]()
    except DataNotFoundError:
        pytest.skip("the data is not here")
    assert task.name == name
    x = task.draw(4000, generator(1))
    assert x.shape == (4000, task.features) and x.dtype == task.test.dtype == torch.float32
    assert torch.equal(x, task.draw(4000, generator(1)))
    assert (x.mean(0) - task.test.mean(0)).abs().max() < 0.35  # in deviations; digits has 179 test points
    if task.kind != "plane":
        assert x.std(0).sub(1).abs().max() < 0.15
        assert torch.equal(task.test, TASKS[name]().test)  # dequantised once and for all


def test_restored_digits_are_grey_values() -> None:
    task = TASKS["digits"]()
    pixels = task.restore(task.test)
    assert pixels.min() > -0.51 and pixels.max() < 16.51
