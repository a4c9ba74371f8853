"""What cannot be done is said in a sentence that helps, and what looks as if it had been done has been done."""

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from iresflow_plugin import NotContractiveError, ResidualBlock, using
from iresflow_plugin.inverse import Anderson, FixedPoint, Newton
from iresflow_plugin.lipschitz import (
    AlmostOrthogonal,
    Bjorck,
    Chain,
    Frobenius,
    Scale,
    Spectral,
    constrain,
    lipschitz_bound,
)
from iresflow_plugin.log_det import (
    Estimate,
    Exact,
    Gaussian,
    Orthogonal,
    PowerSeries,
    Rademacher,
    RussianRoulette,
)
from iresflow_plugin.nets import LipschitzConvNet, LipschitzMLP
from tests.helpers import assert_close, log_det, name, operator_matrix, raw_weights, scale_weights, svd_norm

CONSTRAINTS = [Spectral, AlmostOrthogonal, Bjorck, Frobenius]

every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS, ids=name)

# ------------------------------------------------------------------------------------------- nets


def test_sizes_given_one_by_one_are_answered_with_the_list_they_should_be():
    with pytest.raises((TypeError, ValueError), match=re.escape("[8, 64, 8]")):
        LipschitzMLP(8, 64, 8)


@pytest.mark.parametrize("sizes", [8, 8.0, "8", None, [8, 64.0, 8], [8], [8, 0, 8]], ids=str)
def test_sizes_that_are_none_are_named(sizes):
    with pytest.raises((TypeError, ValueError), match="layers"):
        LipschitzMLP(sizes)


def test_channels_given_one_by_one_are_named():
    with pytest.raises((TypeError, ValueError), match="channels"):
        LipschitzConvNet(3, 16, 3)


def test_a_net_of_normflows_is_answered_with_where_ours_are():
    normflows = pytest.importorskip("normflows")
    with pytest.raises(NotContractiveError, match=r"iresflow_plugin\.nets"):
        ResidualBlock(normflows.nets.LipschitzMLP([2, 8, 2]))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 2)), (2,)),
        (lambda: nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.LazyLinear(2)), (2,)),
        (lambda: nn.Sequential(nn.LazyConv2d(2, 3, padding=1)), (2, 4, 4)),
    ],
    ids=["first", "last", "convolution"],
)
def test_a_lazy_layer_wants_to_see_a_batch_before_it_is_constrained(build, shape):
    net, x = build(), torch.randn(3, *shape)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)lazy.*batch"):
        constrain(net)
    net(x)
    block = ResidualBlock(constrain(net))
    assert_close(block(x)[0], x + net(x), 1e-6)


# ------------------------------------------------------------------------------------------- contexts


class Turned(nn.Module):
    """x -> 0.5 x, turned as the context says."""

    takes_context = True

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        turn = torch.stack([context.cos(), -context.sin(), context.sin(), context.cos()], -1).view(-1, 2, 2)
        return 0.5 * (turn @ x[..., None])[..., 0]

    def lipschitz_bound(self) -> float:
        return 0.5


CONDITIONAL = {
    "MLP": lambda: LipschitzMLP([2, 8, 2], context_features=1),
    "a module of one's own": Turned,
    "in a chain": lambda: Chain(Turned(), Scale(0.5)),
}


@pytest.mark.parametrize("label", CONDITIONAL)
@pytest.mark.parametrize("estimator", [Exact(), PowerSeries(2)], ids=["exact", "series"])
def test_a_conditional_branch_asks_for_its_context(label, estimator):
    block = ResidualBlock(CONDITIONAL[label](), log_det=estimator)
    x, context = torch.randn(4, 2), torch.randn(4, 1)
    for call in (block, block.estimate, block.inverse, block.preimage, block.solve):
        for mode in (torch.enable_grad, torch.no_grad):
            with mode(), pytest.raises(ValueError, match="needs a context"):
                call(x)
    assert_close(block.inverse(block(x, context)[0], context)[0], x, 1e-5)
    assert block.certificate().value < 1


# ------------------------------------------------------------------------------------------- arguments


