"""Where numbers are very small, very large, or almost one."""

import tracemalloc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from iresflow_plugin import NotConvergedError, ResidualBlock, lipschitz, using
from iresflow_plugin.inverse import Anderson, FixedPoint, Newton
from iresflow_plugin.lipschitz import (
    AlmostOrthogonal,
    Bjorck,
    Chain,
    Frobenius,
    LearnableConcatenate,
    Scale,
    Spectral,
    constrain,
    lipschitz_bound,
)
from iresflow_plugin.log_det import Exact, Geometric, Orthogonal, Poisson, PowerSeries, RussianRoulette
from iresflow_plugin.nets import LipschitzDenseNet, LipschitzMLP
from tests.helpers import (
    assert_close,
    jacobian,
    log_det,
    name,
    operator_matrix,
    orthogonal,
    raw_weights,
    scale_weights,
    svd_norm,
)

SOLVERS = [Anderson, FixedPoint, Newton]
CONSTRAINTS = [Spectral, AlmostOrthogonal, Bjorck, Frobenius]

every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=name)
every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS, ids=name)
single_and_double = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def linear_block(
    matrix: Tensor, bound: float, dtype: torch.dtype = torch.float32, estimator: object = None
) -> ResidualBlock:
    """y = x + c Q x for an orthogonal matrix Q, with c as close to the bound as the dtype allows."""
    net = constrain(nn.Sequential(nn.Linear(*matrix.shape, bias=False)), bound, AlmostOrthogonal).to(dtype)
    with torch.no_grad():
        raw_weights(net)[0].copy_(10 * matrix)
    return ResidualBlock(net, log_det=Exact() if estimator is None else estimator)


def matrix_of(block: ResidualBlock) -> Tensor:
    return block.branch[0].weight.detach().double()


# ------------------------------------------------------------------------------------------- exact log-dets


def almost_minus_identity(size: int, angle: float) -> Tensor:
    """-1 times a rotation by a small angle in the planes of features 0, 1 and 2, 3."""
    matrix = torch.eye(size, dtype=torch.float64)
    turn = torch.tensor([[0.0, -angle], [angle, 0.0]], dtype=torch.float64).matrix_exp()
    for i in range(0, size - 1, 2):
        matrix[i : i + 2, i : i + 2] = turn
    return -matrix


@pytest.mark.parametrize("bound", [0.5, 0.97, 0.999, 0.9999, 0.999999])
@pytest.mark.parametrize("angle", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@single_and_double
def test_an_exact_log_det_keeps_its_digits_where_the_block_almost_collapses(size, angle, bound, dtype):
    """I + W is formed without rounding here, and is a multiple of a rotation: nothing may be lost."""
    block = linear_block(almost_minus_identity(size, angle), bound, dtype)
    right = torch.linalg.slogdet(torch.eye(size, dtype=torch.float64) + matrix_of(block))[1].item()
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            found = block.estimate(torch.randn(3, size, dtype=dtype))
        assert found.log_det.tolist() == pytest.approx([right] * 3, rel=32 * eps(dtype))
        assert not found.standard_error.any() and not found.remainder.any()


@pytest.mark.parametrize("bound", [0.97, 0.9999, 0.999999])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["orthogonal", "reflection", "signs"])
@single_and_double
def test_an_exact_log_det_is_as_good_as_its_matrix_is_conditioned(kind, size, bound, dtype):
    axis = nn.functional.normalize(torch.randn(size, 1, dtype=torch.float64), dim=0)
    matrix = {
        "orthogonal": orthogonal(size),
        "reflection": torch.eye(size, dtype=torch.float64) - 2 * axis @ axis.mT,
        "signs": torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)[:size]),
    }[kind]
    block = linear_block(matrix, bound, dtype)
    whole = torch.eye(size, dtype=torch.float64) + matrix_of(block)
    right = torch.linalg.slogdet(whole)[1].item()
    least = torch.linalg.svdvals(whole)[-1].item()
    found = block.estimate(torch.randn(3, size, dtype=dtype)).log_det
    assert found.tolist() == pytest.approx([right] * 3, rel=8 * eps(dtype), abs=8 * size * eps(dtype) / least)


# ------------------------------------------------------------------------------------------- inverses of every size


