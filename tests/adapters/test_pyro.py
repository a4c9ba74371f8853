"""Our transform inside Pyro: what Pyro's own suite asks, the parameter store, and mixed with Pyro's transforms."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms

from iresflow_plugin.adapters.pyro import ConditionalResidualTransform, ResidualTransform
from iresflow_plugin.log_det import Exact
from iresflow_plugin.testing import parametrize_with_checks
from tests.adapters.checks import branch, integral, jacobian_of_one, losses, two_clusters

C = 3


def normal(features: int, dtype: torch.dtype = torch.float32) -> dist.Distribution:
    return dist.Normal(torch.zeros(features, dtype=dtype), torch.ones(features, dtype=dtype)).to_event(1)


@pytest.fixture(autouse=True)
def empty_store():
    pyro.clear_param_store()


@parametrize_with_checks(
    {
        "transform": lambda: ResidualTransform(branch(4)),
        "conditional": (lambda: ConditionalResidualTransform(branch(4, C)), {"context_shape": (C,)}),
    },
    event_shape=(4,),
)
def test_the_property_kit(transform_check) -> None:
    transform_check()


def conditioned(features: int) -> ResidualTransform:
    return ConditionalResidualTransform(branch(features, C).double()).condition(torch.rand(1, C, dtype=torch.float64))


@pytest.mark.parametrize("make", [lambda d: ResidualTransform(branch(d).double()), conditioned])
@pytest.mark.parametrize("features", [2, 5])
def test_what_pyros_own_suite_asks(make, features) -> None:
    """Inverse and log-det to 1e-6 in float64, shapes for three batch shapes, and a log-det by finite differences."""
    transform = make(features)
    x = torch.randn(10, features, dtype=torch.float64)
    y = transform._call(x)
    back = transform._inverse(y)
    assert (back - x).abs().max() < 1e-6
    assert (transform.log_abs_det_jacobian(x, y) - transform.log_abs_det_jacobian(back, y)).abs().max() < 1e-6
    for batch in [(3,), (3, 4), (3, 4, 5)]:
        base = dist.Normal(torch.zeros(*batch, features, dtype=torch.float64), 1.0)
        assert dist.TransformedDistribution(base.to_event(1), [transform]).sample().shape == (*batch, features)
        assert transform.forward_shape((*batch, features)) == transform.inverse_shape((*batch, features))
    step, point = 1e-4, x[:1]
    columns = [
        (transform(point + step * e / 2) - transform(point - step * e / 2)) / step for e in torch.eye(features).double()
    ]
    wanted = torch.linalg.slogdet(torch.cat(columns))[1]
    assert (transform.log_abs_det_jacobian(point, transform(point)) - wanted).abs() < 1e-4


def test_the_parameter_store_sees_the_parameters() -> None:
    transform = ResidualTransform(branch(2))
    pyro.module("flow", transform)
    assert len(pyro.get_param_store()) == len(list(transform.parameters())) > 0


def test_training_by_svi() -> None:
    """The likelihood of data under a flow, as in Pyro's tutorial on flows."""
    transforms_ = [ResidualTransform(branch(2)), transforms.affine_coupling(2, hidden_dims=[8])]
    flow = dist.TransformedDistribution(
        normal(2), [transforms_[0].inv, transforms_[1], ResidualTransform(branch(2)).inv]
    )
    modules = torch.nn.ModuleList([transforms_[0], transforms_[1]])

    def model(data):
        pyro.module("flow", modules)
        with pyro.plate("data", len(data)):
            pyro.sample("x", flow, obs=data)

    svi = pyro.infer.SVI(model, lambda data: None, pyro.optim.Adam({"lr": 1e-2}), pyro.infer.Trace_ELBO())
    history = [svi.step(two_clusters(200)) / 200 for _ in range(30)]
    assert history[-1] < history[0] - 0.3


def test_a_conditional_mixed_flow() -> None:
    ours = [ConditionalResidualTransform(branch(2, C), Exact()) for _ in range(2)]
    coupling = transforms.conditional_affine_coupling(2, C, hidden_dims=[8])
    stack = [ours[0].inv, coupling, transforms.permute(2, torch.tensor([1, 0])), ours[1].inv]
    flow = dist.ConditionalTransformedDistribution(normal(2), stack)
    context = torch.randn(C)
    assert integral(flow.condition(context).log_prob, reach=14) == pytest.approx(1, abs=3e-3)

    def loss():
        side = torch.randint(0, 2, (200, 1)) * 2.0 - 1
        data = torch.cat([side * 2, torch.randn(200, 1)], 1) + 0.3 * torch.randn(200, 2)
        return -flow.condition(side.expand(-1, C)).log_prob(data).mean()

    parameters = [p for part in (*ours, coupling) for p in part.parameters()]
    history = losses(loss, parameters)
    assert history[-1] < history[0] - 0.3


def test_a_conditional_stack_registers_the_parameters() -> None:
    stack = dist.conditional.ConditionalComposeTransformModule(
        [ConditionalResidualTransform(branch(2, C), Exact()), transforms.permute(2)], cache_size=1
    )
    assert len(list(stack.parameters())) > 0
    made, x = stack.condition(torch.randn(C)), torch.randn(2)
    y = made(x)
    wanted = torch.linalg.slogdet(jacobian_of_one(made, x))[1]
    torch.testing.assert_close(made.log_abs_det_jacobian(x, y), wanted, atol=1e-5, rtol=0)


def test_conditioning_shares_the_parameters() -> None:
    transform = ConditionalResidualTransform(branch(2, C), cache_size=1)
    made = transform.condition(torch.randn(5, C))
    assert made.block is transform.block and made._cache_size == 1 and made.with_cache(0)._cache_size == 0
    assert isinstance(made.with_cache(0), dist.TransformModule) and hash(made) and "LipschitzMLP" in repr(made)
