"""What every log-det estimator takes and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from iresflow_plugin.maps import Map


@dataclass(frozen=True)
class Estimate:
    """log det(I + J) of one call, with what is known about its error.

    Attributes:
        value: g(x), shape (B, *event).
        log_det: per sample, shape (B,), in nats; its gradient is right as well.
        standard_error: per sample, shape (B,); 0 if exact, NaN if a single probe leaves it unknown.
        remainder: per sample, shape (B,); a bound on the terms a truncated series left out, for the probes drawn.
        terms: number of terms of the power series that were used; 0 if exact.
    """

    value: Tensor
    log_det: Tensor
    standard_error: Tensor
    remainder: Tensor
    terms: int


class LogDet(Protocol):
    """An estimator: evaluates g once and returns its value with log det(I + J)."""

    def __call__(self, g: Map, x: Tensor) -> Estimate: ...
