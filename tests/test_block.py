"""The residual block: the known defects D1 to D18 that concern vectors, bad input, and the rest of torch."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils import parametrizations, parametrize

import iresflow_plugin
from iresflow_plugin import NotContractiveError, NotConvergedError, ResidualBlock, using
from iresflow_plugin.block import as_block
from iresflow_plugin.inverse import Anderson, FixedPoint, Newton
from iresflow_plugin.lipschitz import (
    AddContext,
    AlmostOrthogonal,
    Bjorck,
    Chain,
    Concatenate,
    Frobenius,
    Scale,
    Spectral,
    Sum,
    certified_map,
    constrain,
    lipschitz_bound,
)
from iresflow_plugin.log_det import BySize, Exact, Geometric, LogDet, Omitted, Orthogonal, PowerSeries, RussianRoulette
from iresflow_plugin.nets import LipschitzConvNet, LipschitzMLP
from tests.helpers import (
    EPS,
    align,
    assert_close,
    assert_second_derivatives,
    branches,
    frozen64,
    gentle_sine,
    gradients,
    inverse64,
    jacobian,
    linear_branch,
    log_det,
    orthogonal,
    raw_weights,
    scale_weights,
    scaled_mlp,
)

ESTIMATORS = [Exact(), Exact(chunk=2), PowerSeries(5), PowerSeries(tolerance=1e-3), RussianRoulette(), BySize()]
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)


def block_of(size: int = 3, estimator: object = None, context: int | None = None, **options: object) -> ResidualBlock:
    net = scaled_mlp(size, 6, gentle_sine, 0.9, context_features=context, **options)
    return ResidualBlock(align(net), Exact() if estimator is None else estimator)


def points(batch: int = 5, size: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, size, dtype=dtype)


# ------------------------------------------------------------------------------------------------------- round trips


@given(branch_and_size=branches(), solver=st.sampled_from([FixedPoint(), Anderson(), Newton()]))
def test_there_and_back(branch_and_size, solver):
    """Any branch, both dtypes: inverse(forward(x)) = x and the log-dets cancel; forward(inverse(y)) = y."""
    branch, size = branch_and_size
    dtype = next(branch.parameters()).dtype
    lipschitz = lipschitz_bound(branch).value
    block = ResidualBlock(branch, Exact(), solver)
    x, context = points(6, size, dtype), points(6, 2, dtype)
    with torch.no_grad():
        y, there = block(x, context)
        z, back = block.inverse(y, context)
        again, _ = block(z, context)
    # y is itself rounded, which moves x by eps |y| / (1 - L)
    far = 100 * EPS[dtype] * (1 + x.norm(dim=1).max().item() + y.norm(dim=1).max().item()) / (1 - lipschitz)
    assert_close(z, x, 0, far)
    assert_close(again, y, 0, far)
    smooth = not any(isinstance(m, (nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.Softsign, nn.ELU)) for m in branch.modules())
    if smooth and dtype == torch.float64:
        assert_close(back, -there, 1e-6, 1e-6)


def test_the_explicit_pass_is_x_plus_g():
    block = block_of(context=2)
    x, context = points(), points(5, 2)
    y, value = block(x, context)
    assert_close(y, x + block.branch(x, context), 1e-13)
    assert_close(value, log_det(block.branch, x, context), 1e-11)
    assert y.shape == x.shape and value.shape == (5,)


def test_events_of_images_through_flatten_and_unflatten():
    """(C, H, W), in both directions, and non-contiguous input as nflows' multiscale transform hands it over."""
    dense = align(scaled_mlp(12, 16, gentle_sine, 0.9))
    block = ResidualBlock(nn.Sequential(nn.Flatten(), *dense, nn.Unflatten(1, (3, 2, 2))), Exact())
    x = torch.randn(4, 2, 2, 3, dtype=torch.float64).permute(0, 3, 1, 2)
    assert not x.is_contiguous()
    y, value = block(x)
    assert y.shape == x.shape
    assert_close(y.reshape(4, 12), x.reshape(4, 12) + dense(x.reshape(4, 12)), 1e-13)
    assert_close(value, log_det(dense, x.reshape(4, 12)), 1e-11)
    z, back = block.inverse(y)
    assert_close(z, x, 1e-11)
    assert_close(back, -value, 1e-10)


@every_estimator
def test_non_contiguous_input(estimator):
    """D18."""
    block = block_of(estimator=estimator)
    wide = points(5, 6)
    x = wide[:, ::2]
    torch.manual_seed(0)
    one = block(x)
    torch.manual_seed(0)
    other = block(x.contiguous())
    for a, b in zip(one, other, strict=True):
        assert_close(a, b, 1e-13)
    assert_close(block.inverse(one[0].detach().mT.contiguous().mT)[0], x, 1e-11)


@pytest.mark.parametrize("batch", [0, 1])
@every_estimator
def test_batches_of_none_and_one(estimator, batch):
    block = block_of(estimator=estimator, context=2)
    x, context = points(batch).requires_grad_(), points(batch, 2)
    y, there = block(x, context)
    z, back = block.inverse(y, context)
    assert y.shape == z.shape == (batch, 3) and there.shape == back.shape == (batch,)
    (z.sum() + back.sum() + there.sum()).backward()
    assert x.grad.shape == x.shape


def test_one_context_row_serves_the_whole_batch():
    block = block_of(context=2)
    x, context = points(), points(1, 2)
    for direction in (block.forward, block.inverse):
        for one, other in zip(direction(x, context), direction(x, context.expand(5, 2)), strict=True):
            assert_close(one, other, 1e-12)


def test_context_by_position_and_by_keyword_and_ignored_when_not_needed():
    block, plain = block_of(context=2), block_of()
    x, context = points(), points(5, 2)
    assert torch.equal(block(x, context)[0], block(x, context=context)[0])
    assert torch.equal(block.inverse(x, context)[0], block.inverse(x, context=context)[0])
    assert torch.equal(plain(x, context)[0], plain(x)[0])
    assert torch.equal(plain.inverse(x, context=None)[0], plain.inverse(x, context)[0])


