"""Contraction, its bound, and failure: for transforms that claim y = x + g(x) with Lip(g) < 1, and for all."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from iresflow_plugin.testing.case import Case, Live, Measurement, NotApplicableError
from iresflow_plugin.testing.checks.measure import ROUND_TRIP, difference
from iresflow_plugin.testing.checks.registry import check

ADVERSE_STEPS = 200


def _norm(case: Case, live: Live) -> float:
    """The largest measured |dg|_2, from the dense Jacobian I + dg at points near and far."""
    x = torch.cat([case.point(case.explicit), 3 * case.point(case.explicit)])
    context = case.context(len(x))
    jacobian = case.jacobian(live, x, context)
    eye = torch.eye(case.size, dtype=jacobian.dtype)
    return torch.linalg.matrix_norm(jacobian - eye, ord=2).max().item()


def _train_adversely(case: Case, live: Live) -> None:
    optimizer = torch.optim.Adam(live.parameters(), lr=1e-2)
    for _ in range(ADVERSE_STEPS):
        x = case.point(case.explicit)
        optimizer.zero_grad()
        (-(live.call(case.explicit, x, case.context())[0] - x).square().mean()).backward()
        optimizer.step()


@torch.no_grad()
def _edit(case: Case, live: Live) -> None:
    for p in live.parameters():
        p.data.mul_(100)


@torch.no_grad()
def _load_foreign(case: Case, live: Live) -> None:
    """Large ones, but none whose exponential leaves no digits: logarithms of scales are among them."""
    for module in live.modules:
        module.load_state_dict(
            {k: 3 * torch.randn_like(v) if v.is_floating_point() else v for k, v in module.state_dict().items()}
        )


CHANGES: dict[str, Callable[[Case, Live], None]] = {
    f"after {ADVERSE_STEPS} Adam steps on an adverse loss": _train_adversely,
    "after every weight was multiplied by 100": _edit,
    "after a state_dict of foreign weights was loaded": _load_foreign,
}


@check("D3", "D15")
def contraction_survives_everything(case: Case) -> Iterator[Measurement]:
    """A block that claims to be a contraction stays one under training, loading and editing of its weights.

    Catches a constraint that holds only if the trainer calls a function after every step.
    """
    _claimed(case)
    for when, change in CHANGES.items():
        live = case.live(train=True)
        change(case, live)
        yield Measurement(_norm(case, live), 1.0, f"The measured norm of dg stays below 1 {when}.")


@check("D13", "D15")
def bound_covers_the_operator(case: Case) -> Iterator[Measurement]:
    """The Lipschitz bound that a block states is at least the measured norm of its Jacobian.

    Catches the norm of a reshaped convolution kernel, and a product of norms that do not compose.
    """
    for scale in (1.0, 5.0):
        live = case.live()
        blocks = [m for top in live.modules for m in top.modules() if callable(getattr(m, "certificate", None))]
        if len(blocks) != 1:
            raise NotApplicableError("not one block with a method certificate()")
        with torch.no_grad():
            for p in live.parameters():
                if p.ndim > 1:
                    p.mul_(scale)
        stated = cast(Any, blocks[0]).certificate()
        bound = float(getattr(stated, "value", stated))
        yield Measurement(_norm(case, live) - bound, 1e-9, f"The norm of dg is within the stated bound, {bound:.4g}.")


@check("D5")
def failure_is_loud(case: Case) -> Iterator[Measurement]:
    """What has no right answer is an error, or NaN in that row alone; never a finite wrong number.

    Catches solvers that stop after so many steps without a word, and NaN that turns into numbers.
    """
    for bad in (math.nan, math.inf):
        for direction in ("forward", "inverse"):
            live, x, context = case.live(), case.point(direction), case.context()
            x.flatten(1)[0, 0] = bad
            with torch.no_grad():
                try:
                    y, log_det = live.call(direction, x, context)
                except Exception:  # an error is as loud as can be
                    continue
            silent = bool(torch.isfinite(y[0]).all())
            yield Measurement(float(silent), 0.0, f"An input of {bad} does not give a finite {direction} output.")
            spread = bool(torch.isfinite(y[1:]).all() and torch.isfinite(log_det[1:]).all())
            yield Measurement(float(not spread), 0.0, f"An input of {bad} does not reach the other {direction} rows.")
    if case.contraction and case.live().parameters():
        for when, change in CHANGES.items():
            yield from _right_or_an_error(case, when, change)


def _right_or_an_error(case: Case, when: str, change: Callable[[Case, Live], None]) -> Iterator[Measurement]:
    live, x, context = case.live(train=True), case.x(), case.context()
    try:
        change(case, live)
        for module in live.modules:
            module.eval()
        with torch.no_grad():
            y = live.forward(x, context)[0]
            back = live.inverse(y, context)[0]
    except Exception:
        return
    sentence = f"The inverse is right, or it is an error, {when}."
    size = y.abs().max().clamp(min=1).item()  # foreign weights may send x far away, and rounding is relative to y
    yield Measurement(difference(back, x) / size, ROUND_TRIP[torch.float64], sentence)


@check("D8")
def bad_arguments_are_rejected(case: Case) -> Iterator[Measurement]:
    """Inputs of a wrong size, and keywords that do not exist, are errors.

    Catches `**kwargs` that swallow a misspelling, and broadcasting that hides a wrong shape.
    """
    live, context = case.live(), case.context()
    sizes = [n + 1 for n in case.event_shape]  # all of them: a convolution takes images of any height and width
    wrong = torch.randn(case.batch, *sizes, dtype=torch.float64)
    if case.inputs is None and not _elementwise(live, case):
        yield Measurement(
            float(not _raises(lambda: live.forward(wrong, context))), 0.0, "Inputs of a wrong size are an error."
        )
    if live.modules:
        misspelt = {"contxt": torch.zeros(1)}
        yield Measurement(
            float(not _raises(lambda: live.modules[0](case.x(), **misspelt))), 0.0, "A misspelt keyword is an error."
        )
    if case.factory is not None and _takes_keywords(case.factory):
        factory = case.factory
        yield Measurement(
            float(not _raises(lambda: factory(misspelt_keyword=0.5))),
            0.0,
            "A keyword that the constructor does not know is an error.",
        )


def _claimed(case: Case) -> None:
    if not case.contraction:
        raise NotApplicableError("no contraction is claimed (contraction=True does)")
    if not case.live().parameters():
        raise NotApplicableError("there are no parameters")


def _takes_keywords(factory: Callable) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(factory).parameters.values())


def _elementwise(live: Live, case: Case) -> bool:
    """Whether the transform has no size of its own: it has no state with a dimension."""
    return all(t.ndim == 0 for m in live.modules for t in m.state_dict().values()) and case.context_shape is None


def _raises(call: Callable[[], object]) -> bool:
    try:
        with torch.no_grad():
            call()
    except Exception:
        return True
    return False
