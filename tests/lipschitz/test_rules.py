"""From modules to maps: every layer that is known, every part, as torch and autograd see them; what is refused."""

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn

from iresflow_plugin import NotContractiveError, ResidualBlock, lipschitz
from iresflow_plugin.lipschitz import (
    AddContext,
    Chain,
    CLipSwish,
    Concatenate,
    CPila,
    LearnableConcatenate,
    LipSwish,
    MaxMin,
    Part,
    Scale,
    SinCos,
    Sine,
    Sum,
    constrain,
)
from iresflow_plugin.lipschitz.rules import RULES, map_of
from iresflow_plugin.lipschitz.torch_activations import TORCH_ACTIVATIONS
from iresflow_plugin.nets import LipschitzConvNet, LipschitzDenseNet, LipschitzMLP
from tests.helpers import assert_close, jacobian, scale_weights

CIRCULAR = {"padding_mode": "circular"}
LAYERS: dict[type[nn.Module], list[tuple[nn.Module, tuple[int, ...]]]] = {
    nn.Linear: [
        (nn.Linear(4, 3), (4,)),
        (nn.Linear(4, 3, bias=False), (2, 4)),
        (constrain(nn.Linear(3, 5), 0.5), (3,)),
    ],
    nn.Conv1d: [
        (nn.Conv1d(2, 3, 3, padding=1), (2, 6)),
        (nn.Conv1d(5, 2, 3, padding=1), (5, 6)),  # to fewer channels it is computed in another way
        (nn.Conv1d(5, 2, 3, padding=3, dilation=2), (5, 6)),
        (nn.Conv1d(5, 2, 4, padding="same", **CIRCULAR), (5, 7)),
        (nn.Conv1d(4, 6, 2, stride=2, groups=2, bias=False), (4, 7)),
        (constrain(nn.Conv1d(2, 3, 3, padding=2), 0.5), (2, 6)),
    ],
    nn.Conv2d: [
        (nn.Conv2d(2, 3, 3, padding=1), (2, 3, 4)),
        (nn.Conv2d(4, 6, (3, 2), (2, 3), (2, 1), (1, 2), 2), (4, 7, 8)),
        (nn.Conv2d(5, 2, 3), (5, 4, 5)),
        (nn.Conv2d(5, 1, (3, 2), padding=(2, 1), dilation=(1, 2), bias=False), (5, 4, 5)),
        (nn.Conv2d(5, 1, (4, 2), padding="same"), (5, 4, 5)),
        (nn.Conv2d(5, 1, 3, padding=3), (5, 4, 5)),
        (nn.Conv2d(5, 1, 3, padding=(2, 1), **CIRCULAR), (5, 4, 5)),
        (nn.Conv2d(5, 1, 3, stride=2, padding=1), (5, 4, 5)),
        (nn.Conv2d(2, 2, 3, stride=2, padding=(3, 0), **CIRCULAR), (2, 5, 4)),
        (constrain(nn.Conv2d(5, 1, 3, padding=1), 0.5), (5, 4, 5)),
    ],
    nn.Conv3d: [
        (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 2)),
        (nn.Conv3d(3, 1, (1, 2, 3), padding=(0, 1, 1)), (3, 2, 3, 2)),
        (nn.Conv3d(2, 2, 2, stride=(1, 2, 1), groups=2), (2, 2, 3, 2)),
        (constrain(nn.Conv3d(3, 1, 2, padding=1), 0.5), (3, 2, 2, 2)),
    ],
    nn.Sequential: [
        (nn.Sequential(), (3,)),
        (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 2), nn.ELU())), (3,)),
    ],
    nn.Flatten: [
        (nn.Flatten(), (2, 3, 2)),
        (nn.Flatten(2), (2, 3, 2)),
        (nn.Flatten(1, 2), (2, 3, 2)),
        (nn.Flatten(-2), (2, 3, 2)),
        (nn.Flatten(-3, -2), (2, 3, 2)),
    ],
    nn.Unflatten: [
        (nn.Unflatten(1, (2, 3)), (6,)),
        (nn.Unflatten(1, (2, -1, 2)), (8, 2)),
        (nn.Unflatten(2, torch.Size([4])), (2, 4)),
        (nn.Unflatten(-1, (2, 2)), (3, 4)),
        (nn.Unflatten(-2, (3, 1)), (3, 4)),
    ],
    nn.ELU: [(nn.ELU(0.3), (4,)), (nn.ELU(2.5), (4,))],
    nn.Softplus: [(nn.Softplus(beta=0.5), (4,)), (nn.Softplus(beta=3.0, threshold=200.0), (4,))],
    nn.GELU: [(nn.GELU("tanh"), (4,))],
    nn.LeakyReLU: [(nn.LeakyReLU(0.3), (4,)), (nn.LeakyReLU(-2.0), (4,))],
    nn.Hardtanh: [(nn.Hardtanh(-0.3, 1.2), (4,))],
}
for kind in TORCH_ACTIVATIONS:
    LAYERS.setdefault(kind, []).insert(0, (kind(), (2, 3)))

