"""Convolutions: the certified bound against the float64 matrix of the operator, at every size; and what is refused."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from iresflow_plugin import NotContractiveError, ResidualBlock
from iresflow_plugin.lipschitz import (
    AlmostOrthogonal,
    Bjorck,
    ConvSpec,
    Frobenius,
    Scale,
    Spectral,
    certified_map,
    constrain,
    lipschitz_bound,
    lipschitz_estimate,
    operator_norm,
    spectral_penalty,
)
from iresflow_plugin.lipschitz.convolution import grid, looseness
from iresflow_plugin.lipschitz.matrix import largest_schatten_norm
from tests.helpers import (
    EPS,
    assert_close,
    assert_slope,
    dtypes,
    name,
    operator_matrix,
    raw_weights,
    scale_weights,
    seeds,
    svd_norm,
    thorough,
)

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONSTRAINTS = [Spectral, AlmostOrthogonal, Frobenius]

every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS, ids=name)


def plain(kernel: int) -> ConvSpec:
    """Of a square kernel that moves by one pixel at a time."""
    return ConvSpec((kernel, kernel), (1, 1), (1, 1), ((0, 0), (0, 0)))


@st.composite
def layers(draw: st.DrawFn, dims: tuple[int, ...] = (1, 2, 3)) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution of any geometry, with weights of any size, and the shape of an event that it takes."""
    d = draw(st.sampled_from(dims))
    most = {1: 5, 2: 4, 3: 2}[d]

    def axes(values: list[int]) -> tuple[int, ...]:
        return tuple(draw(st.sampled_from(values)) for _ in range(d))

    groups = draw(st.sampled_from([1, 1, 2]))
    channels, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel, stride, dilation = axes(list(range(1, most + 1))), axes([1, 1, 2, 3]), axes([1, 1, 2])
    mode = draw(st.sampled_from(["zeros", "circular"]))
    padding = axes([0, 1, 2, 3])
    if stride == (1,) * d and draw(st.booleans()):
        padding = draw(st.sampled_from(["same", "valid"]))
    torch.manual_seed(draw(seeds))
    layer = KINDS[d](channels, out, kernel, stride, padding, dilation, groups, padding_mode=mode, dtype=torch.float64)
    fill = draw(st.sampled_from(["normal", "positive", "sparse"]))
    with torch.no_grad():
        weight = torch.randn_like(layer.weight)
        weight = weight.abs() if fill == "positive" else weight * (weight > 0.8) if fill == "sparse" else weight
        layer.weight.copy_(weight * draw(st.sampled_from([1e-8, 1.0, 1e6])))
    pads = [3] * d if not isinstance(padding, str) else [k * e for k, e in zip(kernel, dilation, strict=True)]
    least = [max(e * (k - 1) + 1, p) for k, e, p in zip(kernel, dilation, pads, strict=True)]
    extra = axes([0, 1, 2, 5] if d < 3 else [0, 1])
    return layer, (channels, *[n + m for n, m in zip(least, extra, strict=True)])


# ----------------------------------------------------------------------------------------------------------- bounds


@thorough
@given(layer_and_shape=layers())
def test_the_bound_covers_the_operator(layer_and_shape):
    """Kernel sizes, strides, paddings, dilations, groups, image sizes, 1 to 3 dimensions."""
    layer, shape = layer_and_shape
    norm = torch.linalg.matrix_norm(operator_matrix(layer, shape), ord=2).item()
    operator = ConvSpec.of(layer)
    for weight in (layer.weight.detach(), layer.weight.detach().float()):
        assert norm <= operator_norm(weight, operator).item() * (1 + EPS[weight.dtype])
    assert lipschitz_bound(layer).value == pytest.approx(operator_norm(layer.weight, operator).item(), rel=1e-12)


KERNELS = {
    "normal": torch.randn,
    "positive": torch.rand,
    "signs": lambda *shape: torch.randint(-1, 2, shape).double() + 1e-3 * torch.randn(shape),
    "combs": lambda *shape: torch.randn(shape[:2])[..., None, None] * torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 1]]),
    "gradients": lambda *shape: torch.randn(shape[:2])[..., None, None] * torch.tensor([[1, 0, -1]] * 3),
}


