"""The estimator nobody named: exact for small events, unbiased beyond, by a rule that does not depend on the mode."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from iresflow_plugin import ResidualBlock, using
from iresflow_plugin.lipschitz import Scale, contraction
from iresflow_plugin.log_det import BySize, Exact, Omitted, PowerSeries, RussianRoulette, default
from tests.helpers import assert_close, gentle_sine, log_det, scaled_mlp

RULE = BySize(with_gradients=4, without_gradients=6)


@pytest.fixture(autouse=True)
def told(monkeypatch) -> list[str]:
    """What the user has been told in this process: nothing yet."""
    monkeypatch.setattr(default, "_told", [])
    return default._told


def chosen(net: nn.Module, x: Tensor, context: Tensor | None = None) -> object:
    return RULE.choose(contraction(net, context), x)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 6, 7])
def test_by_size_chooses_as_documented(size):
    """Fewer dimensions are exact where weights are trained than where the density is a number."""
    net, x = scaled_mlp(size), torch.randn(2, size, dtype=torch.float64)
    training = Exact() if size <= 4 else RussianRoulette()
    elsewhere = Exact() if size <= 6 else RussianRoulette()
    for point in (x, x.clone().requires_grad_()):
        for mode in (net.train, net.eval):
            mode()
            assert chosen(net, point) == training
            for without in (torch.no_grad, torch.inference_mode):
                with without():
                    assert chosen(net, point) == elsewhere
        net.requires_grad_(False)
        assert chosen(net, point) == elsewhere  # the gradient of a density in its inputs
        net.requires_grad_(True)


@pytest.mark.parametrize("trained", ["bias", "frequency", "entry of the context", "context"])
def test_training_is_when_anything_the_branch_holds_is_trained(trained):
    """One parameter is enough, wherever it stands, also one in front of the context."""
    net = scaled_mlp(5, context_features=2).requires_grad_(False)
    x, context = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    assert chosen(net, x, context) == RULE.choose(contraction(Scale(0.5)), x) == Exact()
    parts = {"bias": net[0].bias, "frequency": net[2].log_frequency, "entry of the context": net[1].network.weight}
    parts.get(trained, context).requires_grad_()
    assert chosen(net, x, context) == RussianRoulette()


def test_by_size_counts_all_dimensions_of_the_event():
    g = contraction(Scale(0.5))
    for shape, small in (
        ((3, 2, 3), True),
        ((1, 6, 1), True),
        ((100, 6), True),
        ((1, 7, 1), False),
        ((3, 2, 4), False),
    ):
        assert RULE.choose(g, torch.zeros(shape)) == (Exact() if small else RussianRoulette())


def test_the_default_of_a_block():
    block = ResidualBlock(scaled_mlp(2))
    assert block.estimator == BySize() == BySize(with_gradients=12, without_gradients=128)
    x = torch.randn(4, 2, dtype=torch.float64)
    assert_close(block(x)[1], log_det(block.branch, x), 1e-11)
    assert torch.equal(block.train()(x)[1], block.eval()(x)[1])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("size, exact", [(12, True), (13, None), (128, None), (129, False)])
def test_the_default_never_truncates(mode, size, exact):
    """It is exact or unbiased, at every size, and tells which: an estimate without an error is the log-det."""
    net = scaled_mlp(size, activation=gentle_sine)
    x = torch.randn(3, size, dtype=torch.float64)
    with warnings.catch_warnings(), mode():
        warnings.simplefilter("ignore", RuntimeWarning)
        estimate = ResidualBlock(net).estimate(x)
    exact = mode is torch.no_grad if exact is None else exact
    assert (estimate.terms == 0) == exact and not estimate.remainder.any()
    if exact:
        assert_close(estimate.log_det, log_det(net, x), 1e-9)
        assert not estimate.standard_error.any()
    else:
        assert (estimate.standard_error != 0).all()  # NaN of a single probe


# ----------------------------------------------------------------------------------------------- what the user is told


def warned(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(w.category is RuntimeWarning for w in caught)
    return [str(w.message) for w in caught]


def wide(size: int = 129) -> tuple[ResidualBlock, Tensor]:
    return ResidualBlock(scaled_mlp(size, dtype=torch.float32)), torch.randn(4, size)


@torch.no_grad()
def without_gradients(call: Callable[[], object]) -> object:
    return call()


CALLS = {
    "forward": lambda block, x: block(x),
    "inverse": lambda block, x: block.inverse(x),
    "estimate": lambda block, x: block.estimate(x),
}


@pytest.mark.parametrize("label", CALLS)
def test_a_random_density_is_told_once(label):
    """With what to do about it; not a second time, whichever block is called and how."""
    block, x = wide()
    (message,) = warned(lambda: without_gradients(lambda: CALLS[label](block, x)))
    for word in ("129 dimensions", "Exact()", "PowerSeries(", "Omitted()", "using("):
        assert word in message
    for other, point in ((block, x), wide(140)):
        for call in CALLS.values():
            assert warned(lambda call=call, b=other, p=point: without_gradients(lambda: call(b, p))) == []


def test_the_error_that_is_told_is_that_of_the_density():
    """In nats for each sample, to a factor of two: it is estimated itself."""
    block, x = wide()
    (message,) = warned(lambda: without_gradients(lambda: block(x)))
    told = float(message.split("standard error of about ")[1].split(" nats")[0])
    with torch.no_grad():
        draws = torch.stack([block(x)[1] for _ in range(100)])
    spread = draws.var(0).mean().sqrt().item()
    assert 0.5 * spread <= told <= 2 * spread


def test_telling_changes_no_number():
    """One seed decides, whether or not this process has said it before."""
    block, x = wide()

    def run() -> Tensor:
        torch.manual_seed(3)
        with torch.no_grad():
            return torch.stack([block(x)[1], block(x)[1]])

    runs: list[Tensor] = []
    assert len(warned(lambda: runs.append(run()))) == 1
    assert warned(lambda: runs.append(run())) == []
    assert torch.equal(*runs)


SILENT = {
    "in training": lambda block, x: block(x),
    "where it is exact": lambda block, x: without_gradients(lambda: wide(128)[0](x[:, :128])),
    "with an estimator that was named": lambda block, x: without_gradients(
        lambda: ResidualBlock(block.branch, RussianRoulette(probes=2))(x)
    ),
    "with one that was named for a while": lambda block, x: named_for_a_while(block, x),
    "for samples alone": lambda block, x: without_gradients(lambda: block.preimage(x)),
    "for an empty batch": lambda block, x: without_gradients(lambda: block(x[:0])),
}


def named_for_a_while(block: ResidualBlock, x: Tensor) -> None:
    for estimator in (Omitted(), PowerSeries(terms=3), Exact()):
        with torch.no_grad(), using(block, log_det=estimator):
            block(x)


@pytest.mark.parametrize("label", SILENT)
def test_nothing_is_told_where_it_would_be_noise(label, told):
    """And what was not told is told later, where it is not."""
    block, x = wide()
    assert warned(lambda: SILENT[label](block, x)) == [] and not told
    assert len(warned(lambda: without_gradients(lambda: block(x)))) == 1


def test_the_gradient_of_a_random_density_in_its_inputs_is_told_as_well():
    block, x = wide()
    block.requires_grad_(False)
    assert len(warned(lambda: block(x.requires_grad_()))) == 1


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
