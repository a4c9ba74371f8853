"""Derivatives of every order in every mode: reverse, forward, nested, batched; right, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from iresflow_plugin import ResidualBlock
from iresflow_plugin.inverse import Anderson, FixedPoint, Newton
from iresflow_plugin.lipschitz import (
    AlmostOrthogonal,
    Bjorck,
    Chain,
    Concatenate,
    Frobenius,
    LipSwish,
    Scale,
    SinCos,
    Spectral,
    Sum,
    constrain,
)
from iresflow_plugin.log_det import (
    BySize,
    Exact,
    Gaussian,
    Geometric,
    Omitted,
    Orthogonal,
    Poisson,
    PowerSeries,
    RussianRoulette,
)
from iresflow_plugin.nets import LipschitzConvNet, LipschitzDenseNet, LipschitzMLP
from tests.helpers import (
    assert_close,
    gentle_sine,
    inverse64,
    jacobian,
    linear_branch,
    log_det,
    orthogonal,
    raw_weights,
    scale_weights,
)

CONSTRAINTS = [Spectral, AlmostOrthogonal, Bjorck, Frobenius]
SOLVERS = [FixedPoint(), Anderson(), Newton(), Newton(dense=0)]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=str)


# ---------------------------------------------------------------------------------------------------------------- nets


@dataclass
class Net:
    make: Callable[[], nn.Module]
    event: tuple[int, ...] = (2,)
    context: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        return torch.Size(self.event).numel()


def gentle_waves(features: int, spatial_dims: int = 0) -> SinCos:
    return SinCos(features, spatial_dims, low=0.5, high=3.0)


def tree() -> nn.Module:
    wide = Chain(Concatenate(nn.Linear(2, 2), Chain(nn.Linear(2, 3), nn.Tanh())), nn.Linear(5, 2))
    return constrain(Chain(Sum(wide, Chain(Scale(0.5), nn.Linear(2, 2))), gentle_sine(2)), 0.8)


mlp = partial(LipschitzMLP, [2, 4, 2], lipschitz=0.8)
conv = partial(LipschitzConvNet, [1, 2, 1], lipschitz=0.8, activation=gentle_waves)

VECTORS = {
    "mlp": Net(mlp),
    "waves": Net(partial(mlp, activation=gentle_waves)),
    "sine": Net(partial(mlp, activation=gentle_sine)),
    "lipswish": Net(partial(mlp, activation=LipSwish)),
    "tanh": Net(partial(mlp, activation=nn.Tanh)),
    "elu": Net(partial(mlp, activation=nn.ELU)),
    "almost-orthogonal": Net(partial(mlp, constraint=AlmostOrthogonal, activation=gentle_sine)),
    "bjorck": Net(partial(mlp, constraint=Bjorck, activation=nn.Tanh)),
    "frobenius": Net(partial(mlp, constraint=Frobenius, activation=LipSwish)),
    "dense": Net(partial(LipschitzDenseNet, 2, [2, 2], lipschitz=0.8, activation=gentle_sine)),
    "tree": Net(tree),
    "context": Net(partial(mlp, context_features=2, activation=gentle_waves), context=(2,)),
}
IMAGES = {
    "conv": Net(conv, (1, 2, 3)),
    "conv-tanh": Net(partial(LipschitzConvNet, [2, 3, 2], lipschitz=0.8, activation=nn.Tanh), (2, 2, 2)),
    "conv-dense": Net(partial(LipschitzDenseNet, 1, [2], kernel=3, lipschitz=0.8, activation=gentle_sine), (1, 2, 2)),
    "conv-context": Net(partial(conv, context_features=2), (1, 2, 2), (2,)),
    "conv-context-image": Net(partial(conv, context_channels=1), (1, 2, 2), (1, 2, 2)),
}
NETS = VECTORS | IMAGES
every_net = pytest.mark.parametrize("net", NETS)
every_direction = pytest.mark.parametrize("direction", ["forward", "inverse"])


def block_of(net: str, estimator: object = None, solver: object = None, factor: float = 5.0) -> ResidualBlock:
    branch = scale_weights(NETS[net].make(), factor).double()
    return ResidualBlock(branch, Exact() if estimator is None else estimator, solver)


def sized(size: int, estimator: object = None, activation: Callable = gentle_waves, solver: object = None):
    branch = scale_weights(LipschitzMLP([size, 4, size], activation=activation, lipschitz=0.8), 5.0)
    return ResidualBlock(branch.double(), Exact() if estimator is None else estimator, solver)


def inputs_of(net: str, batch: int = 2) -> tuple[Tensor, Tensor | None]:
    shapes = NETS[net].event, NETS[net].context
    x, context = [None if s is None else torch.randn(batch, *s).double().requires_grad_() for s in shapes]
    return x, context


def without_none(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def all_known(net: str) -> PowerSeries:
    """As many orthogonal probes as dimensions, and terms down to round-off: a random log-det whose value is known."""
    return PowerSeries(terms=150, probes=Orthogonal(NETS[net].size))


def slopes(value: Tensor, wanted: Sequence[Tensor], create: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(
        value.sum(), wanted, create_graph=create, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return list(found)


def assert_all_close(found: Sequence[Tensor], right: Sequence[Tensor], relative: float) -> None:
    largest = max(r.abs().max().item() for r in right)
    for one, other in zip(found, right, strict=True):
        assert_close(one, other, relative, relative * largest)


# ------------------------------------------------------------------------------------ first and second, in reverse mode


def check(function: Callable, inputs: Sequence[Tensor]) -> None:
    """First and second derivatives are those of finite differences; `function` may use the very tensors it is given."""
    inputs = tuple(inputs)
    assert gradcheck(function, inputs, nondet_tol=1e-9, fast_mode=True)
    assert gradgradcheck(function, inputs, nondet_tol=1e-9, fast_mode=True)


@every_net
@every_direction
def test_first_and_second_derivatives(direction, net):
    """Of both outputs, with respect to inputs, contexts, raw weights, biases, and whatever else is learnt."""
    block, (x, context) = block_of(net), inputs_of(net)
    check(lambda *_: getattr(block, direction)(x, context), [x, *without_none(context), *block.parameters()])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("activation", [gentle_waves, nn.Tanh], ids=["waves", "tanh"])
@every_direction
def test_first_and_second_derivatives_in_every_dimension(direction, activation, size):
    block = sized(size, activation=activation)
    x = torch.randn(2, size).double().requires_grad_()
    check(lambda *_: getattr(block, direction)(x), [x, *block.parameters()])


@pytest.mark.parametrize("solver", [*SOLVERS, None], ids=str)
@pytest.mark.parametrize("net", ["waves", "context", "conv"])
def test_first_and_second_derivatives_of_the_preimage(net, solver):
    block, (x, context) = block_of(net, Omitted(), solver), inputs_of(net)
    check(lambda *_: block.preimage(x, context), [x, *without_none(context), *block.parameters()])


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("net", ["waves", "context", "conv"])
@every_direction
def test_first_and_second_derivatives_with_chunks(direction, net, chunk):
    block, (x, context) = block_of(net, Exact(chunk=chunk)), inputs_of(net)
    check(lambda *_: getattr(block, direction)(x, context), [x, *without_none(context), *block.parameters()])


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4), (1, 3), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("factor", [10.0, 0.01])
def test_second_derivatives_of_constrained_weights(factor, shape, constraint):
    """Where the constraint binds, and where it does not."""
    net = constrain(nn.Sequential(nn.Linear(*reversed(shape))), 0.9, constraint).double()
    scale_weights(net, factor)
    x = torch.randn(3, shape[1]).double().requires_grad_()
    check(lambda *_: net(x), [x, *net.parameters()])


@pytest.mark.parametrize("constraint", [Spectral, Bjorck, Frobenius])
def test_second_derivatives_of_constrained_weights_whose_singular_values_agree(constraint):
    net = constrain(nn.Sequential(nn.Linear(3, 3)), 0.9, constraint).double()
    with torch.no_grad():
        raw_weights(net)[0].copy_(5 * orthogonal(3))
    x = torch.randn(3, 3).double().requires_grad_()
    check(lambda *_: net(x), [x, *net.parameters()])


@pytest.mark.parametrize("constraint", [Spectral, AlmostOrthogonal, Frobenius])
@pytest.mark.parametrize("channels", [(1, 1), (1, 3), (3, 1), (2, 2)], ids=str)
def test_second_derivatives_of_constrained_kernels(channels, constraint):
    net = constrain(nn.Sequential(nn.Conv2d(*channels, 3, padding=1)), 0.9, constraint).double()
    scale_weights(net, 10.0)
    x = torch.randn(2, channels[0], 2, 3).double().requires_grad_()
    check(lambda *_: net(x), [x, *net.parameters()])


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_the_hessian_of_a_likelihood_in_a_raw_weight(constraint):
    """As for a Laplace approximation: every entry, against finite differences of the gradient."""
    block = ResidualBlock(scale_weights(mlp(constraint=constraint, activation=gentle_sine), 4.0).double(), Exact())
    label, x = next(k for k, _ in block.named_parameters() if k.endswith("original")), torch.randn(5, 2).double()
    weight = dict(block.named_parameters())[label].detach().clone()

    def loss(weight: Tensor) -> Tensor:
        y, value = functional_call(block, {label: weight}, (x,))
        return y.square().sum() / 2 - value.sum()

    found = hessian(loss)(weight).reshape(weight.numel(), weight.numel())
    assert_close(found, found.mT, 1e-9)
    h, steps = 1e-5, torch.eye(weight.numel()).double().view(-1, *weight.shape)
    right = torch.stack([(grad(loss)(weight + h * e) - grad(loss)(weight - h * e)) / (2 * h) for e in steps])
    assert_close(found, right.view_as(found), 1e-5)


# --------------------------------------------------------------------------------------------------------- the inverse


def newton_inverse(branch: nn.Module, y: Tensor, context: Tensor | None = None) -> Tensor:
    """The solution with derivatives up to the third: two Newton steps with the dense Jacobian, at the solution."""
    x = inverse64(branch, y.detach(), context)
    for _ in range(2):
        matrix = torch.eye(x.shape[1:].numel(), dtype=x.dtype) + jacobian(branch, x, context, create_graph=True)
        residual = (x + (branch(x) if context is None else branch(x, context)) - y).flatten(1)
        x = x - torch.linalg.solve(matrix, residual[..., None])[..., 0].view_as(x)
    return x


@pytest.mark.parametrize("net", NETS)
def test_hessians_through_the_inverse(net):
    """Of a function of the solution, and of the log-det at it."""
    block, (y, context) = block_of(net), inputs_of(net, batch=1)
    point = y.detach()
    plain = None if context is None else context.detach()

    def of_block(y: Tensor) -> Tensor:
        x, back = block.inverse(y, plain)
        return x.pow(3).sum() + 2 * back.sum()

    def of_newton(y: Tensor) -> Tensor:
        x = newton_inverse(block.branch, y, plain)
        return x.pow(3).sum() - 2 * log_det(block.branch, x, plain, create_graph=True).sum()

    found, right = (torch.autograd.functional.hessian(f, point) for f in (of_block, of_newton))
    assert right.abs().max() > 0.05
    assert_close(found, right, 1e-7)


@every_solver
def test_hessians_through_every_solver(solver):
    block, y = sized(3, solver=solver), torch.randn(1, 3).double()
    found = torch.autograd.functional.hessian(lambda y: block.preimage(y).pow(3).sum(), y)
    right = torch.autograd.functional.hessian(lambda y: newton_inverse(block.branch, y).pow(3).sum(), y)
    assert_close(found, right, 1e-7)


def known_in_one_dimension(x: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    """The first three derivatives of tanh(a x + b)."""
    t = torch.tanh(a * x + b)
    return [a * (1 - t**2), -2 * a**2 * t * (1 - t**2), 2 * a**3 * (3 * t**2 - 1) * (1 - t**2)]


def one_dimension(sign: float) -> ResidualBlock:
    net = constrain(nn.Sequential(nn.Linear(1, 1), nn.Tanh()), 0.9).double()
    with torch.no_grad():
        raw_weights(net)[0].fill_(10.0 * sign)
    return ResidualBlock(net, Exact())


def repeated(value: Tensor, x: Tensor, times: int) -> list[Tensor]:
    """The first so many derivatives with respect to x, row by row."""
    found = []
    for _ in range(times):
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        found.append(value)
    return found


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_three_derivatives_of_an_inverse_in_one_dimension(sign):
    """x' = 1 / (1 + g'), x'' = -g'' x'^3, x''' = (3 g''^2 - (1 + g') g''') x'^5."""
    block, y = one_dimension(sign), torch.randn(6, 1).double().requires_grad_()
    x = block.preimage(y)
    with torch.no_grad():
        g1, g2, g3 = known_in_one_dimension(x, block.branch[0].weight, block.branch[0].bias)
        s = 1 / (1 + g1)
        right = [s, -g2 * s**3, (3 * g2**2 - (1 + g1) * g3) * s**5]
    for found, expected in zip(repeated(x, y, 3), right, strict=True):
        assert_close(found, expected, 1e-8)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_three_derivatives_of_an_inverse_log_det_in_one_dimension(sign):
    """With f(x) = -log(1 + g'(x)): df/dy = f' x', and so on, against dense Newton steps and torch's own derivatives."""
    block, y = one_dimension(sign), torch.randn(6, 1).double().requires_grad_()
    right = -log_det(block.branch, newton_inverse(block.branch, y), create_graph=True)
    for found, expected in zip(repeated(block.inverse(y)[1], y, 3), repeated(right, y, 3), strict=True):
        assert_close(found, expected, 1e-7)


@pytest.mark.parametrize("net", ["waves", "lipswish", "context", "dense", "conv"])
@every_solver
def test_a_penalty_on_the_jacobian_of_the_sampler(solver, net):
    """Its gradient along a direction of all parameters and inputs, beside another loss."""
    block, (y, context) = block_of(net, Omitted(), solver), inputs_of(net)
    wanted = [y, *without_none(context), *block.parameters()]
    v, directions = torch.randn_like(y), [torch.randn_like(w) for w in wanted]

    def loss() -> Tensor:
        x = block.preimage(y, context)
        (slope,) = torch.autograd.grad((x * v).sum(), y, create_graph=True)
        return 10 * slope.square().sum() + x.square().sum()

    found = sum((g * d).sum() for g, d in zip(slopes(loss(), wanted), directions, strict=True))
    ends = []
    for h in (1e-6, -1e-6):
        with torch.no_grad():
            for w, d in zip(wanted, directions, strict=True):
                w.add_(d, alpha=h)
        ends.append(loss().item())
        with torch.no_grad():
            for w, d in zip(wanted, directions, strict=True):
                w.add_(d, alpha=-h)
    assert found.item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-5)


