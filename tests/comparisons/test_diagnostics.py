"""Diagnostics against closed forms: branches whose Jacobian is known, planted errors, costs counted by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from comparisons.diagnostics import (
    Visit,
    block_rows,
    inverse_work,
    jacobian_norms,
    log_det_work,
    log_dets,
    round_trip,
    training_memory,
    visit_blocks,
)
from comparisons.methods import METHODS, Density, build
from iresflow_plugin import ResidualBlock, using
from iresflow_plugin.inverse import FixedPoint
from iresflow_plugin.log_det import BySize, Exact, Orthogonal, PowerSeries, Rademacher, RussianRoulette
from tests import helpers

D = 4
L = 0.9
Z = 4.4  # a z-test beyond this rejects a right answer once in 100 000


@pytest.fixture
def matrix() -> Tensor:
    """Orthogonal, so that all singular values of the Jacobian are L."""
    return helpers.orthogonal(D)


@pytest.fixture
def visits(matrix: Tensor) -> list[Visit]:
    block = ResidualBlock(helpers.linear_branch(matrix, L))
    return visit_blocks(block, torch.randn(50, D, dtype=torch.float64))


@pytest.mark.parametrize("name", ["ours", "normflows-realnvp-swapped"])
def test_visits_follow_the_data_through_either_host(name: str) -> None:
    density, x = build(METHODS[name], 2, 2000), torch.randn(20, 2)
    density(x)  # ActNorm
    before = [module.estimator for module in density.modules() if isinstance(module, ResidualBlock)]
    visits = visit_blocks(density, x)
    assert len(visits) == len(before) == 8
    assert {id(visit.block) for visit in visits} == {id(m) for m in density.modules() if isinstance(m, ResidualBlock)}
    assert [visit.block.estimator for visit in visits] == before and density.training
    if name == "ours":
        ends = [x, *(visit.x + visit.g(visit.x) for visit in visits)]
        assert all(torch.allclose(visit.x, end) for visit, end in zip(visits, ends, strict=False))
        assert torch.allclose(ends[-1], density.to_noise(x))


def test_visits_do_not_mind_a_setting_around_them() -> None:
    block = ResidualBlock(helpers.scaled_mlp(D))
    with using(block, log_det=PowerSeries(terms=3)):
        (visit,) = visit_blocks(block, torch.randn(5, D, dtype=torch.float64))
        assert isinstance(block.estimator, PowerSeries)
    assert visit.block is block and block.estimator == BySize()


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear holds no ResidualBlock"):
        visit_blocks(nn.Linear(2, 2), torch.randn(3, 2))


@pytest.mark.parametrize("dense_up_to", [D, 0])
def test_jacobian_norms_are_the_largest_singular_values(dense_up_to: int) -> None:
    branch = helpers.scaled_mlp(D, activation=helpers.gentle_sine)
    x = torch.randn(20, D, dtype=torch.float64)
    truth = torch.linalg.svdvals(helpers.jacobian(branch, x))[:, 0]
    found = jacobian_norms(visit_blocks(ResidualBlock(branch), x)[0].g, x, dense_up_to)
    assert (found <= truth * (1 + 1e-12)).all()
    assert torch.allclose(found, truth, rtol=1e-2 if dense_up_to == 0 else 1e-12)


def test_block_rows(visits: list[Visit]) -> None:
    (row,) = block_rows(visits)
    assert row.block == 1
    truth = torch.linalg.svdvals(jacobian_of(visits)[0])[0].item()
    assert row.measured == pytest.approx(truth, rel=1e-12) == row.median
    assert row.measured <= row.bound <= L < 1.05 * row.measured  # the weight is orthogonal: the bound is nearly met


def jacobian_of(visits: list[Visit]) -> Tensor:
    return helpers.jacobian(visits[0].block.branch, visits[0].x)


def test_bias_of_a_truncated_series() -> None:
    """Orthogonal probes take the trace without scatter: what remains is the tail, another at every point."""
    block = ResidualBlock(helpers.scaled_mlp(D, activation=helpers.gentle_sine))
    visits = visit_blocks(block, torch.randn(50, D, dtype=torch.float64))
    work = log_det_work(visits, {"all": [PowerSeries(terms=n, probes=Orthogonal(D)) for n in (2, 5)]}, repeats=3)
    J = jacobian_of(visits)
    truth = helpers.log_det(block.branch, visits[0].x)
    for row, terms in zip(work, (2, 5), strict=True):
        tail = helpers.power_sum(J, terms) - truth
        assert row.bias == pytest.approx(tail.mean().item(), rel=1e-9)
        assert row.rms == pytest.approx(tail.square().mean().sqrt().item(), rel=1e-9)
        assert row.deviation < 1e-12 and row.bias_error < 1e-12
        assert row.terms == terms and row.evaluations == 1 + D * terms


def test_scatter_of_probes(visits: list[Visit]) -> None:
    """Var v^T J v = sum_{i<j} (J_ij + J_ji)^2 for Rademacher probes; over K of them, a K-th of it."""
    J = jacobian_of(visits)[0]
    variance = (J + J.T).triu(1).square().sum().item()
    for row, probes in zip(
        log_det_work(visits, {"": [PowerSeries(terms=1, probes=Rademacher(k)) for k in (1, 4)]}, repeats=200),
        (1, 4),
        strict=True,
    ):
        assert row.deviation**2 == pytest.approx(variance / probes, rel=0.1)  # 10 000 draws
        assert row.evaluations == 1 + probes


def test_exact_and_roulette_have_no_bias(visits: list[Visit]) -> None:
    exact, roulette = log_det_work(visits, {"": [Exact(), RussianRoulette()]}, repeats=100)
    assert exact.rms < 1e-12 and exact.evaluations == 1 + D and exact.terms == 0
    assert abs(roulette.bias) < Z * roulette.bias_error
    assert roulette.bias_error < 0.1 and roulette.rms > 0.05 and roulette.seconds > 0


def test_evaluations_are_counted_for_every_point_where_rows_part_ways(
    visits: list[Visit], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iresflow_plugin.log_det.exact.CHUNK_ENTRIES", 8 * D * D)  # rows of one Jacobian: 8 of the 50
    (work,) = log_det_work(visits, {"": [Exact()]}, repeats=2)
    assert work.evaluations == 1 + D and work.rms < 1e-12


def test_work_is_the_same_twice_and_leaves_the_seed_alone(visits: list[Visit]) -> None:
    state = torch.get_rng_state()
    first, second = (log_det_work(visits, {"": [RussianRoulette()]}, repeats=3)[0] for _ in range(2))
    assert (first.bias, first.evaluations) == (second.bias, second.evaluations)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="at least 2 repeats, got 1"):
        log_det_work(visits, repeats=1)


def test_every_estimator_of_the_table_runs(visits: list[Visit]) -> None:
    work = log_det_work(visits, repeats=2)
    assert {row.family for row in work} == set(log_dets(D)) and f"series, all {D} probes" in log_dets(D)
    assert all(math.isfinite(row.rms) and row.seconds > 0 for row in work)
    assert "all 500 probes" not in " ".join(log_dets(500))


def test_errors_of_inverses_stay_below_the_certified_ones(visits: list[Visit]) -> None:
    work = inverse_work(visits, tolerances=(1e-2, 1e-8))
    assert [row.name for row in work] == 2 * ["fixed point", "Anderson", "Newton"]
    assert all(0 < row.error <= row.certified <= row.tolerance and row.converged == 1 for row in work if row.tolerance)
    plain, _, newton = work[3:]
    # J is a rotation times a number: every step multiplies the residual by it, until |r| = (1 - L) tolerance. One more
    # evaluation proves the error.
    rate = jacobian_norms(visits[0].g, visits[0].x).max().item()
    first = visits[0].g(visits[0].x + visits[0].g(visits[0].x)).norm(dim=1)
    steps = 2 + torch.ceil(torch.log(first / (1 - visits[0].g.bound) / 1e-8) / math.log(1 / rate))
    assert plain.evaluations == pytest.approx(steps.mean().item(), abs=0.1)
    assert newton.evaluations <= 4 + D  # a linear g: one step, a look at what it brought, and the proof


def test_an_inverse_that_fails_is_a_row_and_not_an_error(visits: list[Visit]) -> None:
    (row,) = inverse_work(visits, {"short": FixedPoint(max_evaluations=3)}, tolerances=[1e-8])
    assert row.converged == 0 and row.most_evaluations == 3
    rate = jacobian_norms(visits[0].g, visits[0].x).max().item()
    assert row.error == pytest.approx(rate**3 * visits[0].g(visits[0].x).norm(dim=1).max().item())  # three plain steps
    assert 1e-8 < row.error <= row.certified


def test_block_rows_use_each_blocks_own_solver(visits: list[Visit]) -> None:
    cost = []
    for tolerance in (1e-1, 1e-9):
        visits[0].block.solver = FixedPoint(tolerance=tolerance)
        cost.append(block_rows(visits)[0].evaluations)
    assert cost[0] < cost[1] / 3


class Lossy(Density):
    """Comes back a distance of 0.5 off, and not at all where x is negative."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x.sqrt()

    def to_data(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return z**2 + torch.tensor([0.3, 0.4])


def test_round_trip_finds_planted_errors() -> None:
    x = torch.rand(10, 2)
    x[3] = -1.0
    found = round_trip(Lossy(), x)
    assert (found.median, found.largest, found.failed) == (pytest.approx(0.5), pytest.approx(0.5), 1)
    assert math.isnan(round_trip(Lossy(), -x.abs()).largest)


def test_round_trip_of_a_residual_flow() -> None:
    assert round_trip(build(METHODS["ours"], 2, 2000), torch.randn(50, 2)).largest < 1e-5


@pytest.mark.parametrize("name", ["ours", "normflows-glow"])
def test_memory_of_a_training_step_grows_with_the_batch(name: str) -> None:
    density = build(METHODS[name], 2, 4000)
    before = copy.deepcopy(density.state_dict())
    small, large = (training_memory(density, METHODS[name], torch.randn(n, 2)) for n in (500, 2000))
    assert 3 < large / small < 5
    assert large > 2000 * 8 * 16 * 4 / 1e6  # at least one hidden layer of every block is kept
    assert all(torch.equal(value, before[key]) for key, value in density.state_dict().items())
