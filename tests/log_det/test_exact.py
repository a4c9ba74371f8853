"""`Exact` against the dense Jacobian of the plain module, values and gradients."""

import math

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from iresflow_plugin.lipschitz import CLipSwish, CPila, LipSwish, MaxMin, SinCos, Sine, constrain, contraction
from iresflow_plugin.log_det import Exact
from iresflow_plugin.log_det import exact as module
from tests.helpers import (
    EPS,
    SMOOTH_ACTIVATIONS,
    align,
    assert_close,
    branches,
    frozen64,
    gentle_sine,
    gradients,
    kept_entries,
    linear_branch,
    log_det,
    name,
    orthogonal,
    scale_weights,
    scaled_mlp,
)


def train_a_little(net: nn.Module, steps: int = 30) -> nn.Module:
    """Maximise a likelihood, so that weights and biases are those of a trained flow."""
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    size = net[0].in_features
    for _ in range(steps):
        x = torch.randn(64, size, dtype=net[0].weight.dtype).abs().sqrt()
        estimate = Exact()(contraction(net), x)
        optimiser.zero_grad()
        ((x + estimate.value).square().sum(1) / 2 - estimate.log_det).mean().backward()
        optimiser.step()
    return net


@pytest.mark.parametrize("state", ["aligned", "trained"])
@pytest.mark.parametrize("size", [1, 2, 6, 21, 64])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-11)], ids=str)
def test_the_value_is_the_log_det(dtype, tolerance, size, state):
    """On nets whose log-dets are far from zero, per sample and relative to its own size."""
    torch.manual_seed(size)
    net = scaled_mlp(size, 64, activation=gentle_sine if state == "aligned" else Sine, dtype=dtype)
    net = align(net) if state == "aligned" else train_a_little(net)
    x = torch.randn(16, size, dtype=dtype)
    truth = log_det(frozen64(net), x.double())
    assert truth.abs().max() > (0.5 * size**0.5 if state == "aligned" else 0.05)
    estimate = Exact()(contraction(net), x)
    assert estimate.log_det.shape == (16,) and estimate.log_det.dtype == dtype
    assert estimate.terms == 0 and not estimate.standard_error.any() and not estimate.remainder.any()
    error = (estimate.log_det.double() - truth).abs()
    # relative to the size of a log-det, or, where it happens to vanish, to that of one dimension's worth
    assert (error <= tolerance * truth.abs().clamp_min(0.1)).all(), (error / truth.abs()).max()


@given(branch_and_size=branches())
def test_any_branch_any_activation_any_context(branch_and_size):
    branch, size = branch_and_size
    dtype = next(branch.parameters()).dtype
    x, context = torch.randn(6, size, dtype=dtype), torch.randn(6, 2, dtype=dtype)
    truth = log_det(frozen64(branch), x.double(), context.double())
    estimate = Exact()(contraction(branch, context), x)
    # (I + J) has condition number up to 200 at L = 0.99; piecewise linear nets may sit on a kink, hence no tighter
    assert_close(estimate.log_det, truth, 0, 1e4 * EPS[dtype])
    assert_close(estimate.value, branch(x, context), 0, 1e3 * EPS[dtype])


