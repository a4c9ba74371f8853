"""Half precision is inverted and certified like any other, and no dtype appears where it was not asked for."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iresflow_plugin import ResidualBlock, lipschitz
from iresflow_plugin.inverse import Anderson, FixedPoint, Newton
from iresflow_plugin.lipschitz import (
    AddContext,
    AlmostOrthogonal,
    Bjorck,
    Chain,
    Concatenate,
    Frobenius,
    LearnableConcatenate,
    Scale,
    Spectral,
    Sum,
    constrain,
    lipschitz_bound,
)
from iresflow_plugin.log_det import Exact, Orthogonal, PowerSeries
from iresflow_plugin.nets import LipschitzConvNet, LipschitzDenseNet, LipschitzMLP
from tests.helpers import (
    align,
    assert_close,
    certified_by_svd,
    frozen64,
    inverse64,
    jacobian,
    log_det,
    name,
    operator_matrix,
    scale_weights,
    scaled_mlp,
    svd_norm,
)

HALF = [torch.float16, torch.bfloat16]
SOLVERS = [Anderson, FixedPoint, Newton]
CONSTRAINTS = [Spectral, AlmostOrthogonal, Bjorck, Frobenius]
FOR_CONVOLUTIONS = [Spectral, AlmostOrthogonal, Frobenius]

every_half = pytest.mark.parametrize("dtype", HALF, ids=str)
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=name)
every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS, ids=name)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def lengths(x: Tensor) -> Tensor:
    return x.double().flatten(1).norm(dim=1)


# ------------------------------------------------------------------------------------------- inverse


@every_solver
@every_half
@pytest.mark.parametrize("factor", [1.0, 5.0, 100.0])
@pytest.mark.parametrize("activation", [None, nn.Tanh, nn.ELU], ids=name)
def test_inverse_in_half_precision_is_right_to_a_few_units(solver, dtype, factor, activation):
    block = ResidualBlock(scale_weights(LipschitzMLP([6, 32, 6], activation=activation), factor).to(dtype))
    block.solver = solver()
    y = torch.randn(32, 6).to(dtype)
    right = inverse64(frozen64(block.branch), y)
    solution = block.solve(y)
    error = lengths(solution.x.double() - right)
    assert solution.converged.all()
    assert (error <= 4 * eps(dtype) * torch.maximum(lengths(y), lengths(right))).all()
    assert solution.error_bound.isfinite().all() and (error <= solution.error_bound.double()).all()
    x, _ = block.inverse(y)
    assert x.dtype == dtype and torch.equal(x, solution.x)


@every_solver
@every_half
@pytest.mark.parametrize("sign", [-1.0, 1.0], ids=["turning", "stretching"])
def test_the_error_bound_in_half_precision_holds_where_the_jacobian_reaches_its_bound(solver, dtype, sign):
    block = ResidualBlock(align(scaled_mlp(5, 5, nn.Tanh), sign).to(dtype), inverse=solver())
    y = torch.cat([torch.randn(16, 5), 0.05 * torch.randn(16, 5), 100 * torch.randn(8, 5)]).to(dtype)
    solution = block.solve(y)
    error = lengths(solution.x.double() - inverse64(frozen64(block.branch), y))
    assert solution.converged.all() and solution.error_bound.isfinite().all()
    assert (error <= solution.error_bound.double()).all()


@every_solver
@every_half
@pytest.mark.parametrize("kind", ["many features", "images", "densely connected"])
def test_there_and_back_in_half_precision(solver, dtype, kind):
    net, shape = {
        "many features": lambda: (LipschitzMLP([40, 64, 40]), (40,)),
        "images": lambda: (LipschitzConvNet([2, 8, 2]), (2, 5, 5)),
        "densely connected": lambda: (LipschitzDenseNet(6, [16, 16]), (6,)),
    }[kind]()
    block = ResidualBlock(net.to(dtype), inverse=solver())
    x = torch.randn(8, *shape).to(dtype)
    back = block.preimage(block(x)[0])
    assert back.dtype == dtype
    assert (lengths(back.double() - x.double()) <= 8 * eps(dtype) * lengths(x)).all()


@every_solver
@every_half
def test_gradients_of_an_inverse_in_half_precision(solver, dtype):
    block = ResidualBlock(scaled_mlp(4, 16, nn.Tanh, factor=2.0).to(dtype), inverse=solver())
    y = torch.randn(8, 4).to(dtype).requires_grad_()
    (grad,) = torch.autograd.grad(block.preimage(y).sum(), y)
    twin = frozen64(block.branch)
    jac = jacobian(twin, inverse64(twin, y.detach()))
    right = torch.linalg.solve((torch.eye(4, dtype=torch.float64) + jac).mT, torch.ones(8, 4, 1, dtype=torch.float64))
    assert grad.dtype == dtype
    assert_close(grad, right[..., 0], 16 * eps(dtype))


# ------------------------------------------------------------------------------------------- certificates


FREE = {
    "square": (lambda: nn.Linear(64, 64), None),
    "wide": (lambda: nn.Linear(48, 5), None),
    "tall": (lambda: nn.Linear(3, 40), None),
    "one number": (lambda: nn.Linear(1, 1), None),
    "convolution": (lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 6, 6)),
    "stride": (lambda: nn.Conv2d(2, 4, (4, 2), stride=(1, 2)), (2, 6, 6)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "dilation": (lambda: nn.Conv1d(3, 3, 3, dilation=2, padding=2), (3, 9)),
    "one by one": (lambda: nn.Conv2d(5, 4, 1), (5, 3, 3)),
    "volume": (lambda: nn.Conv3d(1, 2, 2), (1, 4, 4, 4)),
}


@every_half
@pytest.mark.parametrize("size", [1e-2, 1.0, 300.0])
@pytest.mark.parametrize("label", FREE)
def test_free_layers_in_half_precision_are_not_certified_below_their_norm(label, size, dtype):
    """300: the squares overflow in float16."""
    build, shape = FREE[label]
    layer = build()
    with torch.no_grad():
        layer.weight.mul_(size)
    layer.to(dtype)
    double = copy.deepcopy(layer).double()
    true = svd_norm(double.weight if shape is None else operator_matrix(double, shape))
    bound = lipschitz_bound(layer)
    assert bound.certified
    assert true <= bound.value <= 1.25 * lipschitz_bound(double).value + 1e-4


def behind_weight_norm(constraint: type, dtype: torch.dtype, factor: float = 20.0) -> nn.Module:
    net = nn.Sequential(weight_norm(nn.Linear(24, 48)), nn.Tanh(), weight_norm(nn.Linear(48, 24)))
    constrain(net, 0.97, constraint)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.parametrizations.weight.original0.mul_(factor)
    return net.to(dtype)


@every_half
@every_constraint
@pytest.mark.parametrize("factor", [0.5, 20.0])
def test_certificates_behind_another_parametrization_hold_in_half_precision(constraint, dtype, factor):
    net = behind_weight_norm(constraint, dtype, factor)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            true = svd_norm(net[0].weight) * svd_norm(net[2].weight)
            bound = lipschitz_bound(net)
        assert bound.certified and true <= bound.value <= 0.97 * (1 + 1e-9)
        assert net[0].weight.dtype == dtype


@every_half
@pytest.mark.parametrize("constraint", [Spectral, AlmostOrthogonal], ids=name)
def test_the_remainder_behind_another_parametrization_holds_in_half_precision(constraint, dtype):
    net = behind_weight_norm(constraint, dtype)
    x = (0.1 * torch.randn(16, 24)).to(dtype)
    with torch.no_grad():
        found = ResidualBlock(net, log_det=PowerSeries(tolerance=1e-3, probes=Orthogonal(24))).estimate(x)
    error = (found.log_det.double() - log_det(frozen64(net), x.double())).abs()
    assert (error <= found.remainder.double() + 2 * eps(dtype)).all()


@every_solver
@every_half
def test_solutions_behind_another_parametrization_hold_in_half_precision(solver, dtype):
    block = ResidualBlock(behind_weight_norm(Spectral, dtype), inverse=solver())
    y = torch.randn(6, 24).to(dtype)
    solution = block.solve(y)
    right = inverse64(frozen64(block.branch), y)
    assert (lengths(solution.x.double() - right) <= solution.error_bound.double()).all()
    assert_close(solution.x, right, 8 * eps(dtype))


# ------------------------------------------------------------------------------------------- replicas


def replicate(net: nn.Module) -> nn.Module:
    """What nn.DataParallel does for every device, on the CPU: parameters become plain tensors with a graph."""
    modules = list(net.modules())
    copies = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        replica = copies[id(module)]
        for key, child in module._modules.items():
            setattr(replica, key, None if child is None else copies[id(child)])
        for key, parameter in module._parameters.items():
            setattr(replica, key, None if parameter is None else parameter * 1)
        for key, buffer in module._buffers.items():
            setattr(replica, key, buffer)
    return copies[id(net)]


REPLICATED = {
    "MLP": (lambda: LipschitzMLP([6, 16, 6]), (6,), None),
    "MLP, almost orthogonal": (lambda: LipschitzMLP([6, 16, 6], constraint=AlmostOrthogonal), (6,), None),
    "MLP with context": (lambda: LipschitzMLP([6, 16, 6], context_features=3), (6,), (3,)),
    "convolutions": (lambda: LipschitzConvNet([2, 8, 2]), (2, 5, 5), None),
    "densely connected": (lambda: LipschitzDenseNet(6, [8, 8]), (6,), None),
}

every_replica = pytest.mark.parametrize("label", REPLICATED)


def replicated(label: str) -> tuple[ResidualBlock, Tensor, Tensor | None]:
    build, shape, context = REPLICATED[label]
    block = ResidualBlock(scale_weights(build()), log_det=Exact())
    return block, torch.randn(8, *shape), None if context is None else torch.randn(8, *context)


@every_replica
def test_replicas_compute_what_the_block_computes_and_pass_gradients_on(label):
    block, x, context = replicated(label)

    def there_and_back(model: nn.Module) -> tuple[list[Tensor], list[Tensor | None]]:
        y, volume = model(x, context)
        back, opposite = model.inverse(y.detach(), context)
        loss = y.square().sum() + volume.sum() + back.square().sum() + opposite.sum()
        grads = torch.autograd.grad(loss, list(block.parameters()), allow_unused=True)
        return [y, volume, back, opposite], list(grads)

    values, grads = there_and_back(replicate(block))
    right_values, right_grads = there_and_back(block)
    for found, right in zip(values, right_values, strict=True):
        assert_close(found, right, 1e-6)
    for found, right in zip(grads, right_grads, strict=True):
        assert (found is None) == (right is None)
        if found is not None:
            assert_close(found, right, 1e-4, 1e-5)
    assert any(grad is not None and grad.abs().max() > 0 for grad in grads)


@every_replica
def test_replicas_under_autocast_take_half_inputs_as_the_block_does(label):
    block, x, context = replicated(label)
    half = None if context is None else context.bfloat16()
    replica = replicate(block)
    with torch.autocast("cpu", torch.bfloat16):
        y, volume = replica(x, context)
        right = block(x, context)
        assert_close(y, right[0], 1e-6)
        assert_close(volume, right[1], 1e-6)
        found, right = (model.inverse(y.detach().bfloat16(), half)[0] for model in (replica, block))
    assert found.dtype == right.dtype == torch.float32
    assert_close(found, right, 1e-5)


def test_replicas_in_threads_share_a_batch():
    block, x, _ = replicated("MLP")
    right = block(x)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(replicate(block), rows) for rows in x.chunk(2)]
        parts = [call.result(20) for call in calls]
    for found, wanted in zip(zip(*parts, strict=True), right, strict=True):
        assert_close(torch.cat(found), wanted, 1e-6)


# ------------------------------------------------------------------------------------------- devices without float64


class NoDouble(TorchDispatchMode):
    """Refuses to make a float64 tensor elsewhere than on the CPU, as a device without float64 would."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.dtype == torch.float64 and made.device.type != "cpu":
                raise AssertionError(f"{func} makes float64 on the device")
        return out


