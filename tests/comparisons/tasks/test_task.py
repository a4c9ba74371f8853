"""Points travel with their context; a task knows its units."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comparisons.tasks import Points
from comparisons.tasks.tables import digits


@pytest.fixture
def points() -> Points:
    x = torch.arange(10.0)[:, None].expand(10, 3)
    return Points(x, x[:, :1] + 100)


def test_points_and_context_stay_together(points: Points) -> None:
    parts = [points[2:5], points[torch.tensor([7, 1])], *points.split(4), points.to("cpu")]
    assert [len(part) for part in parts] == [3, 2, 4, 4, 2, 10]
    for part in parts:
        assert part.context is not None
        assert torch.equal(part.context, part.x[:, :1] + 100)
    assert parts[1].x[:, 0].tolist() == [7, 1]
    assert torch.equal(torch.cat([part.x for part in points.split(4)]), points.x)


@given(st.integers(1, 300), st.integers(1, 300))
def test_some_points_stand_for_all_of_a_sorted_file(length: int, n: int) -> None:
    points = Points(torch.arange(float(length))[:, None], torch.arange(float(length))[:, None])
    some = points.spread(n)
    gaps = some.x[:, 0].diff(append=torch.tensor([float(length)]))
    assert len(some) == min(n, length) and some.x[0] == 0 and torch.equal(some.x, some.context)
    assert gaps.min() >= length // len(some) and gaps.max() <= -(-length // len(some))


def test_points_without_context_stay_without() -> None:
    assert Points(torch.zeros(4, 2))[:2].context is None


def test_every_point_needs_its_context(points: Points) -> None:
    with pytest.raises(ValueError, match="10 points have 9 contexts"):
        Points(points.x, torch.zeros(9, 1))


def test_bits_per_dimension_of_a_uniform_density() -> None:
    """Digits have grey values 0 to 16: a uniform density on [0, 17)^64 costs log2(17) bits a pixel."""
    task = digits()
    raw = -64 * math.log(17)
    assert task.bits_per_dimension(raw - task.log_volume) == pytest.approx(math.log2(17))
