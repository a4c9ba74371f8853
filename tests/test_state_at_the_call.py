"""Gradients belong to the call: to the parameters, the flags and the autocast with which the block was called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

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
    Sine,
    Sum,
    constrain,
)
from iresflow_plugin.log_det import Exact, Orthogonal, PowerSeries, RussianRoulette
from iresflow_plugin.nets import LipschitzConvNet, LipschitzDenseNet, LipschitzMLP
from tests.helpers import assert_close, gentle_sine, scale_weights

# ---------------------------------------------------------------------------------------------- nets, and ways to call


@dataclass
class Net:
    make: Callable[[], nn.Module]
    event: tuple[int, ...] = (2,)
    context: tuple[int, ...] | None = None


def tree() -> nn.Module:
    wide = Chain(Concatenate(nn.Linear(2, 2), Chain(nn.Linear(2, 3), nn.Tanh())), nn.Linear(5, 2))
    return constrain(Chain(Sum(wide, Chain(Scale(0.5), nn.Linear(2, 2))), gentle_sine(2)), 0.9)


mlp = partial(LipschitzMLP, [2, 6, 2], lipschitz=0.9)
conv = partial(LipschitzConvNet, [1, 4, 1], lipschitz=0.9)

VECTORS = {
    "mlp": Net(mlp),
    "sine": Net(partial(mlp, activation=Sine)),
    "lipswish": Net(partial(mlp, activation=LipSwish)),
    "tanh": Net(partial(mlp, activation=nn.Tanh)),
    "elu": Net(partial(mlp, activation=nn.ELU)),
    "almost-orthogonal": Net(partial(mlp, constraint=AlmostOrthogonal)),
    "bjorck": Net(partial(mlp, constraint=Bjorck)),
    "frobenius": Net(partial(mlp, constraint=Frobenius)),
    "dense": Net(partial(LipschitzDenseNet, 2, [4, 4], lipschitz=0.9)),
    "tree": Net(tree),
    "context": Net(partial(mlp, context_features=2), context=(2,)),
}
IMAGES = {
    "conv": Net(conv, (1, 4, 4)),
    "conv-tanh": Net(partial(LipschitzConvNet, [2, 4, 2], lipschitz=0.9, activation=nn.Tanh), (2, 3, 3)),
    "conv-frobenius": Net(partial(conv, constraint=Frobenius), (1, 3, 3)),
    "conv-dense": Net(partial(LipschitzDenseNet, 1, [4], kernel=3, lipschitz=0.9), (1, 3, 3)),
    "conv-context": Net(partial(conv, context_features=2), (1, 3, 3), (2,)),
    "conv-context-image": Net(partial(conv, context_channels=1), (1, 3, 3), (1, 3, 3)),
}
NETS = VECTORS | IMAGES

series = lambda size: PowerSeries(terms=40, probes=Orthogonal(size))  # noqa: E731
WAYS: dict[str, tuple[str, Callable, object]] = {
    "forward, Exact": ("forward", lambda size: Exact(), None),
    "forward, Exact in chunks": ("forward", lambda size: Exact(chunk=1), None),
    "forward, PowerSeries": ("forward", series, None),
    "forward, RussianRoulette": ("forward", lambda size: RussianRoulette(), None),
    "inverse, Exact": ("inverse", lambda size: Exact(), None),
    "inverse, Exact in chunks": ("inverse", lambda size: Exact(chunk=1), None),
    "inverse, PowerSeries": ("inverse", series, None),
    "preimage, FixedPoint": ("preimage", series, FixedPoint()),
    "preimage, Anderson": ("preimage", series, Anderson()),
    "preimage, Newton": ("preimage", series, Newton()),
}
every_net = pytest.mark.parametrize("net", NETS)
every_way = pytest.mark.parametrize("way", WAYS)


class Loss(nn.Module):
    """A number made of what a block gives when it is called in this way, a different weight for every sample."""

    def __init__(self, net: str, way: str, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.way, estimator, solver = WAYS[way]
        branch = scale_weights(NETS[net].make(), 5.0).to(dtype)
        self.block = ResidualBlock(branch, estimator(torch.Size(NETS[net].event).numel()), solver)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        torch.manual_seed(1)  # the same probes every time
        out = getattr(self.block, self.way)(x, context)
        point, value = out if isinstance(out, tuple) else (out, 0.0)
        weights = torch.arange(1, len(x) + 1, dtype=x.dtype).cos()
        return (weights * (point.square().flatten(1).sum(1) / 2 - value)).sum()


def inputs_of(net: str, batch: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
    shapes = NETS[net].event, NETS[net].context
    x, context = [None if s is None else torch.randn(batch, *s, dtype=dtype).requires_grad_() for s in shapes]
    return x, context


def without_none(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def slopes(loss: Tensor, wanted: list[Tensor], keep: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(loss, wanted, retain_graph=keep, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


def assert_same(found: list[Tensor], right: list[Tensor], relative: float = 1e-8) -> None:
    largest = max(r.abs().max().item() for r in right)
    for one, other in zip(found, right, strict=True):
        assert_close(one, other, relative, relative * largest)


# ----------------------------------------------------------------------------------------------------- other parameters


def moved(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are far from the module's own."""
    return {k: (0.7 * p + 0.4 * torch.randn_like(p)).detach() for k, p in model.named_parameters()}