WRONG = {
    "exact_terms=1.5": (lambda: RussianRoulette(exact_terms=1.5), "exact_terms"),
    "exact_terms=True": (lambda: RussianRoulette(exact_terms=True), "exact_terms"),
    "terms=2.5": (lambda: PowerSeries(terms=2.5), "terms"),
    "probes=True": (lambda: RussianRoulette(probes=True), "probes"),
    "probes=1.5": (lambda: RussianRoulette(probes=1.5), "probes"),
    "probes=0": (lambda: RussianRoulette(probes=0), "probe"),
    "probes=True of a series": (lambda: PowerSeries(2, probes=True), "probes"),
    "probes=1.5 of a series": (lambda: PowerSeries(2, probes=1.5), "probes"),
    "Rademacher": (lambda: Rademacher(1.5), "count"),
    "Gaussian": (lambda: Gaussian(1.5), "count"),
    "Orthogonal": (lambda: Orthogonal(1.5), "count"),
    "chunk=1.5": (lambda: Exact(chunk=1.5), "chunk"),
    "chunk=0": (lambda: Exact(chunk=0), "chunk"),
    "max_evaluations=2.5": (lambda: FixedPoint(max_evaluations=2.5), "max_evaluations"),
    "max_evaluations of Anderson": (lambda: Anderson(max_evaluations=2.5), "max_evaluations"),
    "max_evaluations of Newton": (lambda: Newton(max_evaluations=2.5), "max_evaluations"),
    "history=2.5": (lambda: Anderson(history=2.5), "history"),
    "dense=1.5": (lambda: Newton(dense=1.5), "dense"),
    "krylov=1.5": (lambda: Newton(krylov=1.5), "krylov"),
}


@pytest.mark.parametrize("label", WRONG)
def test_numbers_that_do_not_count_are_refused_by_name(label):
    make, word = WRONG[label]
    with pytest.raises((TypeError, ValueError), match=word):
        make()


@every_constraint
@pytest.mark.parametrize("value", [-5.0, 0.0, math.nan, math.inf, -math.inf])
def test_a_bound_that_is_none_is_refused_and_the_old_one_stays(constraint, value):
    block = ResidualBlock(scale_weights(LipschitzMLP([3, 8, 3], constraint=constraint)))
    x = torch.randn(4, 3)
    right, bound = block(x)[0], block.certificate()
    item = block.branch[0].parametrizations.weight[0]
    before = item.lipschitz
    with pytest.raises(ValueError, match="lipschitz"):
        item.lipschitz = value
    assert item.lipschitz == before
    assert torch.equal(block(x)[0], right) and block.certificate() == bound


@every_constraint
def test_a_bound_may_be_changed_by_assignment(constraint):
    block = ResidualBlock(scale_weights(LipschitzMLP([3, 8, 3], constraint=constraint)))
    item = block.branch[0].parametrizations.weight[0]
    before = block.certificate().value
    item.lipschitz = item.lipschitz / 2
    assert block.certificate().value == pytest.approx(before / 2, rel=0.05)
    assert svd_norm(block.branch[0].weight) <= item.lipschitz


# ------------------------------------------------------------------------------------------- estimators that learn


