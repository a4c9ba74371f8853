"""What one thread, task or generator sets is its own, and what two compute at the same time is never mixed.

Interleavings are played through on purpose and not left to chance: `Interrupted` lets another thread run in front of
one operation of a computation, and the tests try all operations.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from iresflow_plugin import ResidualBlock, using
from iresflow_plugin.inverse import FixedPoint, Newton
from iresflow_plugin.lipschitz import AlmostOrthogonal, Bjorck, Frobenius, Spectral, constrain, lipschitz_bound
from iresflow_plugin.log_det import Exact, Omitted, PowerSeries
from iresflow_plugin.nets import LipschitzMLP
from tests.helpers import name, operator_matrix, raw_weights, scale_weights, svd_norm

WAIT = 10.0  # seconds, after which a test fails instead of hanging


def block_of(size: int = 3) -> ResidualBlock:
    return ResidualBlock(scale_weights(LipschitzMLP([size, 16, size])))


def settings_of(block: ResidualBlock) -> tuple:
    return block.estimator, block.solver


def in_another_thread(function: Callable, *args: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(WAIT)


# ------------------------------------------------------------------------------------------- using


def overlap(block: ResidualBlock, error: type[Exception] | None = None) -> list[tuple]:
    """Two threads inside `using` at the same time that leave in the order they came; what each saw before leaving."""
    both_inside, first_left = threading.Barrier(2), threading.Event()

    def serve(first: bool, *wanted: Any) -> tuple:
        try:
            with using(block, *wanted):
                both_inside.wait(WAIT)
                if not first:
                    assert first_left.wait(WAIT)
                seen = settings_of(block)
                if first and error is not None:
                    raise error
        except KeyError:
            pass
        finally:
            if first:
                first_left.set()
        return seen

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(serve, True, Omitted(), Newton()), pool.submit(serve, False, Exact(), FixedPoint())]
        return [call.result(WAIT) for call in calls]


@pytest.mark.parametrize("error", [None, KeyError], ids=["plain", "error"])
def test_overlapping_uses_in_two_threads_leave_the_block_as_it_was(error):
    block, x = block_of(), torch.randn(4, 3)
    before, numbers = settings_of(block), block(x)[1]
    assert overlap(block, error) == [(Omitted(), Newton()), (Exact(), FixedPoint())]
    assert settings_of(block) == before
    assert in_another_thread(settings_of, block) == before
    assert torch.equal(block(x)[1], numbers)


def test_another_thread_is_not_affected_while_this_one_is_inside():
    block, x = block_of(), torch.randn(4, 3)
    before, numbers = settings_of(block), block(x)[1]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result(WAIT)  # its thread runs already
        with using(block, log_det=Omitted(), inverse=Newton()):
            assert pool.submit(settings_of, block).result(WAIT) == before
            assert torch.equal(pool.submit(block, x).result(WAIT)[1], numbers)
            assert block(x)[1].isnan().all()


def test_every_block_of_a_model_is_set_in_this_thread_alone():
    model = nn.ModuleList([block_of(), block_of()])
    before = [settings_of(block) for block in model]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result(WAIT)
        with using(model, log_det=PowerSeries(3)):
            assert [block.estimator for block in model] == [PowerSeries(3)] * 2
            assert pool.submit(lambda: [settings_of(block) for block in model]).result(WAIT) == before


def test_nested_uses_end_one_by_one_in_every_thread():
    block = block_of()
    before, meet = settings_of(block), threading.Barrier(3)

    def nest(outer: Any, inner: Any) -> list:
        seen = []
        with using(block, log_det=outer, inverse=Newton()):
            meet.wait(WAIT)
            with pytest.raises(KeyError), using(block, log_det=inner):
                meet.wait(WAIT)
                seen.append(settings_of(block))
                raise KeyError
            meet.wait(WAIT)
            seen.append(settings_of(block))
        return [*seen, settings_of(block)]

    with ThreadPoolExecutor(3) as pool:
        pairs = [(Exact(), PowerSeries(2)), (PowerSeries(3), Omitted()), (Omitted(), Exact())]
        for (outer, inner), call in zip(pairs, [pool.submit(nest, *pair) for pair in pairs], strict=True):
            assert call.result(WAIT) == [(inner, Newton()), (outer, Newton()), before]


def test_tasks_keep_their_own_settings():
    block, x = block_of(), torch.randn(4, 3)
    before, numbers = settings_of(block), block(x)[1]

    async def serve(estimator: Any, enters: asyncio.Event, may_leave: asyncio.Event) -> tuple[Any, Tensor]:
        with using(block, log_det=estimator):
            enters.set()
            await may_leave.wait()
            return block.estimator, block(x)[1]

    async def both() -> list:
        """The first one leaves while the second one is inside."""
        enters, second_enters, first_left = asyncio.Event(), asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(serve(Omitted(), enters, second_enters))
        await enters.wait()
        assert settings_of(block) == before
        second = asyncio.create_task(serve(PowerSeries(2), second_enters, first_left))
        left = await first
        first_left.set()
        return [left, await second]

    (first, unknown), (second, _) = asyncio.run(both())
    assert (first, second) == (Omitted(), PowerSeries(2)) and unknown.isnan().all()
    assert settings_of(block) == before
    assert torch.equal(block(x)[1], numbers)


def steps(block: ResidualBlock, estimator: Any) -> Any:
    with using(block, log_det=estimator):
        yield block.estimator
        yield block.estimator


def test_generators_that_end_in_the_order_they_began_leave_the_block_as_it_was():
    block = block_of()
    before = settings_of(block)
    first, second = steps(block, Omitted()), steps(block, Exact())
    assert (next(first), next(second)) == (Omitted(), Exact())
    first.close()
    assert next(second) == Exact()
    second.close()
    assert settings_of(block) == before


def test_a_generator_may_be_ended_by_another_thread():
    block = block_of()
    before, items = settings_of(block), steps(block, Omitted())
    assert next(items) == Omitted()
    in_another_thread(items.close)
    assert settings_of(block) == before
    assert in_another_thread(settings_of, block) == before


def test_assignment_is_for_all_threads_and_survives_using():
    block, x = block_of(), torch.randn(4, 3)
    block.estimator, block.solver = Exact(), Newton()
    assert settings_of(block) == in_another_thread(settings_of, block) == (Exact(), Newton())
    with using(block, log_det=Omitted(), inverse=FixedPoint()):
        assert settings_of(block) == (Omitted(), FixedPoint())
        assert block(x)[1].isnan().all()
    assert settings_of(block) == in_another_thread(settings_of, block) == (Exact(), Newton())
    assert torch.equal(block(x)[1], block(x)[1])
    block.estimator = PowerSeries(2)
    assert block.estimate(x).terms == in_another_thread(block.estimate, x).terms == 2


# ------------------------------------------------------------------------------------------- hosts


class Halving(nn.Module):
    """x -> x / 2; a thread that has asked for it is held up here until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.held = threading.local()

    def lipschitz_bound(self) -> float:
        return 0.5

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self.held, "arrived"):
            self.held.arrived.set()
            assert self.held.may_go_on.wait(WAIT)
        return x / 2