def own_gradients(model: nn.Module, x: Tensor, context: Tensor | None) -> list[Tensor]:
    return slopes(model(x, context), [*model.parameters(), *without_none(x, context)])


@every_net
@every_way
def test_functional_call_has_the_gradients_of_the_parameters_it_was_given(net, way):
    """As a twin has that holds them: of autograd for leaves, and of torch.func.grad."""
    model, (x, context) = Loss(net, way), inputs_of(net)
    others = moved(model)
    twin = copy.deepcopy(model)
    twin.load_state_dict(others)
    right = own_gradients(twin, x, context)
    wrong = own_gradients(model, x, context)
    assert any((r - w).abs().max() > 0.1 * r.abs().max() for r, w in zip(right, wrong, strict=True))

    leaves = {k: p.clone().requires_grad_() for k, p in others.items()}
    loss = functional_call(model, leaves, (x, context))
    assert_same(slopes(loss, [*leaves.values(), *without_none(x, context)]), right)

    found = torch.func.grad(lambda p: functional_call(model, p, (x, context)))(others)
    assert_same([found[k].detach() for k in others], right[: len(others)])


@every_way
@pytest.mark.parametrize("net", ["mlp", "dense", "context", "conv", "conv-context"])
def test_functional_call_with_some_parameters_mixes_them_with_the_modules_own(net, way):
    model, (x, context) = Loss(net, way), inputs_of(net)
    others = {k: p for k, p in moved(model).items() if not k.endswith("original")}
    twin = copy.deepcopy(model)
    twin.load_state_dict({**model.state_dict(), **others})
    own = dict(model.named_parameters())
    mixed = {k: others[k].clone().requires_grad_() if k in others else p for k, p in own.items()}
    loss = functional_call(model, {k: mixed[k] for k in others}, (x, context))
    assert_same(slopes(loss, [*mixed.values(), *without_none(x, context)]), own_gradients(twin, x, context))


@every_way
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_functional_call_gives_the_module_itself_no_gradient(net, way):
    model, (x, context) = Loss(net, way), inputs_of(net)
    leaves = {k: p.requires_grad_() for k, p in moved(model).items()}
    functional_call(model, leaves, (x, context)).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for k, p in leaves.items() if k.endswith("original"))


