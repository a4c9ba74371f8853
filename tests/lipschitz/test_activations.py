"""Constants of activations by a dense search of slopes in float64; slopes against autograd."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from iresflow_plugin.lipschitz import (
    Activation,
    CLipSwish,
    CPila,
    LipSwish,
    MaxMin,
    Sine,
    build_activation,
    certified_map,
    lipschitz_bound,
)
from iresflow_plugin.lipschitz.torch_activations import TORCH_ACTIVATIONS
from iresflow_plugin.nets import LipschitzMLP
from tests.helpers import EVERY_ACTIVATION, OURS, SMOOTH_ACTIVATIONS, TORCHS, activation_for, assert_close, name, seeds

GRID = torch.cat([torch.linspace(-12, 12, 200_001), torch.linspace(-100, 100, 5_001)]).double()
# The slopes of torch's own depend on their options.
OPTIONS = [
    nn.ELU(alpha=0.3),
    nn.ELU(alpha=2.5),
    nn.LeakyReLU(0.5),
    nn.LeakyReLU(3.0),
    nn.LeakyReLU(-2.0),
    nn.Softplus(beta=7.0),
    nn.Softplus(beta=0.1),
    nn.GELU(approximate="tanh"),
    nn.Hardtanh(-3.0, 0.5),
]


def with_parameters(kind: type[Activation]) -> list[Activation]:
    """One with fresh and some with far-off parameters: the constant must hold for all of them."""
    fresh = kind(2 if kind is MaxMin else 1).double()
    others = []
    for shift in (-3.0, 3.0):
        other = copy.deepcopy(fresh)
        for parameter in other.parameters():
            parameter.data.add_(shift)
        others.append(other)
    return [fresh, *others] if list(fresh.parameters()) else [fresh]


def slopes(module: nn.Module, x: Tensor) -> Tensor:
    """The derivative of every output feature with respect to a scalar input, (points, outputs), by autograd."""
    x = x[:, None].clone().requires_grad_()
    out = module(x)
    columns = [torch.autograd.grad(out[:, i].sum(), x, retain_graph=True)[0] for i in range(out.shape[1])]
    return torch.cat(columns, 1)


@pytest.mark.parametrize("kind", [k for k in OURS if k is not MaxMin], ids=name)
def test_constant_bounds_the_length_of_the_slopes(kind):
    """For activations that double their features that is the norm of both slopes together."""
    for module in with_parameters(kind):
        steepest, constant = slopes(module, GRID).norm(dim=1).max().item(), certified_map(module).ceiling
        assert steepest <= constant * (1 + 1e-12)
        assert 0.99 * constant <= steepest and constant <= 1  # nothing is given away
        assert lipschitz_bound(module).value == constant
        assert module(GRID[:5, None]).shape[1] == module.expansion


@pytest.mark.parametrize("module", [kind() for kind in TORCHS] + OPTIONS, ids=str)
def test_constants_of_torchs_activations(module):
    steepest = slopes(copy.deepcopy(module).double(), GRID).abs().max().item()
    constant = lipschitz_bound(module).value
    assert steepest <= constant * (1 + 1e-12)
    assert constant <= 1.001 * steepest  # and nothing is given away


@pytest.mark.parametrize("kind", EVERY_ACTIVATION, ids=name)
@given(seed=seeds, scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_differences_obey_the_constant(kind, seed, scale):
    """|f(x) - f(y)| <= c |x - y| for vectors, kinks, jumps and all."""
    torch.manual_seed(seed)
    module = activation_for(kind, 4).double()
    x = scale * torch.randn(64, 4, dtype=torch.float64)
    y = x + torch.logspace(-6, 1, 64, dtype=torch.float64)[:, None] * torch.randn(64, 4, dtype=torch.float64)
    with torch.no_grad():
        change = (module(x) - module(y)).norm(dim=1)
    # 1e-8: torch's Softplus switches to the identity at 20, where it still differs from it by 2e-9
    assert (change <= lipschitz_bound(module).value * (x - y).norm(dim=1) * (1 + 1e-9) + 1e-8).all()


@pytest.mark.parametrize("kind", EVERY_ACTIVATION, ids=name)
def test_map_agrees_with_the_module_and_its_autograd_derivative(kind):
    torch.manual_seed(0)
    for scale in (0.1, 1.0, 8.0):
        module = activation_for(kind, 4).double()
        x = scale * torch.randn(9, 4, dtype=torch.float64)
        jac = torch.func.vmap(torch.func.jacrev(module))(x)
        at_x = certified_map(module).linearise(x)
        tangent, cotangent = torch.randn_like(x), torch.randn(9, jac.shape[1], dtype=torch.float64)
        assert_close(at_x.value, module(x), 1e-13)
        assert_close(certified_map(module)(x), module(x), 1e-13)
        assert_close(at_x.jvp(tangent), (jac @ tangent[..., None])[..., 0], 1e-12, 1e-13)
        assert_close(at_x.vjp(cotangent), (jac.mT @ cotangent[..., None])[..., 0], 1e-12, 1e-13)


SMOOTH = [*SMOOTH_ACTIVATIONS, *[module for module in OPTIONS if TORCH_ACTIVATIONS[type(module)].smooth]]


@pytest.mark.parametrize("kind", SMOOTH, ids=str)
def test_slopes_of_maps_have_the_second_derivative_of_the_module(kind):
    """Maps have formulas of their own for slopes, which the gradient of a log-det differentiates."""
    if isinstance(kind, nn.Module):
        modules = [copy.deepcopy(kind).double()]
    else:
        modules = with_parameters(kind) if issubclass(kind, Activation) else [kind().double()]
    for module in modules:
        x = torch.linspace(-2.5, 2.6, 101, dtype=torch.float64)[:, None].requires_grad_()  # off the seams
        (first,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        slope = certified_map(module).linearise(x).jvp(torch.ones_like(x)).sum(1, keepdim=True)
        assert_close(slope, first, 1e-12, 1e-13)
        (of_slope,) = torch.autograd.grad(slope.sum(), x)
        assert_close(of_slope, second, 1e-11, 1e-12)


def is_smooth(kind: type[nn.Module]) -> bool:
    return kind.smooth if issubclass(kind, Activation) else TORCH_ACTIVATIONS[kind].smooth


@pytest.mark.parametrize("kind", EVERY_ACTIVATION, ids=name)
def test_marked_smooth_if_and_only_if_it_has_a_second_derivative(kind):
    """Without one the log-det gives no gradient to biases and inputs."""
    module = activation_for(kind, 2).double()
    x = torch.randn(200, 2, dtype=torch.float64).requires_grad_()
    at_x = certified_map(module).linearise(x)
    product = at_x.jvp(torch.ones_like(x))
    second = (
        torch.autograd.grad(product.square().sum() + product.sum(), x, allow_unused=True)[0]
        if product.requires_grad
        else None
    )
    has_one = second is not None and bool((second.abs() > 1e-6).float().mean() > 0.1)
    assert has_one == is_smooth(kind)


def test_pila_is_continuous_with_its_slope_at_the_seam():
    module = CPila(1).double()
    seam = torch.tensor([[0.2 - 1e-9], [0.2 + 1e-9]], dtype=torch.float64)
    assert (module(seam)[0] - module(seam)[1]).abs().max() < 1e-8
    at_seam = slopes(module, seam[:, 0])
    assert (at_seam[0] - at_seam[1]).abs().max() < 1e-7


@pytest.mark.parametrize("kind", OURS, ids=name)
def test_extreme_inputs_stay_finite(kind):
    """Far out the slopes are still slopes, not inf * 0."""
    module = activation_for(kind, 2)
    x = torch.tensor([[-1e4, 1e4], [1e10, -1e10], [0.0, -0.0]]).requires_grad_()
    at_x = certified_map(module).linearise(x)
    image = at_x.jvp(torch.ones_like(x))
    (grad,) = torch.autograd.grad(at_x.value.sum() + image.sum(), x)
    for tensor in (at_x.value, image, at_x.vjp(torch.ones_like(at_x.value)), grad):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("kind", [Sine, CLipSwish, LipSwish], ids=name)
def test_spatial_dimensions(kind):
    """With spatial_dims=2 the features are the channels, and each pixel is treated as a vector would be."""
    image, vector = kind(3, spatial_dims=2).double(), kind(3).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    as_vectors = vector(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert_close(image(x), as_vectors, 1e-14)


def test_sine_frequencies():
    frequency = Sine(5, low=2.0, high=32.0).frequency
    assert frequency.tolist() == pytest.approx([2, 4, 8, 16, 32], rel=1e-5)
    assert Sine(1, low=2.0, high=8.0).frequency.item() == pytest.approx(4, rel=1e-5)


def test_the_callers_tensor_is_left_alone_by_in_place_activations():
    """nn.ReLU(inplace=True) is common; evaluated on x itself it would change the caller's data."""
    for module in (nn.ReLU(inplace=True), nn.ELU(inplace=True), nn.SiLU(inplace=True), nn.Mish(inplace=True)):
        x = torch.randn(5, 3)
        before = x.clone()
        g = certified_map(module)
        value = g(x)
        g.linearise(x)
        assert torch.equal(x, before)
        assert_close(value, module(before.clone()), 1e-7)
        assert module.inplace  # the user's module is not touched either


