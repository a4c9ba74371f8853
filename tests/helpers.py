"""Oracles that share no code with what they judge (dense Jacobians, SVDs, Newton solves), and nets to try them on.

The nets are scaled against their bound: freshly built ones have tiny Jacobians, on which every wrong value passes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from iresflow_plugin.lipschitz import (
    ACTIVATIONS,
    Activation,
    AddContext,
    Chain,
    Concatenate,
    LearnableConcatenate,
    LipSwish,
    Scale,
    SinCos,
    Sine,
    Sum,
    constrain,
)
from iresflow_plugin.lipschitz.torch_activations import TORCH_ACTIVATIONS
from iresflow_plugin.nets import LipschitzMLP

OURS = list(ACTIVATIONS.values())
TORCHS = [kind for kind in TORCH_ACTIVATIONS if kind is not nn.Identity]
EVERY_ACTIVATION = OURS + TORCHS
SMOOTH_ACTIVATIONS = [k for k in OURS if k.smooth] + [k for k in TORCHS if TORCH_ACTIVATIONS[k].smooth]

EPS = {torch.float32: torch.finfo(torch.float32).eps, torch.float64: torch.finfo(torch.float64).eps}

# Four times the examples of the profile, for checks that cost microseconds.
thorough = settings(max_examples=4 * settings.default.max_examples)

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from([torch.float32, torch.float64])


def name(kind: object) -> str:
    """A readable pytest id."""
    return getattr(kind, "__name__", None) or str(kind)


# ---------------------------------------------------------------------------------------------- nets


def gentle_sine(features: int, spatial_dims: int = 0) -> Sine:
    """A sine whose Jacobian is smooth enough for finite differences."""
    return Sine(features, spatial_dims, low=0.5, high=3.0)


def activation_for(kind: type[nn.Module], features: int) -> nn.Module:
    """An activation that takes `features` features."""
    return kind(features) if issubclass(kind, Activation) else kind()


def raw_weights(module: nn.Module) -> list[nn.Parameter]:
    """The free parameters behind all constrained weights."""
    return [
        part.parametrizations.weight.original
        for part in module.modules()
        if parametrize.is_parametrized(part, "weight")
    ]


@torch.no_grad()
def scale_weights(module: nn.Module, factor: float = 5.0) -> nn.Module:
    """Push every constrained weight against its bound, as adversarial training would."""
    for weight in raw_weights(module):
        weight.mul_(factor)
    return module


def scaled_mlp(
    size: int,
    width: int = 8,
    activation: nn.Module | Callable[..., nn.Module] = Sine,
    lipschitz: float = 0.97,
    context_features: int | None = None,
    factor: float = 5.0,
    dtype: torch.dtype = torch.float64,
    hidden: int = 2,
    **options: object,
) -> LipschitzMLP:
    """An MLP whose weights are `factor` times their fresh values, so that the constraints bind."""
    net = LipschitzMLP([size, *[width] * hidden, size], context_features, activation, lipschitz, **options)
    return scale_weights(net, factor).to(dtype)


@torch.no_grad()
def align(net: nn.Module, sign: float = -1.0) -> nn.Module:
    """Make all layers stretch the same directions, and the last one turn them: Jacobians near -L, large log-dets.

    Random weights cancel; only an adversary, or training, makes the certified bound bite.
    """
    weights = raw_weights(net)
    for weight in weights:
        weight.copy_(10 * torch.eye(*weight.shape) + torch.randn(weight.shape) / weight.shape[1])
    weights[-1].mul_(sign)
    return net


def linear_branch(
    matrix: Tensor, lipschitz: float, bias: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """x -> c W x + b with |c W|_2 as close to `lipschitz` as the constraint allows; W orthogonal makes it hardest."""
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(10 * matrix)
        layer.bias.copy_(torch.zeros(matrix.shape[0]) if bias is None else bias)
    return constrain(nn.Sequential(layer), lipschitz).to(dtype)


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]


@st.composite
def branches(draw: st.DrawFn, activations: list = EVERY_ACTIVATION, context_features: int = 2) -> tuple[nn.Module, int]:
    """A nested branch of Sum, Concatenate, Scale, Chain, contexts and any activations, scaled; with its size D."""
    size = draw(st.integers(1, 5))

    def tree(depth: int) -> nn.Module:
        kind = draw(st.sampled_from(["dense", "sum", "concatenate", "scale"] if depth else ["dense"]))
        if kind == "sum":
            return Sum(tree(depth - 1), tree(depth - 1))
        if kind == "concatenate":
            return Chain(Concatenate(tree(depth - 1), tree(depth - 1)), nn.Linear(2 * size, size))
        if kind == "scale":
            return Chain(Scale(draw(st.sampled_from([-2.0, 0.5]))), tree(depth - 1))
        width = draw(st.sampled_from([2, 6]))
        act = activation_for(draw(st.sampled_from(activations)), width)
        parts: list[nn.Module] = [nn.Linear(size, width), act, nn.Linear(width * getattr(act, "expansion", 1), size)]
        if draw(st.booleans()):
            parts.insert(1, AddContext(nn.Linear(context_features, width)))
        return Chain(*parts)

    torch.manual_seed(draw(seeds))
    lipschitz = draw(st.sampled_from([0.3, 0.9, 0.99]))
    branch = constrain(Chain(tree(draw(st.integers(0, 2)))), lipschitz)
    scale_weights(branch, draw(st.sampled_from([1.0, 5.0, 100.0])))
    return branch.to(draw(dtypes)), size


# ------------------------------------------------------------------------------------------- oracles


def svd_norm(matrix: Tensor) -> float:
    """|W|_2 by a singular value decomposition in float64."""
    return torch.linalg.svdvals(matrix.detach().double().flatten(1))[0].item()


def operator_matrix(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The float64 matrix of a convolution on images of this shape (channels, *sizes), from the module itself."""
    size = torch.Size(shape).numel()
    identity = torch.eye(size, dtype=layer.weight.dtype).view(size, *shape)
    bias, layer.bias = layer.bias, None
    with torch.no_grad():
        columns = layer(identity).double().flatten(1)
    layer.bias = bias
    return columns.mT


