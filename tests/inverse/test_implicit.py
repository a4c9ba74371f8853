"""Derivatives of the inverse to any order: for y, parameters and context, against dense formulas and differences."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vmap

from iresflow_plugin import ResidualBlock
from iresflow_plugin.inverse import Anderson, FixedPoint, Newton, Solver
from iresflow_plugin.log_det import Exact, Omitted, Orthogonal, PowerSeries
from tests.helpers import (
    SMOOTH_ACTIVATIONS,
    align,
    assert_close,
    assert_second_derivatives,
    call,
    gentle_sine,
    gradients,
    inverse64,
    jacobian,
    linear_branch,
    log_det,
    name,
    scaled_mlp,
    shift,
)

SOLVERS = [FixedPoint(), Anderson(), Newton(), Newton(dense=0)]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=["FixedPoint", "Anderson", "Newton", "Newton-Krylov"])


def dense_inverse(net: nn.Module, y: Tensor, context: Tensor | None = None) -> Tensor:
    """x(y, theta, context) with the right derivatives: one Newton step of the plain module from the solution.

    x = x* + (I + J)^-1 (y - x* - g(x*)) with x* and J held fixed has the value x* and the implicit derivatives.
    """
    star = inverse64(net, y.detach(), None if context is None else context.detach())
    jac = jacobian(net, star, context).detach()
    rest = y - star - call(net, star, context)
    step = torch.linalg.solve(torch.eye(jac.shape[-1], dtype=jac.dtype) + jac, rest.flatten(1)[..., None])[..., 0]
    return star + step.view_as(star)


def setting(size: int = 3, activation: object = gentle_sine, **options: object) -> tuple[nn.Module, Tensor, Tensor]:
    net = align(scaled_mlp(size, 6, activation, 0.9, context_features=2, **options))
    y = torch.randn(5, size, dtype=torch.float64).requires_grad_()
    context = torch.randn(5, 2, dtype=torch.float64).requires_grad_()
    return net, y, context


@every_solver
def test_gradients_of_the_solution(solver):
    """For y, context and every parameter, with random cotangents; row 0 has none (D2)."""
    net, y, context = setting()
    cotangent = torch.randn(5, 3, dtype=torch.float64)
    cotangent[0] = 0
    x, _ = ResidualBlock(net, Exact(), solver).inverse(y, context)
    expected = gradients(cotangent * dense_inverse(net, y, context), net, y, context)
    assert expected[0].abs().max() > 1
    for ours, truth in zip(gradients(cotangent * x, net, y, context), expected, strict=True):
        assert_close(ours, truth, 1e-8, 1e-10)


@pytest.mark.parametrize("activation", SMOOTH_ACTIVATIONS, ids=name)
def test_gradients_of_both_outputs(activation):
    """The log-det of the inverse depends on everything through x as well."""
    net, y, context = setting(activation=activation)
    weights = torch.randn(5, dtype=torch.float64)
    x, back = ResidualBlock(net, Exact()).inverse(y, context)
    star = dense_inverse(net, y, context)
    truth = -log_det(net, star, context, create_graph=True)
    assert_close(x, star, 1e-10)
    assert_close(back, truth, 1e-9, 1e-10)
    ours = gradients(weights * (back + x.square().sum(1)), net, y, context)
    expected = gradients(weights * (truth + star.square().sum(1)), net, y, context)
    for one, other in zip(ours, expected, strict=True):
        assert_close(one, other, 1e-7, 1e-9)


@every_solver
def test_finite_differences(solver):
    """An oracle without any formula: solve again at y +- h, theta +- h, context +- h."""
    net, y, context = setting()
    block = ResidualBlock(net, Exact(), solver)
    wanted = [y, context, *net.parameters()]

    def loss() -> Tensor:
        x, back = block.inverse(y, context)
        return (x.sin().sum(1) + back).sum()

    found = torch.autograd.grad(loss(), wanted, allow_unused=True)
    h = 1e-5
    for tensor, grad in zip(wanted, found, strict=True):
        direction = torch.randn_like(tensor)
        with torch.no_grad():
            tensor.add_(h * direction)
            up = loss()
            tensor.sub_(2 * h * direction)
            down = loss()
            tensor.add_(h * direction)
        slope = 0.0 if grad is None else (grad * direction).sum().item()
        assert slope == pytest.approx(((up - down) / (2 * h)).item(), rel=1e-5, abs=1e-6)


def test_there_and_back_has_the_identity_as_its_derivative():
    net, x, context = setting()
    block = ResidualBlock(net, Exact())
    y, there = block(x, context)
    z, back = block.inverse(y, context)
    cotangent = torch.randn_like(x)
    assert_close(torch.autograd.grad((cotangent * z).sum(), x, retain_graph=True)[0], cotangent, 1e-9)
    for parameter in net.parameters():
        (grad,) = torch.autograd.grad((cotangent * z).sum(), parameter, retain_graph=True)
        assert grad.abs().max() < 1e-8
    for grad in gradients(there + back, net, x, context):
        assert grad.abs().max() < 1e-7


@pytest.mark.parametrize("estimator", [Exact(), PowerSeries(6, probes=Orthogonal(3))], ids=str)
def test_d12_the_log_det_of_the_inverse_is_minus_the_forwards_at_the_solution(estimator):
    """D12: neither at y, nor with the wrong sign."""
    net, y, context = setting()
    block = ResidualBlock(net, estimator)
    x, back = block.inverse(y, context)
    assert_close(back, -block(x.detach(), context)[1], 1e-10)
    at_y = block(y, context)[1]
    assert (back + at_y).abs().max() > 0.01


@every_solver
def test_the_solver_is_not_unrolled(solver):
    """Entries kept for backward do not depend on how many evaluations the solve took."""
    net, y, context = setting()

    def kept(tolerance: float) -> tuple[int, int]:
        entries = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal entries
            entries += t.numel()
            return t

        block = ResidualBlock(net, Omitted(), replace(solver, tolerance=tolerance))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            block.inverse(y, context)
        return entries, int(block.solve(y, context).evaluations.sum())

    loose, tight = kept(10.0), kept(1e-12)
    assert tight[1] > loose[1]
    assert tight[0] == loose[0] > 0


@pytest.mark.parametrize("solver", [FixedPoint(1e-4), Anderson(1e-4), Newton(1e-4)], ids=str)
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_gradients_do_not_depend_on_the_scale_of_the_loss(solver, scale):
    """A tolerance is a distance in x; gradients of a mean over many samples are tiny, and must be no worse for it."""
    net, y, context = setting()
    block = ResidualBlock(net, Omitted(), solver)

    def gradient(factor: float) -> Tensor:
        return torch.autograd.grad((factor * block.inverse(y, context)[0]).sum(), y)[0] / factor

    assert_close(gradient(scale), gradient(1.0), 1e-9)
    exact = torch.autograd.grad(dense_inverse(net, y, context).sum(), y)[0]
    assert_close(gradient(scale), exact, 1e-2)


def test_hard_gradients_at_the_bound():
    """At -0.99 the inverse stretches gradients a hundredfold; the adjoint solve has to hold as the solve does."""
    net = linear_branch(torch.diag(torch.tensor([-1.0, 0.3])), 0.99)
    y = torch.randn(4, 2, dtype=torch.float64).requires_grad_()
    cotangent = torch.randn(4, 2, dtype=torch.float64)
    expected = gradients(cotangent * dense_inverse(net, y), net, y)
    assert expected[0].abs().max() > 20
    for solver in SOLVERS:
        ours = gradients(cotangent * ResidualBlock(net, Exact(), solver).inverse(y)[0], net, y)
        for one, other in zip(ours, expected, strict=True):
            assert_close(one, other, 1e-8)


def test_frozen_parameters_still_pass_gradients_to_inputs():
    """normflows' reverse_kld freezes every parameter, runs the flow, and unfreezes."""
    net, y, context = setting()
    net.requires_grad_(False)
    x, back = ResidualBlock(net, Exact()).inverse(y, context)
    net.requires_grad_(True)
    (x.square().sum() + back.sum()).backward()
    assert y.grad.abs().max() > 0 and context.grad.abs().max() > 0
    assert all(p.grad is None for p in net.parameters())


