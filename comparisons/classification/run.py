"""Train classifiers or hybrids through the one loop, measure, and leave JSON lines, a table and a picture."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric, seed_everything
from rich.console import Console

from comparisons.classification import report
from comparisons.classification.hybrid import HYBRID_SIZES, Hybrid, HybridNet
from comparisons.classification.measure import inversion, slopes, there_and_back, wrong
from comparisons.classification.model import SIZES, Classifier, InvertibleClassifier
from comparisons.classification.recipes import Plan
from comparisons.classification.results import Trained, method_name, read
from comparisons.classification.tasks import CLASSES, load_task
from comparisons.methods import Method, build, parameter_count
from comparisons.provenance import provenance
from comparisons.results import SettingsError, Store, append
from comparisons.settings import INTERRUPTED, INTERRUPTED_WORDS, PAUSED, Machine
from comparisons.tables import bar, print_lines, print_wide
from comparisons.tasks import Points, Task
from comparisons.training import OnProgress, log_likelihoods, ready, train
from comparisons.workers import Broken, Left, outcomes, steady

SHOWN = 10  # images in the picture
SCORED = 1000  # images whose density is taken, which costs more than their class


@dataclass(frozen=True)
class Training:
    """One network to train and to measure.

    Args:
        c: the bound of every layer of a branch, or None for vanilla.
        deadline: of `time.monotonic`, when the training pauses.
    """

    plan: Plan
    c: float | None
    seed: int
    deadline: float = math.inf
    weight: float = 1.0

    @property
    def name(self) -> str:
        return method_name(self.c, self.plan.hybrid)

    @property
    def machine(self) -> Machine:
        return self.plan.machine

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline

    @property
    def checkpoint(self) -> Path:
        return Store(self.plan.out).checkpoint((self.plan.data, self.name, self.seed))

    def work(self, fabric: Fabric, on_progress: OnProgress) -> Trained:
        return run_training(self, fabric, on_progress)


def classify(plan: Plan, console: Console) -> int:
    """Run what is not yet done; the exit code: 0, 1 if a training failed or none can be run, 75 paused, 130 Ctrl-C.

    Whatever happens, the finished networks are on disk, printed and shown.
    """
    steady()
    store = Store(plan.out)
    try:
        store.start(plan.settings, plan.fresh)
        load_task(plan.data)
    except (SettingsError, FileNotFoundError) as error:
        console.print(f"[red]{error}[/]", highlight=False)
        return 1
    try:
        code = run_trainings(plan, store, console)
    except KeyboardInterrupt:
        code = INTERRUPTED
        console.print(INTERRUPTED_WORDS)
    if results := read(store.lines):
        grid = report.table(results)
        print_wide(console, [grid.rich()])
        print_lines(
            console,
            *report.image_sources(results),
            f"Table:   {report.write_markdown(store, results, plan.settings)}",
            f"Picture: {report.write_picture(store, results)}",
        )
    return code


def run_trainings(plan: Plan, store: Store, console: Console) -> int:
    """Each is on disk as soon as it is done. The exit code."""
    done = {(network.c, network.seed) for network in read(store.lines)}
    deadline = math.inf if plan.piece is None else time.monotonic() + plan.piece
    wanted = [Training(plan, c, seed, deadline) for seed in plan.seeds for c in plan.bounds if (c, seed) not in done]
    at_once = plan.machine.at_once(plan.workers)
    information = {**provenance(), "workers": at_once}
    codes = [0]
    with bar(len(wanted), console) as (progress, advance):
        for outcome in outcomes(wanted, at_once, plan.machine.fabric(), advance):
            found, training = outcome.found, outcome.job
            if isinstance(found, Trained):
                append(store.lines, {**asdict(found), "run": information})
                training.checkpoint.unlink(missing_ok=True)
            else:
                codes.append(PAUSED if isinstance(found, Left) else 1)
            print_lines(progress.console, sentence(training, found))
    return max(codes)


def sentence(training: Training, found: Trained | Left | Broken) -> str:
    """What is printed when a network is done, or not."""
    if isinstance(found, Trained):
        return report.sentence(found)
    who = f"{training.name}, seed {training.seed}"
    if isinstance(found, Left):
        return f"{who}: {found.words}; the same command goes on"
    return f"{who} failed: {found.words}"


def run_training(training: Training, fabric: Fabric, on_progress: OnProgress) -> Trained:
    """Build, train, measure; or go on with the checkpoint, and pause again at the deadline."""
    plan = training.plan
    task = load_task(plan.data, plan.hybrid is not None)
    seed_everything(training.seed, verbose=False)
    method = method_of(plan, training.c, task)
    density = build(method, task.features, task.parameters, task.context_features)
    history = train(
        density,
        task,
        method,
        rate=plan.rate,
        budget=plan.budget,
        seed=training.seed,
        fabric=fabric,
        on_progress=on_progress,
        checkpoint=training.checkpoint,
        pause=lambda: training.over,
    )
    if not isinstance(density, (Classifier, Hybrid)):
        raise TypeError(f"{type(density).__name__} is not measured here.")
    if training.seed == plan.seeds[0]:
        Store(plan.out).add_arrays(f"{plan.data}--{training.name}", pictures(density, task, fabric))
    return measured(training, density, task, fabric, steps=history.steps[-1], seconds=history.seconds[-1])


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
    training: Training, density: Classifier | Hybrid, task: Task, fabric: Fabric, steps: int, seconds: float
) -> Trained:
    """Every number that is kept of a trained network."""
    errors = wrong(density, task.test, fabric)
    return Trained(
        data=training.plan.data,
        method=training.name,
        c=training.c,
        seed=training.seed,
        steps=steps,
        seconds=seconds,
        parameters=parameter_count(density),
        error=errors.double().mean().item(),
        test_images=len(errors),
        slopes=slopes(density, task.test, fabric),
        double=inversion(density, task.test, fabric, torch.float64),
        single=inversion(density, task.test, fabric, torch.float32),
        bits_per_dimension=bits(density, task, fabric),
        images=task.about,
    )


def bits(density: Classifier | Hybrid, task: Task, fabric: Fabric) -> float | None:
    """Bits per dimension of test images, for a hybrid."""
    if isinstance(density, Classifier):
        return None
    images = Points(task.test.spread(SCORED).x)
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