def test_freia_without_log_det_in_several_threads_leaves_the_others_their_log_det():
    framework = pytest.importorskip("FrEIA.framework")
    from iresflow_plugin.adapters.freia import ResidualModule

    branch, x = Halving(), torch.randn(5, 6)
    inn = framework.SequenceINN(6)
    inn.append(ResidualModule, branch_or_block=branch)
    block = inn.module_list[0].block
    before, numbers = settings_of(block), inn(x)[1]
    arrived, may_go_on = [[threading.Event() for _ in range(4)] for _ in range(2)]

    def sample(i: int) -> tuple[Tensor, Tensor]:
        branch.held.arrived, branch.held.may_go_on = arrived[i], may_go_on[i]
        with torch.no_grad():
            return inn(x, jac=False, rev=i % 2 == 1)

    calls, seen = [], []
    with ThreadPoolExecutor(4) as pool:
        for i in range(4):  # they come one after the other, and go in the same order
            calls.append(pool.submit(sample, i))
            assert arrived[i].wait(WAIT)
            seen.append(inn(x)[1])
        for event, call in zip(may_go_on, calls, strict=True):
            event.set()
            call.result(WAIT)
            seen.append(inn(x)[1])
    assert all(call.result()[1].isnan().all() for call in calls)
    assert all(torch.equal(log_det, numbers) for log_det in seen)
    assert settings_of(block) == before


def test_requests_for_samples_without_log_det_leave_the_density_of_a_flow():
    flows = pytest.importorskip("nflows.flows")
    from nflows.distributions import StandardNormal

    from iresflow_plugin.adapters.nflows import ResidualTransform

    flow = flows.Flow(ResidualTransform(LipschitzMLP([6, 16, 6])), StandardNormal([6]))
    x, both_inside, first_left = torch.randn(3, 6), threading.Barrier(2), threading.Event()
    density = flow.log_prob(x)

    def serve(first: bool) -> Tensor:
        with torch.no_grad(), using(flow, log_det=Omitted()):
            samples = flow.sample(4)
            both_inside.wait(WAIT)
            assert first or first_left.wait(WAIT)
        if first:
            first_left.set()
        return samples

    with ThreadPoolExecutor(2) as pool:
        assert all(call.result(WAIT).shape == (4, 6) for call in [pool.submit(serve, True), pool.submit(serve, False)])
    assert torch.equal(flow.log_prob(x), density)