def test_only_parameters_require_gradients():
    net, y, context = setting()
    x, back = ResidualBlock(net, Exact()).inverse(y.detach(), context.detach())
    (x.square().sum() + back.sum()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=name)
def test_without_gradients_there_is_no_graph(mode):
    net, y, context = setting()
    block = ResidualBlock(net, Exact())
    with mode():
        x, back = block.inverse(y, context)
    assert not x.requires_grad and not back.requires_grad
    with torch.enable_grad():
        assert_close(x.clone(), block.inverse(y, context)[0], 1e-12)


def test_backward_twice_and_in_pieces():
    net, y, context = setting()
    x, back = ResidualBlock(net, Exact()).inverse(y, context)
    loss = x.square().sum() + back.sum()
    one = torch.autograd.grad(loss, y, retain_graph=True)[0]
    assert torch.equal(one, torch.autograd.grad(loss, y, retain_graph=True)[0])
    first = torch.autograd.grad(x.square().sum(), y, retain_graph=True)[0]
    second = torch.autograd.grad(back.sum(), y)[0]
    assert_close(first + second, one, 1e-10)


# ----------------------------------------------------------------------------------------------- second derivatives


@every_solver
def test_second_derivatives_of_the_solution(solver):
    """For y, context and every parameter, and mixed ones."""
    net, y, context = setting()
    block = ResidualBlock(net, Omitted(), solver)
    tensors = [y, context, *net.parameters()]
    assert_second_derivatives(lambda: block.inverse(y, context)[0].sin().sum(), tensors)
    assert_second_derivatives(lambda: block.preimage(y, context).square().sum(), tensors)


