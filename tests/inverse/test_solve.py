"""Solvers against float64 truth, where it is hardest: the reported bound holds, and failure is loud."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from iresflow_plugin import NotContractiveError, NotConvergedError, maps
from iresflow_plugin.inverse import Anderson, FixedPoint, Newton, Solution, Solver
from iresflow_plugin.inverse.newton import gmres
from iresflow_plugin.lipschitz import Chain, Concatenate, Sine, constrain, contraction
from iresflow_plugin.nets import LipschitzMLP
from tests.helpers import (
    EPS,
    align,
    assert_close,
    branches,
    frozen64,
    gentle_sine,
    inverse64,
    jacobian,
    linear_branch,
    orthogonal,
    scale_weights,
    scaled_mlp,
    seeds,
)

SOLVERS = [FixedPoint(), Anderson(), Newton(), Newton(dense=0)]
LIPSCHITZ = [0.5, 0.9, 0.97, 0.99]

every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=["FixedPoint", "Anderson", "Newton", "Newton-Krylov"])
every_dtype = pytest.mark.parametrize("dtype, accuracy", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)


def errors(solution: Solution, truth: Tensor) -> Tensor:
    return (solution.x.double() - truth).flatten(1).norm(dim=1)


def round_off(truth: Tensor, y: Tensor, lipschitz: float) -> Tensor:
    """What one rounding of x or y makes of x in the worst case: eps max(|x|, |y|) / (1 - L)."""
    size = torch.maximum(truth.flatten(1).norm(dim=1), y.double().flatten(1).norm(dim=1))
    return EPS[y.dtype] * size / (1 - lipschitz)


def check(solution: Solution, truth: Tensor, y: Tensor, lipschitz: float) -> Tensor:
    """Converged; the bound is never below the true error, and says something; the error is at round-off."""
    assert solution.converged.all() and solution.certified
    error, possible = errors(solution, truth), round_off(truth, y, lipschitz)
    assert (error <= solution.error_bound).all()
    assert (error <= 8 * possible).all()
    assert (solution.error_bound <= (3 if y.dtype == torch.float32 else 64) * possible).all()
    return error


# ------------------------------------------------------------------------------------------------------ D4: accuracy


@every_solver
@every_dtype
@pytest.mark.parametrize("lipschitz", LIPSCHITZ)
def test_d4_true_error_on_scaled_nets(solver, dtype, accuracy, lipschitz):
    """Against the float64 inverse of the very weights in use; biases and inputs of order one and three."""
    torch.manual_seed(0)
    net = scaled_mlp(4, 16, lipschitz=lipschitz, dtype=dtype, factor=20.0, context_features=2)
    context = torch.randn(16, 2, dtype=dtype)
    for scale in (0.0, 1.0, 3.0):
        y = scale * torch.randn(16, 4, dtype=dtype)
        truth = inverse64(frozen64(net), y, context)
        error = check(solver.solve(contraction(net, context), y), truth, y, lipschitz)
        assert error.max() <= accuracy


@every_solver
@every_dtype
@pytest.mark.parametrize("lipschitz", LIPSCHITZ)
@pytest.mark.parametrize("kind", ["rotation", "-L", "+L"])
def test_d4_true_error_on_linear_maps_that_attain_the_bound(solver, dtype, accuracy, lipschitz, kind):
    """The hardest there is: nothing contracts faster than L, and at -L the inverse stretches by 1 / (1 - L).

    There x is up to 1 / (1 - L) times as long as y, and the bias adds a thousandfold of y.
    """
    torch.manual_seed(0)
    matrix = {"rotation": orthogonal(5), "-L": -torch.eye(5).double(), "+L": torch.eye(5).double()}[kind]
    for bias in (0.0, 1.0, 1e3):
        net = linear_branch(matrix, lipschitz, bias * torch.ones(5), dtype)
        y = torch.randn(12, 5, dtype=dtype)
        weight, shift = net[0].weight.detach().double(), net[0].bias.detach().double()
        truth = torch.linalg.solve(torch.eye(5) + weight, (y.double() - shift).mT).mT
        error = check(solver.solve(contraction(net), y), truth, y, lipschitz)
        # eps |x| / (1 - L) is what no method can beat: accuracy is asked for where that allows it
        limit = EPS[dtype] * truth.norm(dim=1) / (1 - lipschitz)
        assert (error <= torch.clamp_min(16 * limit, accuracy)).all()


@every_solver
@every_dtype
def test_y_of_zero_with_a_bias(solver, dtype, accuracy):
    """The mode of the base distribution: y is exactly zero and x is not, so |y| says nothing about round-off."""
    torch.manual_seed(3)
    for _ in range(10):
        net = align(scaled_mlp(3, 8, gentle_sine, 0.95, dtype=dtype))
        y = torch.zeros(2, 3, dtype=dtype)
        check(solver.solve(contraction(net), y), inverse64(frozen64(net), y), y, 0.95)


@given(
    branch_and_size=branches(),
    solver=st.sampled_from(SOLVERS),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
)
def test_any_branch(branch_and_size, solver, scale):
    """Nested branches with every activation: converges, and the bound holds, up to what the reference is off by."""
    branch, size = branch_and_size
    dtype = next(branch.parameters()).dtype
    y, context = scale * torch.randn(8, size, dtype=dtype), torch.randn(8, 2, dtype=dtype)
    g = contraction(branch, context)
    solution = solver.solve(g, y)
    assert solution.converged.all()
    truth = inverse64(frozen64(branch), y, context)
    doubt = 4 * EPS[torch.float64] / EPS[dtype] * round_off(truth, y, g.bound)
    assert (errors(solution, truth) <= solution.error_bound + doubt).all()


@every_solver
@pytest.mark.parametrize("size", [1, 40])
def test_small_and_large_events(solver, size):
    """Below and beyond the sizes at which Newton forms its Jacobian."""
    net = align(scaled_mlp(size, 64, gentle_sine, 0.9))
    y = torch.randn(6, size, dtype=torch.float64)
    check(solver.solve(contraction(net), y), inverse64(frozen64(net), y), y, 0.9)


@every_solver
def test_events_with_several_dimensions(solver):
    net = nn.Sequential(nn.Flatten(), *align(scaled_mlp(12, 16, gentle_sine, 0.9)), nn.Unflatten(1, (3, 2, 2)))
    y = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    solution = solver.solve(contraction(net), y)
    assert solution.x.shape == y.shape
    check(solution, inverse64(frozen64(net), y), y, 0.9)


@every_solver
def test_half_precision(solver):
    net = scaled_mlp(4, 8, gentle_sine, 0.8, dtype=torch.bfloat16)
    y = torch.randn(6, 4).bfloat16()
    solution = solver.solve(contraction(net), y)
    assert solution.converged.all() and solution.x.dtype == torch.bfloat16
    assert errors(solution, inverse64(frozen64(net), y)).max() < 0.1


# -------------------------------------------------------------------------------------------- tolerances, evaluations


@every_solver
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-7])
@pytest.mark.parametrize("lipschitz", [0.5, 0.97])
def test_d4_d16_the_tolerance_is_honoured(solver, tolerance, lipschitz):
    """D4 and D16: neither squared, nor exchanged for another number."""
    for net in (
        linear_branch(-torch.eye(3, dtype=torch.float64), lipschitz),
        align(scaled_mlp(3, 8, gentle_sine, lipschitz)),
    ):
        y = torch.randn(20, 3, dtype=torch.float64)
        solution = replace(solver, tolerance=tolerance).solve(contraction(net), y)
        assert solution.converged.all() and (solution.error_bound <= tolerance).all()
        assert (errors(solution, inverse64(frozen64(net), y)) <= tolerance).all()


def test_the_tolerance_costs_what_it_must_and_no_more():
    """For g = -L x the residual is exactly |y| L^n: plain steps need ln(tol (1-L) / |y|) / ln L of them."""
    net = linear_branch(-torch.eye(1, dtype=torch.float64), 0.9)
    c = -net[0].weight.item()
    y = torch.tensor([[1.0], [1e3]], dtype=torch.float64)
    bound = contraction(net).bound
    for tolerance in (1e-2, 1e-5, 1e-8):
        solution = FixedPoint(tolerance).solve(contraction(net), y)
        needed = [math.ceil(math.log(tolerance * (1 - bound) / size) / math.log(c)) for size in (1.0, 1e3)]
        assert (solution.evaluations - torch.tensor(needed)).abs().max() <= 1


@given(seed=seeds, lipschitz=st.sampled_from(LIPSCHITZ), kind=st.sampled_from(["net", "aligned", "rotation", "-L"]))
def test_anderson_is_never_much_worse_than_the_fixed_point(seed, lipschitz, kind):
    """Every second evaluation at least is a plain step."""
    torch.manual_seed(seed)
    net = {
        "net": lambda: scaled_mlp(4, 8, lipschitz=lipschitz, factor=20.0),
        "aligned": lambda: align(scaled_mlp(4, 8, lipschitz=lipschitz)),
        "rotation": lambda: linear_branch(orthogonal(4), lipschitz),
        "-L": lambda: linear_branch(-torch.eye(4, dtype=torch.float64), lipschitz),
    }[kind]()
    y = 3 * torch.randn(8, 4, dtype=torch.float64)
    g = contraction(net)
    plain, mixed = (kind(tolerance=1e-8).solve(g, y).evaluations for kind in (FixedPoint, Anderson))
    assert (mixed <= 2 * plain + 2).all()
    assert mixed.sum() <= 1.2 * plain.sum() + 8


def test_acceleration_pays_where_it_should():
    net = linear_branch(-torch.eye(4, dtype=torch.float64), 0.99)
    y = torch.randn(8, 4, dtype=torch.float64)
    spent = [s.solve(contraction(net), y).evaluations.max() for s in SOLVERS]
    assert spent[0] > 500 and max(spent[1:]) < 40
    net = linear_branch(torch.diag(-torch.linspace(0.5, 1, 40)), 0.97)
    y = torch.randn(8, 40, dtype=torch.float64)
    plain, krylov = (s.solve(contraction(net), y).evaluations.max() for s in (FixedPoint(), Newton()))
    assert krylov < 0.5 * plain


@pytest.mark.parametrize("size, steps", [(5, 1), (5, 3), (5, 5), (1, 1)])
def test_gmres_minimises_over_the_krylov_space(size, steps):
    """Against least squares over the span of b, Ab, ..., A^(k-1) b."""
    net = scaled_mlp(size, 8, gentle_sine, 0.95)
    x, right = (torch.randn(4, size, dtype=torch.float64) for _ in range(2))
    at_x = contraction(net).linearise(x)
    matrix = torch.eye(size) + jacobian(net, x)
    step = gmres(at_x, right, steps)
    for a, b, d in zip(matrix, right, step, strict=True):
        space = torch.stack([torch.linalg.matrix_power(a, k) @ b for k in range(steps)], 1)
        best = space @ torch.linalg.lstsq(a @ space, b[:, None]).solution[:, 0]
        assert (b - a @ d).norm() <= (b - a @ best).norm() + 1e-8 * b.norm()
    if steps == size:
        assert_close((matrix @ step[..., None])[..., 0], right, 1e-8)


def test_gmres_survives_breakdown():
    """A multiple of the identity exhausts the Krylov space after one step; a zero residual before it."""
    at_x = maps.Scaling(-0.5, 0.5).linearise(torch.zeros(2, 4).double())
    right = torch.stack([torch.randn(4).double(), torch.zeros(4).double()])
    assert_close(gmres(at_x, right, 4), 2 * right, 1e-12)


@dataclass(eq=False)
class Counted(maps.Map):
    """Counts, per row, what a solver spends: values, that of the proof included, and products in one direction."""

    g: maps.Map
    spent: Tensor
    row: Tensor

    @property
    def ceiling(self) -> float:
        return self.g.ceiling

    @property
    def bound(self) -> float:
        return self.g.bound

    def __call__(self, x: Tensor) -> Tensor:
        self.spent[self.row] += 1
        return self.g(x)

    def rounded(self, x: maps.Rounded, products: maps.Products) -> maps.Rounded:
        self.spent[self.row] += 1
        return self.g.rounded(x, products)

    def linearise(self, x: Tensor) -> maps.Linearised:
        self.spent[self.row] += 1
        at_x = self.g.linearise(x)

        def jvp(t: Tensor) -> Tensor:
            self.spent[self.row] += len(t) if t.ndim > x.ndim else 1
            return at_x.jvp(t)

        return maps.Linearised(at_x.value, jvp, at_x.vjp)

    def rows(self, index: Tensor) -> Counted:
        return Counted(self.g.rows(index), self.spent, self.row[index])


@every_solver
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_evaluations_are_counted_per_sample_and_done_samples_cost_nothing(solver, dtype):
    """Rows far out, where tanh is flat, are done at once; rows near zero take long."""
    net = align(scaled_mlp(3, 3, nn.Tanh, 0.97, dtype=dtype))
    y = torch.cat([torch.full((3, 3), 1e3), 0.1 * torch.randn(3, 3)]).to(dtype)
    spent = torch.zeros(6, dtype=torch.int64)
    solution = solver.solve(Counted(contraction(net), spent, torch.arange(6)), y)
    assert torch.equal(solution.evaluations, spent)
    assert spent[:3].max() < spent[3:].min()


@every_solver
def test_a_batch_gives_the_same_as_row_by_row(solver):
    """Contexts stay with their samples when others leave; evaluations are the same, row by row.

    (Anderson takes plain steps as long as they are fast for the whole batch, so its counts depend on the company.)
    """
    net = align(scaled_mlp(3, 6, nn.Tanh, 0.97, context_features=2))
    solver = replace(solver, tolerance=1e-9)
    y = torch.randn(10, 3, dtype=torch.float64) * torch.logspace(-2, 3, 10, dtype=torch.float64)[:, None]
    context = torch.randn(10, 2, dtype=torch.float64)
    together = solver.solve(contraction(net, context), y)
    assert len(together.evaluations.unique()) > 1
    for i in range(10):
        alone = solver.solve(contraction(net, context[i : i + 1]), y[i : i + 1])
        assert isinstance(solver, Anderson) or alone.evaluations.item() == together.evaluations[i].item()
        assert_close(alone.x[0], together.x[i], 1e-9)
    shared = solver.solve(contraction(net, context[:1]), y)
    repeated = solver.solve(contraction(net, context[:1].expand(10, 2)), y)
    assert_close(shared.x, repeated.x, 1e-12)


def test_zero_branch_and_empty_batch():
    net = linear_branch(torch.zeros(3, 3, dtype=torch.float64), 0.9)
    for solver in SOLVERS:
        y = torch.randn(4, 3, dtype=torch.float64)
        solution = solver.solve(contraction(net), y)
        assert torch.equal(solution.x, y) and (solution.evaluations <= 5).all()
        empty = solver.solve(contraction(net), y[:0])
        assert empty.x.shape == (0, 3) and empty.converged.shape == (0,)


@every_solver
def test_the_input_is_left_alone(solver):
    """D9."""
    net = align(scaled_mlp(3, 6, gentle_sine, 0.9))
    y = torch.randn(5, 3, dtype=torch.float64)
    before = y.clone()
    solution = solver.solve(contraction(net), y)
    solution.x.add_(1)
    assert torch.equal(y, before) and not y.requires_grad


# -------------------------------------------------------------------------------------------------- D5: failure is loud


@every_solver
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_d5_rows_that_are_not_finite(solver, bad):
    """Named in the error; the others are right."""
    net = align(scaled_mlp(3, 6, gentle_sine, 0.9, context_features=2))
    context = torch.randn(6, 2, dtype=torch.float64)
    y = torch.randn(6, 3, dtype=torch.float64)
    truth = inverse64(frozen64(net), y, context)
    y[1, 2] = y[4, 0] = bad
    g = contraction(net, context)
    with pytest.raises(NotConvergedError, match=r"2 of 6 samples \(rows 1, 4\)") as caught:
        solver.solve(g, y)
    lenient = replace(solver, on_failure="return")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = lenient.solve(g, y)
    with pytest.warns(RuntimeWarning, match=r"rows 1, 4"):
        warned = replace(solver, on_failure="warn").solve(g, y)
    for solution in (caught.value.solution, quiet, warned):
        assert solution.converged.tolist() == [True, False, True, True, False, True]
        assert (solution.error_bound[[1, 4]] == math.inf).all()
        good = [0, 2, 3, 5]
        assert (errors(solution, truth)[good] <= solution.error_bound[good]).all()
        assert (solution.evaluations[[1, 4]] == 0).all()  # a NaN costs nothing


def linear_branches() -> dict[str, nn.Module]:
    """Of two features; the weights are pushed against their bounds."""
    build = {
        "one layer": lambda: nn.Sequential(nn.Linear(2, 2, bias=False)),
        "side by side": lambda: Chain(
            Concatenate(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)), nn.Linear(3, 2, bias=False)
        ),
    }
    return {label: scale_weights(constrain(make(), 0.9), 20.0).double() for label, make in build.items()}


def matrix_of(branch: nn.Module) -> list[list[Fraction]]:
    """That of a linear branch, without rounding."""

    def exactly(layer: nn.Linear) -> list[list[Fraction]]:
        return [[Fraction(w) for w in row] for row in layer.weight.tolist()]

    layers = [[part] if isinstance(part, nn.Linear) else list(part) for part in branch]
    product, *others = [[row for layer in side_by_side for row in exactly(layer)] for side_by_side in layers]
    for matrix in others:
        columns = list(zip(*product, strict=True))
        product = [[sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in matrix]
    return product


@every_solver
@pytest.mark.parametrize("label", linear_branches())
@pytest.mark.parametrize(
    "dtype, scale",
    [
        (torch.float32, 1e-25),
        (torch.float32, 1e25),
        (torch.float32, 1e37),
        (torch.float64, 1e-200),
        (torch.float64, 1e160),
        (torch.float64, 1e200),
        (torch.float64, 1e290),
    ],
    ids=str,
)
def test_numbers_whose_squares_no_float_holds(solver, dtype, scale, label):
    """Are solved as any others, beside others: to the last digits, with an error below its bound."""
    branch = linear_branches()[label].to(dtype)
    y = torch.tensor([[1.0, -0.3], [0.0, 0.0], [0.7 * scale, -scale], [scale, 1.0]], dtype=dtype)
    solution = solver.solve(contraction(branch), y)
    assert solution.converged.all()
    (a, b), (c, d) = matrix_of(branch)
    determinant = (1 + a) * (1 + d) - b * c
    for (p, q), x, bound in zip(y.tolist(), solution.x.tolist(), solution.error_bound.tolist(), strict=True):
        unit = Fraction(max(abs(p), abs(q)) or 1.0)
        v, w = Fraction(p) / unit, Fraction(q) / unit
        exact = ((1 + d) * v - b * w) / determinant, ((1 + a) * w - c * v) / determinant  # Cramer's rule
        off = math.hypot(*[float(Fraction(found) / unit - right) for found, right in zip(x, exact, strict=True)])
        assert off <= float(Fraction(bound) / unit) <= 1e3 * EPS[dtype]


@every_solver
def test_d5_a_branch_that_is_not_finite(solver):
    """g itself overflows or is NaN: loud as well, with the advice to look there."""

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 2, torch.nan, 0.1 * x)

        def lipschitz_bound(self) -> float:
            return 0.5

    y = torch.tensor([[1.0, 1.0], [1.0, 3.0], [-1.0, 0.0]], dtype=torch.float64)
    with pytest.raises(NotConvergedError, match=r"1 of 3 samples \(rows 1\).*NaN"):
        solver.solve(contraction(Broken()), y)


@pytest.mark.parametrize("solver", [FixedPoint(max_evaluations=3), Anderson(max_evaluations=3)], ids=str)
def test_d5_too_few_evaluations(solver):
    """The error has the numbers: how many samples, how far off, after how much work, what was asked."""
    net = linear_branch(-torch.eye(3, dtype=torch.float64), 0.99)
    net[0].parametrizations.weight.original.data += 0.3 * torch.randn(3, 3)
    y = torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(NotConvergedError, match=r"4 of 4 .*at most \d.* after 3 evaluations.*round-off") as caught:
        solver.solve(contraction(net), y)
    solution = caught.value.solution
    assert (solution.evaluations == 3).all() and not solution.converged.any()
    assert (errors(solution, inverse64(frozen64(net), y)) <= solution.error_bound).all()  # still a certified bound
    assert torch.isfinite(solution.error_bound).all()


@every_solver
def test_d5_a_tolerance_beyond_the_dtype(solver):
    """float32 cannot hold 1e-9 at L = 0.9: said, not pretended, and not after a hundred thousand evaluations."""
    net = linear_branch(-torch.eye(3, dtype=torch.float64), 0.9, torch.ones(3), torch.float32)
    y = torch.randn(4, 3)
    with pytest.raises(NotConvergedError, match="float64") as caught:
        replace(solver, tolerance=1e-9).solve(contraction(net), y)
    solution = caught.value.solution
    assert solution.evaluations.max() < 1500
    assert (errors(solution, inverse64(frozen64(net), y)) <= solution.error_bound).all()


@every_solver
@pytest.mark.parametrize("bound", [1.0, 1.5, math.inf, math.nan])
def test_d5_a_bound_of_one_or_more_is_refused(solver, bound):
    with pytest.raises(NotContractiveError):
        solver.solve(maps.Scaling(0.5, bound), torch.randn(2, 3))


def test_many_failures_are_summarised():
    with pytest.raises(NotConvergedError, match=r"100 of 100 samples \(rows 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\)"):
        FixedPoint().solve(maps.Scaling(0.5, 0.5), torch.full((100, 2), math.nan))


class Liar(nn.Module):
    """States 0.5, whatever it does."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def lipschitz_bound(self) -> float:
        return 0.5


