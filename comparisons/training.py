"""The one training loop."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from torch import Tensor, nn

from comparisons.methods import Density, Fit, Method
from comparisons.settings import Budget, Optimisation
from comparisons.tasks import Points, Task
from iresflow_plugin import ResidualBlock, using
from iresflow_plugin.log_det import Exact, LogDet, PowerSeries

VALIDATIONS = 20
VALIDATION_POINTS = 1000
VALIDATION_IMAGES = 250  # for densities, which cost more there, and hold many pixels each
FITTED_POINTS = 10_000  # for methods that are fitted and not trained
EXACT_UP_TO = 64  # features: beyond this the exact log-det costs too much to be the yardstick
EVALUATION_BATCH = 1000
# Beyond: a series that leaves out less than a tenth of a nat a block. Its one probe is unbiased and scatters by about
# ten nats a point on MNIST, where points differ by two hundred. Russian roulette would be off by the same in all points
# of a batch, which no average over points mends.
BEYOND = PowerSeries(tolerance=0.1)

OnProgress = Callable[[float], None]  # is told the share of the training that is done


@dataclass
class History:
    """What was seen on the way: validation loss (mean, in nats) against steps and against seconds of training."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)

    def add(self, step: int, seconds: float, loss: float) -> None:
        self.steps.append(step)
        self.seconds.append(seconds)
        self.validation.append(loss)

    @property
    def best(self) -> float:
        return min((loss for loss in self.validation if not math.isnan(loss)), default=math.inf)

    @property
    def last(self) -> dict[str, float]:
        return {"validation": self.validation[-1], "seconds": self.seconds[-1]}


@contextmanager
def evaluating(density: Density, features: int, log_det: LogDet | None = None) -> Iterator[None]:
    """Eval mode and no graph; residual blocks use `log_det`, or by default the exact one where the event is small.

    Where it is large, they use a series as long as it takes, whatever they are trained with: its probes are unbiased
    and its remainder is bounded. `diagnostics.log_det_error` says what both may amount to.
    """
    training = density.training
    if log_det is None and density.volume:
        log_det = Exact() if features <= EXACT_UP_TO else BEYOND
    density.eval()
    try:
        with torch.no_grad(), using(density, log_det=log_det) if has_blocks(density) else nullcontext():
            yield
    finally:
        density.train(training)


def has_blocks(density: nn.Module) -> bool:
    """Whether residual blocks of ours are in it."""
    return any(isinstance(module, ResidualBlock) for module in density.modules())


def ready(points: Points, density: Density, fabric: Fabric) -> Points:
    """On the density's device and in its dtype."""
    return points.to(fabric.device, dtype_of(density))


def dtype_of(density: Density) -> torch.dtype:
    sizes = Counter({torch.float32: 0})
    for weights in (*density.parameters(), *density.buffers()):
        if weights.is_floating_point():
            sizes[weights.dtype] += weights.numel()  # the most: normflows keeps a few float64 beside its float32
    return max(sizes, key=sizes.__getitem__)


def log_likelihoods(density: Density, points: Points, fabric: Fabric) -> Tensor:
    """log p of every point, in nats, with the evaluation's log-det."""
    with evaluating(density, points.x[0].numel()):
        rows = (ready(part, density, fabric) for part in points.split(EVALUATION_BATCH))
        return torch.cat([density.log_prob(part.x, part.context).float().cpu() for part in rows])