SIZES = {
    torch.float32: [1e-30, 1e-25, 1e-22, 1e-20, 1e-18, 1e-6, 1.0, 1e6, 1e18, 1e19, 1e20, 1e30],
    torch.float64: [1e-250, 1e-170, 1e-30, 1.0, 1e30, 1e170, 1e250],
}


@every_solver
@single_and_double
@pytest.mark.parametrize("kind", ["stretching", "turning", "mixed"])
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one batch"])
def test_inverses_of_every_size_are_right_or_not_converged(solver, dtype, kind, together):
    matrix = {"stretching": torch.eye(3), "turning": -torch.eye(3), "mixed": orthogonal(3)}[kind]
    block = linear_block(matrix, 0.9, dtype)
    block.solver = solver(on_failure="return")
    whole = torch.eye(3, dtype=torch.float64) + matrix_of(block)
    y = torch.tensor(SIZES[dtype], dtype=dtype)[:, None] * torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype)
    for rows in [y] if together else y.split(1):
        solution = block.solve(rows)
        right = torch.linalg.solve(whole, rows.double().mT).mT
        sizes = rows.double().abs().amax(1)  # the unit, without which squares overflow
        error = torch.linalg.vector_norm((solution.x.double() - right) / sizes[:, None], dim=1)
        length = torch.linalg.vector_norm(right / sizes[:, None], dim=1).clamp_min(1)
        done = solution.converged
        assert done[(sizes > 1e-12) & (sizes < 1e12)].all()
        assert (error <= 64 * eps(dtype) / 0.1 * length)[done].all()
        assert (error <= solution.error_bound.double() / sizes)[done].all()


@every_solver
@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e-22, 1.0, 1e18, 1e20, 1e30])
def test_a_preimage_of_any_size_is_right_or_an_error(solver, size):
    block = linear_block(orthogonal(2), 0.9)
    block.solver = solver()
    y = size * torch.tensor([[1.0, 2.0]])
    try:
        x = block.preimage(y)
    except NotConvergedError:
        assert not 1e-12 < size < 1e12
        return
    right = torch.linalg.solve(torch.eye(2, dtype=torch.float64) + matrix_of(block), y[0].double())
    assert (x[0].double() - right).abs().max() <= 1e-4 * size


@every_solver
@single_and_double
def test_gradients_of_a_preimage_do_not_depend_on_the_scale_of_the_loss(solver, dtype):
    """Neither of the whole nor of a row; a float64 loss may be scaled by more."""
    block = linear_block(orthogonal(3), 0.9, dtype)
    block.solver = solver()
    whole = torch.eye(3, dtype=torch.float64) + matrix_of(block)
    right = torch.linalg.solve(whole.mT, torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64))
    scales = [1e-24, 1e-22, 1e-12, 1.0, 1e12, 1e19, 1e20]
    if dtype == torch.float64:
        scales = [1e-200, *scales, 1e200]
    for each in [scales, *[[scale] for scale in scales]]:
        scale = torch.tensor(each, dtype=dtype)[:, None]
        y = torch.randn(len(each), 3, dtype=dtype, requires_grad=True)
        loss = (scale * block.preimage(y) * torch.tensor([1.0, -0.5, 2.0], dtype=dtype)).sum()
        (grad,) = torch.autograd.grad(loss, y)
        assert_close(grad / scale, right.expand(len(each), 3), 500 * eps(dtype))


@pytest.mark.parametrize("scale", [1e-24, 1e-12, 1e12, 1e20])
def test_gradients_of_weights_through_a_preimage_do_not_depend_on_the_scale_of_the_loss(scale):
    block = ResidualBlock(scale_weights(LipschitzMLP([3, 8, 3])))
    y = torch.randn(5, 3)
    parameters = list(block.parameters())
    right = torch.autograd.grad(block.preimage(y).sum(), parameters)
    found = torch.autograd.grad((scale * block.preimage(y)).sum(), parameters)
    for a, b in zip(found, right, strict=True):
        assert_close(a / scale, b, 1e-3, 1e-6)


# ------------------------------------------------------------------------------------------- raw weights of every size


@pytest.fixture(params=[False, True], ids=["denormals", "denormals flushed"])
def flushed(request) -> Iterator[bool]:
    torch.set_flush_denormal(request.param)
    yield request.param
    torch.set_flush_denormal(True)