@pytest.mark.parametrize("lipschitz", [0.5, 0.97])
def test_the_bound_holds_whatever_the_context(lipschitz):
    net = scaled_mlp(3, 8, gentle_sine, lipschitz, context_features=2)
    block = ResidualBlock(net, Exact())
    for scale in (0.0, 1.0, 100.0):
        x, context = points(16), scale * points(16, 2)
        norms = torch.linalg.matrix_norm(jacobian(net, x, context), ord=2)
        assert norms.max() <= block.certificate().value <= lipschitz
        y, _ = block(x, context)
        assert_close(block.inverse(y, context)[0], x, 1e-9)


def test_certificate_solution_and_estimate_are_at_hand():
    block = block_of()
    x = points()
    assert block.certificate() == lipschitz_bound(block.branch)
    estimate = block.estimate(x)
    assert_close(estimate.value, block.branch(x), 1e-13)
    solution = block.solve(x)
    assert_close(solution.x, block.inverse(x)[0], 1e-12)
    assert (solution.error_bound < 1e-12).all() and not solution.x.requires_grad


def test_g_is_evaluated_once_in_the_explicit_pass():
    calls = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return 0.5 * torch.sin(x)

        def lipschitz_bound(self) -> float:
            return 0.5

    block = ResidualBlock(Chain(Spy()), Omitted())
    block(points())
    assert len(calls) == 1


# --------------------------------------------------------------------------------------------------- D1 to D18, by name


@every_estimator
@pytest.mark.parametrize("mode", [True, False])
def test_d1_the_value_is_the_log_det_in_training_as_well(estimator, mode):
    """D1: g = x/2 in 3 dimensions is 1.216 and not tr(J (I + J)^-1) = 1.0, whatever the mode. 600 calls, 4.5 errors."""
    net = linear_branch(torch.diag(torch.tensor([1.0, 1.0, 1.0]) * 0.05), 0.9)
    net[0].parametrizations.weight.original.data = 0.5 * torch.eye(3, dtype=torch.float64)
    block = ResidualBlock(net, estimator).train(mode)
    with torch.no_grad():
        values = torch.stack([block(points(2))[1] for _ in range(600)])
    truth = 3 * math.log(1.5)
    allowed = 4.5 * values.std() / 600**0.5 + (1e-10 if not isinstance(estimator, PowerSeries) else 0.02)
    assert abs(values.mean() - truth) < allowed


WEIGHTINGS = [[0.0, 1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0, 0.0], [0.5, -2.0, 0.0, 3.0, 1.0]]
FOR_EACH_ROW = [*ESTIMATORS, RussianRoulette(Geometric())]


