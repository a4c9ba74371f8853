"""`LipschitzMLP`: layers, bounds, contexts, defaults."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from iresflow_plugin import NotContractiveError, ResidualBlock
from iresflow_plugin.lipschitz import (
    AddContext,
    AlmostOrthogonal,
    Bjorck,
    CPila,
    Frobenius,
    LipSwish,
    MaxMin,
    SinCos,
    Sine,
    Spectral,
    certified_map,
    lipschitz_bound,
)
from iresflow_plugin.log_det import Exact
from iresflow_plugin.nets import LipschitzMLP
from tests.helpers import (
    EVERY_ACTIVATION,
    SMOOTH_ACTIVATIONS,
    assert_close,
    certified_by_svd,
    gradients,
    jacobian,
    name,
    scale_weights,
    seeds,
    svd_norm,
)


@given(
    seed=seeds,
    layers=st.sampled_from([[2, 2], [1, 4, 1], [2, 8, 8, 2], [5, 6, 4, 6, 5], [3, 8, 2]]),
    activation=st.sampled_from([None, *EVERY_ACTIVATION]),
    lipschitz=st.sampled_from([0.1, 0.97, 0.999]),
    constraint=st.sampled_from([Spectral, AlmostOrthogonal, Bjorck, Frobenius]),
    context=st.sampled_from([None, 3]),
)
def test_the_bound_is_the_one_asked_for(seed, layers, activation, lipschitz, constraint, context):
    torch.manual_seed(seed)
    if len(layers) == 2:
        context = None
    net = LipschitzMLP(layers, context, activation, lipschitz, constraint)
    assert lipschitz * (1 - 1e-9) <= certified_map(net).ceiling <= lipschitz
    scale_weights(net, 1e3)
    x, c = torch.randn(8, layers[0]), None if context is None else 10 * torch.randn(8, context)
    assert torch.linalg.matrix_norm(jacobian(net, x, c), ord=2).max() <= lipschitz * (1 + 1e-6)
    assert net(x, c).shape == (8, layers[-1])


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_every_layer_gets_the_root_of_the_bound(depth):
    net = scale_weights(LipschitzMLP([3] + [8] * (depth - 1) + [3], activation=nn.Tanh, lipschitz=0.9), 100)
    norms = [svd_norm(layer.weight) for layer in net if isinstance(layer, nn.Linear)]
    assert len(norms) == depth
    for norm in norms:
        assert 0.9 ** (1 / depth) / 1.04 <= norm <= 0.9 ** (1 / depth)


def test_activations_with_constants_above_one_leave_less_for_the_weights():
    """SiLU may steepen by 1.09984: the layers make up for it, and the whole keeps its bound."""
    net = scale_weights(LipschitzMLP([3, 8, 3], activation=nn.SiLU, lipschitz=0.9), 100)
    assert certified_by_svd(net) * 1.09984 <= 0.9
    assert certified_by_svd(net) * 1.09984 >= 0.9 / 1.04**2


def test_no_activation_stands_in_front_of_the_first_layer_or_behind_the_last():
    for activation in (None, Sine, LipSwish):
        net = LipschitzMLP([2, 8, 8, 2], activation=activation)
        assert isinstance(net[0], nn.Linear) and isinstance(net[-1], nn.Linear)
        assert sum(isinstance(layer, nn.Linear) for layer in net) == 3
        assert len(net) == 5


@pytest.mark.parametrize("activation", [SinCos, CPila, MaxMin, Sine, LipSwish, nn.ELU], ids=name)
@pytest.mark.parametrize("width", [6, 8])
def test_hidden_sizes_are_what_the_next_layer_sees(activation, width):
    """One that doubles its features stands behind a layer of half the size."""
    net = LipschitzMLP([2, width, width, 2], activation=activation)
    linear = [layer for layer in net if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in linear] == [2, width, width]
    assert linear[-1].out_features == 2
    assert net(torch.randn(3, 2)).shape == (3, 2)


def test_odd_sizes_with_doubling_activations():
    assert LipschitzMLP([2, 5, 2], activation=SinCos)(torch.randn(3, 2)).shape == (3, 2)
    with pytest.raises(ValueError, match="even"):
        LipschitzMLP([2, 5, 2], activation=MaxMin)


def test_the_default_activation_is_smooth_and_certified():
    net = LipschitzMLP([2, 16, 16, 2])
    acts = [layer for layer in net if not isinstance(layer, nn.Linear)]
    assert all(isinstance(act, SinCos) and act.smooth for act in acts)
    bound = lipschitz_bound(net)
    assert bound.certified and bound.value <= 0.97


# ----------------------------------------------------------------------------------------------------------- contexts


def test_the_context_is_free_and_enters_every_hidden_layer():
    net = LipschitzMLP([3, 8, 8, 3], 2)
    entries = [layer for layer in net if isinstance(layer, AddContext)]
    assert len(entries) == 2
    x, context = torch.randn(5, 3), torch.randn(5, 2)
    for entry in entries:
        before = net(x, context)
        with torch.no_grad():
            entry.network.weight.mul_(100)
        assert not torch.allclose(net(x, context), before, atol=1e-4)
    assert lipschitz_bound(net).value <= 0.97


def test_each_sample_has_its_own_context():
    net = LipschitzMLP([3, 8, 3], 2)
    x, context = torch.randn(5, 3), torch.randn(5, 2)
    alone = torch.cat([net(x[i : i + 1], context[i : i + 1]) for i in range(5)])
    assert_close(net(x, context), alone, 1e-5)
    assert_close(net(x, context[:1]), net(x, context[:1].expand(5, 2)), 1e-6)


def test_events_of_several_rows_do_not_mix_contexts():
    """Batch and event both of size 3: a context row must meet its sample, not a position of the event."""
    net = LipschitzMLP([4, 8, 4], 2)
    x, context = torch.randn(3, 3, 4), torch.randn(3, 2)
    other = context.clone()
    other[0] += 1
    for call in (net, lambda x, c: ResidualBlock(net, Exact())(x, c)[0]):
        changed = (call(x, context) - call(x, other)).abs().amax((1, 2))
        assert changed[0] > 1e-4 and (changed[1:] == 0).all()


def test_a_missing_context_is_named():
    net = LipschitzMLP([3, 8, 3], 2)
    with pytest.raises(ValueError, match="context"):
        net(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"context.*2 features"):
        net(torch.randn(2, 3), torch.randn(2, 4))


def test_an_unconditional_net_ignores_a_context():
    net = LipschitzMLP([3, 8, 3])
    x = torch.randn(2, 3)
    assert torch.equal(net(x, torch.randn(2, 7)), net(x))


# ------------------------------------------------------------------------------------------- learning, and arguments


@pytest.mark.parametrize("activation", [None, *SMOOTH_ACTIVATIONS], ids=name)
@pytest.mark.parametrize("constraint", [Spectral, AlmostOrthogonal, Bjorck, Frobenius], ids=name)
@pytest.mark.parametrize("context", [None, 2])
def test_every_parameter_learns(activation, constraint, context):
    """A likelihood gives every parameter a gradient that is finite and not zero, at the bound and far below it."""
    for factor in (1.0, 20.0):
        net = scale_weights(LipschitzMLP([3, 6, 3], context, activation, constraint=constraint), factor)
        x = torch.randn(32, 3)
        c = None if context is None else torch.randn(32, context)
        y, log_det = ResidualBlock(net, Exact())(x, c)
        for label, grad in zip(
            [k for k, _ in net.named_parameters()], gradients(y.square().sum(1) / 2 - log_det, net), strict=True
        ):
            assert torch.isfinite(grad).all() and grad.abs().max() > 0, label


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"layers": [2]}, "layers"),
        ({"layers": []}, "layers"),
        ({"layers": [2, 0, 2]}, "layers"),
        ({"layers": [2, 3.5, 2]}, "layers"),
        ({"layers": [2, -4, 2]}, "layers"),
        ({"layers": [2, 4, 2], "context_features": 0}, "context_features"),
        ({"layers": [2, 2], "context_features": 3}, "context"),
        ({"layers": [2, 4, 2], "lipschitz": 1.0}, "lipschitz"),
        ({"layers": [2, 4, 2], "lipschitz": 0.0}, "lipschitz"),
        ({"layers": [2, 4, 2], "lipschitz": -0.5}, "lipschitz"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, word):
    with pytest.raises(ValueError, match=word):
        LipschitzMLP(**arguments)


@pytest.mark.parametrize("activation", [nn.SELU, nn.Softmax, nn.LayerNorm(4)], ids=str)
def test_activations_without_a_constant_are_refused(activation):
    with pytest.raises(NotContractiveError):
        LipschitzMLP([2, 4, 2], activation=activation)


def test_misspelt_keywords_are_refused():
    for wrong in ({"coef": 0.5}, {"lipshitz": 0.5}, {"context": 3}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            LipschitzMLP([2, 4, 2], **wrong)


def test_an_activation_may_be_a_function_of_the_number_of_features():
    net = LipschitzMLP([2, 4, 2], activation=lambda features: Sine(features, low=1.0, high=2.0))
    assert net(torch.randn(3, 2)).shape == (3, 2)


def test_a_plain_function_as_activation_is_explained():
    """nflows' own keyword takes a function; whoever passes one here should read what is allowed."""
    with pytest.raises((TypeError, NotContractiveError), match="activation"):
        LipschitzMLP([2, 4, 2], activation=torch.nn.functional.relu)
