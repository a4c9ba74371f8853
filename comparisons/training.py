"""The one training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from comparisons.methods import Density, Fit, Method
from comparisons.tasks import Points, Task
from iresflow_plugin import ResidualBlock, using
from iresflow_plugin.log_det import Exact, LogDet

VALIDATIONS = 20
VALIDATION_POINTS = 1000
CLIP_NORM = 5.0
EXACT_UP_TO = 64  # features: beyond this the exact log-det costs too much to be the yardstick
EVALUATION_BATCH = 1000
FITTED_POINTS = 10_000  # train points for methods that are fitted


@dataclass
class History:
    """What was seen on the way: validation loss (mean, in nats) against steps and against seconds of training."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)


@contextmanager
def evaluating(density: Density, features: int, log_det: LogDet | None = None) -> Iterator[None]:
    """Eval mode and no graph; residual blocks use `log_det`, or by default the exact one where the event is small."""
    training = density.training
    if log_det is None and features <= EXACT_UP_TO:
        log_det = Exact()
    has_blocks = any(isinstance(module, ResidualBlock) for module in density.modules())
    density.eval()
    try:
        with torch.no_grad(), using(density, log_det=log_det) if has_blocks else nullcontext():
            yield
    finally:
        density.train(training)


def log_likelihoods(density: Density, points: Points, fabric: Fabric) -> Tensor:
    """log p of every point, in nats, with the evaluation's log-det."""
    with evaluating(density, points.x[0].numel()):
        batches = [batch.to(fabric.device) for batch in points.split(EVALUATION_BATCH)]
        return torch.cat([density.log_prob(batch.x, batch.context).cpu() for batch in batches])


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that the clock reads finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(
    density: Density, task: Task, method: Method, *, steps: int, seed: int, fabric: Fabric, on_step: Callable[[], None]
) -> History:
    """Adam with a cosine schedule on the negative log-likelihood; ends with the weights of the best validation.

    Every method goes through here, and only learning rate and `after_step` differ; one with `fit` needs no steps. The
    seconds count training alone.
    """
    if method.fit is not None:
        return fit(density, task, method.fit, seed=seed, fabric=fabric)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(density.parameters(), lr=method.learning_rate)
    model, optimizer = fabric.setup(density, optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    history, best, clock = History(), snapshot(density), 0.0
    check = {max(1, round(steps * part / VALIDATIONS)) for part in range(VALIDATIONS + 1)}
    for step in range(1, steps + 1):
        started = time.perf_counter()
        optimizer.zero_grad()
        batch = task.draw(task.batch, generator).to(fabric.device)
        fabric.backward(model(batch.x, batch.context))
        fabric.clip_gradients(model, optimizer, max_norm=CLIP_NORM)
        optimizer.step()
        schedule.step()
        if method.after_step is not None:
            method.after_step(density)
        synchronise(fabric.device)
        clock += time.perf_counter() - started
        if step in check:
            loss = -log_likelihoods(density, task.validation[:VALIDATION_POINTS], fabric).mean().item()
            if loss < min(history.validation, default=float("inf")):
                best = snapshot(density)
            history.steps.append(step)
            history.seconds.append(clock)
            history.validation.append(loss)
        on_step()
    density.load_state_dict(best)
    return history


def fit(density: Density, task: Task, fit: Fit, *, seed: int, fabric: Fabric) -> History:
    """Once, on fixed train points; the history has one entry, at no steps."""
    started = time.perf_counter()
    points = task.draw(FITTED_POINTS, torch.Generator().manual_seed(seed))
    validation = task.validation[:VALIDATION_POINTS]
    fit(density.to(fabric.device), fabric.to_device(points.x), fabric.to_device(validation.x))
    seconds = time.perf_counter() - started
    loss = -log_likelihoods(density, task.validation[:VALIDATION_POINTS], fabric).mean().item()
    return History([0], [seconds], [loss])


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
