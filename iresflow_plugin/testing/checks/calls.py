"""How a transform may be called, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from iresflow_plugin.testing.case import Case, Measurement, NotApplicableError
from iresflow_plugin.testing.checks.measure import close, equal_on_average
from iresflow_plugin.testing.checks.registry import check
from iresflow_plugin.testing.doors import MODULE

SAME = 1e-9
DIRECTIONS = ("forward", "inverse")


@check()
def rows_are_independent(case: Case) -> Iterator[Measurement]:
    """No sample of a batch influences another.

    Catches a stopping rule, a norm or a statistic over the whole batch.
    """
    for direction in DIRECTIONS:
        live, x, context = case.live(), case.point(direction), case.context()
        changed = x.clone()
        changed[0] = case.point(direction)[0]
        with torch.no_grad():
            (y, log_det), (other_y, other_log_det) = (_seeded(live.call, direction, z, context) for z in (x, changed))
        yield close(other_y[1:], y[1:], 1e-8, f"A change of row 0 leaves the other rows' {direction} outputs alone.")
        if not case.varies:
            sentence = f"A change of row 0 leaves the other rows' {direction} log-dets alone."
            yield close(other_log_det[1:], log_det[1:], 1e-7, sentence)


@check()
def context_matters(case: Case) -> Iterator[Measurement]:
    """Every row's outputs depend on that row's context, and on no other.

    Catches a context that is dropped on the way, or mixed over the batch.
    """
    if case.context_shape is None:
        raise NotApplicableError("there is no context")
    for direction in DIRECTIONS:
        live, x = case.live(), case.point(direction)
        live.disturb()
        context = torch.randn(case.batch, *case.context_shape, dtype=torch.float64)
        changed = torch.cat([torch.randn_like(context[:1]), context[1:]])
        with torch.no_grad():
            y, other = (live.call(direction, x, c)[0] for c in (context, changed))
        moved = (other[0] - y[0]).abs().max().item()
        yield Measurement(
            float(not moved > 1e-9), 0.0, f"Another context gives another {direction} output (moved by {moved:.2g})."
        )
        yield close(other[1:], y[1:], 1e-8, f"A change of row 0's context leaves the other {direction} outputs alone.")


@check()
def context_is_optional(case: Case) -> Iterator[Measurement]:
    """An unconditional transform takes `context=None` by keyword, in both directions, as nflows hands it over.

    Catches a signature that breaks inside a conditional flow.
    """
    if case.context_shape is not None or case.door.classes[:1] not in (("nflows.transforms.base.Transform",), ()):
        raise NotApplicableError("the host does not pass context=None to unconditional transforms")
    if case.door is not MODULE and not case.door.classes:
        raise NotApplicableError("a pair of functions takes its arguments by position")
    live, x = case.live(), case.x()
    with torch.no_grad():
        for call, point in ((live.obj.forward, x), (live.obj.inverse, case.y())):
            with_none, without = (_seeded(call, point, **extra)[0] for extra in ({"context": None}, {}))
            yield close(with_none, without, SAME, "context=None gives what no context gives.")


@check()
def log_det_has_a_number_per_sample(case: Case) -> Iterator[Measurement]:
    """The log-det has shape (B,), the dtype and the device of the input.

    Catches a shape (B, 1), which turns a loss into a (B, B) matrix without a word, and a single number for the batch.
    """
    for dtype in (torch.float32, torch.float64):
        for direction in DIRECTIONS:
            live, x, context = case.live(dtype), case.point(direction, dtype), case.context(dtype=dtype)
            with torch.no_grad():
                y, log_det = live.call(direction, x, context)
            right = log_det.shape == (len(x),) and log_det.dtype == dtype and log_det.device == x.device
            right = right and y.dtype == dtype and y.shape[0] == len(x)
            found = f"the {direction} pass gave {tuple(log_det.shape)}, {log_det.dtype} for {len(x)} samples of {dtype}"
            yield Measurement(
                float(not right), 0.0, f"The log-det has a number per sample, of the input's dtype: {found}."
            )


@check()
def batches_of_none_and_one(case: Case) -> Iterator[Measurement]:
    """Batches of no sample and of one give as many outputs.

    Catches a squeeze that drops the batch, and a maximum over nothing.
    """
    for n in (0, 1):
        for direction in DIRECTIONS:
            live, context = case.live(), case.context(n)
            point = case.x(max(n, 1)) if direction == "forward" else case.y(max(n, 1))
            with torch.no_grad():
                y, log_det = live.call(direction, point[:n], context)
            right = y.shape[0] == n and log_det.shape == (n,)
            sentence = (
                f"A batch of {n} gives {n} outputs and log-dets; {direction}: {tuple(y.shape)}, {tuple(log_det.shape)}."
            )
            yield Measurement(float(not right), 0.0, sentence)


@check("D18")
def memory_layout_does_not_matter(case: Case) -> Iterator[Measurement]:
    """Inputs that are not contiguous give the same result.

    Catches `.view` on what a host's multiscale transform hands over.
    """
    for direction in DIRECTIONS:
        live, x, context = case.live(), case.point(direction), case.context()
        strided = x.transpose(0, -1).contiguous().transpose(0, -1)
        with torch.no_grad():
            (y, _), (other, _) = (_seeded(live.call, direction, z, context) for z in (x, strided))
        yield close(other, y, 1e-8, f"The {direction} pass takes inputs that are not contiguous.")


@check("D9")
def inputs_are_left_alone(case: Case) -> Iterator[Measurement]:
    """The caller's tensors keep their values and their requires_grad.

    Catches `x.requires_grad_()` and in-place arithmetic on arguments.
    """
    for train in (False, True):
        for direction in DIRECTIONS:
            live, x, context = case.live(train=train), case.point(direction), case.context()
            before = x.clone()
            live.call(direction, x, context)
            changed = not torch.equal(x, before) or x.requires_grad or (context is not None and context.requires_grad)
            yield Measurement(float(changed), 0.0, f"The {direction} pass leaves its inputs as they were.")


@check()
def outputs_may_be_changed_in_place(case: Case) -> Iterator[Measurement]:
    """The caller may change outputs and log-dets in place before calling backward.

    Catches tensors that are returned and saved for backward as well: hosts do add to log-dets in place.
    """
    for direction in DIRECTIONS:
        slopes = []
        for in_place in (False, True):
            torch.manual_seed(case.seed)
            live, x, context = case.live(train=True), case.point(direction), case.context()
            x.requires_grad_()
            y, log_det = live.call(direction, x * 1.0, context)
            kept = y.sin().sum() + log_det.sum()
            if in_place:
                y.sub_(3.0).mul_(2.0)
                log_det += 1.0
                kept = (y / 2 + 3.0).sin().sum() + (log_det - 1.0).sum()
            slopes.append(torch.autograd.grad(kept, x)[0])
        yield close(
            slopes[1], slopes[0], 1e-8, f"Changing the {direction} outputs in place does not spoil the gradient."
        )


@check("D10")
def a_torch_seed_suffices(case: Case) -> Iterator[Measurement]:
    """The same torch seed gives the same numbers.

    Catches randomness from numpy's or Python's global generator.
    """
    for train in (False, True):
        live, x, context = case.live(train=train), case.point(case.explicit), case.context()
        with torch.no_grad():
            results = [_seeded(live.call, case.explicit, x, context)[1] for _ in range(4)]
        worst = max((close(r, results[0], SAME, "").measured for r in results[1:]), default=0.0)
        yield Measurement(worst, SAME, "The same torch seed gives the same log-det, call after call.")


@check("D6", "D11")
def train_equals_eval(case: Case) -> Iterator[Measurement]:
    """train() and eval() compute the same function.

    Catches mathematics that depends on `.training`: a loss in training that is not the density in evaluation.
    """
    live, x, context = case.live(), case.point(case.explicit), case.context()
    trained = case.live(train=True)
    with torch.no_grad():
        y, other = live.call(case.explicit, x, context)[0], trained.call(case.explicit, x, context)[0]
    yield close(other, y, 1e-8, "train() and eval() give the same outputs.")
    wanted = case.log_det(live, case.explicit, x, context)

    def draw(model) -> Tensor:
        with torch.no_grad():
            return model.call(case.explicit, x, context)[1]

    if not case.varies:
        yield close(draw(trained), draw(live), 1e-8, "train() and eval() give the same log-dets.")
    else:
        for model in (live, trained):
            yield equal_on_average(case, lambda m=model: draw(m), wanted, 1e-6, "train() and eval() agree on average.")


@check("D18")
def works_without_gradients(case: Case) -> Iterator[Measurement]:
    """Under no_grad and under inference_mode the numbers are those with gradients.

    Catches a log-det by autograd that forgets to switch gradients on, or that inference tensors cannot carry.
    """
    for direction in DIRECTIONS:
        live, x, context = case.live(), case.point(direction), case.context()
        y = _seeded(live.call, direction, x, context)[0].detach()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                other, log_det = _seeded(live.call, direction, x, context)
                measured = close(other.clone(), y, 1e-8, "").measured + float(not torch.isfinite(log_det).all())
            yield Measurement(measured, 1e-8, f"The {direction} pass works under {mode.__name__}.")


@check("D18")
def works_under_torch_func(case: Case) -> Iterator[Measurement]:
    """torch.func.jacrev of the explicit pass gives autograd's Jacobian.

    Catches in-place buffer updates and `.item()` in the forward pass.
    """
    live, x, context = case.live(), case.point(case.explicit), case.context()
    wanted = case.jacobian(live, x, context)
    found = torch.func.jacrev(lambda z: live.call(case.explicit, z, context)[0].flatten(1).sum(0))(x)
    yield close(found.movedim(1, 0).flatten(2), wanted, 1e-6, "torch.func.jacrev gives the Jacobian of autograd.")


def _seeded(call, *args, **kwargs):
    """With one and the same seed, so that random log-dets can be compared."""
    torch.manual_seed(20)
    return call(*args, **kwargs)