LIES: dict[str, Callable[[Tensor], Tensor]] = {
    "expands": lambda x: 3 * x,
    "turns": lambda x: 2 * torch.stack([-x[:, 1], x[:, 0]], 1),
    "takes everything away": lambda x: -x,  # x + g(x) = 0 has no solution but for y = 0
    "jumps": lambda x: 2 * torch.sign(x),
    "is cubic": lambda x: x**3,
}


@every_solver
@pytest.mark.parametrize("lie", LIES)
def test_solvers_never_trust_a_lying_bound(solver, lie):
    """Whatever the number of steps that the stated bound is said to need: converged is what was seen to solve y."""
    y = torch.cat([torch.randn(8, 2), torch.zeros(1, 2)]).double()
    solution = replace(solver, on_failure="return").solve(contraction(Chain(Liar(LIES[lie]))), y)
    left = (y - solution.x - LIES[lie](solution.x)).norm(dim=1)
    assert (left[solution.converged] <= 1e-13).all()
    assert (solution.error_bound[~solution.converged] > 1e-3).all()
    assert not solution.certified
    assert torch.isfinite(solution.x).all()


@every_solver
def test_what_has_no_solution_is_not_solved(solver):
    y = torch.randn(8, 2, dtype=torch.float64)
    with pytest.raises(NotConvergedError, match="8 of 8"):
        solver.solve(contraction(Chain(Liar(LIES["takes everything away"]))), y)