LAYERS = {
    "square": (lambda: nn.Linear(3, 3, bias=False), None),
    "wide": (lambda: nn.Linear(5, 2, bias=False), None),
    "tall": (lambda: nn.Linear(2, 5, bias=False), None),
    "convolution": (lambda: nn.Conv2d(2, 3, 3, padding=1, bias=False), (2, 4, 4)),
}
LAYERS_AND_CONSTRAINTS = [
    pytest.param(label, constraint, id=f"{label}-{constraint.__name__}")
    for label in LAYERS
    for constraint in CONSTRAINTS
    if constraint is not Bjorck or LAYERS[label][1] is None
]


def constrained(label: str, constraint: type, scale: float) -> tuple[nn.Module, nn.Parameter]:
    """A layer under a constraint, with raw weights of that size; and those."""
    layer = constrain(nn.Sequential(LAYERS[label][0]()), 0.9, constraint)[0]
    raw = layer.parametrizations.weight.original
    with torch.no_grad():
        raw.copy_(torch.rand_like(raw).add_(0.5).mul_(torch.randn_like(raw).sign()).mul_(scale))
    return layer, raw


@pytest.mark.parametrize(("label", "constraint"), LAYERS_AND_CONSTRAINTS)
@pytest.mark.parametrize("scale", [1e-44, 1e-20, 1.0, 1e18, 1e20, 1e30])
def test_weights_in_use_and_their_gradients_are_finite_for_raw_weights_of_every_size(label, constraint, scale, flushed):
    layer, raw = constrained(label, constraint, scale)
    weight = layer.weight
    (grad,) = torch.autograd.grad((weight * torch.randn_like(weight)).sum(), raw)
    assert weight.isfinite().all() and grad.isfinite().all()
    shape = LAYERS[label][1]
    assert svd_norm(weight if shape is None else operator_matrix(layer, shape)) <= 0.9
    with torch.no_grad():
        assert torch.equal(layer.weight, weight)
    if scale <= 1e-20 and constraint is not Bjorck and not flushed:
        assert torch.equal(weight, raw)
    if scale >= 1e-20:
        assert (weight != 0).all()
    bound = lipschitz_bound(nn.Sequential(layer)).value
    assert 0 <= bound <= 0.9 * (1 + 1e-9)


def twin(label: str, constraint: type, raw: Tensor) -> tuple[nn.Module, nn.Parameter]:
    """The layer in float64, where nothing overflows, with the same raw weights; and those."""
    layer = constrain(nn.Sequential(LAYERS[label][0]().double()), 0.9, constraint)[0]
    exact = layer.parametrizations.weight.original
    with torch.no_grad():
        exact.copy_(raw)
    return layer, exact


@pytest.mark.parametrize(("label", "constraint"), LAYERS_AND_CONSTRAINTS)
@pytest.mark.parametrize("scale", [1e6, 1e18, 1e20, 1e30])
def test_large_raw_weights_give_the_weight_in_use_that_exact_arithmetic_gives(label, constraint, scale):
    layer, raw = constrained(label, constraint, scale)
    assert_close(layer.weight, twin(label, constraint, raw)[0].weight, 1e-3)


@pytest.mark.parametrize(("label", "constraint"), [p for p in LAYERS_AND_CONSTRAINTS if "Bjorck" not in p.id])
@pytest.mark.parametrize("scale", [1e3, 1e6, 1e12])
def test_large_raw_weights_have_the_gradient_that_exact_arithmetic_gives(label, constraint, scale):
    layer, raw = constrained(label, constraint, scale)
    double, exact = twin(label, constraint, raw)
    direction = torch.randn_like(raw)
    (found,) = torch.autograd.grad((layer.weight * direction).sum(), raw)
    (right,) = torch.autograd.grad((double.weight * direction).sum(), exact)
    assert_close(found * scale, right * scale, 1e-3)


@every_constraint
@pytest.mark.parametrize("scale", [1e-44, 1e-20, 1e18, 1e30])
def test_a_block_with_raw_weights_of_every_size_goes_there_and_back(constraint, scale):
    block = ResidualBlock(LipschitzMLP([3, 8, 3], constraint=constraint), log_det=Exact())
    with torch.no_grad():
        for raw in raw_weights(block):
            raw.mul_(scale)
    x = torch.randn(4, 3)
    y, volume = block(x)
    assert_close(block.inverse(y)[0], x, 1e-4)
    grads = torch.autograd.grad(y.square().sum() + volume.sum(), list(block.parameters()), allow_unused=True)
    assert volume.isfinite().all() and all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("gap", [110.0, 1e4, -110.0, -1e4])