def convolutions(*layers: nn.Module):
    return lambda constraint: constrain(nn.Sequential(*copy.deepcopy(layers)), 0.9, constraint)


ON_DEVICE = {
    "MLP": (lambda c: LipschitzMLP([3, 8, 3], constraint=c), (3,), None),
    "MLP with context": (lambda c: LipschitzMLP([3, 8, 3], 2, constraint=c), (3,), (2,)),
    "densely connected": (lambda c: LipschitzDenseNet(3, [8, 8], constraint=c), (3,), None),
    "weight norm": (
        lambda c: constrain(nn.Sequential(weight_norm(nn.Linear(3, 3)), nn.GELU()), 0.9, c),
        (3,),
        None,
    ),
    "nested": (
        lambda c: constrain(
            Chain(
                Sum(nn.Linear(4, 4), Chain(Scale(0.5), nn.Linear(4, 4))),
                Concatenate(nn.Linear(4, 4), nn.Linear(4, 4)),
                LearnableConcatenate(nn.Linear(8, 2), nn.Linear(8, 2)),
                AddContext(nn.Linear(2, 4)),
                nn.Softplus(),
            ),
            0.9,
            c,
        ),
        (4,),
        (2,),
    ),
}
IMAGES_ON_DEVICE = {
    "image": (lambda c: LipschitzConvNet([3, 8, 3], constraint=c), (3, 6, 6), None),
    "one by one": (lambda c: LipschitzConvNet([3, 8, 3], kernels=[1, 1], constraint=c), (3, 6, 6), None),
    "context": (lambda c: LipschitzConvNet([3, 8, 3], context_features=2, constraint=c), (3, 6, 6), (2,)),
    "context image": (lambda c: LipschitzConvNet([3, 8, 3], context_channels=2, constraint=c), (3, 6, 6), (2, 6, 6)),
    "circular": (lambda c: LipschitzConvNet([3, 8, 3], padding_mode="circular", constraint=c), (3, 6, 6), None),
    "densely connected image": (lambda c: LipschitzDenseNet(3, [8], kernel=3, constraint=c), (3, 6, 6), None),
    "stride": (convolutions(nn.Conv2d(2, 4, 3, stride=2), nn.Tanh(), nn.Conv2d(4, 2, (4, 2), (1, 3))), (2, 9, 9), None),
    "groups": (convolutions(nn.Conv2d(4, 8, 3, groups=4), nn.ELU(), nn.Conv2d(8, 4, 1, groups=2)), (4, 6, 6), None),
    "dilation": (convolutions(nn.Conv2d(2, 2, 3, dilation=2, padding="same")), (2, 8, 8), None),
    "signal": (convolutions(nn.Conv1d(2, 2, 3, padding=1), nn.Tanh(), nn.Conv1d(2, 2, 5, stride=2)), (2, 9), None),
    "volume": (convolutions(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Conv3d(2, 1, 2)), (1, 4, 4, 4), None),
}

