"""One cell of a comparison: one method, trained and measured on one task."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from lightning.fabric import Fabric, seed_everything

from comparisons import metrics
from comparisons.methods import METHODS, Density, build, parameter_count
from comparisons.results import Result
from comparisons.tasks import Points, Task
from comparisons.training import evaluating, log_likelihoods, train

GRID = 150  # points a side of a heat map
SHOWN = {"plane": 4000, "table": 3000, "image": 64}  # samples kept for pictures

Arrays = dict[str, np.ndarray]


def run_cell(
    task: Task, method: str, *, steps: int, seed: int, fabric: Fabric, on_step: Callable[[], None]
) -> tuple[Result, Arrays]:
    """Build, train, measure; returns the numbers and the arrays for the pictures."""
    seed_everything(seed, verbose=False)
    density = build(METHODS[method], task.features, task.parameters)
    history = train(density, task, METHODS[method], steps=steps, seed=seed, fabric=fabric, on_step=on_step)
    scores = log_likelihoods(density, task.test, fabric)
    result = Result(
        task=task.name,
        method=method,
        seed=seed,
        steps=steps,
        parameters=parameter_count(density),
        log_likelihood=metrics.Estimate.of(scores),
        training_seconds=history.seconds[-1],
        density_seconds=metrics.density_seconds(density, task.test, fabric),
        sampling_seconds=metrics.sampling_seconds(density, task.features, fabric.device),
        inverse_error=metrics.inverse_error(density, task.test, fabric),
        lipschitz_bound=metrics.largest_lipschitz_bound(density),
        history=history,
        swap=density.swap,
    )
    return result, {"scores": scores.numpy(), **picture_arrays(density, task, fabric)}


def picture_arrays(density: Density, task: Task, fabric: Fabric) -> Arrays:
    """Samples, and in the plane the log density on a grid."""
    with evaluating(density, task.features):
        arrays = {"samples": task.restore(density.sample(SHOWN[task.kind]).cpu()).numpy()}
    if task.kind == "plane":
        axis = torch.linspace(-1, 1, GRID) * plane_limit(task)
        points = torch.cartesian_prod(axis, axis)
        arrays["log_density"] = log_likelihoods(density, Points(points), fabric).reshape(GRID, GRID).numpy()
    return arrays


def task_arrays(task: Task) -> Arrays:
    """The data beside which samples are shown; in the plane also its density on the same grid, by counting samples."""
    arrays = {
        "data": task.restore(task.test.x[: SHOWN[task.kind]]).numpy(),
        "kind": np.str_(task.kind),
        "about": np.str_(task.about),
    }
    if task.entropy is not None:
        arrays["entropy"] = np.float64(task.entropy)
    if task.kind == "plane":
        limit = plane_limit(task)
        many = task.draw(2_000_000, torch.Generator().manual_seed(0)).x.numpy()
        bins = np.linspace(-limit, limit, GRID + 1)
        arrays["density"] = np.histogram2d(many[:, 0], many[:, 1], bins=(bins, bins), density=True)[0]
        arrays["limit"] = np.float64(limit)
    return arrays


def plane_limit(task: Task) -> float:
    """Half the side of the square that is drawn."""
    return 1.1 * task.test.x.abs().max().item()