CASES = [
    pytest.param(layer, event, id=f"{kind.__name__}-{i}")
    for kind, cases in LAYERS.items()
    for i, (layer, event) in enumerate(cases)
]


def test_every_rule_has_its_case():
    assert set(LAYERS) == set(RULES)


@pytest.mark.parametrize("layer, event", CASES)
def test_the_map_of_a_layer_is_its_forward_and_its_derivative(layer, event):
    """To round-off, also with extra dimensions in front of tangents and cotangents, and where batches broadcast."""
    layer = copy.deepcopy(layer).double()
    for scale in (0.3, 4.0):  # torch's Softplus changes its formula beyond 20
        x = scale * torch.randn(3, *event, dtype=torch.float64)
        g, value = map_of(layer), layer(x).detach()
        at_x, jac = g.linearise(x), jacobian(layer, x)
        assert g(x).shape == at_x.value.shape == value.shape
        assert_close(g(x), value, 1e-14, 1e-15)
        assert_close(at_x.value, value, 1e-14, 1e-15)
        out = value.shape[1:]
        t, v = torch.randn(2, *x.shape, dtype=torch.float64), torch.randn(2, *value.shape, dtype=torch.float64)
        pushed, pulled = (
            torch.einsum("bij,kbj->kbi", jac, t.flatten(2)),
            torch.einsum("bij,kbi->kbj", jac, v.flatten(2)),
        )
        assert_close(at_x.jvp(t), pushed.view(2, 3, *out), 1e-13, 1e-14)
        assert_close(at_x.vjp(v), pulled.view(2, 3, *event), 1e-13, 1e-14)
        assert_close(at_x.jvp(t[0]), pushed[0].view(3, *out), 1e-13, 1e-14)
        assert_close(at_x.vjp(v[0]), pulled[0].view(3, *event), 1e-13, 1e-14)
        shared = at_x.jvp(t[:, :1]).expand(2, 3, *out)
        assert_close(shared, at_x.jvp(t[:, :1].expand_as(t)), 1e-13, 1e-14)


@pytest.mark.parametrize("layer, event", CASES)
def test_the_map_of_a_layer_keeps_the_gradients_of_its_forward(layer, event):
    """In the inputs and in every parameter."""
    layer = copy.deepcopy(layer).double()
    x = torch.randn(3, *event, dtype=torch.float64).requires_grad_()
    sources = [x, *layer.parameters()]
    weights = torch.randn_like(layer(x))
    found, right = (torch.autograd.grad((weights * value).sum(), sources) for value in (map_of(layer)(x), layer(x)))
    for one, other in zip(found, right, strict=True):
        assert_close(one, other, 1e-12, 1e-13)


@pytest.mark.parametrize("layer, event", CASES)
def test_the_bound_of_a_layer_covers_its_jacobian(layer, event):
    layer = copy.deepcopy(layer).double()
    norms = torch.linalg.matrix_norm(jacobian(layer, torch.randn(5, *event, dtype=torch.float64)), ord=2)
    assert norms.max() <= map_of(layer).bound * (1 + 1e-12)


# -------------------------------------------------------------------------------------------------------------- parts


def swish(x: Tensor, b: Tensor) -> Tensor:
    return x * torch.sigmoid(torch.nn.functional.softplus(b) * x) / 1.1


def pila(x: Tensor) -> Tensor:
    below = ((5 * x) ** 3 / 2 - (5 * x) ** 2 + 5 * x) / 5 * (5 * x).exp()
    return torch.where(x >= 0, x, below)


def weighed(part: LearnableConcatenate, x: Tensor) -> Tensor:
    shares = part.log_shares.softmax(0).sqrt()
    return torch.cat([s * branch(x) for s, branch in zip(shares, part.branches, strict=True)], -1)


