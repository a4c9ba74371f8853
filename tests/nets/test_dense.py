"""`LipschitzDenseNet` and its learnable concatenation, for vectors and images."""

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
    Chain,
    Frobenius,
    LearnableConcatenate,
    LipSwish,
    Spectral,
    certified_map,
    lipschitz_bound,
)
from iresflow_plugin.log_det import Exact
from iresflow_plugin.nets import LipschitzDenseNet
from tests.helpers import (
    EVERY_ACTIVATION,
    SMOOTH_ACTIVATIONS,
    assert_close,
    gradients,
    jacobian,
    log_det,
    name,
    scale_weights,
    seeds,
)

SHAPES = {None: (3,), 3: (3, 3, 4)}  # events of 3 features, or of 3 channels


@given(
    seed=seeds,
    growth=st.sampled_from([[4], [4, 2, 6]]),
    kernel=st.sampled_from([None, 3]),
    activation=st.sampled_from([None, *EVERY_ACTIVATION]),
    lipschitz=st.sampled_from([0.1, 0.97]),
    constraint=st.sampled_from([Spectral, AlmostOrthogonal, Frobenius]),
    shares=st.sampled_from([0.0, 5.0, 1e3]),
)
def test_the_bound_is_the_one_asked_for(seed, growth, kernel, activation, lipschitz, constraint, shares):
    torch.manual_seed(seed)
    net = LipschitzDenseNet(3, growth, kernel, activation=activation, lipschitz=lipschitz, constraint=constraint)
    assert lipschitz * (1 - 1e-9) <= certified_map(net).ceiling <= lipschitz
    scale_weights(net, 1e3)
    for part in net:
        if isinstance(part, LearnableConcatenate):
            part.log_shares.data.copy_(shares * torch.randn(2))
            assert (part.eta >= 0).all() and part.eta.double().square().sum() <= 1
    x = torch.randn(4, *SHAPES[kernel])
    assert lipschitz_bound(net).value <= lipschitz
    assert torch.linalg.matrix_norm(jacobian(net, x), ord=2).max() <= lipschitz_bound(net).value * (1 + 1e-6)


def test_every_layer_sees_the_input_and_all_activations():
    net = LipschitzDenseNet(3, [4, 6], activation=LipSwish)
    layers = [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in layers] == [(3, 4), (7, 6), (13, 3)]
    images = LipschitzDenseNet(3, [4, 6], kernel=5)  # SinCos makes two channels of one
    convs = [m for m in images.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in convs] == [(3, 2, 5), (7, 3, 5), (13, 3, 1)]


def test_the_concatenation_weighs_its_parts():
    part = LearnableConcatenate(Chain(), nn.Tanh())
    x = torch.randn(5, 2)
    assert_close(part(x), torch.cat([x, x.tanh()], 1) / 2**0.5, 1e-5)
    part.log_shares.data.copy_(torch.tensor([2 * torch.log(torch.tensor(3.0)), 0.0]))  # 3 to 1
    assert_close(part.eta, torch.tensor([3.0, 1.0]) / 10**0.5, 1e-5)
    g = certified_map(part)
    assert torch.equal(g(x), part(x)) and 0.99 <= g.bound <= g.ceiling == 1
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        part.log_shares.data = torch.randn(2)
        assert part.to(dtype).eta.double().square().sum() <= 1


@pytest.mark.parametrize("kernel, context", [(None, None), (None, "vector"), (3, None), (3, "vector"), (3, "image")])
def test_log_det_inverse_and_every_parameter(kernel, context):
    """Against the dense float64 Jacobian; every parameter gets a finite gradient that is not zero."""
    torch.manual_seed(0)
    options = {None: {}, "vector": {"context_features": 2}, "image": {"context_channels": 2}}[context]
    for activation in [None, *SMOOTH_ACTIVATIONS]:
        net = scale_weights(LipschitzDenseNet(3, [4, 4], kernel, activation=activation, **options)).double()
        x = torch.randn(4, *SHAPES[kernel], dtype=torch.float64)
        c = torch.randn(4, 2, *(SHAPES[3][1:] if context == "image" else ()), dtype=torch.float64) if options else None
        block = ResidualBlock(net, Exact())
        y, value = block(x, c)
        assert_close(value, log_det(net, x, c), 1e-9)
        assert_close(block.inverse(y, c)[0], x, 1e-9)
        assert sum(isinstance(m, AddContext) for m in net.modules()) == (2 if options else 0)
        loss = y.square().flatten(1).sum(1) / 2 - value
        for (label, _), grad in zip(net.named_parameters(), gradients(loss, net), strict=True):
            assert torch.isfinite(grad).all() and grad.abs().max() > 0, label


@pytest.mark.parametrize("kernel", [None, 3])
def test_contraction_survives_adverse_training(kernel):
    torch.manual_seed(0)
    net = LipschitzDenseNet(3, [8, 8], kernel)
    optimiser = torch.optim.Adam(net.parameters(), 0.05)
    x = 3 * torch.randn(16, *SHAPES[kernel])
    for _ in range(60):
        optimiser.zero_grad()
        (-10 * net(x).flatten(1).norm(dim=1).mean()).backward()
        optimiser.step()
    norms = torch.linalg.matrix_norm(jacobian(net, x), ord=2)
    assert 0.1 < norms.max() <= lipschitz_bound(net).value <= 0.97


def test_state_dict_into_a_fresh_model():
    one, other = LipschitzDenseNet(3, [4, 4], 3), LipschitzDenseNet(3, [4, 4], 3)
    scale_weights(one, 20.0)
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 6, 5)
    assert torch.equal(one(x), other(x)) and torch.equal(one.eval()(x), one.train()(x))


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"features": 0}, "features"),
        ({"growth": []}, "growth"),
        ({"growth": [4, 0]}, "growth"),
        ({"kernel": 2}, "kernel"),
        ({"context_channels": 2}, "needs images"),
        ({"context_features": 0}, "context_features"),
        ({"lipschitz": 1.5}, "lipschitz"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, word):
    with pytest.raises(ValueError, match=word):
        LipschitzDenseNet(**{"features": 2, "growth": [4], **arguments})


def test_a_growth_that_is_no_list_is_answered_with_one():
    with pytest.raises(TypeError, match=r"growth must be a list.*\[64, 64\].*got 4"):
        LipschitzDenseNet(2, 4)


@pytest.mark.parametrize("activation", [nn.SELU, nn.LayerNorm(4)], ids=name)
def test_what_cannot_be_certified_is_refused(activation):
    with pytest.raises(NotContractiveError):
        LipschitzDenseNet(2, [4], activation=activation)
    with pytest.raises(NotContractiveError, match="Bjorck"):
        LipschitzDenseNet(2, [4], 3, constraint=Bjorck)
    assert lipschitz_bound(LipschitzDenseNet(2, [4], constraint=Bjorck)).value <= 0.97
