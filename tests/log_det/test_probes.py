"""Moments and independence of the probes, where their randomness comes from."""

import math
import random

import pytest
import torch

from iresflow_plugin.log_det import Gaussian, Orthogonal, Rademacher
from tests.helpers import assert_close, name

KINDS = [Rademacher, Gaussian, Orthogonal]


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_second_moment_is_the_identity(kind):
    """E[v v^T] = I within 4.5 standard errors: 10 entries a kind, so a right kind fails with probability 7e-5."""
    n, size = 20_000, 4
    v = torch.cat([kind(2).draw(torch.zeros(50, size, dtype=torch.float64)).reshape(-1, size) for _ in range(n // 100)])
    for i in range(size):
        for j in range(i + 1):
            products = v[:, i] * v[:, j]
            # both probes of a draw, and for Orthogonal all rows, share a basis: judge by means over draws
            means = products.view(n // 100, -1).mean(1)
            error = means.std() / math.sqrt(len(means)) + 1e-12
            assert abs(means.mean() - float(i == j)) <= 4.5 * error


@pytest.mark.parametrize("kind", KINDS, ids=name)
@pytest.mark.parametrize("event", [(3,), (2, 3, 2)])
def test_shapes_and_dtypes(kind, event):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        v = kind(2).draw(torch.zeros(5, *event, dtype=dtype))
        assert v.shape == (2, 5, *event) and v.dtype == dtype


def test_rademacher_entries_are_signs():
    v = Rademacher(3).draw(torch.zeros(50, 7))
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    assert (v.square().sum(-1) == 7).all()


@pytest.mark.parametrize("count", [1, 3, 6])
def test_orthogonal_probes_are_orthogonal_and_of_length_sqrt_d(count):
    v = Orthogonal(count).draw(torch.zeros(4, 2, 3, dtype=torch.float64)).reshape(count, 4, 6)
    for sample in v.unbind(1):
        assert_close(sample @ sample.mT, 6 * torch.eye(count, dtype=torch.float64), 1e-12)


def test_orthogonal_signs_differ_between_samples():
    v = Orthogonal(2).draw(torch.zeros(64, 5))
    assert len({tuple(row.sign().tolist()) for row in v[0]}) > 20


def test_no_more_orthogonal_probes_than_dimensions():
    with pytest.raises(ValueError, match=r"3 probes.*3 dimensions.*count=4"):
        Orthogonal(4).draw(torch.zeros(2, 3))


@pytest.mark.parametrize("kind", KINDS, ids=name)
@pytest.mark.parametrize("count", [0, -1])
def test_at_least_one_probe(kind, count):
    with pytest.raises(ValueError, match="count"):
        kind(count)


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_randomness_comes_from_torch_alone(kind):
    x = torch.zeros(3, 4)
    torch.manual_seed(5)
    one = kind(2).draw(x)
    random.seed(1)
    torch.manual_seed(5)
    assert torch.equal(one, kind(2).draw(x))
    assert not torch.equal(one, kind(2).draw(x))
    state = torch.get_rng_state()
    two = kind(2).draw(x, torch.Generator().manual_seed(1))
    assert torch.equal(two, kind(2).draw(x, torch.Generator().manual_seed(1)))
    assert torch.equal(state, torch.get_rng_state())  # a generator leaves the global state alone