# What every part computes, in torch's own words.
PARTS = {
    "Chain": (lambda: Chain(nn.Linear(4, 3), nn.Tanh()), lambda p, x: torch.tanh(p[0](x))),
    "Sum": (lambda: Sum(nn.Linear(4, 3), nn.Linear(4, 3)), lambda p, x: p.branches[0](x) + p.branches[1](x)),
    "Concatenate": (lambda: Concatenate(nn.Tanh(), nn.ELU()), lambda p, x: torch.cat([x.tanh(), p.branches[1](x)], -1)),
    "LearnableConcatenate": (lambda: LearnableConcatenate(nn.Tanh(), nn.Linear(4, 2)), weighed),
    "Scale": (lambda: Scale(-0.3), lambda p, x: -0.3 * x),
    "Sine": (lambda: Sine(4), lambda p, x: torch.sin(p.frequency * x) / p.frequency),
    "SinCos": (
        lambda: SinCos(4),
        lambda p, x: torch.cat([torch.sin(p.frequency * x), torch.cos(p.frequency * x)], -1) / p.frequency.repeat(2),
    ),
    "LipSwish": (lambda: LipSwish(4), lambda p, x: swish(x, p.b)),
    "CLipSwish": (
        lambda: CLipSwish(4),
        lambda p, x: torch.cat([swish(x, p.swish.b), swish(-x, p.swish.b)], -1) / 1.004,
    ),
    "CPila": (lambda: CPila(4), lambda p, x: torch.cat([pila(x - 0.2), pila(-x - 0.2)], -1) / 1.06),
    "MaxMin": (lambda: MaxMin(4), lambda p, x: torch.cat([x.view(-1, 2, 2).amax(1), x.view(-1, 2, 2).amin(1)], -1)),
}
CONDITIONAL = {
    "AddContext": (lambda: AddContext(nn.Linear(2, 4)), lambda p, x, c: x + p.network(c)),
    "Chain": (
        lambda: Chain(AddContext(nn.Linear(2, 4)), nn.Tanh()),
        lambda p, x, c: torch.tanh(x + p[0].network(c)),
    ),
    "Sum": (
        lambda: Sum(AddContext(nn.Linear(2, 4)), nn.Tanh()),
        lambda p, x, c: x + p.branches[0].network(c) + x.tanh(),
    ),
    "Concatenate": (
        lambda: Concatenate(nn.Tanh(), Chain(AddContext(nn.Linear(2, 4)))),
        lambda p, x, c: torch.cat([x.tanh(), x + p.branches[1][0].network(c)], -1),
    ),
    "LearnableConcatenate": (
        lambda: LearnableConcatenate(nn.Tanh(), AddContext(nn.Linear(2, 4))),
        lambda p, x, c: torch.cat([x.tanh(), x + p.branches[1].network(c)], -1) / 2**0.5,
    ),
    "Sequential inside": (
        lambda: Chain(nn.Sequential(AddContext(nn.Linear(2, 4)), nn.Sequential(nn.Tanh()))),
        lambda p, x, c: torch.tanh(x + p[0][0].network(c)),
    ),
}


def test_every_part_has_its_case():
    exported = [getattr(lipschitz, label) for label in lipschitz.__all__]
    parts = {k.__name__ for k in exported if inspect.isclass(k) and issubclass(k, Part)}
    assert parts - {"Part", "Activation"} == set(PARTS) | {"AddContext"}


@pytest.mark.parametrize("label", PARTS)
def test_the_forward_of_a_part_is_the_map_applied(label):
    """Calling it, its map and torch give the same; a context that nobody asks for is ignored."""
    build, by_torch = PARTS[label]
    part = build().double()
    x, context = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    for given in ((), (context,)):
        value = part(x, *given)
        assert torch.equal(value, part.as_map(*given)(x)) and torch.equal(value, map_of(part, *given)(x))
        assert torch.equal(value, nn.Sequential(part)(x))
        assert_close(part.as_map(*given).linearise(x).value, value, 1e-14)
    assert_close(value, by_torch(part, x), 1e-13)


