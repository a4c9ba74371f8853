"""Rows never mix: one that is NaN, infinite or enormous changes nothing of the others."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from iresflow_plugin import NotConvergedError, ResidualBlock
from iresflow_plugin.inverse import Anderson, FixedPoint, Newton
from iresflow_plugin.lipschitz import AlmostOrthogonal, Constraint, Frobenius, LipSwish, Spectral, constrain
from iresflow_plugin.log_det import (
    BySize,
    Decay,
    Exact,
    Geometric,
    Omitted,
    Orthogonal,
    Poisson,
    PowerSeries,
    RussianRoulette,
)
from iresflow_plugin.nets import LipschitzConvNet, LipschitzDenseNet, LipschitzMLP
from tests.helpers import assert_close, gentle_sine, linear_branch, log_det, raw_weights, scale_weights

SIZE = 20
BAD = {"NaN": math.nan, "infinity": math.inf, "1e30": 1e30}
every_bad = pytest.mark.parametrize("bad", BAD)
not_finite = pytest.mark.parametrize("bad", ["NaN", "infinity"])


# ----------------------------------------------------------------------------------------------------------- branches


def hardest(lipschitz: float = 0.97) -> nn.Module:
    """g = -L x, the hardest map there is."""
    return linear_branch(-torch.eye(SIZE).double(), lipschitz)


def hard_tanh(lipschitz: float = 0.97, constraint: type[Constraint] = AlmostOrthogonal) -> nn.Module:
    """g = tanh(-L x): at the origin D log(1 - L), -70.1 for L = 0.97, of which two terms of the series give -28.8."""
    net = constrain(nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh()), lipschitz, constraint).double()
    with torch.no_grad():
        raw_weights(net)[0].copy_(-10 * torch.eye(SIZE))
        net[0].bias.zero_()
    return net


def hard_images() -> nn.Module:
    """The same on images of one channel."""
    net = LipschitzConvNet([1, 1, 1], [1, 1], activation=nn.Tanh).double()
    with torch.no_grad():
        for layer, factor in zip((net[0], net[2]), (10.0, -10.0), strict=True):
            layer.parametrizations.weight.original.fill_(factor)
            layer.bias.zero_()
    return net


def full(make: Callable[[], nn.Module]) -> nn.Module:
    return scale_weights(make(), 5.0).double()


BRANCHES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "hardest": (hardest, (SIZE,)),
    "hard-tanh": (hard_tanh, (SIZE,)),
    "hard-tanh-spectral": (lambda: hard_tanh(constraint=Spectral), (SIZE,)),
    "mlp": (lambda: full(lambda: LipschitzMLP([SIZE, 32, SIZE])), (SIZE,)),
    "sine": (lambda: full(lambda: LipschitzMLP([SIZE, 32, SIZE], activation=gentle_sine)), (SIZE,)),
    "lipswish": (lambda: full(lambda: LipschitzMLP([SIZE, 32, SIZE], activation=LipSwish)), (SIZE,)),
    "frobenius": (lambda: full(lambda: LipschitzMLP([SIZE, 32, SIZE], constraint=Frobenius)), (SIZE,)),
    "dense": (lambda: full(lambda: LipschitzDenseNet(SIZE, [8, 8])), (SIZE,)),
    "hard-images": (hard_images, (1, 4, 4)),
    "conv": (lambda: full(lambda: LipschitzConvNet([2, 4, 2])), (2, 3, 3)),
}
every_branch = pytest.mark.parametrize("branch", BRANCHES)


def block_and_rows(
    branch: str, estimator: object = None, solver: object = None, batch: int = 5
) -> tuple[ResidualBlock, Tensor]:
    make, event = BRANCHES[branch]
    x = 0.3 * torch.randn(batch, *event).double()
    return ResidualBlock(make(), Exact() if estimator is None else estimator, solver), x


def spoiled(x: Tensor, bad: str, row: int = 3, everywhere: bool = False) -> tuple[Tensor, Tensor]:
    """A copy with a bad row, and the numbers of all others."""
    x = x.clone()
    x[row].view(-1)[slice(None) if everywhere else slice(1)] = BAD[bad]
    return x, torch.tensor([i for i in range(len(x)) if i != row])


# ------------------------------------------------------------------------------ points, and log-dets without randomness

KNOWN = [Exact(), Exact(chunk=3), Omitted(), BySize(SIZE)]


@every_bad
@every_branch
@pytest.mark.parametrize("estimator", KNOWN, ids=str)
@pytest.mark.parametrize("everywhere", [False, True])
def test_one_bad_row_changes_no_other_row_of_a_forward_pass(branch, bad, estimator, everywhere):
    block, x = block_and_rows(branch, estimator)
    dirty, others = spoiled(x, bad, everywhere=everywhere)
    y, value = block(x)
    z, dirty_value = block(dirty)
    assert_close(z[others], y[others], 1e-12)
    if estimator != Omitted():
        assert_close(dirty_value[others], value[others], 1e-11)
        assert bad != "NaN" or branch == "hardest" or dirty_value[3].isnan()  # of a linear map it is known all the same
    if bad != "1e30":
        assert not torch.isfinite(z[3]).all()


@every_bad
@every_branch
@pytest.mark.parametrize("estimator", [*KNOWN[:3], PowerSeries(6), RussianRoulette()], ids=str)
def test_one_bad_row_changes_no_gradient_of_another_row(branch, bad, estimator):
    """With respect to inputs: of the point, and of log-dets without a distribution."""
    block, x = block_and_rows(branch, estimator)
    dirty, others = spoiled(x, bad)
    found = []
    for rows in (x, dirty):
        torch.manual_seed(1)
        rows = rows.requires_grad_()
        y, value = block(rows)
        random = isinstance(estimator, (Omitted, RussianRoulette))
        loss = y.square().sum() / 2 - (0.0 if random else value.sum())
        found.append(torch.autograd.grad(loss, rows)[0][others])
    assert_close(found[1], found[0], 1e-10, 1e-12)


@every_branch
@pytest.mark.parametrize("estimator", [Exact(), Exact(chunk=3), PowerSeries(6)], ids=str)
def test_an_enormous_row_changes_no_gradient_of_the_parameters_from_other_rows(branch, estimator):
    """A NaN would: 0 times NaN is NaN in every product of torch."""
    block, x = block_and_rows(branch, estimator)
    dirty, others = spoiled(x, "1e30")
    found = []
    for rows in (x, dirty):
        torch.manual_seed(1)
        y, value = block(rows)
        loss = (y[others].square().flatten(1).sum(1) / 2 - value[others]).sum()
        found.append(torch.autograd.grad(loss, list(block.parameters()), materialize_grads=True, allow_unused=True))
    for one, other in zip(*found, strict=True):
        assert_close(other, one, 1e-9, 1e-10)


# ------------------------------------------------------------------------------------------------------ random log-dets

ROULETTES = {
    "decay": (RussianRoulette(probes=8), 0.97),
    "decay, late": (RussianRoulette(Decay(), exact_terms=10, probes=4), 0.97),
    "decay, orthogonal": (RussianRoulette(Decay(), probes=Orthogonal(8)), 0.97),
    "geometric": (RussianRoulette(Geometric(), probes=8), 0.97),
    "geometric, p": (RussianRoulette(Geometric(0.05), probes=8), 0.97),
    "poisson": (RussianRoulette(Poisson(8.0), probes=8), 0.5),
    "by size": (BySize(0, 0), 0.97),
}
SERIES = {
    "terms": (PowerSeries(terms=500), 0.97),
    "tolerance": (PowerSeries(tolerance=1e-3), 0.97),
    "tolerance, orthogonal": (PowerSeries(tolerance=1e-3, probes=Orthogonal(4)), 0.97),
}
every_random = pytest.mark.parametrize("label", ROULETTES | SERIES)


def draws_of(label: str) -> range:
    """Jacobians here are diagonal, of which Rademacher probes give the trace without noise: a series needs few."""
    return range(3 if label in ("terms", "tolerance") else 40)


def assert_in_distribution(draws: Tensor, right: Tensor | float, systematic: float = 2e-3) -> None:
    """Means over calls, shape (calls, rows), within 5 standard errors: fails once in a million tests of a right one."""
    assert torch.isfinite(draws).all()
    allowed = 5 * draws.std(0) / len(draws) ** 0.5 + systematic
    assert ((draws.mean(0) - right).abs() <= allowed).all(), (draws.mean(0), right, allowed)


def random_block(label: str, make: Callable[[float], nn.Module]) -> ResidualBlock:
    estimator, lipschitz = (ROULETTES | SERIES)[label]
    return ResidualBlock(make(lipschitz), estimator)


@every_bad
@every_random
@pytest.mark.parametrize("recorded", [True, False])
def test_one_bad_row_shifts_no_mean_of_a_log_det(recorded, label, bad):
    """From the origin, where the series is longest, to a saturated row, where it ends at once."""
    block = random_block(label, hard_tanh)
    x = torch.linspace(0, 3, 4).double()[:, None] * torch.ones(4, SIZE).double()
    dirty, others = spoiled(x, bad, row=1)
    with torch.set_grad_enabled(recorded):
        values = torch.stack([block(dirty)[1].detach() for _ in draws_of(label)])
    assert_in_distribution(values[:, others], log_det(block.branch, x[others]))
    assert bad != "NaN" or values[:, 1].isnan().all()


@every_bad
@pytest.mark.parametrize("row", [0, 2, 4])
def test_the_place_of_the_bad_row_does_not_matter(row, bad):
    block = random_block("decay", hard_tanh)
    dirty, others = spoiled(torch.zeros(5, SIZE).double(), bad, row)
    with torch.no_grad():
        values = torch.stack([block(dirty)[1] for _ in draws_of("decay")])[:, others]
    assert_in_distribution(values, SIZE * math.log1p(block.branch[0].weight[0, 0].item()))


@every_bad
def test_several_bad_rows_leave_the_one_that_is_whole(bad):
    block = random_block("decay", hard_tanh)
    dirty = torch.full((5, SIZE), BAD[bad], dtype=torch.float64)
    dirty[2] = 0.0
    with torch.no_grad():
        values = torch.stack([block(dirty)[1][2:3] for _ in draws_of("decay")])
    assert_in_distribution(values, SIZE * math.log1p(block.branch[0].weight[0, 0].item()))


@every_bad
@pytest.mark.parametrize("label", ["decay", "geometric", "terms"])
@pytest.mark.parametrize("recorded", [True, False])
def test_one_bad_image_shifts_no_mean_of_a_log_det(recorded, label, bad):
    block = ResidualBlock(hard_images(), (ROULETTES | SERIES)[label][0])
    dirty, others = spoiled(torch.zeros(3, 1, 4, 4).double(), bad, row=0, everywhere=True)
    with torch.set_grad_enabled(recorded):
        values = torch.stack([block(dirty)[1].detach() for _ in draws_of(label)])
    slope = block.branch[0].weight.item() * block.branch[2].weight.item()
    assert_in_distribution(values[:, others], 16 * math.log1p(slope))


@every_bad
@pytest.mark.parametrize("label", ["decay", "geometric"])
def test_one_bad_row_shifts_no_mean_of_a_reverse_log_det(label, bad):
    """Rows without a solution are named; where the solver may return them, the others are right."""
    estimator, lipschitz = (ROULETTES | SERIES)[label]
    block = ResidualBlock(hard_tanh(lipschitz), estimator, Newton(on_failure="return"))
    y = 0.01 * torch.randn(3, SIZE).double()
    dirty, others = spoiled(y, bad, row=0)
    with torch.no_grad():
        pairs = [block.inverse(dirty) for _ in draws_of(label)]
    values = torch.stack([value for _, value in pairs])[:, others]
    assert_in_distribution(values, -log_det(block.branch, pairs[0][0][others]))


@every_bad
@every_random
def test_one_bad_row_shifts_no_mean_of_a_gradient(label, bad):
    """Of the log-det with respect to the inputs of the other rows."""
    block = random_block(label, hard_tanh)
    x = (0.1 * torch.randn(3, SIZE)).double()
    dirty, others = spoiled(x, bad, row=2)
    dirty.requires_grad_()
    slopes = torch.stack([torch.autograd.grad(block(dirty)[1].sum(), dirty)[0][others] for _ in draws_of(label)])
    leaf = x[others].requires_grad_()
    (right,) = torch.autograd.grad(log_det(block.branch, leaf, create_graph=True).sum(), leaf)
    assert_in_distribution(slopes, right, systematic=5e-3)


@pytest.mark.parametrize("label", ["decay", "geometric", "poisson", "terms"])
def test_an_enormous_row_shifts_no_mean_of_a_gradient_of_the_parameters(label):
    block = random_block(label, hard_tanh)
    bias = block.branch[0].bias
    x = (0.1 * torch.randn(3, SIZE)).double()
    dirty, others = spoiled(x, "1e30", row=2)
    slopes = torch.stack([torch.autograd.grad(block(dirty)[1][others].sum(), bias)[0] for _ in draws_of(label)])
    (right,) = torch.autograd.grad(log_det(block.branch, x[others].requires_grad_(), create_graph=True).sum(), bias)
    assert_in_distribution(slopes, right, systematic=5e-3)


@every_bad
@pytest.mark.parametrize("label", ["decay", "decay, late", "geometric"])
def test_one_bad_row_leaves_the_standard_errors_of_the_others_honest(label, bad):
    """The reported error is the spread of the estimates, to a third: never 0.0 beside a value that is off by 40."""
    block = random_block(label, hard_tanh)
    dirty, others = spoiled(torch.zeros(3, SIZE).double(), bad, row=0)
    with torch.no_grad():
        estimates = [block.estimate(dirty) for _ in range(200)]
    spread = torch.stack([e.log_det for e in estimates])[:, others].std(0)
    reported = torch.stack([e.standard_error for e in estimates])[:, others].square().mean(0).sqrt()
    assert (reported > 2 / 3 * spread).all() and (reported < 3 / 2 * spread).all(), (reported, spread)


@every_bad
@pytest.mark.parametrize("label", SERIES)
def test_one_bad_row_leaves_the_remainders_of_the_others(label, bad):
    """Bounds that hold: the error is below the remainder, and that below the tolerance."""
    block = random_block(label, hard_tanh)
    dirty, others = spoiled(torch.zeros(3, SIZE).double(), bad, row=0)
    estimate = block.estimate(dirty)
    right = SIZE * math.log1p(block.branch[0].weight[0, 0].item())
    assert ((estimate.log_det - right).abs()[others] <= estimate.remainder[others] + 1e-9).all()
    if block.estimator.tolerance is not None:
        assert (estimate.remainder[others] <= block.estimator.tolerance).all()


@every_bad
@pytest.mark.parametrize("label", ["decay", "tolerance"])
def test_one_bad_row_costs_the_others_no_more_terms(label, bad):
    """On a Jacobian far below its bound, where a series ends early."""
    estimator, lipschitz = (ROULETTES | SERIES)[label]
    net = linear_branch(-torch.eye(SIZE).double(), lipschitz)
    with torch.no_grad():
        raw_weights(net)[0].mul_(0.01)  # from 10 to 0.1
    block = ResidualBlock(constrain(nn.Sequential(nn.Linear(SIZE, SIZE), net), 0.97).double(), estimator)
    with torch.no_grad():
        raw_weights(block)[0].copy_(torch.eye(SIZE))
        x = torch.randn(3, SIZE).double()
        dirty, _ = spoiled(x, bad, row=0)
        clean = max(block.estimate(x).terms for _ in range(20))
        assert max(block.estimate(dirty).terms for _ in range(20)) <= clean + 3


# ------------------------------------------------------------------------------------------------------------ inverses

SOLVERS = [FixedPoint, Anderson, Newton, lambda **options: Newton(dense=0, **options)]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=["FixedPoint", "Anderson", "Newton", "Newton-GMRES"])


@every_bad
@every_branch
@every_solver
@pytest.mark.parametrize("tolerance", [None, 1e-6])
def test_one_bad_row_changes_no_solution_of_another_row(branch, bad, solver, tolerance):
    """Nor its error bound, its evaluations, and whether it converged."""
    block, y = block_and_rows(branch, solver=solver(on_failure="return", tolerance=tolerance))
    dirty, others = spoiled(y, bad)
    clean, found = block.solve(y), block.solve(dirty)
    assert clean.converged.all() and found.converged[others].all()
    assert_close(found.x[others], clean.x[others], 1e-11)
    if tolerance is None:  # how many steps round-off takes is a matter of chance
        assert (found.error_bound[others] <= 1e-11).all()
    else:
        assert_close(found.error_bound[others], clean.error_bound[others], 1e-6, 1e-11)
        assert torch.equal(found.evaluations[others], clean.evaluations[others])
    assert_close(block.preimage(dirty)[others], clean.x[others], 1e-11)
    assert bad == "1e30" or not found.converged[3]


@every_bad
@every_branch
@every_solver
def test_a_bad_row_is_named_or_solved(branch, bad, solver):
    block, y = block_and_rows(branch, solver=solver())
    dirty, _ = spoiled(y, bad)
    for call in (block.inverse, block.preimage, block.solve):
        try:
            call(dirty)
        except NotConvergedError as error:
            assert "rows 3" in str(error) and "1 of 5" in str(error)
        else:
            assert bad == "1e30"
            x = block.preimage(dirty).detach()
            assert_close(x + block.branch(x), dirty, 1e-12)


@every_bad
@pytest.mark.parametrize("branch", ["hard-tanh", "mlp", "sine", "dense", "conv"])
@every_solver
def test_one_bad_row_changes_no_gradient_through_an_inverse(branch, bad, solver):
    """Of solution and log-det of the other rows; for an enormous one of the parameters, too."""
    block, y = block_and_rows(branch, Exact(), solver(on_failure="return"))
    dirty, others = spoiled(y, bad)
    found = []
    for rows in (y, dirty):
        rows = rows.requires_grad_()
        x, value = block.inverse(rows)
        loss = (x[others].square().flatten(1).sum(1) / 2 - value[others]).sum()
        wanted = [rows, *block.parameters()]
        slopes = torch.autograd.grad(loss, wanted, materialize_grads=True, allow_unused=True)
        found.append([slopes[0][others], *slopes[1:]])
    for one, other in list(zip(*found, strict=True))[: None if bad == "1e30" else 1]:
        assert_close(other, one, 1e-8, 1e-9)


@not_finite
@every_solver
def test_a_cotangent_that_is_not_finite_stays_in_its_row(solver, bad):
    """Of the solution: the gradients of the other rows are as without it."""
    block, y = block_and_rows("sine", solver=solver())
    y.requires_grad_()
    cotangent = torch.randn_like(y)
    dirty, others = spoiled(cotangent, bad)
    found = [torch.autograd.grad(block.preimage(y), y, v)[0] for v in (cotangent, dirty)]
    assert_close(found[1][others], found[0][others], 1e-11)
    assert not torch.isfinite(found[1][3]).all()


@every_bad
def test_one_bad_row_of_a_context_changes_no_other_row(bad):
    net = scale_weights(LipschitzMLP([SIZE, 32, SIZE], context_features=3), 5.0).double()
    block, x, context = ResidualBlock(net, Exact()), torch.randn(5, SIZE).double(), torch.randn(5, 3).double()
    dirty, others = spoiled(context, bad)
    for one, other in zip(block(x, dirty), block(x, context), strict=True):
        assert_close(one[others], other[others], 1e-10)


@every_bad
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-11)], ids=str)
def test_rows_do_not_mix_in_single_precision_either(dtype, tolerance, bad):
    """Where the square of 1e30 is infinite."""
    block = ResidualBlock(hard_tanh(0.9).to(dtype), RussianRoulette(probes=8), Anderson(on_failure="return"))
    x = 0.1 * torch.randn(4, SIZE, dtype=dtype)
    dirty, others = spoiled(x, bad)
    with torch.no_grad():
        assert_close(block(dirty)[0][others], block(x)[0][others], tolerance)
        assert_close(block.preimage(dirty)[others], block.preimage(x)[others], tolerance)
        values = torch.stack([block(dirty)[1] for _ in draws_of("decay")]).double()[:, others]
    exact = ResidualBlock(block.branch, Exact())
    assert_in_distribution(values, exact(x)[1].detach().double()[others], systematic=1e-2)