@pytest.mark.parametrize("activation", SMOOTH_ACTIVATIONS, ids=name)
def test_second_derivatives_of_both_outputs(activation):
    net, y, context = setting(activation=activation)
    block = ResidualBlock(net, Exact())

    def loss() -> Tensor:
        x, back = block.inverse(y, context)
        return (x.square().sum(1) * back).sum()

    assert_second_derivatives(loss, [y, context, *net.parameters()], 1e-4)


def test_a_penalty_on_the_slope_of_an_inverse_trains():
    """As a user has it: the gradient of |dx/dy|^2 in the weights, the second derivative in one backward pass."""
    net, y, context = setting()
    block = ResidualBlock(net, Omitted())
    weights = list(net.parameters())

    def penalty(create_graph: bool) -> Tensor:
        x = block.inverse(y, context)[0]
        return torch.autograd.grad(x.sum(), y, create_graph=create_graph)[0].square().sum()

    found = torch.autograd.grad(penalty(create_graph=True), weights, materialize_grads=True)
    directions = [torch.randn_like(w) for w in weights]
    shift(weights, directions, 1e-5)
    up = penalty(create_graph=False)
    shift(weights, directions, -2e-5)
    down = penalty(create_graph=False)
    slope = sum((g * d).sum().item() for g, d in zip(found, directions, strict=True))
    assert slope == pytest.approx((up - down).item() / 2e-5, rel=1e-5) and abs(slope) > 1e-2


def test_third_derivatives_of_the_solution():
    """Against those of the inverse function: x''' (y) of a map of one dimension by its chain rule."""
    net, y, context = setting(size=1)
    block = ResidualBlock(net, Omitted())

    def derivatives(f: Callable[[Tensor], Tensor], at: Tensor) -> list[Tensor]:
        values = [f(at)]
        for _ in range(3):
            values.append(torch.autograd.grad(values[-1].sum(), at, create_graph=True)[0])
        return values

    x, x1, x2, x3 = derivatives(lambda y: block.inverse(y, context)[0], y)
    _, f1, f2, f3 = derivatives(lambda x: x + net(x, context), x.detach().requires_grad_())
    assert_close(x1, 1 / f1, 1e-10)
    assert_close(x2, -f2 / f1**3, 1e-9)
    assert_close(x3, (3 * f2**2 - f1 * f3) / f1**5, 1e-8)


# -------------------------------------------------------------------------------- forward mode, torch.func, ensembles