@pytest.mark.parametrize("label", CONDITIONAL)
def test_the_forward_of_a_part_with_a_context_is_the_map_applied(label):
    """And without one it has a bound, but no value."""
    build, by_torch = CONDITIONAL[label]
    part = build().double()
    x, context = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    value = part(x, context)
    assert torch.equal(value, part.as_map(context)(x)) and torch.equal(value, map_of(part, context)(x))
    assert_close(part.as_map(context).linearise(x).value, value, 1e-14)
    assert_close(value, by_torch(part, x, context), 1e-13)
    assert_close(part(x, context[:1]), by_torch(part, x, context[:1].expand(5, 2)), 1e-13)
    assert part.as_map().bound == part.as_map(context).bound
    assert part.as_map().ceiling == part.as_map(context).ceiling == map_of(part).ceiling
    for attempt in (part, part.as_map(), part.as_map().linearise):
        with pytest.raises(ValueError, match="needs a context, but context is None"):
            attempt(x)


NETS = {
    "vectors": (lambda **kw: LipschitzMLP([3, 8, 8, 3], **kw), (3,)),
    "images": (lambda **kw: LipschitzConvNet([2, 8, 2], **kw), (2, 4, 4)),
    "dense": (lambda **kw: LipschitzDenseNet(3, [4, 4], **kw), (3,)),
    "dense images": (lambda **kw: LipschitzDenseNet(2, [4, 4], kernel=3, **kw), (2, 4, 4)),
}


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("label", NETS)
def test_the_forward_of_a_net_is_what_its_block_adds(label, conditional):
    build, event = NETS[label]
    net = scale_weights(build(**({"context_features": 2} if conditional else {})), 5.0).double()
    x, context = torch.randn(4, *event, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    given = (context,) if conditional else ()
    assert torch.equal(ResidualBlock(net)(x, *given)[0], x + net(x, *given))
    assert torch.equal(net(x, *given), net.as_map(*given)(x))


# -------------------------------------------------------------------------------------------------- the batch is apart


@pytest.mark.parametrize(
    "part, words",
    [
        (nn.Flatten(0), r"Flatten at '1'.*start_dim=0.*rows of a batch"),
        (nn.Flatten(0, 1), r"Flatten at '1'.*rows of a batch"),
        (nn.Unflatten(0, (2, 2)), r"Unflatten at '1'.*behind the batch.*dim=0"),
    ],
    ids=str,
)
def test_what_mixes_the_rows_of_a_batch_is_refused(part, words):
    for attempt in (constrain, lipschitz.lipschitz_bound, ResidualBlock):
        with pytest.raises(NotContractiveError, match=words):
            attempt(nn.Sequential(nn.Linear(2, 2), part))


@pytest.mark.parametrize(
    "there, back, width",
    [
        (nn.Flatten(-2), nn.Unflatten(-1, (4, 3)), 12),
        (nn.Unflatten(-2, (2, 2)), nn.Flatten(-3, -2), 3),
    ],
    ids=str,
)
def test_what_counts_from_the_end_does_not_reach_the_batch(there, back, width):
    """Of events of one dimension the last but one is the batch: four rows would become one, or two of two."""
    net = nn.Sequential(there, constrain(nn.Linear(width, width), 0.9), back)
    scale_weights(net, 10.0)
    block = ResidualBlock(net)
    for attempt in (block, block.inverse, block.preimage, block.solve, block.estimate):
        with pytest.raises((RuntimeError, ValueError)):
            attempt(torch.randn(4, 3))


def test_flatten_and_unflatten_go_through_a_block():
    net = nn.Sequential(nn.Flatten(), *LipschitzMLP([12, 16, 12]), nn.Unflatten(1, (3, 2, 2))).double()
    block, x = ResidualBlock(net), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    y, log_det = block(x)
    assert_close(y, x + net(x), 1e-14)
    back, minus = block.inverse(y)
    assert_close(back, x, 1e-12)
    assert_close(minus, -log_det, 1e-10)
    with pytest.raises((RuntimeError, ValueError)):
        block(torch.randn(4, 13, dtype=torch.float64))


@pytest.mark.parametrize("threshold", [1.0, 19.9, -3.0])
def test_softplus_with_a_low_threshold_is_refused(threshold):
    """Where torch's jumps to the identity by more than rounding."""
    with pytest.raises(NotContractiveError, match=rf"Softplus at '0'.*threshold.*{threshold}.*20"):
        lipschitz.lipschitz_bound(nn.Sequential(nn.Softplus(threshold=threshold)))
