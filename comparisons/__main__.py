"""Residual blocks against ordinary flows: one training loop, real data, one report.

Start with `python -m comparisons quickstart`: five minutes, no download. Then `run` compares what you choose, `swap`
does it with a flow of yours, and `report` shows a finished or an interrupted run again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from comparisons.methods import METHODS, TWINS
from comparisons.settings import Budget, Machine
from comparisons.tasks import SUITES, TASKS, is_file

# the commands import what they run: the help should not wait for lightning

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=__doc__)
console = Console()

QUICKSTART_TASKS = ["checkerboard", "digits", "gas-turbine"]
QUICKSTART_TWINS = ["nflows-realnvp", "nflows-maf", "normflows-realnvp"]
QUICKSTART_METHODS = [*(name for twin in QUICKSTART_TWINS for name in (twin, TWINS[twin])), "nflows-nsf"]
QUICKSTART_BUDGETS = {"digits": Budget(steps=200)}  # lets all cells end within five minutes on two cores
QUICKSTART_BUDGET = Budget(steps=500)
STEPS, SMOKE_STEPS = 500, 3
SWAP_TASKS = ["checkerboard"]
DATA = ("digits", "mnist", "cifar10")  # with classes


def known(kind: str, names: Collection[str]) -> Callable[[list[str]], list[str]]:
    """A callback that refuses a name that is not in the table, and lists those that are."""

    def check(values: list[str] | None) -> list[str]:
        for value in values or []:
            if value not in names:
                raise typer.BadParameter(f"there is no {kind} {value!r}; there are: {', '.join(names)}.")
        return values or []

    return check


def one_of(kind: str, names: Collection[str]) -> Callable[[str], str]:
    """As `known`, for a single value."""

    def check(value: str) -> str:
        return known(kind, names)([value])[0]

    return check


def available(device: str) -> str:
    """A callback that refuses a device that is not there."""
    known("device", ["cpu", "cuda"])([device])
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device here; use cpu.")
    return device


def tensorboard_there(wanted: bool) -> bool:
    """A callback that refuses what would fail in every cell."""
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise typer.BadParameter('tensorboard is not installed; pip install "iresflow_plugin[tensorboard]".')
    return wanted


def files(values: list[str] | None) -> list[str]:
    """A callback that refuses what is no file that is there."""
    for value in values or []:
        if not Path(value).is_file():
            raise typer.BadParameter(f"there is no file {value!r}.")
        if not is_file(value):
            raise typer.BadParameter(f"{value!r} must end in .csv, .npy or .npz.")
    return values or []


Tasks = Annotated[
    list[str], typer.Option("--task", help=f"Repeatable: {', '.join(TASKS)}.", callback=known("task", TASKS))
]
Suites = Annotated[
    list[str],
    typer.Option(
        "--suite",
        help="Repeatable, a set of tasks: "
        + "; ".join(f"{name} ({', '.join(tasks)})" for name, tasks in SUITES.items()),
        callback=known("suite", SUITES),
    ),
]
Data = Annotated[
    list[str],
    typer.Option("--data", help="Repeatable: your own table, a .csv, .npy or .npz file, as a task.", callback=files),
]
Columns = Annotated[
    list[str], typer.Option("--context", help="Repeatable: a column of your files that is given, not modelled.")
]
Methods = Annotated[
    list[str],
    typer.Option(
        "--method", help=f"Repeatable, by default all: {', '.join(METHODS)}.", callback=known("method", METHODS)
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="How many trainings of every method; with one there are no intervals.")]
Seed = Annotated[int, typer.Option(help="The first torch seed.")]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Training steps of every cell; by default 500, and 3 with --suite smoke.")
]
Seconds = Annotated[
    float | None, typer.Option(min=0.01, help="Seconds of training of every cell, in place of steps: equal wall-clock.")
]
Parameters = Annotated[
    int | None,
    typer.Option(min=1, help="Parameters of every model, which set its width; by default the task's."),
]
Batch = Annotated[int | None, typer.Option(min=1, help="Points in a step; by default the task's.")]
Tune = Annotated[
    bool,
    typer.Option(
        "--tune",
        help="Try each method's learning rates on each task first, in a third of the budget; validation decides.",
    ),
]
RatesOf = Annotated[
    Path | None,
    typer.Option(help="Folder of a tuned run, whose learning rates are taken.", exists=True, file_okay=False),
]
Device = Annotated[str, typer.Option(help="cpu or cuda.", callback=available)]
Precision = Annotated[str, typer.Option(help="As lightning Fabric calls it: 32-true, 64-true, bf16-mixed, 16-mixed.")]
Devices = Annotated[int, typer.Option(min=1, help="Processes that share every training, one a device.")]
Nodes = Annotated[int, typer.Option(min=1, help="Nodes that share every training; start the same command by torchrun.")]
Workers = Annotated[
    int, typer.Option(min=1, help="Cells that run side by side on a CPU, each with one thread; on a GPU one.")
]
Piece = Annotated[
    float | None,
    typer.Option(min=1.0, help="Seconds after which to pause, with exit code 75; the same command goes on."),
]
Out = Annotated[Path, typer.Option(help="Folder of the run. The same command goes on with what is there.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Throw away what is in the folder.")]
TensorBoard = Annotated[
    bool,
    typer.Option("--tensorboard", help="Write logs for TensorBoard into the folder.", callback=tensorboard_there),
]
Folder = Annotated[Path, typer.Argument(help="The folder of a run.", exists=True, file_okay=False)]


@app.command()
def quickstart(
    seed: Seed = 0,
    workers: Workers = 2,
    fresh: Fresh = False,
    out: Out = Path("quickstart-results"),
) -> None:
    """Swap the transforms of ordinary flows for residual blocks, train both, and compare.

    Takes Real NVP and MAF of nflows and Real NVP of normflows, swaps their transforms for residual blocks at equal
    parameters, trains originals and twins on a 2-D toy, on scikit-learn's digits, and on the gas turbine set where
    `../shared/data` or `$IRESFLOW_DATA` has it. Ctrl-C keeps what is finished.
    """
    from comparisons.run import Plan, run

    plan = Plan(
        QUICKSTART_TASKS,
        [METHODS[name] for name in QUICKSTART_METHODS],
        [seed],
        QUICKSTART_BUDGET,
        out,
        budgets=QUICKSTART_BUDGETS,
        workers=workers,
        fresh=fresh,
    )
    raise typer.Exit(run(plan, console))


@app.command("run")
def run_(
    suite: Suites = [],  # noqa: B006 - typer's way
    task: Tasks = [],  # noqa: B006
    data: Data = [],  # noqa: B006
    context: Columns = [],  # noqa: B006
    method: Methods = [],  # noqa: B006
    seeds: Seeds = 1,
    seed: Seed = 0,
    steps: Steps = None,
    seconds: Seconds = None,
    parameters: Parameters = None,
    batch: Batch = None,
    tune: Tune = False,
    rates_of: RatesOf = None,
    device: Device = "cpu",
    precision: Precision = "32-true",
    devices: Devices = 1,
    nodes: Nodes = 1,
    workers: Workers = 2,
    piece: Piece = None,
    out: Out = Path("run-results"),
    fresh: Fresh = False,
    tensorboard: TensorBoard = False,
) -> None:
    """Train methods on tasks with equal budgets, measure, and report.

    For example `python -m comparisons run --suite toy --seeds 3`, or `python -m comparisons run --data my.csv`.
    A run that was broken off, even by a kill, goes on when it is started again; more seeds, tasks or methods can be
    added to it.
    """
    from comparisons.run import Plan, run

    if context and not data:
        raise typer.BadParameter("--context names a column of your files; give --data, too.")
    tasks = list(dict.fromkeys([*(name for part in suite for name in SUITES[part]), *task, *data]))
    if not tasks:
        raise typer.BadParameter(f"nothing to run on; give --suite ({', '.join(SUITES)}), --task or --data.")
    usual = SMOKE_STEPS if suite == ["smoke"] and not task and not data else STEPS
    budget = Budget(steps or usual, seconds, parameters, batch)
    plan = Plan(
        tasks,
        [METHODS[name] for name in method or METHODS],
        range(seed, seed + seeds),
        budget,
        out,
        columns=tuple(context),
        tune=tune,
        rates_of=rates_of,
        machine=Machine(device, precision, devices, nodes),
        workers=workers,
        piece=piece,
        fresh=fresh,
        tensorboard=tensorboard,
    )
    raise typer.Exit(run(plan, console))


@app.command()
def swap(
    flow: Annotated[str, typer.Argument(metavar="MODULE:FLOW", help="A flow, or a function that makes one.")],
    replaced: Annotated[
        list[str],
        typer.Option(
            "--replace", help="Repeatable: a class to be replaced; by default couplings and autoregressive ones."
        ),
    ] = [],  # noqa: B006
    task: Tasks = SWAP_TASKS,
    data: Data = [],  # noqa: B006
    context: Columns = [],  # noqa: B006
    rate: Annotated[float, typer.Option(help="Adam's learning rate for your flow.")] = 3e-3,
    swapped_rate: Annotated[float, typer.Option(help="And for its swapped twin.")] = METHODS["ours"].learning_rate,
    seeds: Seeds = 1,
    seed: Seed = 0,
    steps: Steps = None,
    seconds: Seconds = None,
    batch: Batch = None,
    device: Device = "cpu",
    workers: Workers = 2,
    out: Out = Path("swap-results"),
    fresh: Fresh = False,
) -> None:
    """Swap transforms of YOUR nflows or normflows model for residual blocks, train both, and compare.

    For example `python -m comparisons swap my_models:make_flow --data my.csv`, from the folder of my_models.py.
    With `--data`, the default task is left out.
    """
    from comparisons.methods.users import users_methods
    from comparisons.run import Plan, run

    try:
        methods = users_methods(flow, tuple(replaced), rate, swapped_rate)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    tasks = [*([] if data and task == SWAP_TASKS else task), *data]
    plan = Plan(
        tasks,
        methods,
        range(seed, seed + seeds),
        Budget(steps or STEPS, seconds, None, batch),
        out,
        columns=tuple(context),
        machine=Machine(device),
        workers=workers,
        fresh=fresh,
    )
    raise typer.Exit(run(plan, console))


@app.command("data")
def data_(
    name: Annotated[list[str] | None, typer.Argument(help="Tasks, or paths of your files; none: all tasks.")] = None,
    context: Columns = [],  # noqa: B006
) -> None:
    """What the tasks are: how many points, of what size, and what is done to them before training."""
    from comparisons.tables import Grid, print_wide
    from comparisons.tasks import Task, load

    found: list[Task] = []
    for one in name or TASKS:
        try:
            found.append(load(one, context if is_file(one) else ()))
        except (FileNotFoundError, ValueError) as error:
            console.print(f"[yellow]Left out {one}:[/] {error}", highlight=False)
    columns: dict[str, Callable[[Task], str]] = {
        "task": lambda task: task.name,
        "features": lambda task: str(task.features),
        "context": lambda task: str(task.context_features or "-"),
        "validation": lambda task: f"{len(task.validation):,}",
        "test": lambda task: f"{len(task.test):,}",
        "batch": lambda task: str(task.batch),
        "parameters": lambda task: f"{task.parameters:,}",
    }
    print_wide(console, [Grid.of("Tasks", columns, found).rich()] if found else [])
    for task in found:
        console.print(f"[bold]{task.name}[/] {task.about}", highlight=False)
        for step in task.preprocessing:
            console.print(f"  - {step}", highlight=False)
    raise typer.Exit(int(not found))


@app.command()
def classify(
    data: Annotated[str, typer.Option(help="digits, mnist or cifar10.", callback=one_of("data", DATA))] = "digits",
    c: Annotated[
        list[float],
        typer.Option("--c", help="Repeatable: bound of each of a branch's three layers; by default 0.9 and 0.5."),
    ] = [],  # noqa: B006
    vanilla: Annotated[bool, typer.Option("--vanilla", help="Train the twin without a constraint, too.")] = False,
    table: Annotated[bool, typer.Option("--table", help="The paper's table: vanilla and c = .9 .8 .7 .6 .5.")] = False,
    hybrid: Annotated[
        float | None, typer.Option(min=0.0, help="log p(x) / D + this * log p(y|x), in place of classifiers.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="smoke, small, paper or published; by default smoke for digits, else small."),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            help="elu, as published, waves, the default of our nets, or maxmin; by default elu, of hybrids waves."
        ),
    ] = None,
    seeds: Seeds = 1,
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; by default those of the size.")] = None,
    seconds: Seconds = None,
    batch: Batch = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate; by default that of the size.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adam, adamax or sgd.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, steps or constant.")] = None,
    warm_up: Annotated[float | None, typer.Option(help="Share of the training in which the rate rises.")] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0.0)] = None,
    average: Annotated[float | None, typer.Option(help="Decay of a running average of the weights.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of a gradient.")] = None,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Parts in which a batch is worked through.")] = None,
    compile_: Annotated[bool | None, typer.Option("--compile", help="By torch.compile.")] = None,
    piece: Piece = None,
    device: Device = "cpu",
    precision: Precision = "32-true",
    workers: Workers = 1,
    out: Out = Path("classify-results"),
    fresh: Fresh = False,
) -> None:
    """Train invertible residual classifiers and their vanilla twin; show error rates and the way back to the image.

    For example `python -m comparisons classify --vanilla`, a minute on digits, or on MNIST in 40 minutes on two
    cores: `classify --data mnist --vanilla --workers 2`. On a GPU in pieces, each by the same command until it exits
    with 0 and not 75: `classify --data cifar10 --size paper --table --device cuda --precision bf16-mixed --piece 450`.
    """
    from comparisons.classification.recipes import PAPER_BOUNDS, planned
    from comparisons.classification.run import classify as run_classify

    if table and c:
        raise typer.BadParameter("--table has the bounds of the paper; leave out --c, or --table.")
    bounds = [None] * (vanilla or table) + (list(PAPER_BOUNDS) if table else c or [0.9, 0.5])
    wishes = {
        "optimizer": optimizer,
        "schedule": schedule,
        "warm_up": warm_up,
        "weight_decay": weight_decay,
        "average": average,
        "clip": clip,
        "accumulate": accumulate,
        "compile": compile_,
    }
    try:
        plan = planned(
            data,
            size or ("smoke" if data == "digits" else "small"),
            wishes,
            budget=(steps, seconds, batch),
            rate=rate,
            bounds=tuple(bounds),
            seeds=range(seed, seed + seeds),
            out=out,
            activation=activation or ("elu" if hybrid is None else "waves"),
            hybrid=hybrid,
            piece=piece,
            machine=Machine(device, precision),
            workers=workers,
            fresh=fresh,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(run_classify(plan, console))


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test: tiny sizes, numbers without meaning.")] = False,
    kind: Annotated[
        list[str],
        typer.Option(
            "--kind",
            help="Repeatable: vectors, images or classifiers; by default the first two.",
            callback=known("kind", ("vectors", "images", "classifiers")),
        ),
    ] = ["vectors", "images"],  # noqa: B006
    batch: Annotated[
        int | None, typer.Option(min=1, help="Points or images in a step; by default 256, 32 and, of classifiers, 128.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The torch seed.")] = 0,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.md.")] = Path("bench-results"),
) -> None:
    """Time and memory: our block beside normflows' Residual, Real NVP and Glow, and the cost of the certificate.

    One thread, all sides in turn, medians; weights scaled until the Lipschitz constraint binds.
    """
    from comparisons import speed
    from comparisons.bench import bench as run_bench

    settings = replace(speed.FULL, device=torch.device(device))
    settings = settings.smaller() if quick else settings
    if batch is not None:
        settings = replace(settings, batch=batch, image_batch=batch, classifier_batch=batch)
    run_bench(settings, kind, seed, out, console)


@app.command()
def property_kit(
    name: Annotated[list[str] | None, typer.Argument(help="Parts of subjects' names; none: all of them.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for property_kit.md.")] = Path("property-kit-results"),
) -> None:
    """Point the property kit at transforms of every host that is installed: which are sound, and what is not."""
    from comparisons.property_kit import property_kit as run_kit

    raise typer.Exit(run_kit(name or [], out, console))


@app.command()
def report(folder: Folder) -> None:
    """Build report.html and report.md of a finished or interrupted run anew."""
    from comparisons.report import write_markdown, write_report
    from comparisons.results import Store
    from comparisons.tables import print_lines

    store = Store(folder)
    print_lines(console, f"Tables: {write_markdown(store)}", f"Report: {write_report(store)}")


@app.command()
def figures(folder: Folder) -> None:
    """Write every picture of a run as a file of its own."""
    from comparisons.report import write_figures
    from comparisons.results import Store
    from comparisons.tables import print_lines

    print_lines(console, *map(str, write_figures(Store(folder))))


if __name__ == "__main__":
    app()