def clock(device: torch.device) -> float:
    """Seconds of finished work. On a CPU those of this process, with its one thread: a busy machine does not count."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


class PausedError(Exception):
    """The training was asked to pause; its checkpoint is on disk, and it is not finished."""


def train(
    density: Density,
    task: Task,
    method: Method,
    *,
    rate: float,
    budget: Budget,
    seed: int,
    fabric: Fabric,
    on_progress: OnProgress,
    checkpoint: Path | None = None,
    logger: Logger | None = None,
    pause: Callable[[], bool] = lambda: False,
) -> History:
    """Gradient steps on the negative log-likelihood; ends with the weights of the best validation, or as asked for.

    Every method goes through here, and only learning rate, `optimisation` and `after_step` differ; one with `fit`
    needs no steps. The seconds count training alone. Where `checkpoint` is a file, training goes on from it, to the
    same numbers. `pause` is asked after every step.

    Raises:
        PausedError: when `pause` said so, once the checkpoint is written.
    """
    if method.fit is not None:
        history = fit(density, task, method.fit, seed=seed, fabric=fabric)
        on_progress(1.0)
        return history
    how = method.optimisation
    generator, size = torch.Generator().manual_seed(seed), budget.batch or task.batch
    if size < fabric.world_size:
        raise ValueError(f"{fabric.world_size} processes cannot share batches of {size} points; take larger ones.")
    meet(density, ready(task.draw(size, torch.Generator().manual_seed(seed)), density.to(fabric.device), fabric))
    optimizer = how.build(density.parameters(), rate)
    model, optimizer = fabric.setup(compiled(density) if how.compile else density, optimizer)
    state, dtype = beginning(density, how), dtype_of(density)
    if checkpoint is not None and checkpoint.is_file():
        state = load(checkpoint, density, optimizer, generator, fabric)

    def write() -> None:
        if checkpoint is not None and fabric.is_global_zero:
            save(checkpoint, state, density, optimizer, generator, fabric)

    while (spent := budget.spent(state.step, state.seconds)) < 1:
        started = clock(fabric.device)
        for group in optimizer.param_groups:
            group["lr"] = rate * how.factor(spent)
        # all processes draw the same batch and take a part each: the gradient is that of one process
        part = task.draw(size, generator)[fabric.global_rank :: fabric.world_size].to(fabric.device, dtype)
        optimizer.zero_grad()
        backward(model, part, size, how.accumulate, fabric)
        norm = fabric.clip_gradients(model, optimizer, max_norm=how.clip or math.inf, error_if_nonfinite=False)
        # One batch on which a host overflows should not end its training. A scaler of half precision leaves it out by
        # itself, and must see it, or it would never lower its scale.
        if norm is None or torch.isfinite(norm) or getattr(fabric.strategy.precision, "scaler", None) is not None:
            optimizer.step()
        if method.after_step is not None:
            method.after_step(density)
        state.step += 1
        if state.average is not None and how.average is not None:
            follow(state.average, density, how.average, state.step)
        state.seconds = common(state.seconds + clock(fabric.device) - started, fabric)
        now = budget.spent(state.step, state.seconds)
        if state.step == 1 or int(VALIDATIONS * now) > int(VALIDATIONS * spent):
            validate(state, density, task, fabric)
            if logger is not None and fabric.is_global_zero:
                logger.log_metrics(state.history.last, state.step)
            write()
        on_progress(min(now, 1.0))
        if now < 1 and common(float(pause()), fabric):
            write()
            raise PausedError(f"paused after {state.step} steps, {now:.1%} of the training")
    density.load_state_dict(state.kept(density))
    return state.history


def compiled(density: Density) -> nn.Module:
    return cast(nn.Module, torch.compile(density))


def backward(model: Any, part: Points, size: int, pieces: int, fabric: Fabric) -> None:
    """The gradient of the mean loss of the batch of that size, of which this is a part, in so many pieces.

    Gradients are averaged over processes.
    """
    whole = part.split(math.ceil(len(part) / pieces))
    for number, piece in enumerate(whole, start=1):
        with fabric.no_backward_sync(model, enabled=fabric.world_size > 1 and number < len(whole)):
            fabric.backward(model(piece.x, piece.context) * (len(piece) * fabric.world_size / size))


def follow(average: dict[str, Tensor], density: nn.Module, decay: float, step: int) -> None:
    """Move the running average of the free weights; it forgets faster at the beginning, where they are no good."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    for name, value in density.named_parameters():
        average[name].lerp_(value.detach(), weight)