@given(seed=seeds, channels=st.integers(1, 2), out=st.integers(1, 2), size=st.integers(16, 20))
@pytest.mark.parametrize("kind", KERNELS)
def test_the_bound_is_tight_for_3x3(kind, seed, channels, out, size):
    """At most 6 % above the operator on images of 16x16 and more, zeros or copies around, up to 16 channels.

    Not only for random kernels. With r = cos(pi / (n + 1)), a wave at the worst frequency under a window of half a sine
    gets through n pixels and zeros with at least r of the supremum M for each axis: the symbol f along an axis has
    f(0) = M, |f| <= M and hence a mean of at least 0, and f(0) falls to r M + (1 - r) mean. At 16 pixels two axes leave
    96.6 %, and grid and norm add 1 % each. Copies around keep the frequencies 2 pi m / n, at most pi / n off.
    """
    torch.manual_seed(seed)
    for mode in ("zeros", "circular"):
        layer = nn.Conv2d(channels, out, 3, padding=1, padding_mode=mode, bias=False, dtype=torch.float64)
        layer.weight.data.copy_(KERNELS[kind](out, channels, 3, 3))
        norm = torch.linalg.matrix_norm(operator_matrix(layer, (channels, 16, size)), ord=2).item()
        assert norm <= lipschitz_bound(layer).value <= 1.06 * norm


@pytest.mark.parametrize("channels", [8, 24, 48])
def test_the_bound_is_as_tight_as_it_says(channels):
    """Against the supremum over a grid so fine that nothing is left between its points."""
    torch.manual_seed(0)
    for fill in (nn.init.normal_, nn.init.dirac_, nn.init.uniform_):
        weight = fill(torch.empty(channels, channels, 3, 3))
        symbol = torch.fft.rfft2(weight.double(), s=(64, 64)).permute(2, 3, 0, 1)
        norm = torch.linalg.matrix_norm(symbol, ord=2).max().item()
        bound = operator_norm(weight, plain(3)).item()
        assert norm <= bound <= norm * looseness(channels) * (1.04 if channels > 16 else 1.01) * 1.001


