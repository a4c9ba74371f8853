"""Train classifiers or hybrids through the one loop, measure, and leave JSON lines, a table and a picture."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from lightning.fabric import Fabric, seed_everything
from rich.console import Console

from comparisons.classification import report
from comparisons.classification.hybrid import HYBRID_SIZES, Hybrid, HybridNet
from comparisons.classification.measure import inversion, slopes, there_and_back, wrong
from comparisons.classification.model import SIZES, Classifier, InvertibleClassifier
from comparisons.classification.recipes import Plan
from comparisons.classification.results import Outcome, method_name, read
from comparisons.classification.tasks import CLASSES, load_task
from comparisons.methods import Method, build, parameter_count
from comparisons.provenance import provenance
from comparisons.results import SettingsError, Store, append
from comparisons.settings import PAUSED
from comparisons.tables import print_wide
from comparisons.tasks import Points, Task
from comparisons.training import PausedError, log_likelihoods, ready, train
from comparisons.workers import steady, work_alone

SHOWN = 10  # images in the picture


@dataclass(frozen=True)
class Cell:
    """One training: a bound, or None for vanilla, and a seed."""

    c: float | None
    seed: int


@dataclass(frozen=True)
class Left:
    """A training without numbers yet: what to say, and whether it failed or may go on."""

    words: str
    failed: bool = False


def classify(plan: Plan, console: Console) -> int:
    """Run what is not yet done; the exit code: 0 done, 1 a training failed or other settings lie there, 75 paused."""
    steady()
    store = Store(plan.out)
    try:
        store.start(plan.settings, plan.fresh)
        load_task(plan.data)
    except (SettingsError, FileNotFoundError) as error:
        console.print(f"[red]{error}[/]", highlight=False)
        return 1
    done = {(outcome.c, outcome.seed) for outcome in read(store.lines)}
    wanted = [Cell(c, seed) for seed in plan.seeds for c in plan.bounds if (c, seed) not in done]
    deadline = math.inf if plan.piece is None else time.monotonic() + plan.piece
    left: list[Left] = []
    run = {**provenance(), "workers": plan.workers}
    for found in outcomes(plan, wanted, deadline):
        if isinstance(found, Outcome):
            append(store.lines, {**asdict(found), "run": run})
            store.checkpoint((plan.data, found.method, found.seed)).unlink(missing_ok=True)
            console.print(report.sentence(found), highlight=False, soft_wrap=True)
        else:
            left.append(found)
            console.print(f"[yellow]{found.words}[/]", highlight=False, soft_wrap=True)
    results = read(store.lines)
    if results:
        grid = report.table(results)
        print_wide(console, [grid.rich()])
        console.print(f"Table:   {report.write_markdown(store, results, plan.settings)}", highlight=False)
        console.print(f"Picture: {report.write_picture(store, results)}", highlight=False)
    if any(not one.failed for one in left):
        return PAUSED
    return 1 if left else 0


def outcomes(plan: Plan, wanted: Sequence[Cell], deadline: float) -> Iterator[Outcome | Left]:
    """In turn or side by side."""
    work = partial(attempt, plan, deadline)
    if plan.workers == 1:
        yield from map(work, wanted)
        return
    context = get_context("spawn")  # a fork of a process that has used torch may hang
    with ProcessPoolExecutor(plan.workers, context, initializer=work_alone) as pool:
        yield from pool.map(work, wanted)


def attempt(plan: Plan, deadline: float, cell: Cell) -> Outcome | Left:
    """What becomes of a training; one that breaks down, as a vanilla one at a high rate, does not end the others."""
    who = f"{method_name(cell.c, plan.hybrid)}, seed {cell.seed}"
    if time.monotonic() > deadline:
        return Left(f"{who}: not begun in this piece")
    try:
        return run_cell(plan, deadline, cell)
    except PausedError as paused:
        return Left(f"{who}: {paused}; the same command goes on")
    except (RuntimeError, ArithmeticError) as error:
        return Left(f"{who} failed: {error}", failed=True)


def run_cell(plan: Plan, deadline: float, cell: Cell) -> Outcome:
    """Build, train, measure; or go on with the checkpoint, and pause again at the deadline."""
    name = method_name(cell.c, plan.hybrid)
    fabric, store, task = plan.machine.fabric(), Store(plan.out), load_task(plan.data, plan.hybrid is not None)
    seed_everything(cell.seed, verbose=False)
    method = method_of(plan, cell.c, task)
    density = build(method, task.features, task.parameters, task.context_features)
    history = train(
        density,
        task,
        method,
        rate=plan.rate,
        budget=plan.budget,
        seed=cell.seed,
        fabric=fabric,
        on_progress=lambda share: None,
        checkpoint=store.checkpoint((plan.data, name, cell.seed)),
        pause=lambda: time.monotonic() > deadline,
    )
    if not isinstance(density, (Classifier, Hybrid)):
        raise TypeError(f"{type(density).__name__} is not measured here.")
    if cell.seed == plan.seeds[0]:
        store.add_arrays(f"{plan.data}--{name}", pictures(density, task, fabric))
    return measured(plan, cell, density, task, fabric, steps=history.steps[-1], seconds=history.seconds[-1])


def method_of(plan: Plan, c: float | None, task: Task) -> Method:
    """As the training loop wants it; the network has a size of its own."""

    weight = 1.0 if plan.hybrid is None else plan.hybrid

    def classifier(features: int, width: int, context_features: int | None) -> torch.nn.Module:
        return InvertibleClassifier(task.shape, CLASSES, SIZES[plan.size], c, plan.activation)

    def hybrid(features: int, width: int, context_features: int | None) -> torch.nn.Module:
        return HybridNet(task.shape, CLASSES, HYBRID_SIZES[plan.size], c or 0.9, weight, plan.activation)

    return Method(
        name=method_name(c, plan.hybrid),
        about="i-ResNet",
        family="residual",
        reference="Behrmann et al. 2019, arXiv 1811.00995",
        stack=classifier if plan.hybrid is None else hybrid,
        host=Classifier if plan.hybrid is None else Hybrid,
        learning_rate=plan.rate,
        own_size=True,
        optimisation=plan.optimisation,
    )


def measured(
    plan: Plan, cell: Cell, density: Classifier | Hybrid, task: Task, fabric: Fabric, steps: int, seconds: float
) -> Outcome:
    """Every number that is kept of a trained network."""
    errors = wrong(density, task.test, fabric)
    return Outcome(
        data=plan.data,
        method=method_name(cell.c, plan.hybrid),
        c=cell.c,
        seed=cell.seed,
        steps=steps,
        seconds=seconds,
        parameters=parameter_count(density),
        error=errors.double().mean().item(),
        test_images=len(errors),
        slopes=slopes(density, task.test, fabric),
        double=inversion(density, task.test, fabric, torch.float64),
        single=inversion(density, task.test, fabric, torch.float32),
        bits_per_dimension=bits(density, task, fabric),
    )


def bits(density: Classifier | Hybrid, task: Task, fabric: Fabric) -> float | None:
    """Bits per dimension of test images, for a hybrid."""
    if isinstance(density, Classifier):
        return None
    images = Points(task.test.x[:1000])
    likelihoods = log_likelihoods(density.density_alone(), images, fabric)
    return task.bits_per_dimension(likelihoods.mean().item())


def pictures(density: Classifier | Hybrid, task: Task, fabric: Fabric) -> dict[str, Any]:
    """A few test images and what their features give back."""
    x = ready(task.test[:SHOWN], density, fabric).x
    back = there_and_back(density, x)[0].nan_to_num(0.0)
    arrays = {"images": task.restore(x), "reconstructions": task.restore(back)}
    if isinstance(density, Hybrid):
        with torch.no_grad():
            arrays["samples"] = task.restore(density.sample(SHOWN))
    return {name: image.float().cpu().numpy() for name, image in arrays.items()}
