"""The table of checks, filled by the decorator, and how one is run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from iresflow_plugin.testing.case import Case, Measurement, NotApplicableError
from iresflow_plugin.testing.report import Outcome

Body = Callable[[Case], Iterable[Measurement]]


@dataclass(frozen=True)
class Check:
    """A property: its name, its sentence, the known defects (D1 to D18) it would have caught, how it is measured."""

    name: str
    sentence: str
    defects: tuple[str, ...]
    body: Body

    def run(self, case: Case) -> Outcome:
        """Measure; whatever is raised counts as a failure. The caller's random state is left as it was."""
        start = time.perf_counter()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(case.seed)
                found = list(self.body(case))
        except NotApplicableError as reason:
            return Outcome(self.name, "not applicable", str(reason), seconds=time.perf_counter() - start)
        except Exception as error:  # an error is a finding
            sentence = f"{self.sentence} It raised {type(error).__name__}: {error}"
            return Outcome(self.name, "failed", sentence, seconds=time.perf_counter() - start)
        if not found:
            return Outcome(self.name, "not applicable", "nothing here to measure", seconds=time.perf_counter() - start)
        worst = next((m for m in found if not m.passed), None) or max(found, key=_closeness)
        status = "passed" if worst.passed else "failed"
        seconds = time.perf_counter() - start
        return Outcome(self.name, status, f"{worst.sentence}", worst.measured, worst.allowed, seconds)


CHECKS: dict[str, Check] = {}


def check(*defects: str) -> Callable[[Body], Body]:
    """Enter a function into the table under its name; its docstring's first line is the property's sentence."""

    def enter(body: Body) -> Body:
        name = body.__name__
        CHECKS[name] = Check(name, (body.__doc__ or "").split("\n")[0], defects, body)
        return body

    return enter


def _closeness(measurement: Measurement) -> float:
    return measurement.measured / measurement.allowed if measurement.allowed else measurement.measured
