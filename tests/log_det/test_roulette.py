"""`RussianRoulette`: values and gradients unbiased, also with per-sample weights.

Error rate of the z-tests: each compares a mean over independent calls with the truth and allows 4 standard errors. For
a right estimator one comparison fails with probability 6e-5; a test makes at most 70, so 0.5 % per test. Seeds are
fixed, so what passes once passes always. A call holds 8 copies of the batch, which share the number of terms N; hence
the call, not the copy, is the independent observation.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from iresflow_plugin.lipschitz import contraction
from iresflow_plugin.log_det import Decay, Gaussian, Geometric, Orthogonal, Poisson, RussianRoulette
from iresflow_plugin.log_det.roulette import _by_length
from tests.helpers import align, assert_close, gentle_sine, gradients, linear_branch, log_det, scaled_mlp

CALLS, COPIES = 500, 8  # 4000 draws


def z_scores(observations: Tensor, truth: Tensor) -> Tensor:
    error = observations.std(0) / math.sqrt(len(observations))
    return (observations.mean(0) - truth) / error.clamp_min(1e-12)


ROULETTES = [
    (RussianRoulette(), 0.9),
    (RussianRoulette(exact_terms=1), 0.8),
    (RussianRoulette(Geometric(), exact_terms=1), 0.8),
    # without noise of the probes: most sensitive to weights
    (RussianRoulette(exact_terms=1, probes=Orthogonal(3)), 0.8),
    (RussianRoulette(Geometric(), exact_terms=1, probes=Orthogonal(3)), 0.8),
    (RussianRoulette(Geometric(0.3), exact_terms=2, probes=Gaussian(2)), 0.7),
    (RussianRoulette(Poisson(4.0), exact_terms=2), 0.5),
    (RussianRoulette(Poisson(2.0), exact_terms=1, probes=Orthogonal(3)), 0.3),
]


@pytest.mark.parametrize("estimator, lipschitz", ROULETTES, ids=str)
def test_value_and_gradient_are_unbiased_with_per_sample_weights(estimator, lipschitz):
    """4000 draws against the dense Jacobian, for values and gradients of x, context and all parameters."""
    torch.manual_seed(7)
    net = align(scaled_mlp(3, 4, gentle_sine, lipschitz, context_features=1, hidden=1))
    x = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    context = torch.randn(4, 1, dtype=torch.float64).requires_grad_()
    weights = torch.tensor([0.0, 1.0, -2.0, 0.5], dtype=torch.float64)

    dense = log_det(net, x, context, create_graph=True)
    truth = torch.cat([g.flatten() for g in gradients(weights * dense, net, x, context)])
    values, slopes = [], []
    for _ in range(CALLS):
        many = contraction(net, context.repeat(COPIES, 1))
        draws = estimator(many, x.repeat(COPIES, 1)).log_det.view(COPIES, 4).mean(0)
        values.append(draws.detach())
        slopes.append(torch.cat([g.flatten() for g in gradients(weights * draws, net, x, context)]))
    assert z_scores(torch.stack(values), dense.detach()).abs().max() < 4
    assert z_scores(torch.stack(slopes), truth).abs().max() < 4
    noise = torch.stack(values).std(0).max() / math.sqrt(CALLS)
    assert noise < 0.05 * dense.abs().max()  # the test has power: a bias of 20 % would be seen


@pytest.mark.parametrize("distribution", [Decay(), Geometric(), Geometric(0.05), Poisson(6.0)], ids=str)
def test_hardest_linear_map_is_unbiased(distribution):
    """g = -L x: every term is as large as the bound allows, and all have one sign. No noise but that of N."""
    lipschitz = 0.5 if isinstance(distribution, Poisson) else 0.9
    net = linear_branch(-torch.eye(2, dtype=torch.float64), lipschitz)
    x = torch.randn(1, 2, dtype=torch.float64)
    g = contraction(net)
    estimator = RussianRoulette(distribution, exact_terms=1)
    with torch.no_grad():
        values = torch.stack([estimator(g, x).log_det for _ in range(2000)])
    assert z_scores(values, log_det(net, x)).abs().max() < 4
    assert values.std() / math.sqrt(2000) < 0.03 * log_det(net, x).abs()


# --------------------------------------------------------------------------------------------------- distributions of N


@pytest.mark.parametrize(
    "distribution, bound",
    [(Geometric(), 0.8), (Geometric(0.1), 0.8), (Poisson(0.5), 0.02), (Poisson(5.0), 0.4), (Poisson(80.0), 0.8)],
    ids=str,
)
def test_samples_follow_the_survival_function(distribution, bound):
    """P(N >= j) by counting, within 4.5 standard errors, 13 comparisons: fails by chance with probability 8e-5."""
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([distribution.sample(bound, generator) for _ in range(n)])
    step = 10 if distribution == Poisson(80.0) else 1
    for j in range(0, 13 * step, step):
        p = distribution.survival(j, bound)
        assert abs((draws >= j).double().mean().item() - p) <= 4.5 * math.sqrt(p * (1 - p) / n) + 1e-12


@pytest.mark.parametrize("rate", [0.1, 1.0, 2.0, 10.0, 60.0])
@pytest.mark.parametrize("bound", [0.01, 0.1, 0.3, 0.5, 0.8, 0.9, 0.97])
def test_poisson_is_refused_exactly_where_a_term_that_counts_may_grow(rate, bound):
    """A term of size L^j > 1e-7 whose square, L^(2 j), exceeds the chance P(N >= j) with which it comes."""
    net, x = linear_branch(torch.eye(2, dtype=torch.float64), bound), torch.randn(3, 2, dtype=torch.float64)
    g = contraction(net)
    count = math.floor(math.log(1e-7) / math.log(g.ceiling))
    heavy = [j for j in range(1, count + 1) if g.ceiling ** (2 * j) > Poisson(rate).survival(j, bound)]
    if not heavy:
        assert RussianRoulette(Poisson(rate))(g, x).log_det.isfinite().all()
        return
    with pytest.raises(ValueError, match=rf"rate = {rate}.*L = {bound:.4g}.*variance.*a rate near (\d+)") as refusal:
        RussianRoulette(Poisson(rate))(g, x)
    advised = float(str(refusal.value).split("rate near ")[1].rstrip("."))
    for better in (Poisson(advised), Decay(), Geometric()):  # what the sentence says to take works
        assert RussianRoulette(better)(g, x).log_det.isfinite().all()


@pytest.mark.parametrize("rate", [0.1, 2.0, 30.0])
def test_poisson_survival_against_the_sum_of_probabilities(rate):
    """Relative accuracy far into the tail, where 1 - P(N < j) has none left."""

    def probability(i: int) -> float:
        return math.exp(i * math.log(rate) - rate - math.lgamma(i + 1))

    for j in (1, 2, 5, 20, 60):
        tail = math.fsum(probability(i) for i in range(j, j + 300))
        assert Poisson(rate).survival(j, 0.9) == pytest.approx(tail, rel=1e-9)
        assert Poisson(rate).survival(j, 0.9) + math.fsum(map(probability, range(j))) == pytest.approx(1)
    assert Poisson(rate).survival(0, 0.9) == 1


def test_geometric_default_follows_the_bound():
    for bound in (0.3, 0.97):
        assert [Geometric().survival(j, bound) for j in range(3)] == pytest.approx([1, bound, bound**2])
    assert Geometric(0.2).survival(2, 0.5) == pytest.approx(0.64)
    assert Geometric().sample(0.0) == 0


@pytest.mark.parametrize("p, bound", [(0.5, 0.97), (0.5, 0.7072), (0.1, 0.96)])
def test_geometric_refuses_what_may_have_infinite_variance(p, bound):
    """L^2 < 1 - p is needed; the error says so with the numbers and what to do."""
    net = linear_branch(torch.eye(2, dtype=torch.float64), bound)
    with pytest.raises(ValueError, match=rf"p = {p}.*variance"):
        RussianRoulette(Geometric(p))(contraction(net), torch.randn(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("p, bound", [(0.5, 0.7), (0.05, 0.97)])
def test_geometric_accepts_what_has_finite_variance(p, bound):
    net = linear_branch(torch.eye(2, dtype=torch.float64), bound)
    assert RussianRoulette(Geometric(p))(contraction(net), torch.randn(3, 2, dtype=torch.float64)).terms >= 1


# ------------------------------------------------------------------------------------------------- bits and pieces


def test_exact_terms_are_always_there():
    """At least `exact_terms` terms, whatever is drawn, and with more of them less noise."""
    net = linear_branch(-torch.eye(3, dtype=torch.float64), 0.9)
    x = torch.randn(1, 3, dtype=torch.float64)
    spread = []
    for exact in (1, 20):
        estimates = [RussianRoulette(exact_terms=exact)(contraction(net), x) for _ in range(200)]
        assert min(e.terms for e in estimates) >= exact
        assert max(e.terms for e in estimates) > exact
        spread.append(torch.stack([e.log_det for e in estimates]).std())
    assert spread[1] < 0.5 * spread[0]


@pytest.mark.parametrize("distribution", [Decay(), Geometric()], ids=str)
def test_the_weights_are_those_of_the_survival_function(distribution):
    """With the terms known, the value is the reweighted series of the dense Jacobian, digit by digit."""
    net = linear_branch(-torch.eye(2, dtype=torch.float64), 0.8)
    c = net[0].weight[0, 0].item()
    g = contraction(net)
    shrinks = abs(c) if distribution == Decay() else g.ceiling
    for seed in range(20):
        roulette = RussianRoulette(distribution, exact_terms=2, generator=torch.Generator().manual_seed(seed))
        estimate = roulette(g, torch.zeros(1, 2, dtype=torch.float64))
        weights = [1.0 if k <= 2 else shrinks ** -(k - 2) for k in range(1, estimate.terms + 1)]
        expected = sum((-1) ** (k + 1) * w * 2 * c**k / k for k, w in enumerate(weights, 1))
        assert estimate.log_det.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    "distribution, lipschitz",
    [(Decay(), 0.97), (Geometric(), 0.97), (Geometric(0.05), 0.9), (Poisson(8.0), 0.4)],
    ids=str,
)
def test_the_standard_error_is_the_spread_of_the_estimate(distribution, lipschitz):
    """For g = -L x Rademacher probes are exact, and all the noise is that of N; reporting zero would be misleading.

    Its square is unbiased for the variance: over 300 calls the two agree to a quarter.
    """
    net = linear_branch(-torch.eye(3, dtype=torch.float64), lipschitz)
    g, x = contraction(net), torch.randn(1, 3, dtype=torch.float64)
    roulette = RussianRoulette(distribution, exact_terms=1, probes=8)
    with torch.no_grad():
        estimates = [roulette(g, x) for _ in range(300)]
    spread = torch.stack([e.log_det for e in estimates]).std()
    reported = torch.stack([e.standard_error for e in estimates]).square().mean().sqrt()
    assert spread > 1e-3
    assert 0.8 * spread < reported < 1.25 * spread
    assert RussianRoulette(distribution)(g, x).standard_error.isnan().all()  # of one probe it is not known


@settings(max_examples=50)
@given(seed=st.integers(0, 2**31), exact_terms=st.integers(1, 3), probes=st.integers(1, 3))
def test_the_worst_case_of_decay_is_that_of_its_bound(seed, exact_terms, probes):
    """P(N >= j) <= L^j and |(J^T)^(m+j) v| / P(N >= j) <= L^m |v| for every sample, also where J is far from normal,
    so that vectors shrink fast and then slowly."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=generator).triu()
    matrix *= 0.9 / torch.linalg.matrix_norm(matrix, 2)
    vector = torch.randn(probes, 5, 6, dtype=torch.float64, generator=generator)
    length = vector.norm(dim=2).amax(1)
    weigh = _by_length([0.0] * probes, exact_terms, 0.9)  # a draw that never ends
    for k in range(1, 30):
        weights = torch.as_tensor(weigh(k, vector))
        vector = vector @ matrix
        assert (weights >= (1 - 1e-12) * 0.9 ** -max(0, k - exact_terms)).all()
        longest = (vector * weights.view(-1, 1, 1)).norm(dim=2).amax(1)
        assert (longest <= (1 + 1e-12) * 0.9 ** min(k, exact_terms) * length).all()


