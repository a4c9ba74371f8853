"""How numbers are compared: by tolerance of the dtype where they are exact, by a z-test where they are random."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from iresflow_plugin.testing.case import Case, Measurement

ROUND_TRIP = {torch.float32: 2e-4, torch.float64: 1e-6}  # largest error in x, relative to 1 + |x|
EXACT = {torch.float32: 1e-3, torch.float64: 1e-6}  # of a log-det, relative to 1 + |log-det|
SLOPES = 1e-4  # of a derivative against central differences in float64, relative to its size
SIGMAS = 5.0  # of a z-test: 6e-7 is the chance that a right estimator fails one comparison
SMALL_SLOPE = 0.03  # below this size the comparison is absolute
STEP = 1e-4


def difference(found: Tensor, wanted: Tensor, floor: float = 1.0) -> float:
    """The largest difference, relative to floor + |wanted|; infinite where shapes differ, NaN where a number is."""
    if found.shape != wanted.shape:
        return math.inf
    if found.numel() == 0:
        return 0.0
    return ((found.double() - wanted.double()).abs() / (floor + wanted.double().abs())).max().item()


def close(found: Tensor, wanted: Tensor, allowed: float, sentence: str, floor: float = 1.0) -> Measurement:
    """Two tensors that should be equal, as a measurement."""
    return Measurement(difference(found, wanted, floor), allowed, sentence)


def equal_on_average(
    case: Case, draw: Callable[[], Tensor], wanted: Tensor, tolerance: float, sentence: str, floor: float = 1.0
) -> Measurement:
    """One draw against the tolerance if the log-det is deterministic, else the mean of many against `SIGMAS` errors."""
    if not case.varies:
        return close(draw(), wanted, tolerance, sentence, floor)
    draws = torch.stack([draw().detach().double() for _ in range(case.draws)])
    if draws.shape[1:] != wanted.shape:
        return Measurement(math.inf, SIGMAS, sentence)
    error = draws.std(0) / math.sqrt(case.draws)
    z = (draws.mean(0) - wanted).abs() / (error + tolerance * (floor + wanted.abs()))
    return Measurement(z.max().item(), SIGMAS, f"{sentence} (Mean of {case.draws} random draws, in standard errors.)")