def test_second_derivatives_of_a_linear_inverse_vanish():
    """x = (I + A)^-1 y: no second derivative in y, and in y and b the one that is known."""
    block = ResidualBlock(linear_branch(orthogonal(3), 0.9, torch.randn(3)), Exact())
    y = torch.randn(2, 3).double().requires_grad_()
    x, back = block.inverse(y)
    (slope,) = torch.autograd.grad(x.square().sum() / 2 + back.sum(), y, create_graph=True)
    once = torch.linalg.inv(torch.eye(3).double() + block.branch[0].weight.detach())
    v = torch.randn_like(y)
    second, of_bias = torch.autograd.grad((slope * v).sum(), [y, block.branch[0].bias])
    assert_close(second, v @ (once.mT @ once).mT, 1e-10)
    assert_close(of_bias, -second.sum(0), 1e-10)


# ----------------------------------------------------------------------------------------------------- random log-dets

RANDOM = [
    PowerSeries(terms=6),
    PowerSeries(tolerance=1e-2, probes=Gaussian(2)),
    RussianRoulette(),
    RussianRoulette(Geometric(), probes=2),
    RussianRoulette(Poisson(30.0)),
    BySize(0, 0),
]
every_random = pytest.mark.parametrize("estimator", RANDOM, ids=str)
RANDOM_NETS = ["waves", "dense", "context", "conv", "conv-context"]


