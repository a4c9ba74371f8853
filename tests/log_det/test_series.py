"""`PowerSeries` against the series of the dense Jacobian: values, gradients, remainders, memory."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from iresflow_plugin import ResidualBlock
from iresflow_plugin.lipschitz import Chain, Concatenate, LearnableConcatenate, Scale, Sum, constrain, contraction
from iresflow_plugin.log_det import Exact, Gaussian, Orthogonal, PowerSeries, Rademacher, RussianRoulette
from iresflow_plugin.log_det.probes import as_probes
from iresflow_plugin.log_det.series import terms_needed
from iresflow_plugin.nets import LipschitzConvNet
from tests.helpers import (
    SMOOTH_ACTIVATIONS,
    align,
    assert_close,
    gentle_sine,
    gradients,
    jacobian,
    kept_entries,
    linear_branch,
    log_det,
    name,
    orthogonal,
    power_sum,
    scale_weights,
    scaled_mlp,
    seeds,
)


def quadratic_forms(jac: Tensor, v: Tensor, terms: int) -> Tensor:
    """sum_k (-1)^(k+1) v^T J^k v / k, per probe and sample, by dense products."""
    total, power = torch.zeros(v.shape[:2], dtype=jac.dtype), v
    for k in range(1, terms + 1):
        power = (jac @ power[..., None])[..., 0]
        total = total + (-1) ** (k + 1) / k * (power * v).sum(-1)
    return total


def aligned(size: int, lipschitz: float = 0.9, **options: object) -> nn.Module:
    return align(scaled_mlp(size, 8, gentle_sine, lipschitz, **options))


# ----------------------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("terms", [1, 2, 3, 8])
def test_orthogonal_probes_give_the_truncated_series_exactly(terms, size):
    net = aligned(size)
    x = torch.randn(5, size, dtype=torch.float64)
    estimate = PowerSeries(terms, probes=Orthogonal(size))(contraction(net), x)
    assert_close(estimate.log_det, power_sum(jacobian(net, x), terms), 1e-11, 1e-13)
    assert estimate.terms == terms  # the request is honoured
    assert_close(estimate.value, net(x), 1e-13)


@pytest.mark.parametrize("probes", [Rademacher(3), Gaussian(2), Orthogonal(2)], ids=str)
def test_given_its_probes_the_value_is_known(probes):
    """The same probes, drawn again by the same seed and put through dense products."""
    net = aligned(4)
    x = torch.randn(5, 4, dtype=torch.float64)
    series = PowerSeries(6, probes=probes, generator=torch.Generator().manual_seed(3))
    estimate = series(contraction(net), x)
    v = probes.draw(x, torch.Generator().manual_seed(3))
    forms = quadratic_forms(jacobian(net, x), v, 6)
    assert_close(estimate.log_det, forms.mean(0), 1e-11, 1e-13)
    assert_close(estimate.standard_error, forms.std(0) / math.sqrt(len(v)), 1e-9, 1e-12)


@pytest.mark.parametrize("activation", SMOOTH_ACTIVATIONS, ids=name)
def test_gradients_with_per_sample_weights(activation):
    """For x, context and parameters: those of the truncated series of the dense Jacobian, exactly."""
    net = align(scaled_mlp(3, 6, activation=activation, context_features=2))
    x = torch.randn(5, 3, dtype=torch.float64).requires_grad_()
    context = torch.randn(5, 2, dtype=torch.float64).requires_grad_()
    weights = torch.randn(5, dtype=torch.float64)
    weights[0] = 0
    for terms in (1, 4):
        truth = power_sum(jacobian(net, x, context, create_graph=True), terms)
        expected = gradients(weights * truth, net, x, context)
        ours = PowerSeries(terms, probes=Orthogonal(3))(contraction(net, context), x).log_det
        for one, other in zip(gradients(weights * ours, net, x, context), expected, strict=True):
            assert_close(one, other, 1e-9, 1e-11)


def test_value_does_not_change_when_gradients_are_recorded():
    net = aligned(3)
    x = torch.randn(5, 3, dtype=torch.float64)
    values = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            torch.manual_seed(0)
            values.append(PowerSeries(5)(contraction(net), x).log_det.detach().clone())
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


def test_gradients_also_reach_y_when_both_outputs_are_used():
    """The value g(x) that comes with the estimate carries its own gradient."""
    net = aligned(3)
    x = torch.randn(5, 3, dtype=torch.float64).requires_grad_()
    estimate = PowerSeries(3, probes=Orthogonal(3))(contraction(net), x)
    ours = gradients(estimate.value.square().sum(1) + estimate.log_det, net, x)
    expected = gradients(net(x).square().sum(1) + power_sum(jacobian(net, x, create_graph=True), 3), net, x)
    for one, other in zip(ours, expected, strict=True):
        assert_close(one, other, 1e-9, 1e-11)


@pytest.mark.parametrize("probes", [1, Gaussian(1), Orthogonal(1)], ids=str)
def test_unbiased_with_any_probes(probes):
    """Mean of 4000 draws within 4 standard errors, 4 samples: a right estimator fails with probability 3e-4."""
    net = aligned(4)
    x = torch.randn(4, 4, dtype=torch.float64)
    truth = power_sum(jacobian(net, x), 12)
    tiled = x.repeat(80, 1)
    with torch.no_grad():  # rows of one call share the basis of Orthogonal, so a call is one observation
        calls = torch.stack(
            [PowerSeries(12, probes=probes)(contraction(net), tiled).log_det.view(80, 4).mean(0) for _ in range(50)]
        )
    z = (calls.mean(0) - truth) / (calls.std(0) / math.sqrt(len(calls)))
    assert z.abs().max() < 4


# --------------------------------------------------------------------------------------------------------- remainders


@given(
    seed=seeds,
    tolerance=st.sampled_from([1.0, 1e-2, 1e-4, 1e-8]),
    probes=st.sampled_from([Rademacher(1), Rademacher(3), Gaussian(2), Orthogonal(2)]),
    hardest=st.booleans(),
)
def test_true_remainder_below_reported_below_tolerance(seed, tolerance, probes, hardest):
    """For the probes drawn, against 1500 terms; and never more terms than the certified bound alone asks for."""
    torch.manual_seed(seed)
    net = linear_branch(-torch.eye(3, dtype=torch.float64), 0.97) if hardest else aligned(3, 0.97)
    x = torch.randn(4, 3, dtype=torch.float64)
    g = contraction(net)
    estimate = PowerSeries(tolerance=tolerance, probes=probes, generator=torch.Generator().manual_seed(seed))(g, x)
    v = probes.draw(x, torch.Generator().manual_seed(seed))
    truth = quadratic_forms(jacobian(net, x), v, 1500).mean(0)
    true_remainder = (truth - estimate.log_det).abs()
    assert (true_remainder <= estimate.remainder * (1 + 1e-9) + 1e-12).all()
    assert (estimate.remainder <= tolerance * (1 + 1e-9)).all()
    longest = v.square().sum(-1).mean(0).max().item()
    assert estimate.terms <= terms_needed(g.bound, max(longest, 1.0), tolerance)
    if not hardest:
        assert estimate.terms < terms_needed(g.bound, 3, tolerance) or tolerance == 1.0  # a-posteriori pays


@pytest.mark.parametrize("terms", [1, 5, 40])
@pytest.mark.parametrize("hardest", [True, False])
def test_fixed_terms_report_their_remainder(terms, hardest):
    net = linear_branch(-torch.eye(4, dtype=torch.float64), 0.9) if hardest else aligned(4)
    x = torch.randn(5, 4, dtype=torch.float64)
    estimate = PowerSeries(terms, probes=Orthogonal(4))(contraction(net), x)
    truth = log_det(net, x)
    assert ((truth - estimate.log_det).abs() <= estimate.remainder * (1 + 1e-9) + 1e-12).all()
    if hardest:  # -L I: the bound is of the right size, not merely an upper one
        assert (estimate.remainder <= 1.05 * 20 * (truth - estimate.log_det).abs() + 1e-12).all()


@pytest.mark.parametrize("bound", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("tolerance", [1.0, 1e-3, 1e-9])
@pytest.mark.parametrize("size", [1, 64])
def test_terms_needed_is_the_smallest_that_suffices(bound, tolerance, size):
    def tail(n: int) -> float:
        return size * bound ** (n + 1) / ((n + 1) * (1 - bound))

    n = terms_needed(bound, size, tolerance)
    assert tail(n) <= tolerance
    assert n == 1 or tail(n - 1) > tolerance


def test_published_numbers_of_terms():
    """Terms that guarantee 1e-3 (1e-4) bit per dimension, from the reading report; its tail bound is the exact sum."""
    for bound, coarse, fine in ((0.59, 10, 14), (0.81, 26, 35), (0.9, 52, 71), (0.941, 90, 123)):
        for bits, published in ((1e-3, coarse), (1e-4, fine)):
            assert published - 3 <= terms_needed(bound, 1, bits * math.log(2)) <= published + 3


def test_the_series_stops_at_round_off_before_denormals():
    """Once vectors are below round-off more terms change nothing; denormal floats made a package 8 times slower."""
    net = linear_branch(orthogonal(4), 0.1)
    estimate = PowerSeries(1000)(contraction(net), torch.randn(3, 4, dtype=torch.float64))
    assert estimate.terms < 25
    assert (estimate.remainder < 1e-14).all()


def test_a_zero_branch_needs_no_series():
    net = linear_branch(torch.zeros(3, 3, dtype=torch.float64), 0.9)
    for series in (PowerSeries(5), PowerSeries(tolerance=1e-6), RussianRoulette()):
        estimate = series(contraction(net), torch.randn(2, 3, dtype=torch.float64))
        assert not estimate.log_det.any() and estimate.terms <= 2


# --------------------------------------------------------------------------------------------------- standard errors


@pytest.mark.parametrize("probes", [Rademacher(16), Gaussian(16)], ids=str)
def test_standard_errors_are_calibrated(probes):
    """Errors in units of the reported standard error have mean square 15/13 (Student's t of 15 degrees).

    2000 samples of one x: the mean square has a standard deviation of about 0.05.
    """
    net = align(scaled_mlp(6, 12, gentle_sine, 0.9), sign=1.0)
    net[0].parametrizations.weight.original.data.add_(torch.randn(12, 6, dtype=torch.float64))
    x = torch.randn(1, 6, dtype=torch.float64)
    with torch.no_grad():
        estimate = PowerSeries(20, probes=probes)(contraction(net), x.expand(2000, 6))
    z = (estimate.log_det - power_sum(jacobian(net, x), 20)) / estimate.standard_error
    assert 0.9 < z.square().mean() < 1.5


def test_a_single_probe_does_not_claim_to_know_its_error():
    estimate = PowerSeries(3)(contraction(aligned(3)), torch.randn(4, 3, dtype=torch.float64))
    assert estimate.standard_error.isnan().all()


# ------------------------------------------------------------------------------------------- memory, modes, randomness


@pytest.mark.parametrize("make", [lambda n: PowerSeries(n), lambda n: RussianRoulette(exact_terms=n)])
def test_memory_does_not_grow_with_the_terms(make):
    """What is kept for the backward pass, beyond the map and x: the same for 2 and for 50 terms."""
    net = align(scaled_mlp(6, 16, gentle_sine, 0.99))
    x = torch.randn(8, 6, dtype=torch.float64).requires_grad_()
    g = contraction(net)

    def kept(terms: int) -> int:
        estimates = []
        entries = kept_entries(lambda: estimates.append(make(terms)(g, x)) or estimates, x, *g.tensors())
        assert estimates[0].terms >= terms
        return entries

    assert kept(2) == kept(50) > 0


@pytest.mark.parametrize(
    "estimator", [PowerSeries(5), PowerSeries(tolerance=1e-3, probes=Gaussian(2)), RussianRoulette()], ids=str
)
def test_one_seed_decides_and_train_and_eval_are_the_same(estimator):
    net = aligned(5)
    x = torch.randn(4, 5, dtype=torch.float64).requires_grad_()

    def run(mode: bool) -> list[Tensor]:
        torch.manual_seed(11)
        estimate = estimator(contraction(net.train(mode)), x)
        return [estimate.log_det.detach(), *gradients(estimate.log_det, net, x)]

    for one, other in zip(run(True), run(False), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(run(True)[0], estimator(contraction(net), x).log_det)


@pytest.mark.parametrize("make", [lambda g: PowerSeries(5, generator=g), lambda g: RussianRoulette(generator=g)])
def test_a_generator_decides_alone(make):
    net = aligned(5)
    x = torch.randn(4, 5, dtype=torch.float64)
    state = torch.get_rng_state()
    one, other = (make(torch.Generator().manual_seed(2))(contraction(net), x).log_det for _ in range(2))
    assert torch.equal(one, other) and torch.equal(state, torch.get_rng_state())
    generator = torch.Generator().manual_seed(2)
    first, second = (make(generator)(contraction(net), x).log_det for _ in range(2))
    assert torch.equal(first, one) and not torch.equal(second, one)


@pytest.mark.parametrize("estimator", [PowerSeries(5), PowerSeries(tolerance=1e-3), RussianRoulette()], ids=str)
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(estimator, batch):
    net = aligned(3)
    x = torch.randn(batch, 3, dtype=torch.float64).requires_grad_()
    estimate = estimator(contraction(net), x)
    assert estimate.log_det.shape == estimate.standard_error.shape == estimate.remainder.shape == (batch,)
    estimate.log_det.sum().backward()
    assert x.grad.shape == x.shape


def test_events_with_several_dimensions():
    net = nn.Sequential(nn.Flatten(), *aligned(6), nn.Unflatten(1, (1, 2, 3)))
    x = torch.randn(4, 1, 2, 3, dtype=torch.float64)
    estimate = PowerSeries(7, probes=Orthogonal(6))(contraction(net), x)
    assert_close(estimate.log_det, power_sum(jacobian(net, x), 7), 1e-11)
    tight = PowerSeries(tolerance=1e-9, probes=Orthogonal(6))(contraction(net), x)
    assert_close(tight.log_det, log_det(net, x), 0, 1e-9)


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({}, "terms"),
        ({"terms": 3, "tolerance": 1e-3}, "tolerance"),
        ({"terms": 0}, "terms"),
        ({"terms": -1}, "terms"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"terms": 3, "probes": 0}, "count|probe"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, word):
    with pytest.raises(ValueError, match=word):
        PowerSeries(**arguments)


def test_misspelt_keywords_are_refused():
    with pytest.raises(TypeError, match="tol"):
        PowerSeries(tol=1e-3)  # type: ignore[call-arg]


def test_a_number_of_probes_means_rademacher():
    assert as_probes(4) == Rademacher(4) and as_probes(Gaussian(2)) == Gaussian(2)
    assert PowerSeries(3) == PowerSeries(3) != PowerSeries(4)


# ------------------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("series", [PowerSeries(terms=8), RussianRoulette()], ids=str)
def test_images_keep_less_and_have_the_same_gradients(series):
    """Rows as images of one row: the same numbers, from activations evaluated anew instead of kept."""
    torch.manual_seed(0)
    net = scaled_mlp(6, width=64)
    x = torch.randn(5, 6, dtype=torch.float64)
    g = contraction(net)
    kept, found = [], []
    for event in ((6,), (1, 6)):
        leaf, estimates = x.view(5, *event).clone().requires_grad_(), []
        torch.manual_seed(1)
        kept.append(kept_entries(lambda e=estimates, leaf=leaf: e.append(series(g, leaf)) or e, leaf, *g.tensors()))
        (estimate,) = estimates
        loss = (estimate.value.square().flatten(1).sum(1) - estimate.log_det).sum()
        grads = torch.autograd.grad(loss, [leaf, *net.parameters()], retain_graph=True)
        found.append([estimate.log_det, grads[0].flatten(1), *grads[1:]])
    for image, vector in zip(found[1], found[0], strict=True):
        assert_close(image, vector, 1e-12, 1e-14)
    assert kept[0] > 5 * 2 * 64  # activations of two hidden layers
    assert kept[1] <= 4 * x.numel()  # v, w and what is of their size


# -------------------------------------------------------------------------------------------------------- torch.func

SERIES = [PowerSeries(terms=6), PowerSeries(tolerance=1e-3), RussianRoulette()]
every_series = pytest.mark.parametrize("estimator", SERIES, ids=str)


def image_block(estimator: object) -> tuple[ResidualBlock, Tensor]:
    net = scale_weights(LipschitzConvNet([2, 4, 2], kernels=[3, 3]), 5.0).double()
    return ResidualBlock(net, estimator), torch.randn(3, 2, 4, 4, dtype=torch.float64)


def estimate_with(block: ResidualBlock, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(block, weights, (x,))[1]


@pytest.mark.parametrize("estimator", [*SERIES, Exact(chunk=4)], ids=str)
def test_transforms_of_the_weights_alone_reach_images(estimator):
    """x is an ordinary tensor then, and only the weights are wrapped."""
    block, x = image_block(estimator)
    weights = {k: v.detach() for k, v in block.named_parameters()}
    torch.manual_seed(1)
    found = torch.func.grad(lambda w: estimate_with(block, w, x).sum())(weights)
    torch.manual_seed(1)
    expected = gradients(block(x)[1], block)
    for label, truth in zip(weights, expected, strict=True):
        assert_close(found[label], truth, 1e-11, 1e-13)


@pytest.mark.timeout(60)
@every_series
@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_ensembles_are_their_members(estimator, kind):
    """vmap over the weights; no member's remainder can be read, so the series does not stop early."""
    net = aligned(3).double()
    block, x = (
        image_block(estimator) if kind == "images" else (ResidualBlock(net, estimator), torch.randn(4, 3).double())
    )
    members = [{k: factor * v.detach() for k, v in block.named_parameters()} for factor in (0.3, 1.0, 1.5)]
    stacked = {k: torch.stack([member[k] for member in members]) for k in members[0]}

    def with_gradient(w: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        return torch.func.grad_and_value(lambda w: estimate_with(block, w, x).sum())(w)

    torch.manual_seed(1)
    grads, values = torch.func.vmap(with_gradient, randomness="same")(stacked)
    tolerance = 2e-3 * len(x) if estimator == SERIES[1] else 1e-10
    for i, member in enumerate(members):
        torch.manual_seed(1)
        grad, value = with_gradient(member)
        assert_close(values[i], value, tolerance, tolerance)
        for label in grad:
            assert_close(grads[label][i], grad[label], 10 * tolerance, 10 * tolerance)


class Swaying(nn.Module):
    """States its bound, so that torch.func differentiates it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return 0.9 * torch.tanh(self.a) * torch.sin(x)

    def lipschitz_bound(self) -> float:
        return 0.9


WRAPPED = {
    "alone": lambda: Swaying(),
    "chain": lambda: Chain(Swaying(), nn.Tanh()),
    "sum": lambda: Chain(Scale(0.5), Sum(Swaying(), nn.Tanh())),
    "concatenation": lambda: Chain(
        Concatenate(Chain(Scale(0.3), Swaying()), Scale(0.3), dim=-3), constrain(nn.Conv2d(4, 2, 1), 0.9)
    ),
    "learnable concatenation": lambda: Chain(
        LearnableConcatenate(Swaying(), nn.Tanh(), dim=-3), constrain(nn.Conv2d(4, 2, 1), 0.9)
    ),
}


@every_series
@pytest.mark.parametrize("label", WRAPPED)
def test_modules_that_state_their_bound_take_images(estimator, label):
    """Wherever they stand in the branch: torch.func and checkpoints do not mix."""
    net = WRAPPED[label]().double()
    block = ResidualBlock(net, estimator)
    flat = ResidualBlock(nn.Sequential(nn.Unflatten(1, (2, 2, 3)), Stated(net), nn.Flatten()), estimator)
    x = torch.randn(4, 2, 2, 3, dtype=torch.float64).requires_grad_()
    torch.manual_seed(1)
    y, value = block(x)
    torch.manual_seed(1)
    z, same = flat(x.flatten(1))
    assert_close(y.flatten(1), z, 1e-12)
    exact = 1e-10 if estimator != SERIES[1] else 1e-2  # which may stop elsewhere, by a larger bound
    assert_close(value, same, exact, exact)
    for one, other in zip(gradients(y.sum() + value, net, x), gradients(z.sum() + same, net, x), strict=True):
        assert_close(one, other, exact, exact)
    assert_close(block.inverse(y.detach())[0], x, 1e-9)


class Stated(nn.Module):
    """The same branch, as one module with the same bound."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def lipschitz_bound(self) -> float:
        return contraction(self.net).ceiling  # of the same distribution of terms