@pytest.mark.parametrize("lie", ["expands", "turns"])
@pytest.mark.parametrize("solver, solves", [(FixedPoint(), False), (Newton(), True), (Newton(dense=0), True)], ids=str)
def test_who_finds_what_expands(solver, solves, lie):
    """Plain steps run away from it, and say so; Newton's solve a linear map at once, whatever it states."""
    y = torch.randn(8, 2, dtype=torch.float64)
    g = contraction(Chain(Liar(LIES[lie])))
    assert (replace(solver, on_failure="return").solve(g, y).converged == solves).all()


@every_solver
def test_only_proven_bounds_are_called_certified(solver):
    y = torch.randn(4, 2, dtype=torch.float64)
    assert solver.solve(contraction(linear_branch(orthogonal(2), 0.9)), y).certified
    assert not solver.solve(contraction(Chain(Liar(torch.zeros_like))), y).certified


@every_solver
def test_a_tiny_frequency_does_not_make_an_identity_of_a_sine(solver):
    """sin(w x) / w is x where w x is small, and also where w x is no number any more."""
    net = scale_weights(LipschitzMLP([1, 1, 1], activation=Sine, lipschitz=0.5), 1e3).double()
    for label, parameter in net.named_parameters():
        if label.endswith("bias"):
            parameter.data.zero_()
    net[1].log_frequency.data.fill_(-400.0)
    slope = net[0].weight.item() * net[2].weight.item()
    for size in (1e-3, 1e-100, 1e-200):
        solution = solver.solve(contraction(net), torch.tensor([[size]], dtype=torch.float64))
        assert abs(solution.x.item() - size / (1 + slope)) <= solution.error_bound.item() + 1e-15 * size