@every_way
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_two_functional_calls_in_one_loss_keep_their_own_parameters(net, way):
    """Whichever backward pass comes later than the other call."""
    model, (x, context) = Loss(net, way), inputs_of(net)
    sets = [{k: p.requires_grad_() for k, p in moved(model).items()} for _ in range(2)]
    both = functional_call(model, sets[0], (x, context)) + 2 * functional_call(model, sets[1], (x, context))
    found = slopes(both, [*sets[0].values(), *sets[1].values()])
    apart = [slopes(functional_call(model, s, (x, context)), list(s.values())) for s in sets]
    twins = [copy.deepcopy(model) for _ in sets]
    for twin, s in zip(twins, sets, strict=True):
        twin.load_state_dict(s)
    own = [slopes(twin(x, context), list(twin.parameters())) for twin in twins]
    assert_same(found, [*own[0], *[2 * g for g in own[1]]])
    assert_same([*apart[0], *apart[1]], [*own[0], *own[1]])


@every_way
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_weights_of_a_hypernetwork_pass_the_gradient_on(net, way):
    model, (x, context) = Loss(net, way), inputs_of(net)
    factors = {k: torch.ones((), dtype=torch.float64, requires_grad=True) for k, _ in model.named_parameters()}
    others = moved(model)
    found = slopes(
        functional_call(model, {k: factors[k] * p for k, p in others.items()}, (x, context)), [*factors.values()]
    )
    twin = copy.deepcopy(model)
    twin.load_state_dict(others)
    own = slopes(twin(x, context), list(twin.parameters()))
    assert_same(found, [(g * p).sum() for g, p in zip(own, others.values(), strict=True)])


# -------------------------------------------------------------------------------------------------------- edits between


def assert_refused_or_as_before(loss: Tensor, wanted: list[Tensor], edit: Callable[[], object]) -> None:
    """After the edit either torch refuses the backward pass, or it gives what it gave before."""
    right = slopes(loss, wanted, keep=True)
    with torch.no_grad():
        edit()
    try:
        found = slopes(loss, wanted)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert_same(found, right)


@every_net
@every_way
def test_an_edited_parameter_is_refused_or_does_not_matter(net, way):
    """One parameter after the other, each edited in place between the forward and the backward pass."""
    model, (x, context) = Loss(net, way), inputs_of(net)
    wanted = [*model.parameters(), *without_none(x, context)]
    for label, parameter in model.named_parameters():
        before = parameter.detach().clone()
        edit = partial(parameter.add_, 0.7) if parameter.ndim < 2 or "log_" in label else parameter.neg_
        assert_refused_or_as_before(model(x, context), wanted, edit)
        with torch.no_grad():
            parameter.copy_(before)


@every_way
@pytest.mark.parametrize("net", ["mlp", "tanh", "dense", "context", "conv", "conv-context", "conv-context-image"])
def test_an_edited_input_or_context_is_refused_or_does_not_matter(net, way):
    model, (x, context) = Loss(net, way), inputs_of(net)
    wanted = [*model.parameters(), *without_none(x, context)]
    for tensor in without_none(x, context):
        assert_refused_or_as_before(model(x, context), wanted, lambda tensor=tensor: tensor.mul_(-2))


@every_way
@pytest.mark.parametrize("net", ["mlp", "lipswish", "context", "conv"])
@pytest.mark.parametrize("kind", ["optimiser", "load_state_dict", "everything halved"])
def test_a_step_of_training_between_is_refused_or_does_not_matter(net, way, kind):
    model, (x, context) = Loss(net, way), inputs_of(net)
    wanted = [*model.parameters(), *without_none(x, context)]
    others = moved(model)

    def step() -> None:
        if kind == "load_state_dict":
            model.load_state_dict(others)
        elif kind == "everything halved":
            for p in model.parameters():
                p.mul_(0.5)
        else:
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            torch.optim.Adam(model.parameters(), 0.3).step()

    assert_refused_or_as_before(model(x, context), wanted, step)