@pytest.mark.parametrize("size", [1, 2, 3, 21])
@pytest.mark.parametrize("lipschitz", [0.5, 0.97, 0.999])
def test_known_linear_maps(size, lipschitz):
    x = torch.randn(4, size, dtype=torch.float64)
    net = linear_branch(-torch.eye(size, dtype=torch.float64), lipschitz)
    c = -net[0].weight[0, 0].item()
    value = Exact()(contraction(net), x).log_det
    assert_close(value, torch.full((4,), size * math.log1p(-c), dtype=torch.float64), 1e-11)
    net = linear_branch(orthogonal(size), lipschitz)
    truth = torch.linalg.slogdet(torch.eye(size) + net[0].weight)[1].expand(4)
    assert_close(Exact()(contraction(net), x).log_det, truth.detach(), 1e-11, 1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_sizes_keep_tiny_log_dets(size):
    """log1p, not log of 1 + something: in float32 a log-det of 1e-6 keeps its digits where the formula is explicit."""
    net = linear_branch(torch.eye(size, dtype=torch.float64), 1e-6 if size < 3 else 1e-3, dtype=torch.float32)
    truth = size * math.log1p(net[0].weight[0, 0].item())
    value = Exact()(contraction(net), torch.randn(2, size)).log_det
    assert value.tolist() == pytest.approx([truth] * 2, rel=1e-5 if size < 3 else 1e-3)


# --------------------------------------------------------------------------------------------------------- gradients


def dense_gradients(net: nn.Module, x: Tensor, context: Tensor | None, weights: Tensor) -> list[Tensor]:
    inputs = [x] if context is None else [x, context]
    return gradients(weights * log_det(net, x, context, create_graph=True), net, *inputs)


def our_gradients(net: nn.Module, x: Tensor, context: Tensor | None, weights: Tensor, estimator: Exact) -> list[Tensor]:
    inputs = [x] if context is None else [x, context]
    return gradients(weights * estimator(contraction(net, context), x).log_det, net, *inputs)


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("activation", SMOOTH_ACTIVATIONS, ids=name)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_gradients_with_per_sample_weights(size, activation, chunk):
    """For x, context and every parameter; row 0 has weight zero, which must not silence the others."""
    net = scaled_mlp(size, 6, activation=activation, context_features=2)
    x = torch.randn(5, size, dtype=torch.float64).requires_grad_()
    context = torch.randn(5, 2, dtype=torch.float64).requires_grad_()
    weights = torch.randn(5, dtype=torch.float64)
    weights[0] = 0
    expected = dense_gradients(net, x, context, weights)
    assert expected[0].abs().max() > 1e-3
    for ours, truth in zip(our_gradients(net, x, context, weights, Exact(chunk)), expected, strict=True):
        assert_close(ours, truth, 1e-9, 1e-10)


@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("activation", [Sine, SinCos, LipSwish, CLipSwish, CPila, nn.ELU, nn.GELU], ids=name)
def test_chunks_change_neither_values_nor_gradients(chunk, activation):
    net = scaled_mlp(7, 12, activation=activation)
    x = torch.randn(4, 7, dtype=torch.float64).requires_grad_()
    whole, parts = (Exact(c)(contraction(net), x) for c in (None, chunk))
    assert_close(parts.log_det, whole.log_det, 1e-13, 1e-14)
    with torch.no_grad():
        assert_close(Exact(chunk)(contraction(net), x).log_det, whole.log_det, 1e-13, 1e-14)
    weights = torch.randn(4, dtype=torch.float64)
    for one, other in zip(*[gradients(weights * e.log_det, net, x) for e in (whole, parts)], strict=True):
        assert_close(other, one, 1e-12, 1e-13)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("entries", [1, 7, 40, 150, 10**6])
def test_no_more_entries_than_a_chunk_may_hold_are_taken_at_a_time(monkeypatch, entries, mode):
    """By default, whatever the batch: columns are split for a backward pass, rows where there is none."""
    net = scaled_mlp(6, 8, context_features=2)
    x, context = torch.randn(10, 6, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    whole = Exact()(contraction(net, context), x)
    taken, columns = [], module.jacobian_columns

    def spied(at_x, point: Tensor, which: range) -> Tensor:
        taken.append((len(point), len(which)))
        return columns(at_x, point, which)

    monkeypatch.setattr(module, "CHUNK_ENTRIES", entries)
    monkeypatch.setattr(module, "jacobian_columns", spied)
    with mode():
        estimate = Exact()(contraction(net, context), x)
    assert sum(rows * count for rows, count in taken) == 10 * 6  # everything once
    least = 10 if mode is torch.enable_grad else 1  # rows that are taken together
    assert all(rows * count * 6 <= max(entries, 6 * least) for rows, count in taken)
    assert mode is torch.no_grad or {rows for rows, _ in taken} == {10}
    assert_close(estimate.log_det, whole.log_det, 1e-13)
    assert_close(estimate.value, whole.value, 1e-13)


@pytest.mark.parametrize("chunk", [1, 4, 12])
def test_chunks_bound_the_memory_of_the_backward_pass(chunk):
    """With them the Jacobian and its factors are kept, without them the activations of every column as well."""
    net = scaled_mlp(24, 128)
    x = torch.randn(8, 24, dtype=torch.float64).requires_grad_()
    g = contraction(net)

    def kept(chunk: int | None) -> int:
        return kept_entries(lambda: Exact(chunk)(g, x), x, *g.tensors())

    once = kept_entries(lambda: g.linearise(x).value, x, *g.tensors())  # the value has a backward pass, too
    assert kept(None) > 24 * 8 * 2 * 128  # of two hidden layers
    assert kept(chunk) < 0.2 * kept(None)
    assert kept(chunk) <= once + 2 * 8 * 24 * 24


def test_no_gradient_is_invented_for_piecewise_linear_nets():
    """MaxMin has no second derivative: the log-det depends on the weights, locally not on x or biases."""
    net = scaled_mlp(4, 8, activation=MaxMin)
    x = torch.randn(5, 4, dtype=torch.float64).requires_grad_()
    value = Exact()(contraction(net), x).log_det.sum()
    assert (
        torch.autograd.grad(value, x, retain_graph=True, allow_unused=True)[0] in (None,)
        or not torch.autograd.grad(value, x, retain_graph=True, allow_unused=True)[0].any()
    )
    assert torch.autograd.grad(value, net[0].parametrizations.weight.original)[0].abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------- bits and pieces


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("chunk", [None, 2])
def test_small_batches(batch, chunk):
    net = scaled_mlp(3)
    x = torch.randn(batch, 3, dtype=torch.float64).requires_grad_()
    value = Exact(chunk)(contraction(net), x).log_det
    assert value.shape == (batch,)
    value.sum().backward()
    assert x.grad.shape == x.shape
    if batch:
        assert_close(value, log_det(net, x), 1e-11)


def test_events_with_several_dimensions():
    """(C, H, W) through Flatten and Unflatten, and a linear layer along the last dimension of (S, F)."""
    dense = scaled_mlp(12, 16, activation=gentle_sine, lipschitz=0.9)
    image = nn.Sequential(nn.Flatten(), *dense, nn.Unflatten(1, (3, 2, 2)))
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    assert_close(Exact()(contraction(image), x).log_det, log_det(image, x), 1e-11)
    rows = scale_weights(constrain(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)), 0.9), 10).double()
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    assert_close(Exact()(contraction(rows), x).log_det, log_det(rows, x), 1e-11)
    assert_close(Exact(4)(contraction(rows), x).log_det, log_det(rows, x), 1e-11)


def test_deterministic_and_independent_of_mode():
    net = scaled_mlp(5)
    x = torch.randn(4, 5, dtype=torch.float64)
    state = torch.get_rng_state()
    one = Exact()(contraction(net.train()), x).log_det
    other = Exact()(contraction(net.eval()), x).log_det
    assert torch.equal(one, other) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("chunk", [0, -3])
def test_bad_chunks_are_refused(chunk):
    with pytest.raises(ValueError, match="chunk"):
        Exact(chunk=chunk)


def test_estimators_are_plain_values():
    """Printable, comparable, hashable, frozen; misspelt keywords are errors."""
    assert Exact() == Exact() != Exact(chunk=2) and hash(Exact()) == hash(Exact())
    assert repr(Exact(chunk=2)) == "Exact(chunk=2)"
    with pytest.raises(AttributeError):
        Exact().chunk = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="chunks"):
        Exact(chunks=3)  # type: ignore[call-arg]