# ------------------------------------------------------------------------------------------- weights and certificates


class Interrupted(TorchDispatchMode):
    """Lets another thread run `action` in front of operation number `at` of this thread; counts the operations.

    It waits for that thread, but not for ever: the other one may have to wait for this one.
    """

    def __init__(self, action: Callable[[], Any], at: int | None = None, patience: float = WAIT) -> None:
        super().__init__()
        self.action, self.at, self.patience = action, at, patience
        self.count = 0
        self.thread: threading.Thread | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.count == self.at:
            self.thread = threading.Thread(target=self.action)
            self.thread.start()
            self.thread.join(self.patience)
        self.count += 1
        return func(*args, **(kwargs or {}))

    def end(self) -> None:
        if self.thread is not None:
            self.thread.join(WAIT)
            assert not self.thread.is_alive()


def copy(target: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)


def copy_behind_the_back_of_autograd(target: Tensor, source: Tensor) -> None:
    target.data.copy_(source)


def matrix_of(layer: nn.Module) -> Tensor:
    return layer.weight.detach() if isinstance(layer, nn.Linear) else operator_matrix(layer, (2, 4, 4))


def matrix_in_use(block: ResidualBlock) -> Tensor:
    """The matrix of a linear g as the block evaluates it."""
    event = (6,) if isinstance(block.branch[0], nn.Linear) else (2, 4, 4)
    identity = torch.eye(torch.Size(event).numel(), dtype=torch.float64).view(-1, *event)
    with torch.no_grad():
        return (block(identity)[0] - identity).flatten(1).mT


LINEAR = {
    "Spectral": (lambda: nn.Linear(6, 6, bias=False), Spectral),
    "AlmostOrthogonal": (lambda: nn.Linear(6, 6, bias=False), AlmostOrthogonal),
    "Bjorck": (lambda: nn.Linear(6, 6, bias=False), Bjorck),
    "Frobenius": (lambda: nn.Linear(6, 6, bias=False), Frobenius),
    "convolution": (lambda: nn.Conv2d(2, 2, 3, padding=1, bias=False), Spectral),
}


@pytest.mark.parametrize("write", [copy, copy_behind_the_back_of_autograd], ids=name)
@pytest.mark.parametrize("sizes", [(0.1, 30.0), (30.0, 0.1), (30.0, 20.0)], ids=str)
@pytest.mark.parametrize("label", LINEAR)
def test_a_weight_overwritten_while_its_certificate_is_computed_is_certified_afterwards(label, sizes, write):
    """Whatever the two made of it meanwhile: from then on numbers and certificate are those of the weight there."""
    layer, constraint = LINEAR[label]
    block = ResidualBlock(constrain(nn.Sequential(layer()), 0.9, constraint).double(), log_det=Exact())
    (raw,) = raw_weights(block)
    first, second = [size * torch.randn_like(raw) for size in sizes]

    def compute(at: int | None) -> int:
        copy(raw, first)
        with torch.no_grad(), Interrupted(lambda: write(raw, second), at) as mode:
            lipschitz_bound(block.branch)
        mode.end()
        return mode.count

    copy(raw, second)
    right = matrix_of(block.branch[0])
    assert svd_norm(right) <= 0.9 * (1 + 1e-9)
    for at in range(compute(None)):
        compute(at)
        value = block.certificate().value
        assert svd_norm(right) <= value * (1 + 1e-9) and value <= 0.9 * (1 + 1e-9), at
        torch.testing.assert_close(matrix_of(block.branch[0]), right, rtol=0, atol=1e-12)
        torch.testing.assert_close(matrix_in_use(block), right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mine", [False, True], ids=["without autocast", "under autocast"])
def test_a_thread_gets_its_own_numbers_while_another_one_has_other_autocast(mine):
    block, x = ResidualBlock(scale_weights(LipschitzMLP([4, 16, 4]), 10.0)), torch.randn(8, 4)

    def forward(autocast: bool) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return block(x)

    theirs, right = forward(not mine), forward(mine)
    assert not torch.equal(theirs[0], right[0])
    got: list[tuple[Tensor, Tensor]] = []

    def interrupted(at: int | None) -> int:
        with Interrupted(lambda: got.append(forward(not mine)), at, patience=0.05) as mode:
            mixed = forward(mine)
        mode.end()
        assert torch.equal(mixed[0], right[0]) and torch.equal(mixed[1], right[1]), at
        return mode.count

    for at in range(interrupted(None)):
        interrupted(at)
        assert torch.equal(got[-1][0], theirs[0]) and torch.equal(got[-1][1], theirs[1]), at