@pytest.mark.parametrize("parts", [2, 3])
@single_and_double
def test_a_share_that_has_vanished_leaves_values_and_gradients_finite(gap, parts, dtype):
    net = LearnableConcatenate(*[Chain(nn.Linear(2, 2), nn.Tanh()) for _ in range(parts)]).to(dtype)
    with torch.no_grad():
        net.log_shares[0] = gap
    x = torch.randn(4, 2, dtype=dtype)
    for evaluate in (net, lipschitz.certified_map(net)):
        y = evaluate(x)
        (grad,) = torch.autograd.grad(y.sum(), net.log_shares)
        assert y.isfinite().all() and grad.isfinite().all()
        if parts == 2:
            assert grad.abs().max() < 1e-6
    assert net.eta.square().sum() <= 1 and lipschitz_bound(net).value >= svd_norm(jacobian(net, x)[0])


@pytest.mark.parametrize("gap", [110.0, 1e4, -110.0, -1e4])
def test_a_densely_connected_block_with_a_vanished_share_trains_on(gap):
    block = ResidualBlock(LipschitzDenseNet(2, [8, 8]))
    with torch.no_grad():
        block.branch[0].log_shares.copy_(torch.tensor([0.0, gap]))
    y, volume = block(torch.randn(3, 2))
    back, _ = block.inverse(y.detach())
    loss = y.sum() + volume.sum() + back.square().sum()
    grads = torch.autograd.grad(loss, list(block.parameters()), allow_unused=True)
    assert loss.isfinite() and all(g is None or g.isfinite().all() for g in grads)


# ------------------------------------------------------------------------------------------- series


@pytest.mark.parametrize("rate", [0.01, 0.5, 2.0, 20.0, 300.0, 700.0, 744.0, 746.0, 760.0, 1000.0])
def test_the_survival_of_a_poisson_variable_keeps_its_relative_accuracy(rate):
    stats = pytest.importorskip("scipy.stats")
    middle, spread = int(rate), int(rate**0.5) + 1
    for j in {0, 1, 2, 10, middle, middle + 1, *[max(0, middle + k * spread) for k in (-6, -3, -1, 1, 3, 6, 12)]}:
        right = float(stats.poisson.sf(j - 1, rate))
        assert right > 1e-300
        assert Poisson(rate).survival(j, 0.97) == pytest.approx(right, rel=1e-8), j


def turned(size: int, bound: float, estimator: object) -> ResidualBlock:
    """A linear block with eigenvalues all around, for which probes matter."""
    return linear_block(orthogonal(size), bound, torch.float64, estimator)


