"""What is measured of a trained flow: one function a metric."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from torch import Tensor

from comparisons.methods import Density
from comparisons.tasks import Points
from comparisons.training import evaluating, log_likelihoods, synchronise
from iresflow_plugin import ResidualBlock
from iresflow_plugin.lipschitz import lipschitz_bound
from iresflow_plugin.log_det import Omitted

TIMED_POINTS = 256
TIMED_REPEATS = 3


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        values = values.double()
        return cls(values.mean().item(), values.std().item() / math.sqrt(len(values)))


def test_log_likelihood(density: Density, points: Points, fabric: Fabric) -> Estimate:
    """Nats per test point; the error is that of the mean over the points."""
    return Estimate.of(log_likelihoods(density, points, fabric))


def density_seconds(density: Density, points: Points, fabric: Fabric) -> float:
    """Time of log p for one point, within a batch."""
    rows = points[:TIMED_POINTS].to(fabric.device)
    with evaluating(density, rows.x[0].numel()):
        return median_seconds(lambda: density.log_prob(rows.x, rows.context), fabric.device) / len(rows)


def sampling_seconds(density: Density, features: int, device: torch.device) -> float:
    """Time of one sample, within a batch; residual blocks leave out the log-det, which no one looks at."""
    with evaluating(density, features, Omitted()):
        return median_seconds(lambda: density.sample(TIMED_POINTS), device) / TIMED_POINTS


def inverse_error(density: Density, points: Points, fabric: Fabric) -> float:
    """Largest |x - decode(encode(x))| over test points: what a round trip loses; NaN where there is no way back."""
    if not density.invertible:
        return math.nan
    rows = fabric.to_device(points.x[:TIMED_POINTS])
    with evaluating(density, points.x[0].numel()):
        return (density.to_data(density.to_noise(rows)) - rows).abs().max().item()


def largest_lipschitz_bound(density: Density) -> float | None:
    """The largest certified bound of a residual block's g; None for a flow without any."""
    bounds = [lipschitz_bound(module.branch) for module in density.modules() if isinstance(module, ResidualBlock)]
    if not all(bound.certified for bound in bounds):
        raise ValueError("a residual block without certificate")
    return max((bound.value for bound in bounds), default=None)


def median_seconds(call: Callable[[], object], device: torch.device) -> float:
    call()
    return statistics.median(timed(call, device) for _ in range(TIMED_REPEATS))


def timed(call: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - started
