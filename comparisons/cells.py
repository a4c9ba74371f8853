"""One cell of a comparison: one method, trained and measured on one task with one seed."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric, seed_everything
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from torch import Tensor

from comparisons import diagnostics, metrics
from comparisons.methods import Density, Method, build, parameter_count
from comparisons.results import Key, Result, Trial, cell_name
from comparisons.settings import Budget, Machine
from comparisons.tasks import Points, Task, load
from comparisons.training import History, OnProgress, evaluating, has_blocks, log_likelihoods, ready, train
from iresflow_plugin.log_det import Omitted

GRID = 150  # points a side of a heat map
SHOWN = {"plane": 4000, "table": 3000, "image": 64}  # samples kept for pictures
LOOKED_INTO = 256  # numbers, points times features, at which errors of log-dets and inverses are measured
REPEATS = 20  # of random log-dets
TEMPERATURE = 0.7  # of cool samples, which are what the literature on images shows
PAIRS, BETWEEN = 8, 8  # test images with a path through the noise between them, and images on that path
TRIAL_SHARE = 1 / 3  # of the budget, for trying a learning rate

Arrays = dict[str, np.ndarray]
Costs = dict[str, list[dict[str, Any]]]  # of log-dets and inverses, against their errors


@dataclass(frozen=True)
class Cell:
    """What is to be run.

    Args:
        task: name or path, with `columns` of a file as context.
        rate: of Adam.
        trial: train for a short while, to see what the learning rate is worth.
        pictures: keep what pictures are drawn from; without, the scores alone.
        look_inside: measure error against cost of log-dets and inverses.
        checkpoint: a training that was broken off goes on from here.
        tensorboard: folder for its logs.
        deadline: of `time.monotonic`, when the training pauses.
    """

    task: str
    columns: tuple[str, ...]
    method: Method
    seed: int
    rate: float
    budget: Budget
    machine: Machine
    trial: bool = False
    pictures: bool = False
    look_inside: bool = False
    checkpoint: Path | None = None
    tensorboard: Path | None = None
    deadline: float = math.inf

    @property
    def over(self) -> bool:
        """Whether it is past its deadline."""
        return time.monotonic() > self.deadline

    @property
    def weight(self) -> float:
        """Its part of the progress bar."""
        return TRIAL_SHARE if self.trial else 1.0

    def work(self, fabric: Fabric, on_progress: OnProgress) -> Trial | Finished:
        return (run_trial if self.trial else run_cell)(self, fabric, on_progress)


@dataclass(frozen=True)
class Finished:
    """A cell that is done: its numbers, the arrays for the pictures, and the costs inside."""

    result: Result
    arrays: Arrays
    costs: Costs


@cache
def loaded(task: str, columns: tuple[str, ...]) -> Task:
    return load(task, columns)


def run_trial(cell: Cell, fabric: Fabric, on_progress: OnProgress) -> Trial:
    """A short training; its best validation says what the learning rate is worth."""
    task = loaded(cell.task, cell.columns)
    cell = replace(cell, budget=cell.budget.part(TRIAL_SHARE))
    _, history = trained(cell, task, fabric, on_progress)
    return Trial(task.name, cell.method.name, cell.rate, history.best if math.isfinite(history.best) else None)


def run_cell(cell: Cell, fabric: Fabric, on_progress: OnProgress) -> Finished:
    """Build, train, measure."""
    task = loaded(cell.task, cell.columns)
    density, history = trained(cell, task, fabric, on_progress)
    scores = log_likelihoods(density, task.test, fabric)
    broken = int((~torch.isfinite(scores)).sum())
    if broken:
        raise FloatingPointError(f"the log-likelihood of {broken} of {len(scores)} test points is not finite")
    result = measured(cell, task, density, history, scores, fabric)
    arrays = {"scores": scores.numpy(), **(picture_arrays(density, task, fabric) if cell.pictures else {})}
    inside = (
        costs_inside(density, ready(task.test.spread(max(LOOKED_INTO // task.features, 8)), density, fabric))
        if cell.look_inside and result.blocks and len(task.shape) == 1  # blocks of images differ in size
        else {}
    )
    return Finished(result, arrays, inside)


def trained(cell: Cell, task: Task, fabric: Fabric, on_progress: OnProgress) -> tuple[Density, History]:
    seed_everything(cell.seed, verbose=False)
    density = build(cell.method, task.shape, cell.budget.parameters or task.parameters, task.context_features)
    history = train(
        density,
        task,
        cell.method,
        rate=cell.rate,
        budget=cell.budget,
        seed=cell.seed,
        fabric=fabric,
        on_progress=on_progress,
        checkpoint=cell.checkpoint,
        logger=logger(cell, task),
        pause=lambda: cell.over,
    )
    return density, history


def logger(cell: Cell, task: Task) -> TensorBoardLogger | None:
    if cell.tensorboard is None:
        return None
    return TensorBoardLogger(cell.tensorboard, name="", version=cell_name((task.name, cell.method.name, cell.seed)))


def measured(cell: Cell, task: Task, density: Density, history: History, scores: Tensor, fabric: Fabric) -> Result:
    """Every number that is kept of a trained density."""
    likelihood = metrics.Estimate.of(scores, task.groups)
    rows = ready(task.test.spread(metrics.MEASURED_POINTS), density, fabric)
    distances, lost_samples = metrics.sample_distances(density, task, fabric)
    visits = diagnostics.visit_blocks(density, rows.x, rows.context) if has_blocks(density) else []
    batch = ready(task.draw(cell.budget.batch or task.batch, torch.Generator().manual_seed(0)), density, fabric)
    return Result(
        task=task.name,
        method=cell.method.name,
        seed=cell.seed,
        steps=history.steps[-1],
        parameters=parameter_count(density),
        learning_rate=cell.rate,
        validation=history.best,
        log_likelihood=likelihood,
        raw_log_likelihood=likelihood.mean + task.log_volume,
        bits_per_dimension=task.bits_per_dimension(likelihood.mean),
        bits_error=None if task.levels is None else likelihood.error * task.bits_per_nat,
        log_det_error=diagnostics.log_det_error(density, visits, rows, len(task.test)),
        distances=distances,
        lost_samples=lost_samples,
        training_seconds=history.seconds[-1],
        density_seconds=metrics.density_seconds(density, rows, fabric.device),
        sampling_seconds=metrics.sampling_seconds(density, rows, fabric.device),
        memory=None if cell.method.fit else diagnostics.training_memory(density, cell.method, batch.x, batch.context),
        inverse=diagnostics.round_trip(density, rows.x, rows.context) if density.invertible else None,
        blocks=diagnostics.block_rows(visits),
        history=history,
        swap=density.swap,
    )


def costs_inside(density: Density, points: Points) -> Costs:
    """Error against cost of every solver and every estimator of the log-det, in double precision."""
    exact = diagnostics.in_double(density)
    visits = diagnostics.visit_blocks(
        exact, points.x.double(), None if points.context is None else points.context.double()
    )
    log_dets = diagnostics.log_det_work(visits, repeats=REPEATS)
    return {
        "inverse": [asdict(row) for row in diagnostics.inverse_work(visits)],
        "log_det": [{**asdict(row), "estimator": str(row.estimator)} for row in log_dets],
    }


# what pictures are drawn from -------------------------------------------------------------------------


def picture_arrays(density: Density, task: Task, fabric: Fabric) -> Arrays:
    """Samples, and in the plane the log density on a grid; those of a conditional task are given the test contexts."""
    n = min(SHOWN[task.kind], len(task.test)) if task.context_features else SHOWN[task.kind]
    shown = ready(task.test.spread(n), density, fabric)
    given = shown.context
    with evaluating(density, task.features):
        arrays = {"samples": task.restore(density.sample(n, given).float().cpu()).numpy()}
    if task.kind == "plane" and given is None:
        axis = torch.linspace(-1, 1, GRID) * plane_limit(task)
        points = torch.cartesian_prod(axis, axis)
        grid = log_likelihoods(density, Points(points), fabric).reshape(GRID, GRID)
        arrays["log_density"] = grid.clamp(-1e4, 1e4).half().numpy()  # half as large on disk, and as good to the eye
    if len(task.shape) > 1 and density.invertible:
        with evaluating(density, task.features, Omitted()):
            arrays |= image_arrays(density, task, shown)
    return arrays


def image_arrays(density: Density, task: Task, shown: Points) -> Arrays:
    """Test images on their way to noise and back, paths between images through the noise, and cool samples.

    A path turns from one noise to the other (x cos t + y sin t, t from 0 to pi / 2), so that it keeps their length.
    """
    noise = density.to_noise(shown.x, shown.context)
    given = None if shown.context is None else shown.context[:PAIRS].repeat_interleave(BETWEEN, 0)
    angles = torch.linspace(0, math.pi / 2, BETWEEN).to(noise).view(-1, *[1] * (noise.ndim - 1))
    start, end = noise[:PAIRS, None], noise[PAIRS : 2 * PAIRS, None]
    paths = (start * angles.cos() + end * angles.sin()).flatten(0, 1)
    found = {
        "reconstructions": density.to_data(noise, shown.context),
        "interpolations": density.to_data(paths, given),
        "cool_samples": density.to_data(TEMPERATURE * torch.randn_like(noise), shown.context),
    }
    return {name: task.restore(images.float().cpu()).numpy() for name, images in found.items()}


def task_arrays(task: Task) -> Arrays:
    """The data beside which samples are shown; in the plane also its density on the same grid, by counting samples."""
    arrays: Arrays = {
        "data": task.restore(task.test.spread(SHOWN[task.kind]).x).numpy(),
        "kind": np.array(task.kind),
        "about": np.array(task.about),
        "preprocessing": np.array(task.preprocessing, dtype=str),
        "features": np.array(task.features),
        "given": np.array(task.context_features is not None),
    }
    if task.value_range is not None:
        arrays["value_range"] = np.array(task.value_range)
    if task.entropy is not None:
        arrays["entropy"] = np.array(task.entropy)
    if task.groups is not None:
        arrays["groups"] = task.groups.numpy()
    if task.kind == "plane":
        limit = plane_limit(task)
        arrays["limit"] = np.array(limit)
        if task.context_features is None:
            many = task.draw(2_000_000, torch.Generator().manual_seed(0)).x.numpy()
            bins = np.linspace(-limit, limit, GRID + 1)
            arrays["density"] = np.histogram2d(many[:, 0], many[:, 1], bins=(bins, bins), density=True)[0]
    return arrays


def plane_limit(task: Task) -> float:
    """Half the side of the square that is drawn."""
    return 1.1 * task.test.x.abs().max().item()


def key_of(cell: Cell) -> Key:
    return loaded(cell.task, cell.columns).name, cell.method.name, cell.seed