ALL_ON_DEVICE = [
    pytest.param(*case, kind, id=f"{label}-{kind.__name__}")
    for cases, kinds in ((ON_DEVICE, CONSTRAINTS), (IMAGES_ON_DEVICE, FOR_CONVOLUTIONS))
    for label, case in cases.items()
    for kind in kinds
]


@pytest.mark.parametrize(("build", "shape", "context", "constraint"), ALL_ON_DEVICE)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=name)
def test_no_float64_appears_on_a_device(build, shape, context, constraint, mode):
    """The device "meta" stands for those that have none."""
    net = build(constraint).to("meta")
    x = torch.randn(2, *shape, device="meta")
    row = None if context is None else torch.randn(2, *context, device="meta")
    with mode(), NoDouble():
        at_x = lipschitz.certified_map(net, row).linearise(x)
        tangent = at_x.jvp(x)
        cotangent = at_x.vjp(tangent)
    assert at_x.value.device.type == "meta" and at_x.value.dtype == torch.float32
    assert tangent.shape == at_x.value.shape and cotangent.shape == x.shape


# ------------------------------------------------------------------------------------------- double precision


@every_solver
@every_constraint
def test_float64_stays_float64(solver, constraint):
    block = ResidualBlock(scaled_mlp(4, 8, constraint=constraint), log_det=Exact(), inverse=solver())
    assert torch.get_default_dtype() == torch.float32
    twin = frozen64(block.branch)
    x = torch.randn(6, 4, dtype=torch.float64)
    y, volume = block(x)
    solution = block.solve(y)
    back, opposite = block.inverse(y)
    for made in (y, volume, back, opposite, solution.x, solution.error_bound, block.branch[0].weight):
        assert made.dtype == torch.float64
    assert_close(y, x + twin(x), 1e-14)
    assert_close(volume, log_det(twin, x), 1e-12)
    assert_close(back, x, 1e-12)
    assert_close(-opposite, volume, 1e-11)
    assert (solution.error_bound < 1e-11).all()
    assert certified_by_svd(block.branch) <= block.certificate().value


def test_float64_images_stay_float64():
    block = ResidualBlock(scale_weights(LipschitzConvNet([2, 8, 2])).double(), log_det=Exact())
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    y, volume = block(x)
    back = block.preimage(y)
    assert y.dtype == volume.dtype == back.dtype == torch.float64
    assert_close(y, x + block.branch(x), 1e-14)
    assert_close(volume, log_det(block.branch, x), 1e-12)
    assert_close(back, x, 1e-12)