def implicit_jacobian(net: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    """dx/dy of every sample."""
    jac = jacobian(net, x, context)
    return torch.linalg.inv(torch.eye(jac.shape[-1], dtype=jac.dtype) + jac)


class Preimage(nn.Module):
    """Whose forward pass solves."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, y: Tensor, context: Tensor) -> Tensor:
        return self.block.preimage(y, context)


@every_solver
def test_forward_mode(solver):
    """In torch.func and in torch.autograd.forward_ad: for y, context and the weights, against reverse mode."""
    net, y, context = setting()
    block = ResidualBlock(net, Omitted(), solver)
    parameters = {label: p.detach() for label, p in net.named_parameters()}
    inputs = (y.detach(), context.detach(), parameters)
    tangents = (torch.randn_like(y), torch.randn_like(context), {k: torch.randn_like(p) for k, p in parameters.items()})

    module = Preimage(block)

    def solution(y: Tensor, context: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(module, {f"block.branch.{k}": p for k, p in parameters.items()}, (y, context))

    _, pushed = jvp(solution, inputs, tangents)
    cotangent = torch.randn_like(pushed)
    pulled = torch.autograd.grad((cotangent * block.preimage(y, context)).sum(), [y, context, *net.parameters()])
    every = [tangents[0], tangents[1], *tangents[2].values()]
    expected = sum((p * t).sum().item() for p, t in zip(pulled, every, strict=True))
    assert (cotangent * pushed).sum().item() == pytest.approx(expected, rel=1e-8)
    with forward_ad.dual_level():
        x = block.preimage(forward_ad.make_dual(inputs[0], tangents[0]), inputs[1])
        along = forward_ad.unpack_dual(x).tangent
    matrix = implicit_jacobian(net, block.preimage(y, context).detach(), context.detach())
    assert_close(along, (matrix @ tangents[0][..., None])[..., 0], 1e-8)


@every_solver
def test_torch_func_of_the_solution(solver):
    """jacrev, jacfwd, hessian in both ways, and vmap over rows."""
    net, y, context = setting()
    block = ResidualBlock(net, Exact(), solver)
    y, row = y.detach(), context.detach()[:1]
    x = block.preimage(y, row).detach()
    expected = implicit_jacobian(net, x, row.expand(5, 2))
    for transform in (jacrev, jacfwd):
        found = vmap(transform(lambda v: block.preimage(v[None], row)[0]))(y)
        assert_close(found, expected, 1e-8)

    def both(v: Tensor) -> Tensor:
        x, back = block.inverse(v[None], row)
        return x.square().sum() + back.sum()

    curvature = torch.autograd.functional.hessian(both, y[0])
    assert curvature.abs().max() > 1e-2
    for second in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f))):
        assert_close(second(both)(y[0]), curvature, 1e-7)
    assert_close(vmap(torch.func.grad(both))(y), torch.stack([torch.func.grad(both)(v) for v in y]), 1e-8)


def test_forward_over_forward_is_right_or_refused():
    """torch itself loses the inner tangent in every autograd.Function."""
    net, y, context = setting()
    block, v, row = ResidualBlock(net, Omitted()), y.detach()[0], context.detach()[:1]

    def loss(v: Tensor) -> Tensor:
        return block.preimage(v[None], row).square().sum()

    try:
        found = jacfwd(jacfwd(loss))(v)
    except RuntimeError:
        return
    assert_close(found, hessian(loss)(v), 1e-7)


def test_ensembles_are_their_members():
    """vmap over weights, contexts and rows: each member is solved by itself."""
    net, y, context = setting()
    module = Preimage(ResidualBlock(net, Exact()))
    y, context = y.detach(), context.detach()
    stacked = {k: torch.stack([p.detach(), 0.3 * p.detach()]) for k, p in module.named_parameters()}
    contexts = torch.stack([context, 1 - context])
    both = vmap(lambda p, c: functional_call(module, p, (y, c)))(stacked, contexts)
    for i in range(2):
        alone = functional_call(module, {k: p[i] for k, p in stacked.items()}, (y, contexts[i]))
        assert_close(both[i], alone, 1e-9)


# ------------------------------------------------------------------------------------------------------- robustness


@every_solver
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_stays_so_in_its_row_alone(solver, bad):
    """As in all of torch (gradient scalers rely on it): neither hidden, nor an endless solve, nor spread to others."""
    net, y, context = setting()
    x, _ = ResidualBlock(net, Omitted(), solver).inverse(y, context)
    (clean,) = torch.autograd.grad(x.sum(), y, retain_graph=True)
    (grad,) = torch.autograd.grad((x * torch.tensor([1.0, 1.0, bad, 1.0, 1.0])[:, None]).sum(), y)
    assert not torch.isfinite(grad[2]).any()
    others = [0, 1, 3, 4]
    assert_close(grad[others], clean[others], 1e-9)


def test_zero_cotangents_cost_nothing_and_give_zero():
    net, y, context = setting()
    x, _ = ResidualBlock(net, Omitted()).inverse(y, context)
    assert not any(g.any() for g in gradients(0 * x, net, y, context))


def test_samples_do_not_influence_each_other():
    net, y, context = setting()
    block = ResidualBlock(net, Exact())
    x, back = block.inverse(y, context)
    (grad,) = torch.autograd.grad(x[1].sum() + back[1], y)
    assert grad[1].abs().max() > 0
    grad[1] = 0
    assert not grad.any()


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_outputs_may_be_changed_in_place_before_backward(direction):
    """Callers add to log-dets and subtract from outputs in place."""
    net, inputs, context = setting()
    block = ResidualBlock(net, Exact())
    plain, change = getattr(block, direction)(inputs, context)
    expected = gradients(3 * plain.sum() + change.sum(), net, inputs, context)
    out, change = getattr(block, direction)(inputs, context)
    out.mul_(3).sub_(1)
    change.add_(2)
    for one, other in zip(gradients(torch.cat([out.sum()[None], change]), net, inputs, context), expected, strict=True):
        assert_close(one, other, 1e-12, 1e-13)


@every_solver
def test_no_gradient_reaches_the_callers_tensors_by_surprise(solver: Solver):
    """D9: inputs that do not require gradients do not start to."""
    net, y, context = setting()
    y, context = y.detach(), context.detach()
    before = y.clone(), context.clone()
    ResidualBlock(net, Exact(), solver).inverse(y, context)
    assert not y.requires_grad and not context.requires_grad
    assert torch.equal(y, before[0]) and torch.equal(context, before[1])