@pytest.mark.parametrize("estimator", FOR_EACH_ROW, ids=str)
@pytest.mark.parametrize("weights", WEIGHTINGS, ids=str)
def test_d2_per_sample_weights_are_honoured(estimator, weights):
    """D2: every row of the inputs and of the context gets the gradient of its own sample times its weight."""
    block = block_of(estimator=estimator, context=2)
    x, context, weights = points().requires_grad_(), points(5, 2).requires_grad_(), torch.tensor(weights).double()

    def rows(weights: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return torch.autograd.grad((weights * block(x, context)[1]).sum(), (x, context))

    for weighted, plain in zip(rows(weights), rows(torch.ones(5).double()), strict=True):
        assert (plain.norm(dim=1) > 1e-3).all()
        assert_close(weighted, weights[:, None] * plain, 1e-11)


@pytest.mark.parametrize("estimator", [e for e in FOR_EACH_ROW if e != RussianRoulette()], ids=str)
@pytest.mark.parametrize("row", [0, 3])
def test_d2_parameters_learn_from_the_rows_that_count(estimator, row):
    """D2: a row of weight zero may be anything, and one that counts alone gives the gradient of its own log-det.

    (But for `Decay`, whose number of terms is that of the longest vector of a batch.)
    """
    block, x = block_of(estimator=estimator), points()
    others = x.clone()
    others[[i for i in range(5) if i != row]] = points(4)

    def learnt(x: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        return gradients(block(x)[1][row], block)

    found = learnt(x)
    assert all(g.abs().max() > 1e-4 for g, p in zip(found, block.parameters(), strict=True) if p.ndim > 1)
    alike = 1e-3 if isinstance(estimator, PowerSeries) and estimator.tolerance else 1e-12
    for one, other in zip(found, learnt(others), strict=True):
        assert_close(one, other, alike)
    if isinstance(estimator, (Exact, BySize)):
        truth = log_det(block.branch, x[row : row + 1], create_graph=True)
        for one, other in zip(found, gradients(truth, block), strict=True):
            assert_close(one, other, 1e-9, 1e-12)


def test_d3_the_contraction_survives_adverse_training_without_anybody_calling_anything():
    """D3: through the block, with its inverse right after every tenth step."""
    block = ResidualBlock(LipschitzMLP([2, 16, 16, 2]), Exact())
    optimiser = torch.optim.Adam(block.parameters(), 1e-2)
    x = 3 * torch.randn(32, 2)
    for step in range(100):
        y, value = block(x)
        optimiser.zero_grad()
        (-y.square().mean() + value.mean()).backward()
        optimiser.step()
        assert block.certificate().value <= 0.97
        if step % 10 == 9:
            with torch.no_grad():
                y, value = block(x)
                assert_close(block.inverse(y)[0], x, 0, 1e-4)
                assert torch.isfinite(value).all()


def test_d4_the_inverse_is_within_its_tolerance():
    """D4: nominal 1e-5 at Lip 0.5 and 0.97 left errors of 4e-3 and 0.11 elsewhere, in float64 too."""
    for lipschitz in (0.5, 0.97):
        net = linear_branch(-torch.eye(3, dtype=torch.float64), lipschitz)
        block = ResidualBlock(net, inverse=FixedPoint(tolerance=1e-5))
        y = points(20)
        error = (block.inverse(y)[0] - inverse64(frozen64(net), y)).norm(dim=1).max()
        assert error <= 1e-5


@pytest.mark.parametrize("solver", [FixedPoint(), Anderson(), Newton()], ids=str)
def test_d5_failure_is_loud(solver):
    """D5: NaN, infinity, too few evaluations, and branches that do not contract."""
    block = ResidualBlock(align(scaled_mlp(3)), Exact(), solver)
    y = points()
    y[3, 0] = torch.nan
    with pytest.raises(NotConvergedError, match=r"rows 3"):
        block.inverse(y)
    with pytest.raises(NotConvergedError, match=r"rows 3"):
        block.solve(y)
    short = ResidualBlock(align(scaled_mlp(3)), Exact(), type(solver)(max_evaluations=1))
    with pytest.raises(NotConvergedError, match="after 1"):
        short.inverse(points())
    with pytest.raises(NotContractiveError):
        ResidualBlock(nn.Linear(3, 3))


def block_with(value: float, entries: str) -> ResidualBlock:
    block = block_of(context=2)
    with torch.no_grad():
        weight = raw_weights(block)[0]
        weight.fill_(value) if entries == "all" else weight[0, 0].fill_(value)
    return block


@pytest.mark.parametrize("entries", ["all", "one"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("solver", [FixedPoint(), Anderson(), Newton(), Newton(dense=0)], ids=str)
def test_d5_weights_that_are_no_numbers_are_the_reason_that_is_given(solver, value, entries):
    block = block_with(value, entries)
    for solve in (block.inverse, block.solve, block.preimage):
        with using(block, inverse=solver), pytest.raises(NotContractiveError, match=r"weights.*not finite"):
            solve(points(), points(5, 2))
    with pytest.raises(NotContractiveError, match=r"not finite.*'.*weight.*'"):
        block.certificate()


@every_estimator
@pytest.mark.parametrize("entries", ["all", "one"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_d5_weights_that_are_no_numbers_do_not_pass_for_a_density(estimator, value, entries):
    """Nothing that they make looks like a number."""
    block = block_with(value, entries)
    with using(block, log_det=estimator):
        y, log_density = block(points(), points(5, 2))
    assert not torch.isfinite(y).any() and not torch.isfinite(log_density).any()


def test_d6_a_request_is_honoured_or_refused():
    """D6: an exact log-det is the same twice and right; a number of terms holds in eval as well."""
    block = block_of(size=4, estimator=Exact())
    x = points(5, 4)
    for mode in (True, False):
        block.train(mode)
        assert torch.equal(block(x)[1], block(x)[1])
        assert_close(block(x)[1], log_det(block.branch, x), 1e-11)
        with using(block, log_det=PowerSeries(7)):
            assert block.estimate(x).terms == 7


@every_estimator
def test_d7_every_parameter_learns(estimator):
    """D7: no parameter is left without a gradient, in either direction (DDP, zuko's suite)."""
    for direction in ("forward", "inverse"):
        block = block_of(estimator=estimator, context=2)
        out, value = getattr(block, direction)(points(), points(5, 2))
        (out.square().sum() / 2 - value.sum()).backward()
        for label, parameter in block.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, (direction, label)


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: ResidualBlock(LipschitzMLP([2, 2]), logdet=Exact()), "logdet"),
        (lambda: ResidualBlock(LipschitzMLP([2, 2]), log_det="exact"), "log_det"),
        (lambda: ResidualBlock(LipschitzMLP([2, 2]), log_det=Exact), "log_det"),
        (lambda: ResidualBlock(LipschitzMLP([2, 2]), log_det=FixedPoint()), "log_det"),
        (lambda: ResidualBlock(LipschitzMLP([2, 2]), inverse="newton"), "inverse"),
        (lambda: ResidualBlock(LipschitzMLP([2, 2]), inverse=FixedPoint), "inverse"),
        (lambda: ResidualBlock(LipschitzMLP([2, 2]), inverse=Exact()), "inverse"),
        (lambda: ResidualBlock([2, 2]), "branch"),
        (lambda: ResidualBlock(LipschitzMLP), "branch"),
        (lambda: as_block(ResidualBlock(LipschitzMLP([2, 2])), log_det=Exact()), "log_det"),
    ],
)
def test_d8_bad_arguments_are_rejected_by_name(make, word):
    """D8."""
    with pytest.raises((TypeError, ValueError), match=word):
        make()


@every_estimator
def test_d9_inputs_are_left_untouched(estimator):
    """D9: neither values nor requires_grad; in-place activations in the branch included."""
    for block in (
        block_of(estimator=estimator, context=2),
        ResidualBlock(constrain(Chain(nn.ELU(inplace=True), nn.Linear(3, 3))).double(), estimator),
    ):
        x, context = points(), points(5, 2)
        before = x.clone(), context.clone()
        for direction in (block.forward, block.inverse):
            direction(x, context)
            assert torch.equal(x, before[0]) and torch.equal(context, before[1])
            assert not x.requires_grad and not context.requires_grad


@every_estimator
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_d10_a_torch_seed_suffices(estimator, direction, monkeypatch):
    """D10: Python's and numpy's generators are neither used, nor moved, nor replaced by fresh ones."""
    block, x = block_of(estimator=estimator), points()
    for owner, kind in ((random, "Random"), (random, "SystemRandom"), (np.random, "default_rng")):
        monkeypatch.setattr(owner, kind, refused)
    results = []
    for other in range(4):
        random.seed(other)
        np.random.seed(other)
        before = random.getstate(), np.random.get_state()[1].tolist()
        torch.manual_seed(3)
        value = getattr(block, direction)(x)[1]
        results.append(torch.cat([value, *[g.flatten() for g in gradients(value, block)]]))
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert all(torch.equal(results[0], other) for other in results)
    torch.manual_seed(4)
    assert torch.equal(getattr(block, direction)(x)[1], results[0][:5]) == isinstance(estimator, (Exact, BySize))


def refused(*_: object, **__: object) -> None:
    raise AssertionError("a generator of its own")


@every_estimator
def test_d11_gradients_do_not_depend_on_the_mode(estimator):
    """D11: in eval too, with D != 2, the log-det has its gradient."""
    block, x = block_of(estimator=estimator), points()
    found = []
    for mode in (True, False):
        torch.manual_seed(0)
        found.append(gradients(block.train(mode)(x)[1], block))
    assert max(g.abs().max() for g in found[1]) > 1e-3
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_d12_reverse_log_det():
    """D12: at the solution, with the sign of the call just made."""
    block, y = block_of(), points()
    x, back = block.inverse(y)
    assert_close(back, -log_det(block.branch, x.detach()), 1e-10)


@pytest.mark.parametrize("context", [None, 2])
def test_d14_checkpoints_load_into_a_fresh_model(context):
    """D14: whatever batches were seen before; no buffers, and the same keys before and after use."""
    used, fresh = block_of(context=context), block_of(context=context)
    x, c = points(7), None if context is None else points(7, 2)
    keys = list(used.state_dict())
    used(x, c)
    used.inverse(x, c)
    assert list(used.state_dict()) == keys and not list(used.buffers())
    file = io.BytesIO()
    torch.save(used.state_dict(), file)
    file.seek(0)
    assert not torch.equal(fresh(x, c)[0], used(x, c)[0])
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x, c)[0], used(x, c)[0]) and torch.equal(fresh(x, c)[1], used(x, c)[1])
    assert fresh.certificate() == used.certificate()


@pytest.mark.parametrize("bad", [nn.SELU(), nn.Dropout(0.1), nn.BatchNorm1d(3)], ids=str)
def test_d15_no_certificate_no_block(bad):
    """D15."""
    with pytest.raises(NotContractiveError, match=type(bad).__name__):
        constrain(nn.Sequential(nn.Linear(3, 3), bad))
    with pytest.raises(NotContractiveError, match=type(bad).__name__):
        ResidualBlock(Chain(LipschitzMLP([3, 4, 3]), bad))


def test_d15_determinants_are_positive_under_adversarial_weights():
    """A model that met every layer constraint elsewhere had det(I + J) = -1.92."""
    for seed in range(10):
        torch.manual_seed(seed)
        net = scale_weights(LipschitzMLP([3, 8, 8, 3], lipschitz=0.99).double(), 100)
        log_det(net, 3 * points(50))  # asserts the sign


TOLERANCES = [1e-1, 1e-4, 1e-7]


def minus(lipschitz: float) -> nn.Module:
    """-L x, of which the plain iteration comes closer by L at every step, and by no more."""
    return linear_branch(-torch.eye(2, dtype=torch.float64), lipschitz)


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("way", ["argument", "using", "assignment"])
def test_d16_a_tolerance_is_met_and_not_exceeded(way, tolerance):
    """D16: it is neither squared, nor exchanged for another number, nor lost on its way to the solver."""
    net, y, solver = minus(0.9), points(4, 2), FixedPoint(tolerance)
    block = ResidualBlock(net, inverse=solver if way == "argument" else FixedPoint(1e-12))
    if way == "assignment":
        block.solver = solver
    with using(block, inverse=solver if way == "using" else None):
        found, x = block.solve(y), block.inverse(y)[0]
    error = (found.x - inverse64(frozen64(net), y)).norm(dim=1)
    assert torch.equal(x, found.x)
    assert (error <= found.error_bound).all() and (found.error_bound <= tolerance).all()
    assert (error > 0.5 * tolerance).all()


def test_d16_every_argument_goes_where_its_name_says():
    """D16: the limit of evaluations is no tolerance, and what to do on failure is none of both."""
    assert FixedPoint(1e-2, 500, "warn") == FixedPoint(tolerance=1e-2, max_evaluations=500, on_failure="warn")
    y = points(4, 2)
    for solver in (FixedPoint(1e-9, 7), Anderson(1e-15, 2), Newton(1e-15, 2)):
        block = ResidualBlock(align(scaled_mlp(2)), inverse=replace(solver, on_failure="return"))
        found = block.solve(y)
        assert not found.converged.any() and (found.error_bound > solver.tolerance).all()
        limit = solver.max_evaluations + (3 if isinstance(solver, Newton) else 0)  # a step of Newton's is not cut short
        assert (found.evaluations <= limit).all()
        with using(block, inverse=solver), pytest.raises(NotConvergedError, match=f"{solver.tolerance:.3g}"):
            block.inverse(y)
        with using(block, inverse=replace(solver, on_failure="warn")), pytest.warns(RuntimeWarning, match="4 of 4"):
            block.inverse(y)
    net = minus(0.9)
    steps = [ResidualBlock(net, inverse=FixedPoint(t)).solve(y).evaluations for t in TOLERANCES]
    for fewer, more in pairwise(steps):  # a thousandth costs what it must
        assert ((more - fewer - math.log(1e-3) / math.log(-net[0].weight[0, 0].item())).abs() <= 1).all()


def test_d17_the_error_of_a_log_det_is_reported_or_zero():
    """D17: exact values say so; estimates report a standard error of the right size (80 % to 125 %)."""
    block, x = block_of(size=6), points(1, 6)
    assert not block.estimate(x).standard_error.any()
    with using(block, log_det=PowerSeries(8, probes=8)), torch.no_grad():
        many = block.estimate(x.expand(4000, 6))
    spread = many.log_det.std()
    assert 0.8 * spread < many.standard_error.square().mean().sqrt() < 1.25 * spread


# ------------------------------------------------------------------------------------------- D18: the rest of torch


def test_d18_torch_func_in_x():
    """jacrev, jacfwd, hessian and vmap over rows, of y and of the log-det."""
    block = block_of()
    x = points()
    jac = torch.eye(3) + jacobian(block.branch, x)
    for transform in (jacrev, jacfwd):
        assert_close(vmap(transform(lambda row: block(row[None])[0][0]))(x), jac, 1e-11)
    slopes = vmap(grad(lambda row: block(row[None])[1][0]))(x)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(log_det(block.branch, leaf, create_graph=True).sum(), leaf)[0]
    assert_close(slopes, expected, 1e-9)
    # row by row: in torch 2.13 vmap(jacfwd(torch.linalg.slogdet)) itself is wrong on batches
    forward = torch.stack([jacfwd(lambda row: block(row[None])[1][0])(row) for row in x])
    assert_close(forward, expected, 1e-9)
    curvature = hessian(lambda row: block(row[None])[1][0])(x[0])
    dense = torch.autograd.functional.hessian(lambda row: log_det(block.branch, row[None], create_graph=True)[0], x[0])
    assert_close(curvature, dense, 1e-7)
    assert_close(vmap(lambda row: block(row[None])[1][0])(x), block(x)[1], 1e-11)


@pytest.mark.parametrize("estimator", [Exact(), Exact(chunk=2), PowerSeries(5), RussianRoulette()], ids=str)
def test_d18_functional_call_with_gradients(estimator):
    block = block_of(estimator=estimator, context=2)
    x, context = points(), points(5, 2)
    parameters = {k: v.detach() for k, v in block.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(0)
        y, value = functional_call(block, values, (x, context))
        return y.square().sum() / 2 - value.sum()

    found = grad(loss)(parameters)
    torch.manual_seed(0)
    y, value = block(x, context)
    (y.square().sum() / 2 - value.sum()).backward()
    for label, parameter in block.named_parameters():
        assert_close(found[label], parameter.grad, 1e-9, 1e-12)


def test_d18_per_sample_gradients_and_ensembles():
    block, x = block_of(), points()
    parameters = {k: v.detach() for k, v in block.named_parameters()}

    def value(p: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(block, p, (row[None],))[1][0]

    per_sample = vmap(grad(value), in_dims=(None, 0))(parameters, x)
    for i in range(5):
        block.zero_grad()
        block(x[i : i + 1])[1].sum().backward()
        for label, parameter in block.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert_close(per_sample[label][i], expected, 1e-9, 1e-12)
    stacked = {k: torch.stack([v, 1.5 * v]) for k, v in parameters.items()}
    both = vmap(lambda p: functional_call(block, p, (x,))[1])(stacked)
    assert_close(both[0], block(x)[1], 1e-11)
    functional = functional_call(block, {k: v[1] for k, v in stacked.items()}, (x,))[1]
    assert_close(both[1], functional, 1e-11)


def test_d18_torch_func_with_chunks():
    chunked, x = block_of(estimator=Exact(chunk=2)), points()
    whole = block_of()
    whole.load_state_dict(chunked.state_dict())
    assert_close(jacrev(lambda t: chunked(t)[1].sum())(x), jacrev(lambda t: whole(t)[1].sum())(x), 1e-9)


@every_estimator
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_d18_no_grad_and_inference_mode(estimator, mode):
    """Both directions; and training goes on afterwards."""
    block, x = block_of(estimator=estimator), points()
    with mode():
        y, there = block(x)
        z, _ = block.inverse(y)
        assert not y.requires_grad and not there.requires_grad
        assert_close(z, x, 1e-10)
    optimiser = torch.optim.SGD(block.parameters(), 0.1)
    for _ in range(2):
        optimiser.zero_grad()
        sum(t.sum() for t in block(x)).backward()
        optimiser.step()
        with mode():
            block(x)


@every_estimator
def test_d18_bfloat16(estimator):
    """Keeps its dtype, and is right to the two digits it has, also in its gradients; the inverse to the last bit."""
    net = align(scaled_mlp(4, 8, gentle_sine, 0.8, dtype=torch.float32)).bfloat16()
    block, exact = ResidualBlock(net, estimator), certified_map(frozen64(net))
    x = points(6, 4).bfloat16().requires_grad_()
    wide, unit = x.detach().double().requires_grad_(), torch.finfo(torch.bfloat16).eps

    def seeded(function: Callable[..., Any], *inputs: object) -> Any:
        torch.manual_seed(0)
        return function(*inputs)

    y, there = seeded(block, x)
    truth = seeded(estimator, exact, wide)
    assert_close(y, wide + truth.value, 0, 3 * unit)
    assert_close(there, truth.log_det, 0, 4 * unit)
    assert there.abs().min() > 1
    (slope,), (right,) = (torch.autograd.grad(v.sum(), t) for v, t in ((there, x), (truth.log_det, wide)))
    assert_close(slope, right, 0.03)
    z, back = seeded(block.inverse, y.detach())
    solution = inverse64(frozen64(net), y.detach())
    assert ((z - solution).abs() <= 0.51 * unit * solution.abs()).all()
    assert_close(back, -seeded(estimator, exact, z.double()).log_det, 0, 4 * unit)
    assert {t.dtype for t in (y, there, z, back, slope)} == {torch.bfloat16}
    for direction in (block.forward, block.inverse):
        found = gradients(sum(t.float().sum() for t in direction(x.detach())), block)
        assert all(g.dtype == torch.bfloat16 and torch.isfinite(g).all() and g.any() for g in found)


def test_d18_torch_compile():
    """The same numbers and gradients under torch.compile, in training as well."""
    torch._dynamo.reset()
    block = ResidualBlock(align(scaled_mlp(3, 6, dtype=torch.float32, activation=gentle_sine)), Exact())
    compiled = torch.compile(block, backend="aot_eager")
    x = points(dtype=torch.float32)
    for one, other in zip(compiled(x), block(x), strict=True):
        assert_close(one, other, 1e-5)
    found = gradients(sum(t.sum() for t in compiled(x)), block)
    for one, other in zip(found, gradients(sum(t.sum() for t in block(x)), block), strict=True):
        assert_close(one, other, 1e-4, 1e-5)
    with torch.no_grad():  # new weights, no stale certificate
        raw_weights(block)[0].mul_(0.05)
    assert_close(compiled(x)[0], block(x)[0], 1e-5)


def test_autocast_keeps_its_promises():
    """Under autocast the layers compute in half precision; the certificate must not."""
    block = ResidualBlock(scaled_mlp(4, 8, gentle_sine, 0.9, dtype=torch.float32), Exact())
    x = points(5, 4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = block(x)
        assert block.certificate().value <= 0.9
    assert_close(y, block(x)[0], 0.05)
    assert_close(block.inverse(block(x)[0])[0], x, 1e-4)


@pytest.mark.parametrize("lipschitz", [0.97, 0.98, 0.99, 0.999])
@pytest.mark.parametrize("size", [1, 4])
def test_autocast_does_not_break_the_contraction(lipschitz, size):
    """Rounded to bfloat16, 0.999 would be 1."""
    layer = nn.Linear(size, size, bias=False)
    layer.weight.data.fill_(-5.0)
    block = ResidualBlock(constrain(nn.Sequential(layer), lipschitz), Exact())
    x = torch.ones(1, size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, value = block(x)
        assert (y - x).norm() <= block.certificate().value * x.norm() <= lipschitz * x.norm()
    assert torch.isfinite(value).all()


@torch.no_grad()
def loosened(net: nn.Module) -> nn.Module:
    """Weights of 0.9 times what they may have: no constraint binds, and no margin changes them."""
    for part in net.modules():
        if parametrize.is_parametrized(part, "weight"):
            item = part.parametrizations.weight[0]
            raw = part.parametrizations.weight.original
            raw.mul_(0.9 * item.lipschitz / item.certify(raw)[1])
    return net


UNDER_AUTOCAST = {
    "mlp": (lambda: LipschitzMLP([3, 16, 16, 3], 2, activation=gentle_sine), (6, 3)),
    "conv": (lambda: LipschitzConvNet([2, 8, 2], context_features=2, activation=nn.ELU), (6, 2, 3, 3)),
    "orthogonal": (
        lambda: constrain(Chain(AddContext(nn.Linear(2, 3)), parametrizations.orthogonal(nn.Linear(3, 3)), nn.Tanh())),
        (6, 3),
    ),
}


@pytest.mark.parametrize("solver", [FixedPoint(), Anderson(), Newton(), Newton(dense=0)], ids=str)
@pytest.mark.parametrize("label", UNDER_AUTOCAST)
@pytest.mark.parametrize("factor", [1.0, 20.0])
def test_autocast_there_and_back(label, solver, factor):
    """Solves converge, to what the forward pass under autocast inverts; whatever the dtype of the outputs of others."""
    make, shape = UNDER_AUTOCAST[label]
    block = ResidualBlock(scale_weights(make(), factor), Exact(), solver)
    x, context = torch.randn(shape), torch.randn(6, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, there = block(x, context)
        z, back = block.inverse(y, context)
        others = block.preimage(y, context), block.solve(y, context).x
        halves = block.inverse(y.bfloat16(), context.bfloat16())
    for tensor in (z, *others):
        assert_close(tensor, x, 0, 0.1)
        assert tensor.dtype == torch.float32
    assert_close(back, -there, 0, 0.2)
    assert_close(halves[0], x, 0, 0.2)
    assert {t.dtype for t in (back, *halves)} == {torch.float32}


def test_autocast_inverts_its_own_forward_pass():
    """Wide constrained weights are 3 % smaller under autocast, to leave room for its rounding: in both directions."""
    net = linear_branch(orthogonal(64), 0.5, dtype=torch.float32)
    block = ResidualBlock(net, Omitted())
    x = torch.randn(20, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = block.inverse(block(x)[0])[0]
    assert (z - x).norm() <= 0.005 * x.norm()


@pytest.mark.parametrize("solver", [FixedPoint(), Anderson(), Newton(), Newton(dense=0)], ids=str)
@pytest.mark.parametrize("label", ["mlp", "conv"])
def test_autocast_changes_no_digit_of_an_inverse(label, solver):
    """Values and gradients of solve and log-det are those without autocast, where it changes no weight."""
    make, shape = UNDER_AUTOCAST[label]
    net = loosened(make())
    for part in net.modules():
        if isinstance(part, AddContext):  # the networks of the context do run in half precision
            part.network.requires_grad_(False).weight.zero_()
    block = ResidualBlock(net, Exact(), solver)
    y, context = torch.randn(shape).requires_grad_(), torch.randn(6, 2)
    learnt = [p for p in block.parameters() if p.requires_grad]
    found = []
    for on in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            x, back = block.inverse(y, context)
            (inside,) = torch.autograd.grad(block.preimage(y, context).square().sum(), y)  # as nobody should
        found.append([x, back, inside, *torch.autograd.grad(x.square().sum() + back.sum(), [y, *learnt])])
    assert all(t.dtype == torch.float32 for t in found[0])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 1e-4, 1e-4)


def test_deepcopy_and_pickle():
    block = block_of(context=2)
    x, context = points(), points(5, 2)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x, context)[0], block(x, context)[0])
        assert twin.estimator == block.estimator and twin.solver == block.solver
        assert list(twin.state_dict()) == list(block.state_dict())
        scale_weights(twin, 0.01)
        assert not torch.equal(twin(x, context)[0], block(x, context)[0])
        scale_weights(twin, 1e6)
        assert twin.certificate().value <= 0.9
        optimiser = torch.optim.SGD(twin.parameters(), 0.1)
        sum(t.sum() for t in twin(x, context)).backward()
        optimiser.step()
        copy.deepcopy(pickle.loads(pickle.dumps(twin)))(x, context)


def test_double_and_back():
    block = block_of(dtype=torch.float32)
    x = points(dtype=torch.float32)
    before = block(x)
    block.double()
    assert block(x.double())[1].dtype == torch.float64
    assert_close(block.float()(x)[0], before[0], 1e-6)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("direction", ["forward", "inverse", "solve", "estimate"])
@pytest.mark.parametrize(
    "inputs, error, words",
    [
        (lambda: torch.randn(4, 3), TypeError, r"inputs.*float32.*float64"),
        (lambda: torch.ones(4, 3, dtype=torch.int64), TypeError, r"inputs.*floating point.*int64"),
        (lambda: torch.ones(4, 3, dtype=torch.complex128), TypeError, r"inputs.*complex"),
        (lambda: [[1.0, 2.0, 3.0]], TypeError, r"inputs.*Tensor.*list"),
        (lambda: torch.randn(3).double(), ValueError, r"inputs.*\(3,\)"),
        (lambda: torch.tensor(1.0).double(), ValueError, r"inputs.*\(\)"),
        (lambda: torch.randn(4, 5).double(), ValueError, r"3 features.*inputs.*5"),
    ],
)
def test_bad_inputs_are_named(direction, inputs, error, words):
    with pytest.raises(error, match=words):
        getattr(block_of(), direction)(inputs())


@pytest.mark.parametrize("direction", ["forward", "inverse", "solve", "estimate"])
@pytest.mark.parametrize(
    "context, error, words",
    [
        (lambda: None, ValueError, r"context"),
        (lambda: torch.randn(4, 2), TypeError, r"context.*float32.*float64"),
        (lambda: torch.ones(5, 2, dtype=torch.int64), TypeError, r"context.*int64"),
        (lambda: torch.randn(4, 2).double(), ValueError, r"context.*5.*4"),
        (lambda: torch.randn(5, 3).double(), ValueError, r"context.*2 features"),
        (lambda: torch.randn(5).double(), ValueError, r"context.*\(5,\)"),
        (lambda: torch.tensor(1.0).double(), ValueError, r"context.*\(\)"),
        (lambda: [1.0, 2.0], TypeError, r"context.*list"),
    ],
)
def test_bad_contexts_are_named(direction, context, error, words):
    with pytest.raises(error, match=words):
        getattr(block_of(context=2), direction)(points(), context())


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("out", [1, 2, 5])
@pytest.mark.parametrize("estimator", [Exact(), PowerSeries(3), Omitted()], ids=str)
def test_a_branch_that_changes_the_size_is_explained(estimator, out, direction):
    block = ResidualBlock(LipschitzMLP([3, 6, out]), estimator)
    with pytest.raises(ValueError, match=rf"\(3,\).*\({out},\)"):
        getattr(block, direction)(torch.randn(4, 3))


# ------------------------------------------------------------------------------------------------------------- using()


def model_of_blocks() -> nn.Sequential:
    return nn.Sequential(block_of(), nn.Identity(), nn.ModuleList([block_of(), block_of(estimator=PowerSeries(3))]))


def settings_of(model: nn.Module) -> list[tuple]:
    return [(m.estimator, m.solver) for m in model.modules() if isinstance(m, ResidualBlock)]


def test_using_changes_every_block_and_restores():
    model = model_of_blocks()
    before = settings_of(model)
    with using(model, log_det=PowerSeries(2), inverse=Newton()) as nothing:
        assert nothing is None
        assert settings_of(model) == [(PowerSeries(2), Newton())] * 3
        with using(model[2], log_det=Exact()):
            assert [e for e, _ in settings_of(model)] == [PowerSeries(2), Exact(), Exact()]
        assert settings_of(model) == [(PowerSeries(2), Newton())] * 3
    assert settings_of(model) == before


def test_using_restores_after_an_exception():
    model = model_of_blocks()
    before = settings_of(model)
    with pytest.raises(KeyError), using(model, log_det=Exact(), inverse=Newton()):
        raise KeyError
    assert settings_of(model) == before
    with pytest.raises(TypeError, match="inverse"), using(model, log_det=Exact(), inverse="newton"):
        pass
    assert settings_of(model) == before
    with pytest.raises(TypeError, match="log_det"), using(model, log_det="exact"):
        pass
    assert settings_of(model) == before


def test_using_one_argument_leaves_the_other():
    model = model_of_blocks()
    before = settings_of(model)
    with using(model, inverse=Newton()):
        assert [e for e, _ in settings_of(model)] == [e for e, _ in before]
        assert all(s == Newton() for _, s in settings_of(model))


def test_using_a_single_block_changes_what_it_computes():
    block, x = block_of(), points()
    exact = block(x)[1]
    with using(block, log_det=PowerSeries(1, probes=Orthogonal(3))):
        trace = jacobian(block.branch, x).diagonal(dim1=1, dim2=2).sum(1)
        assert_close(block(x)[1], trace, 1e-10)
        assert (block(x)[1] - exact).abs().max() > 1e-2
    assert torch.equal(block(x)[1], exact)


def test_using_needs_a_block():
    with pytest.raises(ValueError, match="Linear"), using(nn.Linear(2, 2), log_det=Exact()):
        pass


def test_train_and_eval_change_nothing():
    block, x = ResidualBlock(scaled_mlp(3)), points()
    assert torch.equal(block.train()(x)[1], block.eval()(x)[1])
    assert torch.equal(block.train().inverse(x)[0], block.eval().inverse(x)[0])


# --------------------------------------------------------------------------------------------------------- small things


def test_as_block_takes_either():
    branch = LipschitzMLP([2, 4, 2])
    block = ResidualBlock(branch)
    assert as_block(block) is block
    made = as_block(branch, Exact(), Newton())
    assert (made.branch, made.estimator, made.solver) == (branch, Exact(), Newton())


def test_public_names_and_repr():
    for public in ("ResidualBlock", "using", "NotContractiveError", "NotConvergedError"):
        assert public in iresflow_plugin.__all__ and hasattr(iresflow_plugin, public)
    text = repr(ResidualBlock(LipschitzMLP([2, 4, 2]), PowerSeries(terms=4), Newton(tolerance=1e-3)))
    for part in ("PowerSeries(terms=4", "Newton(tolerance=0.001", "LipschitzMLP", "Spectral(lipschitz="):
        assert part in text


def test_blocks_are_ordinary_modules():
    """Nested branches, shared branches, to(), parameters(), zero_grad()."""
    net = constrain(
        Chain(Sum(nn.Linear(3, 3), nn.Sequential(Scale(0.5), nn.Tanh())), Concatenate(nn.Linear(3, 3))), 0.9
    )
    one, other = ResidualBlock(net), ResidualBlock(net)
    assert len(list(nn.ModuleList([one, other]).parameters())) == 4
    x = torch.randn(4, 3)
    assert torch.equal(one(x)[0], other(x)[0])


# ----------------------------------------------------------------------------------------------- second derivatives


@pytest.mark.parametrize("chunk", [None, 2])
def test_second_derivatives_of_an_exact_log_det(chunk):
    """In inputs, context and every parameter, and mixed ones; those of both directions at once."""
    block = block_of(estimator=Exact(chunk), context=2)
    x, context = points().requires_grad_(), points(5, 2).requires_grad_()
    wanted = [x, context, *block.parameters()]
    assert_second_derivatives(lambda: (block(x, context)[1] * block(x, context)[0].sin().sum(1)).sum(), wanted)
    assert_second_derivatives(lambda: sum(t.sum() for t in block.inverse(x, context)), wanted)


def test_second_derivatives_of_images():
    net = scale_weights(LipschitzConvNet([2, 3, 2], context_features=2, activation=nn.Softplus)).double()
    x, context = torch.randn(2, 2, 2, 3).double().requires_grad_(), points(2, 2).requires_grad_()
    block = ResidualBlock(net, Exact())
    assert_second_derivatives(lambda: sum(t.sum() for t in block(x, context)), [x, context, *net.parameters()], 1e-4)


RANDOM = [PowerSeries(4, probes=Orthogonal(3)), PowerSeries(tolerance=1e-3), RussianRoulette(), BySize(0, 0)]
every_random = pytest.mark.parametrize("estimator", RANDOM, ids=str)
IN_WHAT = ["inputs", "context", "weights"]


def block_and_inputs(shape: str, estimator: LogDet) -> tuple[ResidualBlock, Tensor, Tensor]:
    if shape == "images":
        net = LipschitzConvNet([2, 3, 2], context_features=2, activation=nn.ELU).double()
        block, x = ResidualBlock(net, estimator), torch.randn(5, 2, 2, 3).double()
    else:
        block, x = block_of(estimator=estimator, context=2), points()
    return block, x.requires_grad_(), points(5, 2).requires_grad_()


@every_random
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("shape", ["vectors", "images"])
@pytest.mark.parametrize("first", IN_WHAT)
@pytest.mark.parametrize("second", IN_WHAT)
def test_second_derivatives_of_a_random_log_det_are_refused(first, second, shape, direction, estimator):
    """Whatever is differentiated, and then differentiated again; first ones are there, and those of y go on."""
    block, x, context = block_and_inputs(shape, estimator)
    among = {"inputs": x, "context": context, "weights": raw_weights(block)[0]}
    y, value = getattr(block, direction)(x, context)
    (slope,) = torch.autograd.grad(value.sum(), among[first], create_graph=True)
    assert slope.abs().max() > 0
    with pytest.raises(RuntimeError, match=r"Exact\(\)"):
        torch.autograd.grad(slope.square().sum(), among[second])
    (slope,) = torch.autograd.grad(y.sin().sum(), among[first], create_graph=True)
    assert torch.isfinite(torch.autograd.grad(slope.square().sum(), among[second])[0]).all()


@every_random
@pytest.mark.parametrize(
    "twice",
    [
        lambda f, x: jacfwd(jacrev(f), randomness="different")(x),
        lambda f, x: jacrev(jacrev(f))(x),
        lambda f, x: jacrev(lambda v: jvp(f, (v,), (torch.ones_like(v),))[1])(x),
        lambda f, x: jvp(lambda v: jvp(f, (v,), (torch.ones_like(v),))[1], (x,), (torch.ones_like(x),))[1],
        lambda f, x: jvp(grad(f), (x,), (torch.ones_like(x),))[1],
    ],
    ids=["hessian", "reverse twice", "reverse over forward", "forward twice", "forward over reverse"],
)
def test_torch_func_refuses_second_derivatives_of_a_random_log_det(twice, estimator):
    """torch itself has no forward mode inside forward mode of functions like these."""
    block, x = block_of(estimator=estimator), points()
    with pytest.raises(RuntimeError, match=r"Exact\(\)|Forward mode inside forward mode"):
        twice(lambda v: block(v)[1].sum(), x)


def test_the_way_out_that_is_named_works():
    block, x = block_of(estimator=RussianRoulette()), points().requires_grad_()
    with using(block, log_det=Exact()):
        assert_second_derivatives(lambda: block(x)[1].sum(), [x])


@pytest.mark.parametrize("constraint", [Spectral, Frobenius, AlmostOrthogonal, Bjorck])
@pytest.mark.parametrize("shape", [(3, 3), (5, 3), (3, 5)], ids=str)
def test_second_derivatives_of_constrained_weights(constraint, shape):
    """Those of weights that the constraint changes."""
    net = constrain(nn.Sequential(nn.Linear(*shape)), 0.9, constraint).double()
    weight = raw_weights(net)[0]
    weight.data = 3 * torch.randn_like(weight)
    x = points(4, shape[0])
    assert not torch.allclose(net[0].weight, weight)
    assert_second_derivatives(lambda: net(x).sin().sum(), [weight, net[0].bias], 1e-4)


@pytest.mark.parametrize("constraint", [Spectral, Frobenius, AlmostOrthogonal])
def test_second_derivatives_of_constrained_kernels(constraint):
    net = constrain(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)), 0.9, constraint).double()
    weight = raw_weights(net)[0]
    weight.data = 3 * torch.randn_like(weight)
    x = torch.randn(2, 2, 4, 4).double()
    assert not torch.allclose(net[0].weight, weight)
    assert_second_derivatives(lambda: net(x).sin().sum(), [weight, net[0].bias], 1e-4)