@every_way
@pytest.mark.parametrize("net", ["tanh", "conv-tanh"])
def test_an_edit_of_small_weights_is_refused_or_does_not_matter(net, way):
    """Below its bound a weight is used as it is."""
    model, (x, context) = Loss(net, way), inputs_of(net)
    scale_weights(model, 0.02)
    wanted = [*model.parameters(), *without_none(x, context)]
    assert_refused_or_as_before(model(x, context), wanted, lambda: scale_weights(model, -3.0))


@every_way
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_other_calls_between_do_not_matter(net, way):
    """Of the same block, with other parameters, other inputs, and without gradients."""
    model, (x, context) = Loss(net, way), inputs_of(net)
    wanted = [*model.parameters(), x]
    loss = model(x, context)
    right = slopes(loss, wanted, keep=True)
    functional_call(model, moved(model), (x, context))
    with torch.no_grad():
        model(2 * x, context)
    model(3 * x, context).backward()
    assert_same(slopes(loss, wanted), right, 1e-12)


# ----------------------------------------------------------------------------------------------------- freezing between


@contextmanager
def frozen(parameters: list[nn.Parameter]):
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(False)
    yield
    for p, flag in zip(parameters, before, strict=True):
        p.requires_grad_(flag)


@every_net
@every_way
def test_freezing_the_parameters_between_changes_no_gradient_of_the_inputs(net, way):
    model, (x, context) = Loss(net, way), inputs_of(net)
    wanted = without_none(x, context)
    right = slopes(model(x, context), wanted)
    loss = model(x, context)
    with frozen(list(model.parameters())):
        found = slopes(loss, wanted)
    assert_same(found, right, 1e-12)


@every_way
@pytest.mark.parametrize("net", ["mlp", "tanh", "dense", "context", "conv", "conv-context"])
def test_thawing_the_parameters_between_changes_no_gradient_of_the_inputs(net, way):
    model, (x, context) = Loss(net, way), inputs_of(net)
    wanted = without_none(x, context)
    right = slopes(model(x, context), wanted)
    with frozen(list(model.parameters())):
        loss = model(x, context)
    assert_same(slopes(loss, wanted), right, 1e-12)


@every_way
@pytest.mark.parametrize("net", ["mlp", "tanh", "dense", "context", "conv", "conv-context"])
def test_freezing_some_parameters_between_changes_no_gradient_of_the_others(net, way):
    model, (x, context) = Loss(net, way), inputs_of(net)
    weights = [p for k, p in model.named_parameters() if k.endswith("original")]
    others = [p for k, p in model.named_parameters() if not k.endswith("original")]
    right = slopes(model(x, context), others)
    loss = model(x, context)
    with frozen(weights):
        found = slopes(loss, others)
    assert_same(found, right, 1e-12)


# ----------------------------------------------------------------------------------------------------- autocast between


def under_autocast(model: nn.Module, x: Tensor, context: Tensor | None, forward: bool, backward: bool) -> list[Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=forward):
        loss = model(x, context)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward):
        return slopes(loss, [*model.parameters(), *without_none(x, context)])


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Of all gradients together, relative to the other's length."""
    flat = [torch.cat([t.double().flatten() for t in gradients]) for gradients in (one, other)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


@every_way
@pytest.mark.parametrize("net", ["mlp", "sine", "dense", "context", "conv", "conv-dense", "conv-context-image"])
@pytest.mark.parametrize("on", [True, False])
def test_gradients_are_those_of_the_autocast_of_the_forward_pass(on, net, way):
    """Numbers near 100 and waves of many radians: rounded to eight bits, they are at another point of the wave."""
    model, (x, context) = Loss(net, way, torch.float32), inputs_of(net, dtype=torch.float32)
    with torch.no_grad():
        x.mul_(100)
    throughout = under_autocast(model, x, context, forward=on, backward=on)
    found = under_autocast(model, x, context, forward=on, backward=not on)
    assert distance(under_autocast(model, x, context, not on, not on), throughout) > 0.03
    assert distance(found, throughout) < 0.01  # torch itself rounds some products of the backward pass where it is on
