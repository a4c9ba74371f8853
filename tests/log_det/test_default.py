"""The estimator nobody named: exact for small events, unbiased beyond, by a rule that does not depend on the mode."""

import pytest
import torch

from iresflow_plugin import ResidualBlock
from iresflow_plugin.lipschitz import contraction
from iresflow_plugin.log_det import BySize, Exact, Omitted, RussianRoulette
from tests.helpers import assert_close, log_det, scaled_mlp


@pytest.mark.parametrize("size", [1, 3, 4, 5, 6, 7])
def test_by_size_chooses_as_documented(size):
    rule = BySize(with_gradients=4, without_gradients=6)
    x = torch.randn(2, size)
    assert isinstance(rule.choose(x), Exact if size <= 4 else RussianRoulette)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert isinstance(rule.choose(x), Exact if size <= 6 else RussianRoulette)


def test_by_size_counts_all_dimensions_of_the_event():
    rule = BySize(with_gradients=4, without_gradients=6)
    assert isinstance(rule.choose(torch.zeros(3, 2, 2)), Exact)
    assert isinstance(rule.choose(torch.zeros(1, 5, 1)), RussianRoulette)


def test_the_default_of_a_block():
    block = ResidualBlock(scaled_mlp(2))
    assert block.estimator == BySize()
    x = torch.randn(4, 2, dtype=torch.float64)
    assert_close(block(x)[1], log_det(block.branch, x), 1e-11)
    assert torch.equal(block.train()(x)[1], block.eval()(x)[1])


def test_the_default_never_truncates():
    """Beyond the sizes of Exact it is unbiased, with and without gradients."""
    rule = BySize()
    assert 2 <= rule.with_gradients <= rule.without_gradients
    beyond = torch.zeros(1, rule.without_gradients + 1)
    assert isinstance(rule.choose(beyond), RussianRoulette)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_omitted_is_nan_and_cannot_be_mistaken_for_a_density(direction):
    block = ResidualBlock(scaled_mlp(3), log_det=Omitted())
    x = torch.randn(4, 3, dtype=torch.float64)
    value, missing = getattr(block, direction)(x)
    assert missing.shape == (4,) and missing.dtype == x.dtype and missing.isnan().all()
    expected = getattr(ResidualBlock(block.branch, log_det=Exact()), direction)(x)[0]
    assert_close(value, expected, 1e-12)


def test_omitted_keeps_gradients_of_the_samples():
    block = ResidualBlock(scaled_mlp(3), log_det=Omitted())
    block.inverse(torch.randn(4, 3, dtype=torch.float64))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters())


def test_estimates_agree_across_estimators():
    net = scaled_mlp(3)
    x = torch.randn(4, 3, dtype=torch.float64)
    assert_close(BySize()(contraction(net), x).value, net(x), 1e-13)
    assert_close(Omitted()(contraction(net), x).value, net(x), 1e-13)
