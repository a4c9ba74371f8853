"""Our transform inside zuko: what zuko's own `test_flows` asks, and mixed with zuko's transforms."""

from __future__ import annotations

import pytest
import torch
import zuko
from zuko.flows import Flow, UnconditionalDistribution, UnconditionalTransform

from iresflow_plugin.adapters.zuko import ResidualTransform
from iresflow_plugin.log_det import Exact, RussianRoulette
from iresflow_plugin.testing import parametrize_with_checks
from tests.adapters.checks import branch, integral, jacobian_of_one, losses, two_clusters

C = 5


def base(features: int) -> UnconditionalDistribution:
    return UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(features), torch.ones(features), buffer=True
    )


def flow(features: int, context: int | None = C) -> Flow:
    return Flow([ResidualTransform(branch(features, context)) for _ in range(2)], base(features))


def mixed(features: int, context: int | None = C) -> Flow:
    """Residual blocks both ways round, between a masked autoregressive transform and a rotation."""
    transforms = [
        ResidualTransform(branch(features, context)),
        zuko.flows.MaskedAutoregressiveTransform(features, context or 0, hidden_features=(16,)),
        ResidualTransform(branch(features, context)).inv,
        UnconditionalTransform(zuko.transforms.RotationTransform, torch.randn(features, features)),
    ]
    return Flow(transforms, base(features))


@parametrize_with_checks(
    {
        "transform": lambda: ResidualTransform(branch(4)),
        "inverse": lambda: ResidualTransform(branch(4)).inv,
        "conditional": (lambda: ResidualTransform(branch(4, C)), {"context_shape": (C,)}),
        "flow": (lambda: flow(2), {"event_shape": (2,), "context_shape": (C,)}),
    },
    event_shape=(4,),
)
def test_the_property_kit(transform_check) -> None:
    transform_check()


@pytest.mark.parametrize("make", [flow, mixed])
def test_what_zukos_own_suite_asks(make, tmp_path) -> None:
    model = make(3)
    x, c = torch.randn(256, 3), torch.randn(C)
    log_prob = model(c).log_prob(x)
    assert log_prob.shape == (256,) and log_prob.requires_grad
    log_prob.mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(c).log_prob(x), log_prob)
    assert model.train()(c).sample((32,)).shape == (32, 3)

    model.zero_grad(set_to_none=True)
    model(c).rsample().square().sum().sqrt().backward()
    assert all(p.grad is not None for p in model.parameters())

    contexts = torch.randn(256, C)
    transform = model(contexts).transform
    torch.testing.assert_close(transform.inv(transform(x)), x, atol=1e-4, rtol=0)

    point, transform = torch.randn(3), model(c).transform
    there = jacobian_of_one(transform, point)
    back = jacobian_of_one(transform.inv, transform(point))
    torch.testing.assert_close(there, torch.linalg.inv(back), atol=1e-3, rtol=0)
    found = transform.log_abs_det_jacobian(point, transform(point))
    torch.testing.assert_close(found, torch.linalg.slogdet(there)[1], atol=1e-3, rtol=0)

    torch.save(model, tmp_path / "flow.pth")
    loaded = torch.load(tmp_path / "flow.pth", weights_only=False)
    torch.testing.assert_close(loaded(c).log_prob(point), model(c).log_prob(point))
    assert "ResidualTransform" in repr(model)


@pytest.mark.parametrize("context", [None, C])
def test_a_mixed_flow_is_a_density(context) -> None:
    model = mixed(2, context)
    given = None if context is None else torch.randn(context)
    assert integral(model(given).log_prob, reach=16) == pytest.approx(1, abs=3e-3)
    samples, log_prob = model(given).rsample_and_log_prob((64,))
    torch.testing.assert_close(log_prob, model(given).log_prob(samples), atol=1e-3, rtol=0)


def test_a_mixed_flow_learns() -> None:
    model = mixed(2, None)
    history = losses(lambda: -model().log_prob(two_clusters(200)).mean(), model.parameters(), steps=40)
    assert history[-1] < history[0] - 0.3


@pytest.mark.parametrize(
    ("inputs", "contexts", "outputs"), [((7, 3), (C,), (7, 3)), ((3,), (7, C), (7, 3)), ((4, 1, 3), (7, C), (4, 7, 3))]
)
def test_contexts_broadcast_with_inputs(inputs, contexts, outputs) -> None:
    transform = ResidualTransform(branch(3, C))(torch.randn(contexts))
    y, log_det = transform.call_and_ladj(torch.randn(inputs))
    assert y.shape == outputs and log_det.shape == outputs[:-1]


def test_one_pass_gives_value_and_log_det_of_one_draw() -> None:
    lazy, x = ResidualTransform(branch(6), RussianRoulette()), torch.randn(5, 6)
    torch.manual_seed(1)
    y, log_det = lazy().call_and_ladj(x)
    torch.manual_seed(1)
    wanted = lazy.block(x)
    torch.testing.assert_close((y, log_det), wanted)


def test_an_unconditional_block_ignores_a_context() -> None:
    lazy, x = ResidualTransform(branch(3), Exact()), torch.randn(5, 3)
    torch.testing.assert_close(lazy(torch.randn(C))(x), lazy()(x))
