"""`LipschitzConvNet`: layers, bounds, contexts; its block against dense Jacobians; image flows in both hosts."""

import math

import normflows as nf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform
from torch import nn

from iresflow_plugin import NotContractiveError, ResidualBlock, using
from iresflow_plugin.adapters.nflows import ResidualTransform
from iresflow_plugin.adapters.normflows import ResidualFlow
from iresflow_plugin.lipschitz import (
    AddContext,
    AlmostOrthogonal,
    Bjorck,
    Frobenius,
    LipSwish,
    Spectral,
    certified_map,
    lipschitz_bound,
)
from iresflow_plugin.log_det import Exact, PowerSeries, RussianRoulette
from iresflow_plugin.nets import LipschitzConvNet
from iresflow_plugin.testing import check_transform
from iresflow_plugin.testing import scale_weights as scale_kernels
from iresflow_plugin.testing.strategies import events, image_branches
from tests.helpers import (
    EVERY_ACTIVATION,
    SMOOTH_ACTIVATIONS,
    assert_close,
    gentle_sine,
    gradients,
    jacobian,
    log_det,
    name,
    operator_matrix,
    raw_weights,
    scale_weights,
    seeds,
)


def convolutions(net: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in net if isinstance(layer, nn.Conv2d)]


@given(
    seed=seeds,
    channels=st.sampled_from([[1, 1], [1, 4, 1], [2, 4, 6, 2], [3, 2]]),
    activation=st.sampled_from([None, *EVERY_ACTIVATION]),
    lipschitz=st.sampled_from([0.1, 0.97]),
    constraint=st.sampled_from([Spectral, AlmostOrthogonal, Frobenius]),
    context=st.sampled_from([None, "vector", "image"]),
    mode=st.sampled_from(["zeros", "circular"]),
)
def test_the_bound_is_the_one_asked_for(seed, channels, activation, lipschitz, constraint, context, mode):
    torch.manual_seed(seed)
    options = {"vector": {"context_features": 3}, "image": {"context_channels": 2}}.get(context, {})
    if len(channels) == 2:
        options = {}
    net = LipschitzConvNet(
        channels, activation=activation, lipschitz=lipschitz, constraint=constraint, padding_mode=mode, **options
    )
    assert lipschitz * (1 - 1e-9) <= certified_map(net).ceiling <= lipschitz
    scale_weights(net, 1e3)
    x = torch.randn(3, channels[0], 3, 4)
    c = None if not options else 10 * torch.randn(3, *([3] if context == "vector" else [2, 3, 4]))
    assert torch.linalg.matrix_norm(jacobian(net, x, c), ord=2).max() <= lipschitz * (1 + 1e-6)
    assert net(x, c).shape == (3, channels[-1], 3, 4)


def test_layers():
    net = LipschitzConvNet([2, 8, 6, 2], activation=LipSwish)
    assert [(c.in_channels, c.out_channels, c.kernel_size) for c in convolutions(net)] == [
        (2, 8, (3, 3)),
        (8, 6, (1, 1)),
        (6, 2, (3, 3)),
    ]
    assert isinstance(net[0], nn.Conv2d) and isinstance(net[-1], nn.Conv2d) and len(net) == 5
    doubled = LipschitzConvNet([2, 8, 2])  # SinCos makes two features of one
    assert [(c.in_channels, c.out_channels) for c in convolutions(doubled)] == [(2, 4), (8, 2)]
    assert [c.kernel_size[0] for c in convolutions(LipschitzConvNet([1, 2, 2, 1], [5, 3, 1]))] == [5, 3, 1]


def test_every_layer_gets_the_root_of_the_bound():
    net = scale_weights(LipschitzConvNet([2, 4, 4, 2], activation=nn.Tanh, lipschitz=0.9), 100)
    shapes = [(c.in_channels, 16, 16) for c in convolutions(net)]
    for layer, shape in zip(convolutions(net), shapes, strict=True):
        norm = torch.linalg.matrix_norm(operator_matrix(layer, shape), ord=2)
        assert 0.9 ** (1 / 3) / 1.06 <= norm <= 0.9 ** (1 / 3)