def test_one_bound_for_every_size():
    """Certified once, before any image is seen; larger images only come closer to it."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
    nn.init.uniform_(layer.weight)
    bound = lipschitz_bound(layer).value
    norms = [torch.linalg.matrix_norm(operator_matrix(layer, (2, n, n)), ord=2).item() for n in (2, 4, 8, 16, 24)]
    assert norms == sorted(norms) and norms[-1] <= bound <= 1.03 * norms[-1]
    assert lipschitz_bound(layer).value == bound


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv2d(3, 5, 1), (3, 2, 2)),
        (nn.Conv2d(3, 5, 1, stride=2), (3, 4, 4)),
        (nn.Conv2d(3, 12, 2, stride=2), (3, 4, 6)),  # one matrix on blocks of 2x2
        (nn.Conv1d(2, 4, 5, stride=5, groups=2), (2, 10)),
        (nn.Conv3d(1, 3, 2, stride=2), (1, 2, 4, 2)),
    ],
    ids=str,
)
def test_kernels_that_are_one_matrix_are_exact(layer, shape):
    layer = layer.double()
    norm = torch.linalg.matrix_norm(operator_matrix(layer, shape), ord=2).item()
    assert norm <= lipschitz_bound(layer).value <= norm * 1.01 * (1 + 1e-9)


def test_wide_circular_padding_repeats_outputs():
    """A box of one pixel, padded by three copies of it on each side, comes out seven times."""
    layer = nn.Conv1d(1, 1, 1, padding=3, padding_mode="circular", bias=False, dtype=torch.float64)
    nn.init.ones_(layer.weight)
    for n in (3, 4, 6):
        norm = torch.linalg.matrix_norm(operator_matrix(layer, (1, n)), ord=2).item()
        assert norm <= lipschitz_bound(layer).value == pytest.approx(math.sqrt(3), rel=1e-6)


def test_strided_circular_convolutions_of_odd_images():
    """Where the stride does not divide the image, outputs overlap as they never do on a line."""
    layer = nn.Conv1d(1, 1, 3, stride=2, padding=1, padding_mode="circular", bias=False, dtype=torch.float64)
    nn.init.ones_(layer.weight)
    for n in (3, 5, 8):
        norm = torch.linalg.matrix_norm(operator_matrix(layer, (1, n)), ord=2).item()
        assert norm <= lipschitz_bound(layer).value


def test_more_points_for_larger_kernels_fewer_for_many_channels():
    assert [grid((k, k), 1.04)[0][0] for k in (1, 3, 5)] == [1, 16, 32]
    assert [grid((3, 3), looseness(n))[0][0] for n in (4, 64, 128, 512)] == [32, 16, 12, 8]
    for sizes in ((3,), (2, 5), (3, 3, 3)):
        for overshoot in (1.01, 1.2):
            assert 1 < grid(sizes, overshoot)[1] <= overshoot


@given(seed=seeds, n=st.sampled_from([1, 3, 8]), count=st.integers(1, 20), equal=st.booleans())
def test_dropping_losers_changes_no_winner(seed, n, count, equal):
    torch.manual_seed(seed)
    a = torch.randn(count, n + 1, n, dtype=torch.complex128)
    if equal:  # nothing to tell them apart but the last digits
        a = torch.linalg.qr(a)[0] * (1 + 1e-3 * torch.rand(count, 1, 1))
    gram = a.mH @ a
    p = 2 ** (math.ceil(math.log2(max(math.log(max(n, 2)) / math.log(1.04) - 2, 1)) - 1) + 1) + 2
    norms = torch.linalg.svdvals(a).pow(p).sum(1).log() / p
    best = largest_schatten_norm(gram)
    assert norms[best].item() >= norms.max().item() - 1e-9


def test_nan_stays_nan():
    weight = torch.full((2, 2, 3, 3), math.nan)
    assert operator_norm(weight, plain(3)).isnan()
    assert operator_norm(torch.zeros(2, 2, 3, 3), plain(3)) == 0


# ------------------------------------------------------------------------------------------------------- constraints


@every_constraint
@given(layer_and_shape=layers(), bound=st.sampled_from([0.3, 0.97]))
def test_the_operator_in_use_obeys(constraint, layer_and_shape, bound):
    layer, shape = layer_and_shape
    net = constrain(nn.Sequential(layer), bound, constraint)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            assert torch.linalg.matrix_norm(operator_matrix(layer, shape), ord=2) <= bound
            assert torch.equal(layer.weight, certified_map(net).maps[0].weight)
            assert lipschitz_bound(net).value <= bound


@every_constraint
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_half_precision_rounding_does_not_break_the_bound(constraint, dtype):
    for seed in range(10):
        torch.manual_seed(seed)
        net = constrain(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), 0.9, constraint)
        scale_weights(net, 20.0).to(dtype)
        used = nn.Conv2d(3, 4, 3, padding=1, dtype=torch.float64)
        used.weight.data = net[0].weight.detach().double()
        assert torch.linalg.matrix_norm(operator_matrix(used, (3, 8, 8)), ord=2) <= 0.9
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert lipschitz_bound(net.float()).value <= 0.9


@every_constraint
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize("channels, kernel", [(1, 1), (1, 3), (3, 3)])
def test_kernels_obey_after_autocast_has_rounded_them(constraint, dtype, channels, kernel):
    """Constrained or not: what autocast makes of a kernel is within the certificate under autocast."""
    for bound in (0.97, 0.98, 0.999):
        net = constrain(nn.Sequential(nn.Conv1d(channels, channels, kernel, bias=False)), bound, constraint)
        free = nn.Sequential(nn.Conv1d(channels, channels, kernel, bias=False))
        raw_weights(net)[0].data.fill_(-5.0)
        free[0].weight.data.fill_(-(1 + torch.finfo(dtype).eps * 0.501))
        for some, most in ((net, bound), (free, math.inf)):
            with torch.autocast("cpu", dtype=dtype):
                weight, certified = some[0].weight.detach().to(dtype), lipschitz_bound(some).value
            # frequency zero, where all taps of one sign add up
            assert svd_norm(weight.double().sum(-1)) <= min(certified, most)


@every_constraint
@pytest.mark.parametrize("stride, groups", [(1, 1), (2, 1), (1, 2)])
@given(seed=seeds, scale=st.sampled_from([0.1, 3.0]))
def test_gradients_match_finite_differences(constraint, stride, groups, seed, scale):
    torch.manual_seed(seed)
    layer = nn.Conv2d(4, 2, 3, stride, 1, groups=groups, dtype=torch.float64)
    item = constraint(1.0)
    item.spec = ConvSpec.of(layer)
    weight = (scale * torch.randn_like(layer.weight)).requires_grad_()
    probe, direction = torch.randn_like(weight), torch.randn_like(weight)

    def value(w: Tensor) -> Tensor:
        return (item(w) * probe).sum()

    assert_slope(value, weight, direction, 1e-5)


SECOND = {
    "2d": nn.Conv2d(2, 3, 3, padding=1),
    "wide": nn.Conv2d(1, 3, 3),
    "narrow": nn.Conv2d(3, 1, 3),
    "stride": nn.Conv2d(2, 2, 3, stride=2, padding=1),
    "groups": nn.Conv2d(4, 2, 3, padding=1, groups=2),
    "dilated and circular": nn.Conv2d(1, 2, (3, 2), padding=(2, 1), dilation=(2, 1), padding_mode="circular"),
    "one matrix": nn.Conv2d(3, 2, 1),
    "1d": nn.Conv1d(2, 2, 4),
    "3d": nn.Conv3d(1, 2, 2),
}


@pytest.mark.parametrize("label", SECOND)
def test_second_derivatives_of_the_operator_norm_match_finite_differences(label):
    """In reverse and in forward mode, and batched."""
    torch.manual_seed(0)
    layer = SECOND[label]
    spec, weight = ConvSpec.of(layer), torch.randn_like(layer.weight, dtype=torch.float64).requires_grad_()

    def norm(w: Tensor) -> Tensor:
        return operator_norm(w, spec)

    assert torch.autograd.gradcheck(norm, weight, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(norm, weight, check_fwd_over_rev=True, check_batched_grad=True)
    hessian = torch.func.hessian(norm)(weight.detach()).view(weight.numel(), -1)
    assert (hessian @ weight.detach().flatten()).abs().max() < 1e-10  # of a norm: homogeneous of degree one
    assert torch.linalg.eigvalsh(hessian)[0] > -1e-10  # and convex
    assert hessian.abs().max() > 1e-3 or weight.numel() == 1


@every_constraint
@pytest.mark.parametrize("factor", [0.02, 3.0])
@pytest.mark.parametrize("label", SECOND)
def test_second_derivatives_of_kernels_in_use_match_finite_differences(constraint, label, factor):
    """Where the constraint binds, and where it leaves the kernel alone."""
    torch.manual_seed(0)
    item = constraint(1.0)
    item.spec = ConvSpec.of(SECOND[label])
    weight = (factor * torch.randn_like(SECOND[label].weight, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(item, weight, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(item, weight, fast_mode=True, check_fwd_over_rev=True)
    assert torch.equal(item(weight), weight) == (factor < 1)


@every_constraint
@pytest.mark.parametrize("kernel, mode", [(3, "zeros"), (3, "circular"), (1, "zeros")])
def test_contraction_survives_adverse_training(constraint, kernel, mode):
    """100 Adam steps of 0.05 that reward large outputs; the dense operators afterwards are still within the bound."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 4, kernel, padding=kernel // 2, padding_mode=mode), nn.ELU()]
    layers += [nn.Conv2d(4, 2, kernel, padding=kernel // 2, padding_mode=mode)]
    net = constrain(nn.Sequential(*layers), 0.97, constraint)
    optimiser = torch.optim.Adam(net.parameters(), 0.05)
    x = 3 * torch.randn(8, 2, 8, 8)
    for _ in range(100):
        optimiser.zero_grad()
        (-10 * net(x).flatten(1).norm(dim=1).mean()).backward()
        optimiser.step()
        assert lipschitz_bound(net).value <= 0.97
    norms = [torch.linalg.matrix_norm(operator_matrix(net[i], (c, 9, 9)), ord=2) for i, c in ((0, 2), (2, 4))]
    assert norms[0] * norms[1] <= 0.97
    assert constraint is not Spectral or norms[0] * norms[1] >= 0.8  # the constraint binds, and gives little away
    free = [nn.Conv2d(2, 4, kernel, bias=False), nn.Conv2d(4, 2, kernel, bias=False)]
    for layer, weight in zip(free, raw_weights(net), strict=True):
        layer.weight.data = weight.detach()
    assert max(lipschitz_bound(layer).value for layer in free) > 1.5
    assert lipschitz_estimate(net, x).value <= lipschitz_bound(net).value


def test_editing_loading_and_copying():
    """The certificate is kept while the weights stand still, and never longer; a checkpoint fits a fresh model."""

    def build() -> nn.Module:
        return constrain(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1)), 0.9)

    torch.manual_seed(0)
    net, fresh = build(), build()
    small, large = torch.randn(2, 2, 5, 5), torch.randn(2, 2, 12, 9)
    net(small), lipschitz_bound(net)
    for weight in raw_weights(net):
        weight.data.mul_(100)  # moves no version counter
    assert torch.linalg.matrix_norm(operator_matrix(net[0], (2, 8, 8)), ord=2) <= 0.9**0.5
    assert 0.7 <= lipschitz_bound(net).value <= 0.9
    fresh.load_state_dict(net.state_dict())
    for twin in (fresh, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        for x in (large, small):
            assert torch.equal(twin(x), net(x)) and torch.equal(twin.eval()(x), net(x))
        assert lipschitz_bound(twin) == lipschitz_bound(net)


def test_maps_agree_with_modules_and_their_products_with_autograd():
    """What blocks evaluate, for every padding: values, J t, J^T v, also with leading dimensions."""
    cases = [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), (2, 3), (2, 1), (1, 2), 2),
        nn.Conv2d(4, 6, (4, 2), padding="same"),
        nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular"),
        nn.Conv2d(4, 6, (4, 3), padding="same", padding_mode="circular", dilation=(1, 2)),
        nn.Conv2d(4, 6, 3, stride=2, padding=(3, 0), padding_mode="circular"),
    ]
    for layer in cases:
        layer = layer.double()
        g = certified_map(layer)
        x = torch.randn(3, 4, 7, 8, dtype=torch.float64)
        at_x = g.linearise(x)
        assert_close(at_x.value, layer(x), 1e-12)
        matrix = operator_matrix(layer, (4, 7, 8))
        t, v = torch.randn(2, *x.shape, dtype=torch.float64), torch.randn(2, *at_x.value.shape, dtype=torch.float64)
        assert_close(at_x.jvp(t).flatten(2), t.flatten(2) @ matrix.mT, 1e-12)
        assert_close(at_x.vjp(v).flatten(2), v.flatten(2) @ matrix, 1e-12)
        assert_close(at_x.jvp(t[0]).flatten(1), t[0].flatten(1) @ matrix.mT, 1e-12)


