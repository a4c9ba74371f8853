"""What the checks found, as values, a table and one error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "not applicable"]


@dataclass(frozen=True)
class Outcome:
    """One check on one subject: the measurement that came closest to its limit, or went furthest beyond."""

    check: str
    status: Status
    sentence: str
    measured: float | None = None
    allowed: float | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.status != "failed"

    def __str__(self) -> str:
        numbers = "" if self.measured is None else f" Measured {self.measured:.3g}, allowed {self.allowed:.3g}."
        return f"{self.check}: {self.sentence}{numbers}"


@dataclass(frozen=True)
class Report:
    """All outcomes for one subject; `print(report)` gives a table."""

    subject: str
    outcomes: tuple[Outcome, ...]

    @property
    def failures(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if not outcome.passed)

    @property
    def passed(self) -> bool:
        return not self.failures

    def __getitem__(self, check: str) -> Outcome:
        return next(outcome for outcome in self.outcomes if outcome.check == check)

    def raise_failures(self) -> None:
        """One AssertionError that lists every failure."""
        if self.failures:
            lines = "\n".join(f"- {failure}" for failure in self.failures)
            raise AssertionError(f"{self.subject} fails {len(self.failures)} of {len(self.outcomes)} checks:\n{lines}")

    def __str__(self) -> str:
        rows = [("check", "", "measured", "allowed", "what was found")]
        for outcome in self.outcomes:
            measured, allowed = (f"{n:.2g}" if n is not None else "" for n in (outcome.measured, outcome.allowed))
            mark = {"passed": "ok", "failed": "FAILED", "not applicable": "-"}[outcome.status]
            rows.append((outcome.check, mark, measured, allowed, outcome.sentence.split("\n")[0][:110]))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
        failed, applied = len(self.failures), sum(o.status != "not applicable" for o in self.outcomes)
        others = len(self.outcomes) - applied
        verdict = f"{self.subject}: {applied - failed} of {applied} checks passed, {others} not applicable"
        return "\n".join([verdict, "", *lines])
