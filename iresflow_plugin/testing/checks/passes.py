"""Values: the two passes undo one another, and the log-det is the log-det."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from iresflow_plugin.testing.case import Case, Measurement, NotApplicableError
from iresflow_plugin.testing.checks.measure import EXACT, ROUND_TRIP, close, equal_on_average
from iresflow_plugin.testing.checks.registry import check


@check("D4", "D16")
def inverse_undoes_forward(case: Case) -> Iterator[Measurement]:
    """Inverse after forward returns the input, to the accuracy of the dtype.

    Catches a solver that stops early, for instance by comparing a squared step with a tolerance.
    """
    yield from _round_trips(case, "forward", "inverse", "Inverse after forward returns the input")


@check("D4", "D16")
def forward_undoes_inverse(case: Case) -> Iterator[Measurement]:
    """Forward after inverse returns the output, to the accuracy of the dtype.

    Catches an inverse that is right on the image of some inputs alone.
    """
    yield from _round_trips(case, "inverse", "forward", "Forward after inverse returns the output")


def _round_trips(case: Case, there: str, back: str, sentence: str) -> Iterator[Measurement]:
    for dtype, allowed in ROUND_TRIP.items():
        live, x, context = case.live(dtype), case.point(there, dtype), case.context(dtype=dtype)
        image = live.call(there, x, context)[0].detach()
        yield close(live.call(back, image, context)[0].detach(), x, allowed, f"{sentence} ({dtype}).")


@check("D1", "D6")
def log_det_is_that_of_the_jacobian(case: Case) -> Iterator[Measurement]:
    """The log-det is log |det| of the dense Jacobian, in train and in eval mode.

    Catches a wrong sign, a forgotten term, and a value that is only there to have the right gradient.
    """
    for train in (False, True):
        live, x, context = case.live(train=train), case.point(case.explicit), case.context()
        wanted = case.log_det(live, case.explicit, x, context)

        def draw(live=live, x=x, context=context) -> torch.Tensor:
            return live.call(case.explicit, x, context)[1].detach()

        mode = "train" if train else "eval"
        sentence = f"The log-det equals that of the dense float64 Jacobian ({mode} mode)."
        yield equal_on_average(case, draw, wanted, EXACT[torch.float64], sentence)


@check("D12")
def inverse_log_det_belongs_to_the_solution(case: Case) -> Iterator[Measurement]:
    """The log-det of the solving pass is minus the other pass's, taken at the solution.

    Catches the right formula evaluated at y instead of x, and a forgotten minus.
    """
    direction = "forward" if case.explicit == "inverse" else "inverse"
    live, y, context = case.live(), case.point(direction), case.context()
    wanted = case.log_det(live, direction, y, context)

    def draw() -> torch.Tensor:
        return live.call(direction, y, context)[1].detach()

    sentence = "The inverse's log-det is minus the forward's at the solution."
    yield equal_on_average(case, draw, wanted, EXACT[torch.float64], sentence)


@check("D6")
def exactness_is_as_claimed(case: Case) -> Iterator[Measurement]:
    """A log-det that is claimed to be deterministic is the same at every call.

    Catches an option such as `brute_force=True` that is ignored.
    """
    if not case.deterministic:
        raise NotApplicableError("no deterministic log-det is claimed (deterministic=True does)")
    for train in (False, True):
        live, x, context = case.live(train=train), case.point(case.explicit), case.context()
        with torch.no_grad():
            first, second = (live.call(case.explicit, x, context)[1] for _ in range(2))
        yield close(first, second, 1e-9, "Two calls give the same log-det, as was claimed.")


@check("D17")
def random_log_det_reports_its_error(case: Case) -> Iterator[Measurement]:
    """A random log-det comes with its standard error: a method `estimate` returns one that covers the spread.

    Catches one random probe, nats off at every call, with nothing to tell the user so.
    """
    if not case.varies:
        raise NotApplicableError("the log-det is deterministic")
    live, x, context = case.live(), case.point(case.explicit), case.context()
    with torch.no_grad():
        spread = torch.stack([live.call(case.explicit, x, context)[1] for _ in range(case.draws)]).std(0)
    reporters = [m for top in live.modules for m in top.modules() if callable(getattr(m, "estimate", None))]
    sentence = f"A log-det that is off by {spread.max():.2g} nats at a call reports a standard error."
    yield Measurement(float(not reporters), 0.0, sentence)