@pytest.mark.parametrize("net", RANDOM_NETS)
@every_direction
def test_first_derivatives_of_a_random_log_det_are_right_with_create_graph(direction, net):
    known, exact, (x, context) = block_of(net, all_known(net)), block_of(net), inputs_of(net)
    exact.load_state_dict(known.state_dict())
    found, right = [
        slopes(getattr(b, direction)(x, context)[1], [x, *without_none(context), *b.parameters()], create=True)
        for b in (known, exact)
    ]
    assert_all_close(found, right, 1e-8)


@every_random
@pytest.mark.parametrize("net", RANDOM_NETS)
@every_direction
def test_create_graph_changes_no_first_derivative_of_a_random_log_det(direction, net, estimator):
    block, (x, context) = block_of(net, estimator), inputs_of(net)
    wanted, found = [x, *without_none(context), *block.parameters()], []
    for create in (True, False):
        torch.manual_seed(1)
        y, value = getattr(block, direction)(x, context)
        found.append(slopes(y.square().sum() / 2 - value.sum(), wanted, create))
    assert_all_close(*found, relative=1e-12)


@every_random
@pytest.mark.parametrize("net", RANDOM_NETS)
@every_direction
def test_second_derivatives_of_a_random_log_det_are_refused(direction, net, estimator):
    """Of its gradient in x or in a weight, with respect to x, weights, biases and context; naming what has them."""
    block, (x, context) = block_of(net, estimator), inputs_of(net)
    first, last = raw_weights(block)[0], raw_weights(block)[-1]
    bias = next(p for k, p in block.named_parameters() if k.endswith("bias"))
    value = getattr(block, direction)(x, context)[1]
    for slope in slopes(value, [x, first, last], create=True):
        for wanted in without_none(x, first, last, bias, context):
            with pytest.raises(RuntimeError, match=r"Exact\(\)"):
                torch.autograd.grad(slope.square().sum(), wanted, retain_graph=True)


