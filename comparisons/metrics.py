"""What is measured of a trained flow: one function a metric. Points come on the density's device, in its dtype."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from torch import Tensor

from comparisons.methods import Density
from comparisons.statistics import over_points
from comparisons.tasks import Points, Task
from comparisons.training import clock, evaluating, ready
from comparisons.two_sample import DISTANCES, WithFloor, with_floor
from iresflow_plugin.log_det import Omitted

MEASURED_POINTS = 256
REPEATS = 3
COMPARED_POINTS = 2000  # samples whose distance to the data is taken


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor, groups: Tensor | None = None) -> Estimate:
        """Over independent points, or over independent groups of them."""
        found = over_points(values.double().cpu().numpy(), None if groups is None else groups.numpy())
        return cls(found.mean, found.error)


def density_seconds(density: Density, points: Points, device: torch.device) -> float:
    """Time of log p for one point, within a batch."""
    with evaluating(density, points.x[0].numel()):
        return median_seconds(lambda: density.log_prob(points.x, points.context), device) / len(points)


def sampling_seconds(density: Density, points: Points, device: torch.device) -> float:
    """Time of one sample, within a batch; residual blocks leave out the log-det, which no one looks at."""
    with evaluating(density, points.x[0].numel(), Omitted()):
        return median_seconds(lambda: density.sample(len(points), points.context), device) / len(points)


def sample_distances(density: Density, task: Task, fabric: Fabric) -> tuple[dict[str, WithFloor], float]:
    """Distances of samples to test points, beside those of validation points, and the share of samples that is lost.

    A sample that is not finite is left out. Contexts are part of the points: p(x, context) is compared.
    """
    n = min(COMPARED_POINTS, len(task.test), len(task.validation))
    data, other = task.test.spread(n), task.validation.spread(n)
    given = ready(data, density, fabric)
    with evaluating(density, task.features, Omitted()):
        samples = density.sample(n, given.context).float().cpu()
    kept = torch.isfinite(samples).flatten(1).all(1)
    lost = 1 - kept.double().mean().item()
    if kept.sum() < 2:
        return {}, lost
    context = None if data.context is None else data.context[kept]
    mine, fresh = together(Points(samples[kept], context)), together(other.spread(int(kept.sum())))
    return {name: with_floor(distance, mine, together(data), fresh) for name, distance in DISTANCES.items()}, lost


def together(points: Points) -> Tensor:
    x = points.x.flatten(1)
    return x if points.context is None else torch.cat([x, points.context.to(x)], dim=1)


def median_seconds(call: Callable[[], object], device: torch.device) -> float:
    call()
    return statistics.median(timed(call, device) for _ in range(REPEATS))


def timed(call: Callable[[], object], device: torch.device) -> float:
    started = clock(device)
    call()
    return clock(device) - started
