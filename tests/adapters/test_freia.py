"""Our block inside FrEIA: its two frameworks, conditions, and mixed with FrEIA's modules."""

from __future__ import annotations

import FrEIA.framework as ff
import FrEIA.modules as fm
import pytest
import torch
from torch import Tensor, nn

from iresflow_plugin.adapters.freia import ResidualModule
from iresflow_plugin.lipschitz import constrain
from iresflow_plugin.log_det import Exact
from iresflow_plugin.testing import parametrize_with_checks
from tests.adapters.checks import branch, dense_log_det, integral, losses, two_clusters

C = 3


def subnet(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def sequence(features: int, context: int | None = None) -> ff.SequenceINN:
    """Residual blocks around a coupling and a permutation."""
    given = {} if context is None else {"cond": 0, "cond_shape": (context,)}
    inn = ff.SequenceINN(features)
    inn.append(ResidualModule, **given, branch_or_block=branch(features, context))
    inn.append(fm.RNVPCouplingBlock, **given, subnet_constructor=subnet)
    inn.append(fm.PermuteRandom, seed=1)
    inn.append(ResidualModule, **given, branch_or_block=branch(features, context))
    return inn


def graph(features: int) -> ff.GraphINN:
    nodes = [ff.InputNode(features, name="in")]
    nodes.append(ff.Node(nodes[-1], ResidualModule, {"branch_or_block": branch(features)}, name="ours"))
    nodes.append(ff.Node(nodes[-1], fm.AllInOneBlock, {"subnet_constructor": subnet}, name="theirs"))
    nodes.append(ff.OutputNode(nodes[-1], name="out"))
    return ff.GraphINN(nodes, verbose=False)


@parametrize_with_checks(
    {
        "module": lambda: ResidualModule([(4,)], branch_or_block=branch(4)),
        "conditional": (lambda: ResidualModule([(4,)], [(C,)], branch_or_block=branch(4, C)), {"context_shape": (C,)}),
    },
    event_shape=(4,),
)
def test_the_property_kit(transform_check) -> None:
    transform_check()


@pytest.mark.parametrize("make", [sequence, graph])
def test_a_mixed_network_inverts_and_has_the_log_det_of_its_jacobian(make) -> None:
    inn, x = make(4), torch.randn(6, 4)
    z, log_jac = inn(x)
    back, log_jac_back = inn(z, rev=True)
    assert log_jac.shape == log_jac_back.shape == (6,)
    torch.testing.assert_close(back, x, atol=1e-4, rtol=0)
    torch.testing.assert_close(log_jac_back, -log_jac, atol=1e-4, rtol=0)
    torch.testing.assert_close(log_jac, dense_log_det(inn, x), atol=1e-4, rtol=0)


def test_conditions_reach_the_block() -> None:
    inn, x = sequence(4, C), torch.randn(6, 4)
    first, second = torch.randn(6, C), torch.randn(6, C)
    z, log_jac = inn(x, c=[first])
    torch.testing.assert_close(inn(z, c=[first], rev=True)[0], x, atol=1e-4, rtol=0)
    assert (inn(x, c=[second])[0] - z).abs().max() > 1e-3
    wanted = torch.cat(
        [dense_log_det(lambda r, c=c: inn(r, c=[c]), row) for row, c in zip(x.split(1), first.split(1), strict=True)]
    )
    torch.testing.assert_close(log_jac, wanted, atol=1e-4, rtol=0)


def test_several_conditions_are_joined() -> None:
    module = ResidualModule([(4,)], [(2,), (1, 2)], branch_or_block=branch(4, 4))
    x, one, two = torch.randn(6, 4), torch.randn(6, 2), torch.randn(6, 1, 2)
    (z,), _ = module((x,), c=(one, two))
    torch.testing.assert_close(z, module.block(x, torch.cat([one, two.flatten(1)], 1))[0])


def test_training_in_front_of_a_normal() -> None:
    inn = sequence(2)

    def log_prob(x: Tensor) -> Tensor:
        z, log_jac = inn(x)
        return log_jac - z.square().sum(1) / 2 - 1.8378770664

    assert integral(log_prob, reach=14) == pytest.approx(1, abs=3e-3)
    history = losses(lambda: -log_prob(two_clusters(200)).mean(), inn.parameters())
    assert history[-1] < history[0] - 0.3


@pytest.mark.parametrize("rev", [False, True])
def test_without_jacobian_nobody_takes_a_number_for_one(rev) -> None:
    module, x = ResidualModule([(4,)], branch_or_block=branch(4)), torch.randn(6, 4)
    (out,), log_jac = module((x,), rev=rev, jac=False)
    (wanted,), _ = module((x,), rev=rev)
    torch.testing.assert_close(out, wanted)
    assert log_jac.isnan().all()
    assert module((x,), rev=rev)[1].isfinite().all()  # only for that call


def test_images() -> None:
    net = constrain(
        nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Unflatten(1, (2, 2, 2)))
    )
    inn = ff.SequenceINN(2, 2, 2)
    inn.append(ResidualModule, branch_or_block=net, log_det=Exact())
    inn.append(fm.Flatten)
    x = torch.randn(3, 2, 2, 2)
    z, _ = inn(x)
    assert z.shape == (3, 8)
    torch.testing.assert_close(inn(z, rev=True)[0], x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: ResidualModule([(2,), (2,)], branch_or_block=branch(2)), "dims_in"),
        (lambda: ResidualModule([(2,)], branch_or_block=branch(2))(torch.zeros(5, 2)), "x_or_z"),
    ],
)
def test_bad_arguments_are_named(call, word) -> None:
    with pytest.raises(ValueError, match=word):
        call()


def test_a_branch_is_required() -> None:
    with pytest.raises(TypeError, match="branch_or_block"):
        ResidualModule([(2,)])