def meet(density: Density, points: Points) -> None:
    """Layers that look at their first batch, such as ActNorm, see a whole one, the same in every process."""
    density.train()
    with torch.no_grad():
        density(points.x, points.context)


def common(seconds: float, fabric: Fabric) -> float:
    """The clock of the first process, by which all of them stop together."""
    return seconds if fabric.world_size == 1 else fabric.broadcast(seconds)


def validate(state: State, density: Density, task: Task, fabric: Fabric) -> None:
    few = len(task.shape) > 1 and density.volume
    points = task.validation.spread(VALIDATION_IMAGES if few else VALIDATION_POINTS)
    with weights_of(density, state.average):
        loss = -log_likelihoods(density, points, fabric).mean().item()
        if state.best is not None and loss < state.history.best:
            state.best = snapshot(density)
    state.history.add(state.step, state.seconds, loss)


@contextmanager
def weights_of(density: Density, average: dict[str, Tensor] | None) -> Iterator[None]:
    """Within the context the density has the averaged weights, where there are any."""
    if average is None:
        yield
        return
    own = free_weights(density)
    density.load_state_dict(average, strict=False)
    try:
        yield
    finally:
        density.load_state_dict(own, strict=False)


def fit(density: Density, task: Task, fit: Fit, *, seed: int, fabric: Fabric) -> History:
    """Once, on fixed train points; the history has one entry, at no steps."""
    started = clock(fabric.device)
    points = task.draw(FITTED_POINTS, torch.Generator().manual_seed(seed))
    validation = task.validation.spread(VALIDATION_POINTS)
    density.to(fabric.device)
    fit(density, ready(points, density, fabric).x, ready(validation, density, fabric).x)
    seconds = clock(fabric.device) - started
    return History([0], [seconds], [-log_likelihoods(density, validation, fabric).mean().item()])


# what goes on after a kill ----------------------------------------------------------------------------


@dataclass
class State:
    """Where a training stands, beside weights, optimiser and random generators.

    Attributes:
        best: weights of the best validation; None where the last are wanted.
        average: of the free weights, over the steps; None for none.
    """

    best: dict[str, Tensor] | None
    step: int = 0
    seconds: float = 0.0
    history: History = field(default_factory=History)
    average: dict[str, Tensor] | None = None

    def kept(self, density: nn.Module) -> dict[str, Tensor]:
        """What the training ends with."""
        return self.best if self.best is not None else {**density.state_dict(), **(self.average or {})}


def beginning(density: nn.Module, how: Optimisation) -> State:
    return State(
        best=snapshot(density) if how.keep == "best" else None,
        average=None if how.average is None else free_weights(density),
    )


def save(
    path: Path,
    state: State,
    density: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    fabric: Fabric,
) -> None:
    """Atomically: the file is the old checkpoint or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "density": density.state_dict(),
        "optimizer": optimizer.state_dict(),
        "precision": fabric.strategy.precision.state_dict(),  # the scale of 16-mixed
        "generator": generator.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        **{name: getattr(state, name) for name in ("best", "step", "seconds", "average")},
        "history": asdict(state.history),
    }
    unfinished = path.with_suffix(".unfinished")
    torch.save(content, unfinished)
    os.replace(unfinished, path)


def load(
    path: Path, density: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator, fabric: Fabric
) -> State:
    """Put everything back; the state says how far the training had come."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    weights = next(density.parameters())
    density.load_state_dict(content["density"])
    optimizer.load_state_dict(content["optimizer"])
    if content.get("precision"):
        fabric.strategy.precision.load_state_dict(content["precision"])
    generator.set_state(content["generator"])
    torch.set_rng_state(content["torch"])
    if content["cuda"]:
        torch.cuda.set_rng_state_all(content["cuda"])
    history, average = History(**content["history"]), content.get("average")
    if average is not None:  # beside the weights that it follows
        average = {name: value.to(weights.device) for name, value in average.items()}
    return State(content["best"], content["step"], content["seconds"], history, average)


def free_weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of what is trained: an average of these, unlike one of bounds and buffers, keeps every constraint."""
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