def test_a_context_vector_shifts_channels_and_a_context_image_pixels():
    x, vector, image = torch.randn(4, 2, 5, 6), torch.randn(4, 3), torch.randn(4, 3, 5, 6)
    by_vector = LipschitzConvNet([2, 8, 8, 2], context_features=3)
    by_image = LipschitzConvNet([2, 8, 8, 2], context_channels=3)
    for net, context in ((by_vector, vector), (by_image, image)):
        assert sum(isinstance(part, AddContext) for part in net) == 2
        alone = torch.cat([net(x[i : i + 1], context[i : i + 1]) for i in range(4)])
        assert_close(net(x, context), alone, 1e-5)
        assert_close(net(x, context[:1]), net(x, context[:1].expand_as(context)), 1e-6)
        other = context.clone()
        other[0] += 1
        changed = (net(x, context) - net(x, other)).abs().amax((1, 2, 3))
        assert changed[0] > 1e-4 and (changed[1:] == 0).all()
        block = ResidualBlock(net)
        y, _ = block(x, context)
        assert_close(block.inverse(y, context)[0], x, 1e-4)
        with pytest.raises(ValueError, match="context"):
            net(x)
    with pytest.raises(ValueError, match=r"feature map of shape \(batch, 3.*\(4, 2, 5, 6\)"):
        by_image(x, torch.randn(4, 2, 5, 6))
    with pytest.raises(ValueError, match="3 features"):
        by_vector(x, torch.randn(4, 2))


@pytest.mark.parametrize("activation", [None, *SMOOTH_ACTIVATIONS], ids=name)
@pytest.mark.parametrize("options", [{}, {"context_features": 2}, {"context_channels": 2}], ids=str)
def test_every_parameter_learns(activation, options):
    for factor in (1.0, 20.0):
        net = scale_weights(LipschitzConvNet([1, 4, 4, 1], activation=activation, **options), factor)
        x = torch.randn(8, 1, 3, 3)
        c = torch.randn(8, 2, *([3, 3] if "context_channels" in options else [])) if options else None
        y, value = ResidualBlock(net, Exact())(x, c)
        loss = y.square().flatten(1).sum(1) / 2 - value
        for (label, _), grad in zip(net.named_parameters(), gradients(loss, net), strict=True):
            assert torch.isfinite(grad).all() and grad.abs().max() > 0, label


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"channels": [2]}, "channels"),
        ({"channels": [2, 0, 2]}, "channels"),
        ({"channels": [2, 4, 2], "kernels": [3]}, "kernels must be 2"),
        ({"channels": [2, 4, 2], "kernels": [3, 2]}, "kernels"),
        ({"channels": [2, 4, 2], "context_features": 0}, "context_features"),
        ({"channels": [2, 4, 2], "context_channels": 0}, "context_channels"),
        ({"channels": [2, 4, 2], "context_channels": 1, "context_features": 1}, "a vector or an image"),
        ({"channels": [2, 2], "context_features": 1}, "hidden"),
        ({"channels": [2, 4, 2], "lipschitz": 1.0}, "lipschitz"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, word):
    with pytest.raises(ValueError, match=word):
        LipschitzConvNet(**arguments)


def test_bjorck_and_reflection_are_refused():
    with pytest.raises(NotContractiveError, match="Bjorck"):
        LipschitzConvNet([1, 2, 1], constraint=Bjorck)
    with pytest.raises(NotContractiveError, match="reflect"):
        LipschitzConvNet([1, 2, 1], padding_mode="reflect")


# -------------------------------------------------------------------------------------------------------- the block


@given(branch=image_branches(), x=events((2, 3, 4), batch=3, extreme=False))
def test_log_det_and_inverse_against_the_dense_jacobian(branch, x):
    block = ResidualBlock(branch, Exact())
    y, value = block(x)
    assert_close(y, x + branch(x), 1e-12, 1e-12)
    assert_close(value, log_det(branch, x), 1e-9, 1e-9)
    back, minus = block.inverse(y)
    assert_close(back, x, 1e-9, 1e-9)
    assert_close(minus, -value, 1e-7, 1e-7)


def aligned(net: LipschitzConvNet) -> LipschitzConvNet:
    """All layers stretch the same smooth images, and the last one turns them: Jacobians near -L, large log-dets."""
    with torch.no_grad():
        for kernel in raw_weights(net):
            kernel.copy_(kernel.abs() + 0.3 * torch.randn_like(kernel))
        raw_weights(net)[-1].mul_(-1)
    return scale_weights(net, 10.0)