@every_solver
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_weights_that_are_no_numbers_are_the_reason_that_is_given(solver, value, everywhere):
    net = scaled_mlp(3, 6, gentle_sine, 0.9)
    weight = net[0].parametrizations.weight.original.data
    weight.fill_(value) if everywhere else weight[0, 0].fill_(value)
    with pytest.raises(NotContractiveError, match=r"weights.*not finite"):
        solver.solve(contraction(net), torch.randn(4, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: FixedPoint(tolerance=0.0), "tolerance"),
        (lambda: FixedPoint(tolerance=-1.0), "tolerance"),
        (lambda: FixedPoint(tolerance=math.nan), "tolerance"),
        (lambda: FixedPoint(max_evaluations=0), "max_evaluations"),
        (lambda: FixedPoint(on_failure="ignore"), "on_failure"),
        (lambda: Anderson(history=1), "history"),
        (lambda: Anderson(regularisation=-1.0), "regularisation"),
        (lambda: Newton(dense=-1), "dense"),
        (lambda: Newton(krylov=0), "krylov"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, word):
    with pytest.raises(ValueError, match=word):
        make()


@pytest.mark.parametrize("kind", [FixedPoint, Anderson, Newton])
def test_d8_solvers_are_plain_values(kind):
    with pytest.raises(TypeError, match="tol"):
        kind(tol=1e-3)
    assert kind() == kind() != kind(tolerance=1e-3) and isinstance(kind(), Solver)
    assert "tolerance=0.001" in repr(kind(tolerance=1e-3))
    with pytest.raises(AttributeError):
        kind().tolerance = 1.0


def test_scale_of_the_weights_does_not_matter():
    """Adversarial raw weights, up to 1e6 times their size: the weights in use are what counts."""
    net = scale_weights(scaled_mlp(3, 8, gentle_sine, 0.97), 1e6)
    y = torch.randn(6, 3, dtype=torch.float64)
    for solver in SOLVERS:
        check(solver.solve(contraction(net), y), inverse64(frozen64(net), y), y, 0.97)