def frozen64(branch: nn.Module) -> nn.Module:
    """A float64 copy without constraints that holds the very numbers `branch` uses now.

    (`copy.deepcopy(branch).double()` would compute its weights and frequencies anew, with the margins of float64.)
    """
    holder = nn.ModuleList([copy.deepcopy(branch)])
    for parent in list(holder.modules()):
        for label, child in list(parent.named_children()):
            setattr(parent, label, _frozen(child))
    return holder[0].double()


@torch.no_grad()
def _frozen(part: nn.Module) -> nn.Module:
    if isinstance(part, nn.Linear):
        plain = nn.Linear(part.in_features, part.out_features, part.bias is not None)
        plain.weight.data = part.weight.detach().clone()
        if part.bias is not None:
            plain.bias.data = part.bias.detach().clone()
        return plain
    if isinstance(part, (Sine, SinCos)):
        part.log_frequency.data = part.frequency.double().log()
    if isinstance(part, LipSwish):
        part.b.data = torch.nn.functional.softplus(part.b).double().expm1().log()
    if isinstance(part, AddContext):
        return AddContext(_AsItIs(part.network))
    if isinstance(part, LearnableConcatenate):
        scaled = [Chain(branch, Scale(e)) for branch, e in zip(part, part.eta.tolist(), strict=True)]
        return Concatenate(*scaled, dim=part.dim)
    return part


