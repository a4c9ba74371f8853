"""No error is above its bound, rounding included, and bounds are not far above errors: against longdouble solutions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comparisons.rounding import (
    DTYPES,
    FINE,
    IS_FINE,
    KINDS,
    Array,
    Case,
    Verdict,
    build,
    exact_solution,
    function_of,
    judge,
    norms,
    numbers,
)
from iresflow_plugin import ResidualBlock
from iresflow_plugin.inverse import Anderson
from iresflow_plugin.lipschitz import Chain, Frobenius, LipSwish, Scale, SinCos, Sine, Sum, constrain
from iresflow_plugin.nets import LipschitzMLP
from tests.helpers import raw_weights, scale_weights

pytestmark = pytest.mark.skipif(not IS_FINE, reason="numpy's longdouble is no wider than float64 on this machine")

CASES, ROWS, LARGEST = 3, 4, 784
USEFUL = 50.0  # bound / error

every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def small_case(kind: str, dtype: str, number: int) -> Case:
    """Its number goes through the Lipschitz bounds; every kind starts at another one."""
    return build(kind, dtype, number + list(KINDS).index(kind), rows=ROWS, largest=LARGEST)


@cache
def verdicts(kind: str, dtype: str) -> list[Verdict]:
    return [verdict for number in range(CASES) for verdict in judge(small_case(kind, dtype, number))]


def check(found: list[Verdict]) -> None:
    """Every bound says something, and holds; the reference is far better than what it judges."""
    for verdict in found:
        assert not verdict.violates, verdict
        assert np.isfinite(verdict.bound), verdict
        assert verdict.doubt <= 0.5 * max(verdict.bound, verdict.error), verdict


@every_dtype
@every_kind
def test_no_error_is_above_its_bound(kind, dtype):
    check(verdicts(kind, dtype))


def test_bounds_are_useful():
    """Single precision is judged in double and its bounds are near; double is judged by itself, and pays for it."""
    ratios = {dtype: [verdict.ratio for kind in KINDS for verdict in verdicts(kind, dtype)] for dtype in DTYPES}
    assert statistics.median(ratios["float32"]) <= 10
    assert statistics.median(ratios["float64"]) <= 150
    assert statistics.median(ratios["float32"] + ratios["float64"]) <= USEFUL


# ------------------------------------------------------------------------------------------------------ special cases


def one_matrix(weight: Tensor, lipschitz: float, dtype: str) -> nn.Module:
    """x -> W x, scaled down to the bound."""
    branch = constrain(nn.Sequential(nn.Linear(*weight.shape, bias=False)), lipschitz, Frobenius)
    raw_weights(branch)[0].data = weight
    return branch.to(DTYPES[dtype])


@every_dtype
@pytest.mark.parametrize("lipschitz", [0.8, 0.97])
def test_an_averaging_branch(dtype, lipschitz):
    """Of a constant image, whose every pixel is the same sum of 784 equal terms."""
    branch = one_matrix(-torch.ones(784, 784), lipschitz, dtype)
    y = torch.tensor([0.7, 1.0, 1.3], dtype=DTYPES[dtype])[:, None].repeat(1, 784)
    check(judge(Case(branch, y, lipschitz)))


@every_dtype
@pytest.mark.parametrize("lipschitz", [0.1, 0.5, 0.9])
def test_terms_that_are_lost_one_by_one(dtype, lipschitz):
    """Each is less than half a unit in the last place of the sum, and all together are many units."""
    weight = torch.zeros(784, 784)
    weight[0], weight[0, 0] = 1e-4, 1.0
    eps = torch.finfo(DTYPES[dtype]).eps
    y = torch.full((1, 784), 0.3e4 * eps / lipschitz, dtype=DTYPES[dtype])
    y[:, 0] = 1
    check(judge(Case(one_matrix(weight, lipschitz, dtype), y, lipschitz)))


@every_dtype
def test_a_sum_of_many_terms_that_cancel(dtype):
    terms = [nn.Linear(2, 2) for _ in range(64)]
    branch = constrain(Sum(*terms), 0.5).to(DTYPES[dtype])
    with torch.no_grad():
        for number, term in enumerate(terms):
            term.bias.copy_((1 + 0.01 * torch.randn(2)) * (1 if number < 32 else -1))
        terms[-1].bias.sub_(sum(term.bias for term in terms))
    check(judge(Case(branch, torch.randn(8, 2, dtype=DTYPES[dtype]), 0.5)))


@pytest.mark.parametrize("last", [10.0, -10.0])
def test_softplus_where_torch_jumps_to_the_identity(last):
    """By 2e-9 at 20, which is nothing in single precision, and everything in double."""
    branch = constrain(Chain(nn.Linear(1, 1), nn.Softplus(), nn.Linear(1, 1)), 0.97).double()
    for raw, value in zip(raw_weights(branch), (10.0, last), strict=True):
        raw.data.fill_(value)
    for layer in (branch[0], branch[2]):
        layer.bias.data.zero_()
    x = 20 / branch[0].weight.item() + np.linspace(-5e-9, 5e-9, 9, dtype=FINE)[:, None]
    y = torch.from_numpy((x + function_of(branch, FINE)(x)).astype(np.float64))
    check(judge(Case(branch, y, 0.97)))


@pytest.fixture(params=[True, False], ids=["flushed", "kept"])
def denormals(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_flush_denormal(request.param)
    yield
    torch.set_flush_denormal(True)  # as the other tests have it


@pytest.mark.usefixtures("denormals")
@pytest.mark.parametrize("exponent", [-88.0, -90.0, -92.0, -93.0, -94.0, -95.0])
def test_frequencies_without_digits(exponent):
    """Single precision holds exp(-88) with few digits left, and exp(-95) with three."""
    branch = scale_weights(LipschitzMLP([2, 8, 2], activation=Sine, lipschitz=0.9), 5.0)
    branch[1].log_frequency.data.fill_(exponent)
    check(judge(Case(branch, torch.randn(4, 2), 0.9)))


@every_dtype
def test_a_scale_that_nearly_takes_everything_away(dtype):
    """Rounded to single precision the factor would be -1, and x + g(x) zero. The solution is y / (1 + factor)."""
    y = torch.randn(4, 3, dtype=DTYPES[dtype])
    scale = Scale(-(1 - 1e-9))
    solution = ResidualBlock(scale, inverse=Anderson(on_failure="return")).solve(y)
    exact = numbers(y, FINE) / (1 + FINE(scale.factor))
    assert (norms(numbers(solution.x, FINE) - exact) <= numbers(solution.error_bound, FINE)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [Sine, nn.Tanh])
def test_half_precision(dtype, activation):
    branch = scale_weights(LipschitzMLP([4, 16, 4], activation=activation, lipschitz=0.8), 5.0).to(dtype)
    check(judge(Case(branch, torch.randn(4, 4).to(dtype), 0.8)))


# ------------------------------------------------------------------------------------------------------ the reference


def fractions(array: Array) -> list[list[Fraction]]:
    return [[Fraction(*entry.as_integer_ratio()) for entry in row] for row in array]


def solved(matrix: list[list[Fraction]], right: list[list[Fraction]]) -> list[list[Fraction]]:
    """Rows x with matrix x = right, by elimination without any rounding; the matrix needs no pivots."""
    rows = [line + [r[number] for r in right] for number, line in enumerate(matrix)]
    size = len(matrix)
    for pivot in range(size):
        rows[pivot] = [entry / rows[pivot][pivot] for entry in rows[pivot]]
        for other in range(size):
            if other != pivot and rows[other][pivot]:
                factor = rows[other][pivot]
                rows[other] = [a - factor * b for a, b in zip(rows[other], rows[pivot], strict=True)]
    return [[rows[i][size + number] for i in range(size)] for number in range(len(right))]


@every_dtype
@pytest.mark.parametrize("lipschitz", [0.5, 0.97])
def test_the_reference_is_the_exact_solution_of_a_linear_map(dtype, lipschitz):
    """By fractions: off by a small part of a unit in the last place, and by no more than it thinks."""
    branch = constrain(Chain(nn.Linear(6, 6), Scale(-0.7), nn.Linear(6, 6)), lipschitz)
    branch = scale_weights(branch, 20.0).to(DTYPES[dtype])
    y = torch.randn(3, 6, dtype=DTYPES[dtype])
    reference = exact_solution(branch, y, y, lipschitz)
    with torch.no_grad():
        first, second = (fractions(numbers(branch[i].weight, FINE)) for i in (0, 2))
        (b, c), factor = (fractions(numbers(branch[i].bias[None], FINE))[0] for i in (0, 2)), Fraction(-0.7)
    matrix = [[factor * sum(row[k] * first[k][j] for k in range(6)) for j in range(6)] for row in second]
    shift = [factor * sum(w * bias for w, bias in zip(row, b, strict=True)) + c[i] for i, row in enumerate(second)]
    eye = [[matrix[i][j] + (i == j) for j in range(6)] for i in range(6)]
    right = [[value - s for value, s in zip(row, shift, strict=True)] for row in fractions(numbers(y, FINE))]
    exact = solved(eye, right)
    for row, x, doubt in zip(exact, fractions(reference.x), reference.doubt, strict=True):
        off = float(sum((a - b) ** 2 for a, b in zip(x, row, strict=True))) ** 0.5
        size = float(sum(a**2 for a in row)) ** 0.5
        assert off <= doubt <= 1e-3 / (1 - lipschitz) * torch.finfo(y.dtype).eps * size


@pytest.mark.parametrize("kind", ["averaging", "one row", "dense"])
def test_the_reference_is_that_of_linear_algebra(kind):
    """Larger maps, of single precision: float64 elimination has nine digits more than they."""
    for number in range(4):
        case = build(kind, "float32", number, rows=3, largest=LARGEST)
        layer, y = case.branch[0], case.y.double()
        with torch.no_grad():
            matrix = torch.eye(y.shape[1], dtype=torch.float64) + layer.weight.double()
            right = y if layer.bias is None else y - layer.bias.double()
        exact = torch.linalg.solve(matrix, right.mT).mT.numpy()
        reference = exact_solution(case.branch, case.y, case.y, case.lipschitz)
        assert (norms(reference.x - exact) <= 1e-12 / (1 - case.lipschitz) * norms(exact)).all()


@every_kind
def test_the_reference_is_the_same_function(kind):
    """As the module itself, up to rounding (and to the jump of torch's own Softplus)."""
    for number in range(6):
        case = small_case(kind, "float64", number)
        y = numbers(case.y, FINE)
        with torch.no_grad():
            value = numbers(case.branch(case.y), FINE)
            biases = [p.abs().max().item() for label, p in case.branch.named_parameters() if label.endswith("bias")]
        difference = norms(function_of(case.branch, FINE)(y) - value)
        assert (difference <= 1e-9 * (norms(y) + max(biases, default=0.0))).all()


ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Any, nn.Module], Any]]] = {
    "Sine": (Sine, lambda mp, x, f: mp.sin(f.frequency.item() * x) / f.frequency.item()),
    "SinCos": (SinCos, lambda mp, x, f: mp.sin(f.frequency.item() * x) / f.frequency.item()),
    "Tanh": (nn.Tanh, lambda mp, x, f: mp.tanh(x)),
    "ELU": (nn.ELU, lambda mp, x, f: x if x > 0 else mp.expm1(x)),
    "LipSwish": (LipSwish, lambda mp, x, f: x / (1 + mp.exp(-F.softplus(f.b).item() * x)) / mp.mpf(1.1)),
    "Softplus": (nn.Softplus, lambda mp, x, f: mp.log1p(mp.exp(x))),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_keeps_its_digits(activation):
    """Against 40 decimal ones, at numbers that only longdouble holds; the last but one of it is right."""
    mpmath = pytest.importorskip("mpmath")
    make, formula = ACTIVATIONS[activation]
    module = make().double()
    x = np.array([-44, -13.7, -0.7, -1e-9, 1e-9, 0.1, 1.9, 20.0, 60.0], FINE)[:, None] / 3
    values = function_of(module, FINE)(x)[:, 0]
    assert values.dtype == FINE
    with mpmath.workdps(40), torch.no_grad():
        for entry, value in zip(x[:, 0], values, strict=True):
            at, found = (mpmath.mpf(p) / q for p, q in (n.as_integer_ratio() for n in (entry, value)))
            exact = formula(mpmath, at, module)
            assert abs(found - exact) <= 2.0**-61 * max(abs(exact), abs(at) if activation.startswith("Sin") else 0)