def test_decay_spends_what_the_jacobian_asks_for():
    """m + sum_j |(J^T)^(m+j-1) v| / |(J^T)^(m-1) v| terms in the mean: 2 + c / (1 - c) for c times the identity. Over
    400 calls the mean is off by 5 standard errors with probability 6e-7."""
    net = linear_branch(0.048 * torch.eye(3, dtype=torch.float64), 0.97)  # a tenth of its norm, which is half the bound
    g, x = contraction(net), torch.randn(8, 3, dtype=torch.float64)
    c = net[0].weight.detach().norm(2, dim=1).max().item()
    terms = torch.tensor([float(RussianRoulette()(g, x).terms) for _ in range(400)])
    assert c < 0.5
    assert abs(terms.mean().item() - 2 - c / (1 - c)) < 5 * terms.std().item() / 20
    dear = [RussianRoulette(Geometric())(g, x).terms for _ in range(100)]
    assert terms.mean() < 0.5 * sum(dear) / len(dear)


def test_roulette_on_a_net_much_smaller_than_its_bound_is_cheap():
    """All that follows is below round-off long before the last term drawn."""
    net = nn.Sequential(*linear_branch(torch.eye(3, dtype=torch.float64), 0.97))
    net[0].parametrizations.weight.original.data.mul_(1e-4)
    terms = [
        RussianRoulette(Geometric(), exact_terms=50)(contraction(net), torch.randn(2, 3).double()).terms
        for _ in range(20)
    ]
    assert max(terms) < 10


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: RussianRoulette(exact_terms=0), "exact_terms"),
        (lambda: Geometric(0.0), "p must"),
        (lambda: Geometric(1.0), "p must"),
        (lambda: Poisson(0.0), "rate"),
        (lambda: Poisson(-1.0), "rate"),
        (lambda: Poisson(math.nan), "rate"),
        (lambda: RussianRoulette(probes=0), "count"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_unknown_distributions_are_refused():
    """Strings such as n_dist='geometric' belong to another package."""
    with pytest.raises((TypeError, ValueError)):
        RussianRoulette("geometric")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="probes"):
        RussianRoulette(probes="gaussian")  # type: ignore[arg-type]


def test_events_with_several_dimensions():
    net = nn.Sequential(nn.Flatten(), *align(scaled_mlp(6, 8, gentle_sine, 0.5)), nn.Unflatten(1, (2, 3)))
    x = torch.randn(2, 2, 3, dtype=torch.float64)
    estimate = RussianRoulette(exact_terms=60, probes=Orthogonal(6))(contraction(net), x)
    assert_close(estimate.log_det, log_det(net, x), 1e-9)