class _AsItIs(nn.Module):
    """A network of the context in its own precision: the block takes the numbers that it gives."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.hidden = [network]  # not converted with the rest

    def forward(self, context: Tensor) -> Tensor:
        network = self.hidden[0]
        return network(context.to(next(network.parameters()).dtype)).double()


def call(branch: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
    """The branch as the plain module that it is, without `Map`s."""
    return branch(x) if context is None else branch(x, context)


def jacobian(branch: nn.Module, x: Tensor, context: Tensor | None = None, create_graph: bool = False) -> Tensor:
    """dg/dx of every sample by reverse mode through the plain module, shape (B, D, D), in the dtype of x."""
    with torch.enable_grad():
        if not (create_graph and x.requires_grad):
            x = x.detach().requires_grad_()
        out = call(branch, x, context).flatten(1)
        rows = [
            torch.autograd.grad(out[:, i].sum(), x, create_graph=create_graph, retain_graph=True)[0].flatten(1)
            for i in range(out.shape[1])
        ]
        return torch.stack(rows, 1)


def log_det(branch: nn.Module, x: Tensor, context: Tensor | None = None, create_graph: bool = False) -> Tensor:
    """log det(I + J) from the dense Jacobian; the sign must be positive."""
    jac = jacobian(branch, x, context, create_graph)
    sign, value = torch.linalg.slogdet(torch.eye(jac.shape[-1], dtype=jac.dtype) + jac)
    assert (sign > 0).all()
    return value


def inverse64(branch64: nn.Module, y: Tensor, context: Tensor | None = None) -> Tensor:
    """x with x + g(x) = y in float64: Newton steps with the dense Jacobian as long as they help, and checked."""
    y = y.double()
    context = None if context is None else context.double()

    def residual(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            r = y - x - call(branch64, x, context)
        return r, r.flatten(1).norm(dim=1)

    x, idle = y, torch.zeros(len(y))
    r, size = residual(x)
    for _ in range(300):
        jac = jacobian(branch64, x, context)
        eye = torch.eye(jac.shape[-1], dtype=torch.float64)
        newton = torch.linalg.solve(eye + jac, r.flatten(1)[..., None])[..., 0].view_as(x)
        for step in (newton, r):  # the plain step always helps, down to round-off
            r_new, size_new = residual(x + step)
            better = size_new < size
            wide = better.view(-1, *[1] * (x.ndim - 1))
            x, r, size = torch.where(wide, x + step, x), torch.where(wide, r_new, r), torch.minimum(size, size_new)
            idle = torch.where(better, 0, idle + 1)
        if (idle >= 4).all():
            break
    assert (size <= 1e-13 * (1 + x.flatten(1).norm(dim=1))).all()
    return x


def power_sum(jac: Tensor, terms: int) -> Tensor:
    """sum_{k=1}^terms (-1)^(k+1) tr(J^k) / k, shape (B,)."""
    power, total = torch.eye(jac.shape[-1], dtype=jac.dtype).expand_as(jac), jac.new_zeros(jac.shape[0])
    for k in range(1, terms + 1):
        power = power @ jac
        total = total + (-1) ** (k + 1) / k * power.diagonal(dim1=1, dim2=2).sum(1)
    return total


def certified_by_svd(branch: nn.Module) -> float:
    """The product of the layers' float64 norms: the bound of a chain with 1-Lipschitz activations."""
    product = 1.0
    for part in branch.modules():
        if isinstance(part, nn.Linear) and parametrize.is_parametrized(part, "weight"):
            product *= svd_norm(part.weight)
    return product


def kept_entries(run: Callable[[], object], *given: Tensor) -> int:
    """Entries that `run` leaves for a backward pass: of every storage once, and not of what was there before."""
    before = {t.untyped_storage().data_ptr() for t in given}
    kept: list[Tensor] = []  # alive, so that no address comes twice

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // t.element_size() for t in kept}
    assert result is not None  # and its graph, alive until here
    return sum(size for address, size in sizes.items() if address not in before)


def gradients(outputs: Tensor, module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Gradients of sum(outputs) with respect to inputs and all parameters, zero where there is none."""
    wanted = [*inputs, *module.parameters()]
    found = torch.autograd.grad(outputs.sum(), wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


def assert_close(actual: Tensor, expected: Tensor, relative: float, absolute: float = 0.0) -> None:
    """Largest difference at most relative * largest entry + absolute."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.numel():
        return
    error = (actual.double() - expected.double()).abs().max().item()
    allowed = relative * expected.double().abs().max().item() + absolute
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def assert_slope(value: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor, tolerance: float) -> None:
    """autograd's derivative of value along a direction is that of central differences, to 1e-4 or `tolerance`."""
    (grad,) = torch.autograd.grad(value(at), at)
    with torch.no_grad():
        h = 1e-6
        slope = (value(at + h * direction) - value(at - h * direction)) / (2 * h)
    assert (grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4, abs=tolerance)


@torch.no_grad()
def shift(tensors: list[Tensor], directions: list[Tensor], h: float) -> None:
    """tensors += h directions, in place."""
    for tensor, direction in zip(tensors, directions, strict=True):
        tensor.add_(h * direction)


def assert_second_derivatives(value: Callable[[], Tensor], tensors: list[Tensor], relative: float = 1e-5) -> None:
    """Of every pair of these tensors: a slope of the gradient, by autograd, is that of central differences."""
    directions, weights = ([torch.randn_like(t) for t in tensors] for _ in range(2))

    def gradient(create_graph: bool) -> Tensor:
        """Along the weights."""
        found = torch.autograd.grad(value(), tensors, create_graph=create_graph, materialize_grads=True)
        return sum((g * w).sum() for g, w in zip(found, weights, strict=True))

    h, largest = 1e-5, 0.0
    for tensor, direction, ours in zip(
        tensors, directions, torch.autograd.grad(gradient(True), tensors, materialize_grads=True), strict=True
    ):
        shift([tensor], [direction], h)
        up = gradient(False)
        shift([tensor], [direction], -2 * h)
        slope = ((up - gradient(False)) / (2 * h)).item()
        shift([tensor], [direction], h)
        found = (ours * direction).sum().item()
        assert found == pytest.approx(slope, rel=relative, abs=1e-6), tuple(tensor.shape)
        largest = max(largest, abs(slope))
    assert largest > 1e-3, "nothing to be seen"