def test_softplus_with_a_low_threshold_is_refused():
    """torch switches from softplus to the identity at `threshold`, a jump of log(1 + exp(-threshold)) / beta."""
    with pytest.raises(ValueError, match="threshold"):
        lipschitz_bound(nn.Softplus(threshold=1.0))


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: Sine(0), "features"),
        (lambda: Sine(2, low=3.0, high=1.0), "low"),
        (lambda: Sine(2, low=0.0), "low"),
        (lambda: MaxMin(3), "even"),
        (lambda: LipSwish(-1), "features"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_misspelt_keywords_are_refused():
    with pytest.raises(TypeError, match="lo"):
        Sine(2, lo=1.0)


def test_build_activation():
    """An activation with `features` outputs, from a class, a function or a module."""
    assert isinstance(build_activation(nn.Tanh, 3), nn.Tanh)
    mine = Sine(3)
    copied = build_activation(mine, 3)
    assert isinstance(copied, Sine) and copied.log_frequency is not mine.log_frequency
    doubling = build_activation(CLipSwish, 6)
    assert doubling(torch.randn(2, 3)).shape == (2, 6)
    assert build_activation(lambda n: Sine(n, low=1.0, high=2.0), 4).frequency.max() < 2.001


def test_layers_of_a_net_do_not_share_an_activation_given_as_a_module():
    net = LipschitzMLP([2, 4, 4, 2], activation=LipSwish())
    inner = [m for m in net if isinstance(m, LipSwish)]
    assert len(inner) == 2 and inner[0].b is not inner[1].b