def test_log_det_at_3x8x8_and_its_gradient():
    """Exact and in chunks, against slogdet of the float64 Jacobian; the gradient against autograd's through it."""
    torch.manual_seed(0)
    net = aligned(LipschitzConvNet([3, 8, 8, 3], activation=gentle_sine)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = log_det(net, x, create_graph=True)
    assert expected.abs().min() > 1.0
    slopes = gradients(expected, net)
    for estimator in (Exact(), Exact(chunk=50)):
        value = ResidualBlock(net, estimator)(x)[1]
        assert_close(value, expected.detach(), 1e-10)
        for ours, theirs in zip(gradients(value, net), slopes, strict=True):
            assert_close(ours, theirs, 1e-7, 1e-9)


def test_log_det_at_1x28x28_is_unbiased():
    """Russian roulette against `Exact` in chunks: mean of 400 draws, |z| < 4.4 (a false alarm in 10^5 runs)."""
    torch.manual_seed(0)
    net = aligned(LipschitzConvNet([1, 8, 8, 1], activation=gentle_sine)).double()
    x = torch.randn(1, 1, 28, 28, dtype=torch.float64)
    with torch.no_grad():
        exact = ResidualBlock(net, Exact(chunk=196))(x)[1]
        block = ResidualBlock(net, RussianRoulette())
        draws = block(x.expand(400, -1, -1, -1))[1]
        assert exact.abs() > 1.0
        z = (draws.mean() - exact[0]) / (draws.std() / math.sqrt(400))
        assert abs(z) < 4.4
        truncated = ResidualBlock(net, PowerSeries(terms=1))(x.expand(400, -1, -1, -1))[1]
        assert abs((truncated.mean() - exact[0]) / (truncated.std() / math.sqrt(400))) > 4.4  # the test can fail


def image_blocks(n: int, channels: int = 1, **options: object) -> list[nn.Module]:
    torch.manual_seed(0)
    return [scale_kernels(LipschitzConvNet([channels, 4, 4, channels], **options), 5.0) for _ in range(n)]


def test_inverse_of_twelve_blocks():
    """To 1e-5 in float32, on images of two sizes by the same flow."""
    flow = CompositeTransform([ResidualTransform(net) for net in image_blocks(12)])
    for size in (8, 14):
        x = torch.randn(2, 1, size, size)
        with torch.no_grad():
            y, _ = flow(x)
            back, _ = flow.inverse(y)
        assert (back - x).abs().max() < 1e-5 and (y - x).abs().max() > 0.1


def test_nflows_image_flow_samples_what_it_scores():
    nets = image_blocks(3, context_features=2)
    flow = Flow(CompositeTransform([ResidualTransform(net) for net in nets]), StandardNormal([1, 3, 3]))
    context = torch.randn(2, 2)
    with using(flow, log_det=Exact()), torch.no_grad():
        samples, scores = flow.sample_and_log_prob(4, context)
        assert samples.shape == (2, 4, 1, 3, 3)
        again = flow.log_prob(samples.flatten(0, 1), context.repeat_interleave(4, 0))
    assert_close(scores.flatten(), again, 1e-4, 1e-4)


def test_normflows_image_flow_samples_what_it_scores():
    flows = [ResidualFlow(net) for net in image_blocks(3)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian((1, 3, 3), trainable=False), flows)
    with using(model, log_det=Exact()), torch.no_grad():
        samples, scores = model.sample(5)
        assert samples.shape == (5, 1, 3, 3)
        assert_close(model.log_prob(samples), scores, 1e-4, 1e-4)


def test_density_integrates_to_one_on_two_pixels():
    """Sampling and log_prob tell of one density: its integral over a grid of two-pixel images is one."""
    flow = Flow(
        CompositeTransform([ResidualTransform(net, Exact()) for net in image_blocks(2)]), StandardNormal([1, 1, 2])
    )
    axis = torch.linspace(-7, 7, 141)
    grid = torch.cartesian_prod(axis, axis).view(-1, 1, 1, 2)
    with torch.no_grad():
        mass = flow.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=2e-3)


def test_a_checkpoint_fits_a_fresh_model_whatever_size_it_saw():
    """Nothing in the state remembers the size of an image."""
    one, other = LipschitzConvNet([2, 4, 2]), LipschitzConvNet([2, 4, 2])
    scale_weights(one, 20.0)
    one(torch.randn(2, 2, 4, 4))
    other(torch.randn(2, 2, 16, 16))
    other.load_state_dict(one.state_dict())
    for size in (4, 9, 32):
        x = torch.randn(2, 2, size, size)
        assert torch.equal(one(x), other(x)) and torch.equal(one.eval()(x), one.train()(x))
    assert lipschitz_bound(one) == lipschitz_bound(other)


def test_rows_of_a_batch_do_not_meet():
    """A solver that drops finished rows must not mix the contexts of the others."""
    torch.manual_seed(0)
    net = scale_weights(LipschitzConvNet([2, 8, 2], context_channels=1), 5.0).double()
    block = ResidualBlock(net)
    x = torch.randn(5, 2, 4, 4).double() * torch.tensor([0.0, 1e-3, 1, 10, 100]).double().view(-1, 1, 1, 1)
    context = torch.randn(5, 1, 4, 4).double()
    back, _ = block.inverse(block(x, context)[0], context)
    assert_close(back, x, 1e-9)


def test_the_property_kit_accepts_an_image_block():
    torch.manual_seed(0)
    net = scale_kernels(LipschitzConvNet([1, 4, 1], context_features=2))
    report = check_transform(ResidualTransform(net, Exact()), (1, 3, 3), (2,))
    assert report.passed, report
