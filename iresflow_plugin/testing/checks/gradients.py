"""Gradients: every derivative against central differences of the dense float64 reference, along random directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from iresflow_plugin.testing.case import Case, Live, Measurement, NotApplicableError
from iresflow_plugin.testing.checks.measure import SLOPES, SMALL_SLOPE, STEP, equal_on_average
from iresflow_plugin.testing.checks.registry import check

TRIES = 3


def _leaves(live: Live, x: Tensor, context: Tensor | None) -> dict[str, list[Tensor]]:
    groups: dict[str, list[Tensor]] = {"inputs": [x.requires_grad_()], "parameters": list(live.parameters())}
    if context is not None:
        groups["context"] = [context.requires_grad_()]
    return {name: leaves for name, leaves in groups.items() if leaves}


def _central_difference(function: Callable[[], Tensor], leaves: list[Tensor], directions: list[Tensor]) -> Tensor:
    values = []
    for step in (STEP, -2 * STEP):
        with torch.no_grad():
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.add_(step * direction)
        values.append(function().detach())
    with torch.no_grad():
        for leaf, direction in zip(leaves, directions, strict=True):
            leaf.add_(STEP * direction)
    return (values[0] - values[1]) / (2 * STEP)


def _slope(loss: Tensor, leaves: list[Tensor], directions: list[Tensor]) -> Tensor:
    grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    slopes = [(g * d).sum() for g, d in zip(grads, directions, strict=True) if g is not None]
    return torch.stack(slopes).sum() if slopes else torch.zeros((), dtype=loss.dtype)


def _compare(
    case: Case, direction: str, train: bool, what: str, weights: Tensor | None = None, only: str | None = None
) -> Iterator[Measurement]:
    """Autograd against differences, for `what` in (value, log-det) of one pass, with respect to everything.

    Where a comparison fails it is made anew at other points: a difference may straddle the kink of a ReLU, but a wrong
    gradient is wrong everywhere.
    """
    best: dict[str, Measurement] = {}
    for _ in range(TRIES):
        for name, measurement in _compare_once(case, direction, train, what, weights):
            if (only is None or name == only) and not (name in best and best[name].passed):
                best[name] = measurement
        if all(measurement.passed for measurement in best.values()):
            break
    yield from best.values()


def _compare_once(
    case: Case, direction: str, train: bool, what: str, weights: Tensor | None
) -> Iterator[tuple[str, Measurement]]:
    live, x, context = case.live(train=train), case.point(direction), case.context()
    live.disturb(0.01)
    weights = torch.rand(len(x), dtype=x.dtype) + 0.5 if weights is None else weights
    cotangent = torch.randn(x.shape, dtype=x.dtype)

    def ours() -> Tensor:
        y, log_det = live.call(direction, x, context)
        values = (y * cotangent).flatten(1).sum(1) if what == "value" else log_det
        return (weights * values).sum()

    def reference() -> Tensor:
        if what == "value":
            with torch.no_grad():
                return ours()
        return (weights * case.log_det(live, direction, x, context)).sum()

    mode = "train" if train else "eval"
    for name, leaves in _leaves(live, x, context).items():
        directions = [torch.randn_like(leaf) / leaf.numel() ** 0.5 for leaf in leaves]
        wanted = _central_difference(reference, leaves, directions)
        sentence = f"The gradient of the {direction} pass's {what} with respect to {name} is right ({mode} mode)."

        def draw(leaves: list[Tensor] = leaves, directions: list[Tensor] = directions) -> Tensor:
            return _slope(ours(), leaves, directions)

        yield name, equal_on_average(case, draw, wanted, SLOPES, sentence, SMALL_SLOPE)


@check()
def gradients_of_the_outputs(case: Case) -> Iterator[Measurement]:
    """The outputs of both passes have the gradients of finite differences, for inputs, parameters and context.

    Catches a solver differentiated through its last step alone, or not at all.
    """
    for direction in ("forward", "inverse"):
        yield from _compare(case, direction, train=True, what="value")


@check("D11")
def gradients_of_the_log_det(case: Case) -> Iterator[Measurement]:
    """The log-det of the explicit pass has the gradients of the dense one, in train and in eval mode.

    Catches a log-det that is detached in eval mode, or whose estimator is unbiased in value alone.
    """
    for train in (True, False):
        yield from _compare(case, case.explicit, train=train, what="log-det")


@check()
def gradients_of_the_inverse_log_det(case: Case) -> Iterator[Measurement]:
    """The log-det of the solving pass has the gradients of the dense one.

    Catches a solution that is detached before its log-det is taken.
    """
    direction = "forward" if case.explicit == "inverse" else "inverse"
    yield from _compare(case, direction, train=True, what="log-det")


@check("D2")
def per_sample_weights_are_honoured(case: Case) -> Iterator[Measurement]:
    """A loss that weights samples differently gets the gradient of that loss.

    Catches a backward pass that multiplies every row by the first row's cotangent.
    """
    weights = torch.ones(case.batch, dtype=torch.float64)
    weights[0] = 0
    found = list(_compare(case, case.explicit, train=True, what="log-det", weights=weights, only="parameters"))
    if not found:
        raise NotApplicableError("there are no parameters")
    yield from found


@check("D7")
def every_parameter_learns(case: Case) -> Iterator[Measurement]:
    """Every parameter that asks for a gradient gets one.

    Catches parameters left out of the graph, on which distributed training stops with "unused parameters".
    """
    live = case.live(train=True)
    names = [(name, p) for module in live.modules for name, p in module.named_parameters() if p.requires_grad]
    if not names:
        raise NotApplicableError("there are no parameters")
    live.disturb()
    learning: set[str] = set()
    for _ in range(3):
        y, log_det = live.call(case.explicit, case.point(case.explicit), case.context())
        loss = y.square().sum() - log_det.sum()
        if not loss.requires_grad:
            break
        grads = torch.autograd.grad(loss, [p for _, p in names], allow_unused=True)
        learning |= {name for (name, _), g in zip(names, grads, strict=True) if g is not None and bool((g != 0).any())}
    idle = [name for name, _ in names if name not in learning]
    listed = f" Without one: {', '.join(idle[:5])}." if idle else ""
    yield Measurement(float(len(idle)), 0.0, f"Every parameter receives a gradient.{listed}")
