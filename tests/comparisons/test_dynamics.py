"""Plain blocks cross, ours do not, and ours come close to the best that a map without crossings can do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from comparisons.dynamics import (
    BLOCKS,
    LIMIT,
    TRAJECTORIES,
    Dynamics,
    InvertibleBlock,
    crossings,
    dynamics,
    dynamics_figure,
    fit_error,
    least_increasing_error,
    trajectories,
)
from iresflow_plugin import ResidualBlock
from tests.helpers import scale_weights


@pytest.fixture(scope="module")
def found() -> Dynamics:
    torch.set_num_threads(1)
    return dynamics()


def test_shapes_and_inputs(found: Dynamics) -> None:
    assert found.plain.shape == found.invertible.shape == (BLOCKS + 1, TRAJECTORIES)
    assert np.array_equal(found.plain[0], found.invertible[0])
    assert np.allclose(found.plain[0], np.linspace(-LIMIT, LIMIT, TRAJECTORIES))
    assert np.allclose(found.target, found.plain[0] ** 3 - 2 * found.plain[0])


def test_ours_keep_strict_order_in_every_block(found: Dynamics) -> None:
    assert (np.diff(found.invertible, axis=1) > 0).all()


def test_plain_blocks_cross(found: Dynamics) -> None:
    assert crossings(found.plain).max() >= 10  # the target falls between 16 neighbours


def test_both_learned(found: Dynamics) -> None:
    best = least_increasing_error(found)
    assert fit_error(found.plain, found.target) < 0.3 * best
    assert best <= fit_error(found.invertible, found.target) < 1.1 * best


def test_order_is_kept_by_any_weights() -> None:
    """Not a matter of training: with weights pushed against the bound, at points 1e-6 apart."""
    net = nn.Sequential(*[InvertibleBlock(16) for _ in range(4)]).double()
    scale_weights(net, 20.0)
    x = torch.linspace(-1e-4, 1e-4, 200, dtype=torch.float64)[:, None]
    assert crossings(trajectories(net, x)).sum() == 0
    assert isinstance(net[0].block, ResidualBlock)


def test_crossings_counts_neighbours_that_met_or_changed_sides() -> None:
    places = np.array([[0.0, 1.0, 2.0, 3.0], [0.0, 2.0, 1.0, 3.0], [0.0, 1.0, 1.0, 0.5]])
    assert crossings(places).tolist() == [0, 1, 2]


def test_one_seed_suffices() -> None:
    first, second = (dynamics(blocks=1, seed=3) for _ in range(2))
    assert np.array_equal(first.invertible, second.invertible) and np.array_equal(first.plain, second.plain)


def test_the_figure_says_what_was_found(found: Dynamics) -> None:
    plain, ours = dynamics_figure(found).axes
    assert "neighbours out of order" in plain.get_title() and "order kept" in ours.get_title()
    assert len(ours.lines) == 2 * TRAJECTORIES