@every_random
@pytest.mark.parametrize("net", RANDOM_NETS)
@every_direction
def test_second_derivatives_of_the_point_alone_are_right_beside_a_random_log_det(direction, net, estimator):
    """Where the log-det is no part of the loss."""
    block, exact, (x, context) = block_of(net, estimator), block_of(net), inputs_of(net)
    exact.load_state_dict(block.state_dict())
    found = []
    for b in (block, exact):
        wanted = [x, *without_none(context), *b.parameters()]
        y, _ = getattr(b, direction)(x, context)
        penalty = sum(slope.square().sum() for slope in slopes(y.pow(3), wanted, create=True))
        found.append(slopes(penalty, wanted))
    assert_all_close(*found, relative=1e-8)


@every_random
@pytest.mark.parametrize("net", RANDOM_NETS)
@every_direction
def test_a_penalty_on_the_point_goes_with_the_first_derivatives_of_a_random_log_det(direction, net, estimator):
    block, (x, context) = block_of(net, estimator), inputs_of(net)
    wanted = [x, *without_none(context), *block.parameters()]

    def parts() -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        y, value = getattr(block, direction)(x, context)
        return slopes(y.square(), [x], create=True)[0].square().sum(), value.sum()

    together = slopes(torch.stack(parts()), wanted)
    apart = [a + b for a, b in zip(slopes(parts()[0], wanted), slopes(parts()[1], wanted), strict=True)]
    assert_all_close(together, apart, 1e-10)


@every_random
@pytest.mark.parametrize("twice", ["jacrev(jacrev)", "hessian", "jacrev(jacfwd)", "jacfwd(jacfwd)"])
@pytest.mark.parametrize("net", ["waves", "conv"])
def test_torch_func_refuses_second_derivatives_of_a_random_log_det(net, twice, estimator):
    block, x = block_of(net, estimator), torch.randn(NETS[net].event).double()
    forward = partial(jacfwd, randomness="same")
    outer, inner = {
        "jacrev(jacrev)": (jacrev, jacrev),
        "hessian": (forward, jacrev),
        "jacrev(jacfwd)": (jacrev, forward),
        "jacfwd(jacfwd)": (forward, forward),
    }[twice]
    words = r"Exact\(\)|inside forward mode" if twice == "jacfwd(jacfwd)" else r"Exact\(\)"
    with pytest.raises(RuntimeError, match=words):
        outer(inner(lambda row: block(row[None])[1][0]))(x)