@pytest.mark.parametrize(("rate", "bound"), [(2.0, 0.97), (0.5, 0.9), (100.0, 0.99)])
def test_a_poisson_number_of_terms_is_refused_where_its_variance_cannot_be_bounded(rate, bound):
    block = turned(6, bound, RussianRoulette(Poisson(rate)))
    with pytest.raises(ValueError, match=r"variance.*(rate|Geometric|Decay)"):
        block(torch.randn(2, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="variance"):  # as it has always been for a p that is too large
        turned(6, bound, RussianRoulette(Geometric(0.5)))(torch.randn(2, 6, dtype=torch.float64))


@pytest.mark.parametrize(("rate", "bound", "calls", "rows"), [(1000.0, 0.97, 16, 80), (5.0, 0.3, 200, 20)])
def test_a_poisson_number_of_terms_is_unbiased_where_it_is_accepted(rate, bound, calls, rows):
    block = turned(6, bound, RussianRoulette(Poisson(rate)))
    right = torch.linalg.slogdet(torch.eye(6, dtype=torch.float64) + matrix_of(block))[1]
    x = torch.zeros(rows, 6, dtype=torch.float64)
    with torch.no_grad():
        means = torch.stack([block(x)[1].mean() for _ in range(calls)])
    standard_error = means.std() / calls**0.5
    assert 0 < standard_error < 0.5
    assert (means.mean() - right).abs() <= 5 * standard_error


class Gentle(nn.Module):
    """x -> 0.1 tanh(x), of which it only says that it is a contraction."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * torch.tanh(x)

    def lipschitz_bound(self) -> float:
        return 1 - 1e-7


def gentle_mlp() -> nn.Module:
    return scale_weights(LipschitzMLP([20, 20, 20], None, nn.Tanh, 1 - 1e-7, AlmostOrthogonal), 0.2).double()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("build", [Gentle, gentle_mlp], ids=name)
def test_a_series_with_a_tolerance_costs_what_the_jacobian_asks_for_and_not_what_its_bound_does(build):
    branch = build()
    x = torch.randn(4, 20, dtype=torch.float64)
    block = ResidualBlock(branch, log_det=PowerSeries(tolerance=1e-3, probes=Orthogonal(20)))
    with using(block, log_det=PowerSeries(1)):
        block.estimate(x)  # what torch imports when it first differentiates is not counted
    tracemalloc.start()
    try:
        found = block.estimate(x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5e6
    assert found.terms < 40
    assert (found.remainder <= 1e-3).all()
    assert ((found.log_det - log_det(branch, x)).abs() <= 1e-3).all()


# ------------------------------------------------------------------------------------------- bounds next to one


NEXT_TO_ONE = {
    "float32": (1 - 1e-9, torch.float32),
    "float32, next number": (1 - 2.0**-24, torch.float32),
    "bfloat16": (0.999, torch.bfloat16),
    "float16": (1 - 1e-5, torch.float16),
    "float64": (1 - 2.0**-53, torch.float64),
}


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("label", NEXT_TO_ONE)
def test_a_scale_that_rounds_to_one_stays_below_its_bound(label, sign):
    factor, dtype = NEXT_TO_ONE[label]
    block = ResidualBlock(nn.Sequential(Scale(sign * factor)), log_det=Exact())
    bound = block.certificate()
    assert bound.certified and bound.value < 1
    x = torch.cat([torch.randn(500, 3), torch.rand(100, 3) + 1, 100 * torch.randn(100, 3)]).to(dtype)
    x[x.abs() < 1e-2] = 1
    y, volume = block(x)
    for value in (lipschitz.certified_map(block.branch)(x), block.branch(x)):
        assert (value.double().abs() <= bound.value * x.double().abs()).all()
        assert_close(value, sign * factor * x.double(), 4 * eps(dtype))
        assert torch.equal(y, x + value)
    assert (y != 0).all() and volume.isfinite().all()


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("step", [1e-12, 1e-9, 1e-3])
def test_softplus_obeys_its_bound_where_torch_switches_to_the_identity(beta, step):
    block = ResidualBlock(Chain(nn.Softplus(beta), Scale(-0.9)))
    at = 20 / beta
    x = at + step * torch.linspace(-4.5, 4.5, 10, dtype=torch.float64)[:, None]
    y, _ = block(x)
    value, rounding = y - x, 16 * torch.finfo(torch.float64).eps * at
    run, rise = x.diff(dim=0), value.diff(dim=0)
    assert (rise.abs() <= block.certificate().value * run + rounding).all()
    assert (y.diff(dim=0) >= 0.1 * run - rounding).all()
    assert_close(value, -0.9 * torch.log1p((beta * x).exp()) / beta, 1e-8)


# ------------------------------------------------------------------------------------------- weights of NaN or infinity


@every_constraint
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("everywhere", [False, True], ids=["one entry", "every entry"])
def test_weights_that_are_no_numbers_are_named_as_the_reason(constraint, value, everywhere):
    block = ResidualBlock(LipschitzMLP([2, 8, 2], constraint=constraint))
    with torch.no_grad():
        raw = raw_weights(block)[0]
        (raw if everywhere else raw[0, 0]).fill_(value)
    y = torch.randn(3, 2)
    for attempt in (block.certificate, lambda: lipschitz_bound(block.branch), lambda: block.solve(y)):
        with pytest.raises(ValueError, match=r"(?i)nan|infinit|not finite") as caught:
            attempt()
        text = str(caught.value)
        assert "weight" in text.lower()
        assert all(blame not in text for blame in ("below 1", "smaller Lipschitz", "constrain("))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_kernels_that_are_no_numbers_are_named_as_the_reason(value):
    block = ResidualBlock(constrain(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1)), 0.9))
    with torch.no_grad():
        raw_weights(block)[0][0, 0, 0, 0] = value
    for attempt in (block.certificate, lambda: block.solve(torch.randn(3, 2, 4, 4))):
        with pytest.raises(ValueError, match=r"(?i)nan|infinit|not finite") as caught:
            attempt()
        assert "weight" in str(caught.value).lower() and "below 1" not in str(caught.value)
