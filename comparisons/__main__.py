"""Residual blocks against ordinary flows: one training loop, real data, one report.

Start with `python -m comparisons quickstart`: five minutes, no download.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from comparisons.methods import METHODS, TWINS
from comparisons.tasks import TASKS, is_file

# the commands import what they run: the help should not wait for lightning

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=__doc__)
console = Console()

QUICKSTART_TASKS = ["checkerboard", "digits", "gas-turbine"]
QUICKSTART_TWINS = ["nflows-realnvp", "nflows-maf", "normflows-realnvp"]
QUICKSTART_METHODS = [*(name for twin in QUICKSTART_TWINS for name in (twin, TWINS[twin])), "nflows-nsf"]
TRAIN_TASKS = ["checkerboard"]
TRAIN_METHODS = ["ours", "nflows-nsf", "nflows-realnvp", "nflows-maf", "normflows-residual"]
# steps that let all cells end within five minutes on two cores
QUICKSTART_STEPS = {"digits": 200}
USUAL_STEPS = 500


def known(kind: str, names: Collection[str]) -> Callable[[list[str]], list[str]]:
    """A callback that refuses a name that is not in the table, and lists those that are."""

    def check(values: list[str]) -> list[str]:
        for value in values:
            if value not in names:
                raise typer.BadParameter(f"there is no {kind} {value!r}; there are: {', '.join(names)}.")
        return values

    return check


def available(device: str) -> str:
    """A callback that refuses a device that is not there."""
    known("device", ["cpu", "cuda"])([device])
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device here; use cpu.")
    return device


def tasks_or_files(values: list[str]) -> list[str]:
    """A callback that refuses what is neither a task nor a file that is there."""
    for value in values:
        if is_file(value) and not Path(value).is_file():
            raise typer.BadParameter(f"there is no file {value!r}.")
    known("task", TASKS)([value for value in values if not is_file(value)])
    return values


Tasks = Annotated[
    list[str],
    typer.Option(
        "--task",
        help=f"Repeatable: {', '.join(TASKS)}, or the path of a .csv, .npy or .npz file.",
        callback=tasks_or_files,
    ),
]
Methods = Annotated[
    list[str], typer.Option("--method", help=f"Repeatable: {', '.join(METHODS)}.", callback=known("method", METHODS))
]
Out = Annotated[Path, typer.Option(help="Folder for report.html, results.json and the arrays behind the pictures.")]
Seed = Annotated[int, typer.Option(help="The torch seed of every cell.")]
Workers = Annotated[int, typer.Option(min=1, help="Cells that run side by side, each with one thread.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.", callback=available)]


@app.command()
def quickstart(
    task: Tasks = QUICKSTART_TASKS,
    method: Methods = QUICKSTART_METHODS,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of every cell; by default a few hundred, by task.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    workers: Workers = 2,
    out: Out = Path("quickstart-results"),
) -> None:
    """Swap the transforms of ordinary flows for residual blocks, train both, and compare.

    Takes Real NVP and MAF of nflows and Real NVP of normflows, swaps their transforms for residual blocks at equal
    parameters, trains originals and twins on a 2-D toy, on scikit-learn's digits, and on the gas turbine set where
    `../shared/data` or `$IRESFLOW_DATA` has it. Ctrl-C keeps what is finished.
    """
    from comparisons.compare import compare

    chosen = {name: steps or QUICKSTART_STEPS.get(name, USUAL_STEPS) for name in task}
    raise typer.Exit(compare(chosen, method, seed=seed, device=device, workers=workers, out=out, console=console))


@app.command()
def train(
    task: Tasks = TRAIN_TASKS,
    method: Methods = TRAIN_METHODS,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of every cell.")] = 1500,
    seed: Seed = 0,
    device: Device = "cpu",
    workers: Workers = 2,
    out: Out = Path("train-results"),
) -> None:
    """Train methods of equal size on a task for longer, and compare: the numbers that the defaults were chosen by."""
    from comparisons.compare import compare

    chosen = dict.fromkeys(task, steps)
    raise typer.Exit(compare(chosen, method, seed=seed, device=device, workers=workers, out=out, console=console))


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test: tiny sizes, numbers without meaning.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.md.")] = Path("bench-results"),
) -> None:
    """Time and memory: our block beside normflows' Residual, Real NVP and Glow, and the cost of the certificate.

    One thread, all sides in turn, medians; weights scaled until the Lipschitz constraint binds.
    """
    from comparisons import speed
    from comparisons.bench import bench as run_bench

    settings = speed.QUICK if quick else speed.FULL
    run_bench(replace(settings, device=torch.device(device)), seed, out, console)


@app.command()
def property_kit(
    name: Annotated[list[str] | None, typer.Argument(help="Parts of subjects' names; none: all of them.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for property_kit.md.")] = Path("property-kit-results"),
) -> None:
    """Point the property kit at transforms of every host that is installed: which are sound, and what is not."""
    from comparisons.property_kit import property_kit as run

    raise typer.Exit(run(name or [], out, console))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that quickstart or train wrote.", exists=True)],
) -> None:
    """Build the report of a finished or interrupted run anew."""
    from comparisons.report import write_report
    from comparisons.results import Store

    console.print(f"Report: {write_report(Store(folder))}", highlight=False)


if __name__ == "__main__":
    app()