@pytest.mark.parametrize("size", [12, 13])
def test_the_curvature_of_a_log_det_by_default_is_known_or_refused(size):
    """g_i = -0.9 tanh(x_i): the Laplacian of sum_i log(1 - 0.9 sech^2 x_i), on both sides of the default's limit."""
    net = LipschitzMLP([size, size, size], activation=nn.Tanh).double()
    with torch.no_grad():
        for layer, factor in zip((net[0], net[2]), (1.0, -0.9), strict=True):
            layer.parametrizations.weight.original.copy_(factor * torch.eye(size))
            layer.bias.zero_()
    x = torch.full((1, size), 0.4).double().requires_grad_()
    c = net[2].weight[0, 0].item() * net[0].weight[0, 0].item()  # the bounds leave a little room for rounding

    def known(t: Tensor) -> Tensor:
        return torch.log(1 + c * (1 - torch.tanh(net[0].weight[0, 0].detach() * t) ** 2))

    t = torch.full((), 0.4).double()
    right = size * grad(grad(known))(t)
    (slope,) = torch.autograd.grad(ResidualBlock(net)(x)[1].sum(), x, create_graph=True)
    try:
        rows = [torch.autograd.grad(slope[0, i], x, retain_graph=True)[0][0, i] for i in range(size)]
    except RuntimeError as error:
        assert "Exact()" in str(error)
        return
    assert_close(torch.stack(rows).sum(), right, 1e-8)


# ---------------------------------------------------------------------------------------------------- third derivatives


