"""Our transform inside torch.distributions: batch dimensions, contexts, the cache, and mixed with torch's own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
    constraints,
)

from iresflow_plugin import ResidualBlock
from iresflow_plugin.adapters.distributions import ResidualTransform
from iresflow_plugin.lipschitz import constrain
from iresflow_plugin.log_det import Exact, RussianRoulette
from iresflow_plugin.testing import parametrize_with_checks
from tests.adapters.checks import (
    Counted,
    branch,
    integral,
    jacobian_of_one,
    losses,
    two_clusters,
)

C = 3


def normal(features: int) -> Independent:
    return Independent(Normal(torch.zeros(features), torch.ones(features)), 1)


# torch's inverses forget what they are the inverse of when they are copied (Pyro mends that when it is imported)
COPIES = ("deepcopy_gives_the_same_function", "pickle_gives_the_same_function")


@parametrize_with_checks(
    {
        "transform": lambda: ResidualTransform(branch(4)),
        "inverse": (lambda: ResidualTransform(branch(4), cache_size=1).inv, {"skip": COPIES}),
        "conditional": (lambda: ResidualTransform(branch(4, C)), {"context_shape": (C,)}),
        "flow": (lambda: TransformedDistribution(normal(4), [ResidualTransform(branch(4)).inv]), {"skip": COPIES}),
    },
    event_shape=(4,),
)
def test_the_property_kit(transform_check) -> None:
    transform_check()


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (2, 0, 3)])
@pytest.mark.parametrize("context", [None, (C,), "like the batch", "broadcast"])
def test_any_number_of_batch_dimensions(batch, context) -> None:
    x, c = torch.randn(*batch, 4), None
    if context is not None:
        shapes = {"like the batch": (*batch, C), "broadcast": (*(1 for _ in batch), C), (C,): (C,)}
        c = torch.randn(shapes[context])
    transform = ResidualTransform(branch(4, None if context is None else C), Exact(), context=c)
    y = transform(x)
    log_det = transform.log_abs_det_jacobian(x, y)
    assert y.shape == x.shape and log_det.shape == batch
    torch.testing.assert_close(transform.inv(y), x, atol=1e-5, rtol=0)
    rows = x.reshape(-1, 4)
    wanted = transform.block(rows, None if c is None else c.expand(*batch, C).reshape(-1, C))
    torch.testing.assert_close(y.reshape(-1, 4), wanted[0])
    torch.testing.assert_close(log_det.reshape(-1), wanted[1])


def test_a_batch_of_contexts_widens_a_single_input() -> None:
    transform = ResidualTransform(branch(4, C), context=torch.randn(7, C))
    y, log_det = transform.call_and_ladj(torch.randn(4))
    assert y.shape == (7, 4) and log_det.shape == (7,) and y.std(0).min() > 0


def test_images_have_three_event_dimensions() -> None:
    net = constrain(
        nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Unflatten(1, (2, 2, 2)))
    )
    transform = ResidualTransform(net, event_dim=3)
    assert transform.domain.event_dim == transform.codomain.event_dim == 3
    x = torch.randn(2, 5, 2, 2, 2)
    y = transform(x)
    assert transform.log_abs_det_jacobian(x, y).shape == (2, 5)
    torch.testing.assert_close(transform.inv(y), x, atol=1e-5, rtol=0)
    assert ResidualTransform(branch(2)).domain is constraints.real_vector


@pytest.mark.parametrize("cache_size", [0, 1])
def test_density_work_evaluates_g_once(cache_size) -> None:
    """`TransformedDistribution.log_prob` calls the transform and then asks for the log-det."""
    counted = Counted(3)
    transform = ResidualTransform(counted, Exact(), cache_size=cache_size)
    flow, x = TransformedDistribution(normal(3), [transform.inv]), torch.randn(5, 3)
    flow.log_prob(x)
    in_flow = counted.evaluations
    transform.block(x)
    assert in_flow == counted.evaluations - in_flow > 0


def test_a_cache_saves_the_solve_between_sample_and_log_prob() -> None:
    counted = Counted(3)
    flow = TransformedDistribution(normal(3), [ResidualTransform(counted, Exact()).with_cache(1).inv])
    sample = flow.rsample((5,))
    solving = counted.evaluations
    flow.log_prob(sample)
    flow.log_prob(sample)
    transform = flow.transforms[0].inv
    before = counted.evaluations
    transform.block(sample.detach())
    once = counted.evaluations - before
    assert solving > once and before - solving == once  # one log-det for both, and no further solve


@pytest.mark.parametrize("cache_size", [0, 1])
def test_a_random_log_det_is_that_of_the_call(cache_size) -> None:
    """No second draw: the log-det asked for is the one which the call drew."""
    transform = ResidualTransform(branch(6), RussianRoulette(), cache_size=cache_size)
    x = torch.randn(5, 6)
    torch.manual_seed(3)
    y = transform(x)
    found = transform.log_abs_det_jacobian(x, y)
    torch.manual_seed(3)
    torch.testing.assert_close(found, transform.block(x)[1])
    again = transform.log_abs_det_jacobian(x, y)
    assert torch.equal(again, found) == bool(cache_size)


def test_a_log_det_without_graph_is_not_handed_to_who_wants_gradients() -> None:
    transform, x = ResidualTransform(branch(3), cache_size=1), torch.randn(5, 3)
    with torch.no_grad():
        y = transform(x)
        assert not transform.log_abs_det_jacobian(x, y).requires_grad
    assert transform.log_abs_det_jacobian(x, y).requires_grad


def test_the_log_det_may_be_changed_in_place() -> None:
    transform, x = ResidualTransform(branch(3), cache_size=1), torch.randn(5, 3)
    y = transform(x)
    first = transform.log_abs_det_jacobian(x, y)
    first += 1
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), first - 1)


def test_with_cache_shares_the_parameters() -> None:
    transform = ResidualTransform(branch(3, C), context=torch.randn(C))
    cached = transform.with_cache()
    assert cached._cache_size == 1 and cached.block is transform.block and cached.context is transform.context
    assert transform.with_cache(0) is transform
    assert transform.condition(torch.zeros(C)).block is transform.block
    assert ComposeTransform([transform, AffineTransform(0.0, 2.0, event_dim=1)]).with_cache().parts[0]._cache_size == 1


@pytest.mark.parametrize("ours", ["explicit", "inverse"])
def test_a_mixed_flow(ours) -> None:
    mine = [ResidualTransform(branch(2), Exact()) for _ in range(2)]
    parts = [t.inv if ours == "explicit" else t for t in mine]
    stack = [parts[0], AffineTransform(torch.tensor([0.3, -0.2]), torch.tensor([1.5, 0.6]), event_dim=1), parts[1]]
    flow = TransformedDistribution(normal(2), stack)
    assert integral(flow.log_prob, reach=12) == pytest.approx(1, abs=2e-3)
    z = torch.randn(2)
    x = ComposeTransform(stack)(z)
    jacobian = jacobian_of_one(ComposeTransform(stack), z)
    wanted = normal(2).log_prob(z) - torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(flow.log_prob(x), wanted, atol=1e-4, rtol=0)
    parameters = [p for t in mine for p in t.block.parameters()]
    history = losses(lambda: -flow.log_prob(two_clusters(1000)).mean(), parameters, steps=60)
    assert history[-1] < history[0] - 0.15  # blocks that solve for the noise can contract it by half at most


def test_squashed_samples_for_variational_inference() -> None:
    """Cheap samples with gradients: x + g(x) from noise to data, then tanh."""
    transform = ResidualTransform(branch(2), cache_size=1)
    flow = TransformedDistribution(normal(2), [transform, TanhTransform(cache_size=1)])
    sample = flow.rsample((64,))
    (flow.log_prob(sample).mean() + sample.square().mean()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in transform.block.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
@pytest.mark.parametrize("cache_size", [0, 1])
def test_copies_made_in_the_middle_of_work(copied, cache_size) -> None:
    transform, x = ResidualTransform(branch(3), cache_size=cache_size), torch.randn(5, 3)
    y = transform(x)
    other = copied(transform)
    torch.testing.assert_close(other(x), y)
    torch.testing.assert_close(other.log_abs_det_jacobian(x, y), transform.log_abs_det_jacobian(x, y))
    assert other.block is not transform.block


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: ResidualTransform(branch(2), event_dim=0), "event_dim"),
        (lambda: ResidualTransform(branch(2), event_dim="1"), "event_dim"),
        (lambda: ResidualTransform(branch(2), cache_size=2), "cache_size"),
        (lambda: ResidualTransform(ResidualBlock(branch(2)), Exact()), "ResidualBlock"),
        (lambda: ResidualTransform(branch(2), context=torch.zeros(4, C))(torch.zeros(3, 2)), r"\(4, 3\).*\(3,\)"),
        (lambda: ResidualTransform(branch(2), event_dim=3)(torch.zeros(5, 2)), "event_dim"),
    ],
)
def test_bad_arguments_are_named(make, word) -> None:
    with pytest.raises(ValueError, match=word):
        make()


def test_what_it_is_can_be_read() -> None:
    assert "event_dim=1" in repr(ResidualTransform(branch(2))) and "Anderson" in repr(ResidualTransform(branch(2)))