class Trimmed(nn.Module):
    """Exact log-dets times a learnable factor: nonsense, with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, g: Callable, x: Tensor) -> Estimate:
        exact = Exact()(g, x)
        return dataclasses.replace(exact, log_det=self.factor * exact.log_det)


def test_an_estimator_may_be_a_module_with_parameters():
    estimator, x = Trimmed(), torch.randn(4, 3)
    block = ResidualBlock(scale_weights(LipschitzMLP([3, 8, 3])), log_det=estimator)
    assert any(p is estimator.factor for p in block.parameters())
    assert sum(key.endswith("factor") for key in block.state_dict()) == 1
    right = log_det(block.branch, x)
    assert_close(block(x)[1], 0.5 * right, 1e-5, 1e-6)
    block(x)[1].sum().backward()
    assert estimator.factor.grad.item() == pytest.approx(right.sum().item(), rel=1e-4)


def test_an_estimator_with_parameters_gives_way_to_using_and_comes_back():
    estimator, x = Trimmed(), torch.randn(4, 3)
    block = ResidualBlock(scale_weights(LipschitzMLP([3, 8, 3])), log_det=estimator)
    right = block(x)[1]
    with using(block, log_det=Exact()):
        assert block.estimator == Exact()
        assert_close(block(x)[1], 2 * right, 1e-5)
        other = Trimmed()
        with using(block, log_det=other):
            assert block.estimator is other
        assert block.estimator == Exact()
    assert block.estimator is estimator and torch.equal(block(x)[1], right)
    assert any(p is estimator.factor for p in block.parameters())
    assert not any(p is other.factor for p in block.parameters())


def test_an_estimator_with_parameters_is_copied_and_replaced_with_its_block():
    estimator, x = Trimmed(), torch.randn(4, 3)
    block = ResidualBlock(scale_weights(LipschitzMLP([3, 8, 3])), log_det=estimator)
    twin = copy.deepcopy(block)
    assert torch.equal(twin(x)[1], block(x)[1])
    with torch.no_grad():
        twin.estimator.factor.fill_(1.0)
    assert_close(twin(x)[1], 2 * block(x)[1], 1e-5)
    block.estimator = Exact()
    assert torch.equal(block(x)[1], twin(x)[1])
    assert not any(p is estimator.factor for p in block.parameters())
    block.estimator = estimator
    assert any(p is estimator.factor for p in block.parameters())


# ------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("constraint", [Spectral, AlmostOrthogonal, Frobenius], ids=name)
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Conv2d(2, 1, (4, 2), stride=(1, 3)), (2, 7, 8)),
        (lambda: nn.Conv2d(3, 2, (2, 4), stride=(3, 1)), (3, 8, 6)),
        (lambda: nn.Conv2d(2, 4, (3, 5), stride=(2, 3), groups=2), (2, 7, 11)),
        (lambda: nn.Conv1d(3, 2, 3, stride=5), (3, 13)),
        (lambda: nn.Conv3d(1, 2, (2, 1, 3), stride=(1, 2, 2)), (1, 4, 4, 5)),
    ],
    ids=["4x2 by 1x3", "2x4 by 3x1", "groups", "1d", "3d"],
)
def test_strides_of_every_kind_are_constrained(build, shape, constraint):
    layer = build()
    with torch.no_grad():
        layer.weight.mul_(50)
    free = svd_norm(operator_matrix(layer, shape))
    bound = lipschitz_bound(layer)
    assert bound.certified and free <= bound.value
    net = constrain(nn.Sequential(layer), 0.9, constraint)
    assert 0.1 < svd_norm(operator_matrix(layer, shape)) <= lipschitz_bound(net).value <= 0.9 * (1 + 1e-9)
    layer.weight.sum().backward()
    assert raw_weights(net)[0].grad.isfinite().all()


@pytest.mark.parametrize("constraint", [Spectral, AlmostOrthogonal, Frobenius], ids=name)
@pytest.mark.parametrize("size", [0.01, 20.0], ids=["small", "large"])
@pytest.mark.parametrize("value", [0.0, 0.01])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad], ids=name)
def test_an_init_of_a_constrained_weight_works_or_says_to_assign(constraint, size, value, mode):
    """A weight in use is computed: what is written into it may be lost, but not silently."""
    block = ResidualBlock(scale_weights(LipschitzMLP([3, 8, 3], constraint=constraint), size))
    layer, x = block.branch[0], torch.randn(5, 3)
    wanted = torch.full_like(raw_weights(block)[0], value).detach()
    block(x)
    try:
        with mode():
            nn.init.constant_(layer.weight, value)
            block(x)
    except RuntimeError as error:
        assert re.search(r"weight\s*=", str(error))
        with mode():
            layer.weight = wanted
    assert_close(layer.weight, wanted, 1e-6)
    assert_close(block(x)[0], x + block.branch(x), 1e-6)
    layer.weight = 0.5 * wanted
    assert_close(layer.weight, 0.5 * wanted, 1e-6)


# ------------------------------------------------------------------------------------------- compilation


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_block_takes_a_smaller_last_batch(fresh_compiler):
    block = ResidualBlock(LipschitzMLP([40, 16, 40]))  # a log-det with probes
    compiled = torch.compile(block, backend="aot_eager")
    for rows in (256, 256, 100):
        x = torch.randn(rows, 40)
        y, volume = compiled(x)
        assert_close(y, block(x)[0], 1e-5)
        assert volume.shape == (rows,) and volume.isfinite().all()