def third(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """All third derivatives of a number, in reverse mode."""
    return jacrev(jacrev(jacrev(function)))(x)


@pytest.mark.parametrize("activation", [gentle_waves, LipSwish, nn.Tanh], ids=["waves", "lipswish", "tanh"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_third_derivatives_of_both_outputs(size, activation):
    block, x = sized(size, activation=activation), torch.randn(1, size).double()
    direction = torch.randn(size).double()
    y = third(lambda x: (block(x)[0] @ direction)[0], x)
    value = third(lambda x: block(x)[1][0], x)
    leaf = x.clone().requires_grad_()
    for found, right in (
        (y, (leaf + block.branch(leaf)) @ direction),
        (value, log_det(block.branch, leaf, create_graph=True)),
    ):
        for _ in range(3):
            rows = [torch.autograd.grad(r, leaf, create_graph=True)[0] for r in right.flatten()]
            right = torch.stack(rows)
        assert_close(found.flatten(), right.detach().flatten(), 1e-8, 1e-10)


# ------------------------------------------------------------------------------------------------------- forward mode

MAPS: dict[str, tuple[Callable, Callable]] = {
    "y": (lambda net: Exact(), lambda out: out[0]),
    "exact log-det": (lambda net: Exact(), lambda out: out[1]),
    "exact log-det in chunks": (lambda net: Exact(chunk=1), lambda out: out[1]),
    "y beside a random log-det": (all_known, lambda out: out[0]),
    "random log-det": (all_known, lambda out: out[1]),
}
THERE_AND_BACK = [(f"{label}, {way}") for way in ("forward", "inverse") for label in MAPS]
FUNCTIONS = [*THERE_AND_BACK, "preimage, FixedPoint()", "preimage, Anderson()", "preimage, Newton()"]
every_function = pytest.mark.parametrize("label", FUNCTIONS)
MODE_NETS = ["mlp", "elu", "dense", "context", "conv"]


class Function(nn.Module):
    """One output of a block in one direction."""

    def __init__(self, label: str, net: str) -> None:
        super().__init__()
        self.what, self.way = label.split(", ")
        solver = {"FixedPoint()": FixedPoint(), "Newton()": Newton()}.get(self.way)
        self.block = block_of(net, Omitted() if self.what == "preimage" else MAPS[self.what][0](net), solver)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.what == "preimage":
            return self.block.preimage(x, context)
        return MAPS[self.what][1](getattr(self.block, self.way)(x, context))


def along(value: Tensor, inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """The derivative of every entry along a direction, by reverse mode."""
    entries = []
    for entry in value.flatten():
        found = slopes(entry, inputs)
        entries.append(sum((g * t).sum() for g, t in zip(found, tangents, strict=True)))
    return torch.stack(entries).view_as(value).detach()


@every_function
@pytest.mark.parametrize("net", MODE_NETS)
def test_forward_mode_in_the_inputs(net, label):
    """torch.func.jvp and dual numbers, where gradients are recorded and where not."""
    function, (x, context) = Function(label, net), inputs_of(net)
    inputs = without_none(x, context)
    tangents = [torch.randn_like(t) for t in inputs]
    right = along(function(*inputs), inputs, tangents)
    assert right.abs().max() > 1e-3
    plain = [t.detach() for t in inputs]
    for mode in (nullcontext, torch.no_grad):
        with mode():
            value, found = jvp(function, tuple(plain), tuple(tangents))
            assert_close(value, function(*plain), 1e-10)
            assert_close(found, right, 1e-7)
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(t, d) for t, d in zip(plain, tangents, strict=True)]
                _, found = forward_ad.unpack_dual(function(*duals))
                assert found is not None
                assert_close(found, right, 1e-7)


@every_function
@pytest.mark.parametrize("net", ["elu", "dense", "context", "conv"])
def test_forward_mode_in_the_parameters(net, label):
    function, (x, context) = Function(label, net), inputs_of(net)
    own = dict(function.named_parameters())
    tangents = {k: torch.randn_like(p) for k, p in own.items()}
    right = along(function(x, context), list(own.values()), list(tangents.values()))
    plain = {k: p.detach() for k, p in own.items()}
    x, context = x.detach(), None if context is None else context.detach()

    def of_parameters(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(function, parameters, (x, context))

    for mode in (nullcontext, torch.no_grad):
        with mode():
            assert_close(jvp(of_parameters, (plain,), (tangents,))[1], right, 1e-7, 1e-9)
            with forward_ad.dual_level():
                duals = {k: forward_ad.make_dual(p, tangents[k]) for k, p in plain.items()}
                _, found = forward_ad.unpack_dual(of_parameters(duals))
                assert found is not None
                assert_close(found, right, 1e-7, 1e-9)


@every_function
@pytest.mark.parametrize("net", ["elu", "context", "conv"])
def test_jacfwd_is_jacrev(net, label):
    function, (x, context) = Function(label, net), inputs_of(net)
    plain = tuple(t.detach() for t in without_none(x, context))
    which = tuple(range(len(plain)))
    found, right = jacfwd(function, which, randomness="same")(*plain), jacrev(function, which)(*plain)
    assert_all_close(found, right, 1e-7)


@pytest.mark.parametrize("label", THERE_AND_BACK)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_jacfwd_is_jacrev_in_every_dimension(size, label):
    what, way = label.split(", ")
    estimator = PowerSeries(terms=150, probes=Orthogonal(size)) if "random" in what else MAPS[what][0](None)
    block, x = sized(size, estimator), torch.randn(2, size).double()
    function = lambda x: MAPS[what][1](getattr(block, way)(x))  # noqa: E731
    assert_close(jacfwd(function, randomness="same")(x), jacrev(function)(x), 1e-7)


@every_direction
@pytest.mark.parametrize("net", ["waves", "conv"])
def test_forward_mode_of_russian_roulette_is_unbiased(net, direction):
    """The mean over calls is the derivative of the exact log-det; within 5 standard errors."""
    block, exact = block_of(net, RussianRoulette(probes=40)), block_of(net)
    exact.load_state_dict(block.state_dict())
    x, t = torch.randn(2, 1, *NETS[net].event).double()
    right = jvp(lambda x: getattr(exact, direction)(x)[1], (x,), (t,))[1]
    draws = torch.stack([jvp(lambda x: getattr(block, direction)(x)[1], (x,), (t,))[1] for _ in range(40)])
    assert ((draws.mean(0) - right).abs() <= 5 * draws.std(0) / 40**0.5 + 1e-9).all()


@pytest.mark.parametrize("net", NETS)
def test_forward_over_reverse_and_the_other_way_round(net):
    """Hessian-vector products of both directions."""
    block, (x, context) = block_of(net), inputs_of(net)
    x, context = x.detach(), None if context is None else context.detach()
    t = torch.randn_like(x)
    for direction in ("forward", "inverse"):

        def value(x: Tensor, direction: str = direction) -> Tensor:
            y, log_det = getattr(block, direction)(x, context)
            return y.pow(3).sum() + log_det.sum()

        right = torch.func.vjp(grad(value), x)[1](t)[0]
        assert_close(jvp(grad(value), (x,), (t,))[1], right, 1e-7)
        assert_close(grad(lambda x: jvp(value, (x,), (t,))[1])(x), right, 1e-7)


@every_function
@pytest.mark.parametrize("net", ["waves", "tanh", "conv"])
def test_forward_over_forward_is_right_or_refused(net, label):
    """torch itself loses the second derivative of a custom function here, without a word."""
    function, (x, context) = Function(label, net), inputs_of(net)
    x, context = x.detach(), None if context is None else context.detach()
    t = torch.randn_like(x)
    value = lambda x: function(x, context).pow(3).sum()  # noqa: E731
    try:
        found = jvp(lambda x: jvp(value, (x,), (t,))[1], (x,), (t,))[1]
    except RuntimeError:
        assert label not in ("y, forward", "exact log-det, forward")
        return
    exact = Function(label.replace("y beside a random log-det", "y").replace("random", "exact"), net)
    exact.load_state_dict(function.state_dict())
    h = 1e-4
    up, down = [
        jvp(lambda x: exact(x, context).pow(3).sum(), (x + s * t,), (t,))[1]  # first order, by finite differences
        for s in (h, -h)
    ]
    assert_close(found, (up - down) / (2 * h), 1e-4, 1e-5)


@pytest.mark.parametrize("net", NETS)
def test_torch_func_hessian_of_an_exact_log_det(net):
    block, (x, context) = block_of(net), inputs_of(net, batch=1)
    plain = None if context is None else context.detach()
    found = hessian(lambda x: block(x, plain)[1].sum())(x.detach())
    right = torch.autograd.functional.hessian(
        lambda x: log_det(block.branch, x, plain, create_graph=True).sum(), x.detach()
    )
    assert_close(found, right, 1e-8, 1e-10)


# --------------------------------------------------------------------------------------------------------------- vmap


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@every_direction
def test_vmap_of_hessians_is_row_by_row(direction, size, chunk):
    block, x = sized(size, Exact(chunk)), torch.randn(3, size).double()
    curvature = hessian(lambda row: getattr(block, direction)(row[None])[1][0])
    assert_close(vmap(curvature)(x), torch.stack([curvature(row) for row in x]), 1e-8, 1e-10)
    if direction == "forward":
        value = lambda row: log_det(block.branch, row[None], create_graph=True)[0]  # noqa: E731
        right = torch.stack([torch.autograd.functional.hessian(value, row) for row in x])
        assert_close(vmap(curvature)(x), right, 1e-8, 1e-10)


@pytest.mark.parametrize("transform", [jacfwd, jacrev, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacfwd(f))])
@pytest.mark.parametrize("net", ["mlp", "tanh", "dense", "conv"])
def test_vmap_of_derivatives_is_row_by_row(net, transform):
    block, x = block_of(net), inputs_of(net)[0].detach()
    for which in (0, 1):
        derivative = transform(lambda row: block(row[None])[which][0])  # noqa: B023
        assert_close(vmap(derivative)(x), torch.stack([derivative(row) for row in x]), 1e-8, 1e-10)


ESTIMATORS = {
    "Exact()": Exact(),
    "Exact(chunk=1)": Exact(chunk=1),
    "PowerSeries(5)": PowerSeries(5),
    "PowerSeries, all probes": PowerSeries(60, probes=Orthogonal(2)),
    "PowerSeries, tolerance": PowerSeries(tolerance=1e-9, probes=Orthogonal(2)),
    "PowerSeries, Gaussian": PowerSeries(tolerance=1e-2, probes=Gaussian(3)),
    "Decay": RussianRoulette(),
    "Geometric": RussianRoulette(Geometric()),
    "Poisson": RussianRoulette(Poisson(30.0), probes=2),
    "Omitted()": Omitted(),
    "BySize()": BySize(),
    "BySize(0, 0)": BySize(0, 0),
}
KNOWN = ["Exact()", "Exact(chunk=1)", "PowerSeries, tolerance", "BySize()"]
every_estimator = pytest.mark.parametrize("label", ESTIMATORS)
both_kinds = pytest.mark.parametrize("randomness", ["same", "different"])


@every_estimator
@both_kinds
@every_direction
@pytest.mark.parametrize("net", ["lipswish", "dense"])
def test_vmap_over_rows(net, direction, randomness, label):
    """Points are those of the batch, and log-dets that are known by value."""
    block, x = block_of(net, ESTIMATORS[label]), torch.randn(4, 2).double()
    rows = vmap(lambda row: [out[0] for out in getattr(block, direction)(row[None])], randomness=randomness)
    point, value = rows(x)
    batch = getattr(block, direction)(x)
    assert_close(point, batch[0], 1e-11)
    assert value.shape == (4,) and (value.isnan().all() if label == "Omitted()" else torch.isfinite(value).all())
    if label in KNOWN:
        right = log_det(block.branch, batch[0] if direction == "inverse" else x).detach()
        assert_close(value, -right if direction == "inverse" else right, 0, 2e-9)


@every_estimator
@both_kinds
def test_vmap_over_images(label, randomness):
    block, x = block_of("conv", ESTIMATORS[label]), torch.randn(3, 1, 2, 3).double()
    point, value = vmap(lambda row: [out[0] for out in block(row[None])], randomness=randomness)(x)
    assert_close(point, block(x)[0], 1e-11)
    if "Exact" in label:
        assert_close(value, block(x)[1], 1e-10)


@pytest.mark.parametrize("label", ["PowerSeries(5)", "PowerSeries, Gaussian", "Decay", "Geometric", "Poisson"])
def test_randomness_is_the_same_or_different_as_it_was_asked_for(label):
    """Of equal rows."""
    block, x = block_of("lipswish", ESTIMATORS[label]), torch.randn(1, 2).double().expand(8, 2)
    values = {
        kind: vmap(lambda row: block(row[None])[1][0], randomness=kind)(x).detach() for kind in ("same", "different")
    }
    assert (values["same"] == values["same"][0]).all()
    assert len(set(values["different"].tolist())) > 1
    with pytest.raises(RuntimeError, match="random"):
        vmap(lambda row: block(row[None])[1][0])(x)


@pytest.mark.parametrize("label", ["PowerSeries, Gaussian", "Decay", "Geometric", "Poisson"])
@both_kinds
def test_vmap_of_a_random_log_det_is_unbiased(label, randomness):
    """Within 5 standard errors of 100 calls, and what a tolerance may leave out."""
    block, x = block_of("lipswish", ESTIMATORS[label]), torch.randn(3, 2).double()
    draws = []
    with torch.no_grad():
        for _ in range(100):
            draws.append(vmap(lambda row: block(row[None])[1][0], randomness=randomness)(x))
    draws = torch.stack(draws)
    right = log_det(block.branch, x)
    assert ((draws.mean(0) - right).abs() <= 5 * draws.std(0) / 100**0.5 + 1e-2).all()


def per_sample(block: ResidualBlock, x: Tensor, context: Tensor | None, randomness: str) -> dict[str, Tensor]:
    def value(parameters: dict[str, Tensor], row: Tensor, context: Tensor | None) -> Tensor:
        context = None if context is None else context[None]
        y, log_det = functional_call(block, parameters, (row[None], context))
        return y.square().sum() / 2 - log_det[0]

    parameters = {k: p.detach() for k, p in block.named_parameters()}
    dims = (None, 0, None if context is None else 0)
    return vmap(grad(value), dims, randomness=randomness)(parameters, x, context)


@every_estimator
@both_kinds
@pytest.mark.parametrize("net", ["lipswish", "context", "conv"])
def test_per_sample_gradients(net, randomness, label):
    """Finite for all estimators, and those of a sample alone where they do not depend on draws."""
    block, (x, context) = block_of(net, ESTIMATORS[label]), inputs_of(net, 3)
    x, context = x.detach(), None if context is None else context.detach()
    if label == "Omitted()":
        block = block_of(net, Omitted())
    found = per_sample(block, x, context, randomness)
    for k, p in block.named_parameters():
        assert found[k].shape == (3, *p.shape)
        assert label == "Omitted()" or torch.isfinite(found[k]).all()
    if label not in (*KNOWN, "PowerSeries, all probes") or (net == "conv" and "Series" in label):
        return
    exact = block_of(net)
    exact.load_state_dict(block.state_dict())
    for i in range(3):
        exact.zero_grad()
        y, value = exact(x[i : i + 1], None if context is None else context[i : i + 1])
        (y.square().sum() / 2 - value.sum()).backward()
        for k, p in exact.named_parameters():
            right = torch.zeros_like(p) if p.grad is None else p.grad
            assert_close(found[k][i], right, 0.02 if "all probes" in label else 1e-6, 1e-6)


@every_solver
@pytest.mark.parametrize("net", ["mlp", "context", "conv"])
def test_vmap_of_the_preimage(net, solver):
    """Over rows, over context, and over rows with gradients."""
    block, (y, context) = block_of(net, Omitted(), solver), inputs_of(net, 3)
    y, context = y.detach(), None if context is None else context.detach()
    right = block.preimage(y, context).detach()

    def row(y: Tensor, context: Tensor | None) -> Tensor:
        return block.preimage(y[None], None if context is None else context[None])[0]

    dims = (0, None if context is None else 0)
    assert_close(vmap(row, dims)(y, context), right, 1e-11)
    with torch.no_grad():
        assert_close(vmap(row, dims)(y, context), right, 1e-11)
    found = vmap(jacrev(row), dims)(y, context)
    forward = vmap(jacfwd(row), dims)(y, context)
    jac = jacobian(block.branch, right, context).detach()
    inverses = torch.linalg.inv(torch.eye(jac.shape[-1]).double() + jac)
    assert_close(found.reshape(jac.shape), inverses, 1e-8)
    assert_close(forward.reshape(jac.shape), inverses, 1e-8)


@pytest.mark.parametrize("net", ["mlp", "tanh", "context", "conv"])
@pytest.mark.parametrize("way", ["forward", "inverse", "preimage"])
def test_vmap_over_parameters(way, net):
    """An ensemble: every member as functional_call gives it alone."""
    block, (x, context) = block_of(net), inputs_of(net)
    members = [{k: (s * p).detach() for k, p in block.named_parameters()} for s in (1.0, 0.3, -0.8)]
    stacked = {k: torch.stack([m[k] for m in members]) for k in members[0]}

    class Way(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
            out = getattr(self.block, way)(x, context)
            return out if way == "preimage" else torch.cat([out[0].flatten(1), out[1][:, None]], 1)

    model = Way()
    named = lambda p: {f"block.{k}": v for k, v in p.items()}  # noqa: E731
    found = vmap(lambda p: functional_call(model, named(p), (x, context)))(stacked)
    right = torch.stack([functional_call(model, named(m), (x, context)) for m in members])
    assert (right[0] - right[1]).abs().max() > 1e-2
    assert_close(found, right, 1e-10)


def test_vmap_over_rows_of_a_hard_linear_map_knows_its_log_det():
    """g = -0.97 x, the largest log-det there is."""
    block = ResidualBlock(linear_branch(-torch.eye(3).double(), 0.97), Exact())
    value = vmap(lambda row: block(row[None])[1][0])(torch.randn(4, 3).double())
    right = 3 * math.log1p(block.branch[0].weight[0, 0].item())
    assert_close(value, torch.full((4,), right, dtype=torch.float64), 1e-11)