def test_spectral_penalty_takes_the_operator():
    net = nn.Sequential(nn.Conv2d(1, 1, 3, bias=False))
    nn.init.ones_(net[0].weight)
    assert 9**2 <= spectral_penalty(net, 1.0).item() <= 1.05 * 9**2


def test_functional_transforms_reach_the_weight():
    """torch.func sees through the constraint, where no number can be read."""
    net = constrain(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1)), 0.9)
    scale_weights(net, 10.0)
    x = torch.randn(4, 1, 5, 5)
    parameters = dict(net.named_parameters())

    def loss(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, p, x).square().sum()

    grads = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(net(x).square().sum(), list(parameters.values()))
    for grad, other in zip(grads.values(), expected, strict=True):
        assert_close(grad, other, 1e-4)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_paddings_that_copy_borders_are_refused(mode):
    with pytest.raises(NotContractiveError, match=rf"Conv2d at '0'.*{mode}.*zeros"):
        constrain(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode)))


def test_what_else_is_refused():
    with pytest.raises(NotContractiveError, match=r"Bjorck cannot constrain Conv2d.*Spectral"):
        constrain(nn.Sequential(nn.Conv2d(1, 1, 3)), constraint=Bjorck)
    with pytest.raises(NotContractiveError, match="ConvTranspose2d"):
        constrain(nn.Sequential(nn.ConvTranspose2d(1, 1, 3)))
    net = constrain(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1)))
    with pytest.raises(ValueError, match=r"takes 2 channels.*\(4, 3, 8, 8\)"):
        certified_map(net)(torch.randn(4, 3, 8, 8))

    class Mine(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return 100 * super()._conv_forward(input, weight, bias)

    with pytest.raises(NotContractiveError, match="_conv_forward"):
        constrain(nn.Sequential(Mine(1, 1, 3)))


@pytest.mark.parametrize("kind", KINDS.values(), ids=name)
def test_bjorck_registered_by_hand_is_refused(kind):
    """It would bound the reshaped kernel, and the operator may have a norm of up to the root of the taps times that."""
    layer = kind(2, 2, 3, padding=1)
    parametrize.register_parametrization(layer, "weight", Bjorck(0.9))
    for attempt in (lipschitz_bound, ResidualBlock):
        with pytest.raises(NotContractiveError, match=rf"{kind.__name__} at '0'.*Bjorck"):
            attempt(nn.Sequential(layer))


def test_a_changed_geometry_is_noticed():
    """A stride of two lets a larger kernel pass; taken away, the kernel in use shrinks."""
    net = constrain(nn.Sequential(Scale(1.0), nn.Conv2d(2, 2, 3, stride=2, padding=1)).double(), 0.9)
    nn.init.ones_(raw_weights(net)[0])
    before = net[1].weight.sum().item()
    net[1].stride = (1, 1)
    assert lipschitz_bound(net).value <= 0.9
    assert net[1].weight.sum().item() < 0.9 * before
    assert torch.linalg.matrix_norm(operator_matrix(net[1], (2, 8, 8)), ord=2) <= 0.9


@given(dtype=dtypes, seed=seeds)
def test_plain_convolutions_are_bounded_but_free_to_grow(dtype, seed):
    torch.manual_seed(seed)
    layer = nn.Conv1d(3, 2, 3, padding=1, dtype=dtype)
    bound = lipschitz_bound(layer)
    assert bound.certified and bound.value > 0 and certified_map(layer).ceiling == math.inf
