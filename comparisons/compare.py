"""Run tasks x methods and leave table, JSON and report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from comparisons.cells import task_arrays
from comparisons.report import COLUMNS, GAIN_COLUMNS, best_of, by_task, gains, with_error, write_report
from comparisons.results import Failure, Result, Store, provenance
from comparisons.tables import PROGRESS_COLUMNS, print_wide, rich_table
from comparisons.tasks import DataNotFoundError, Task, load
from comparisons.workers import Cell, run_all

INTERRUPTED = 130  # what a shell calls an end by Ctrl-C


def load_tasks(names: Iterable[str], console: Console) -> dict[str, Task]:
    """The tasks whose data is here and sound, by the name or path asked for; the others are named and left out."""
    tasks = {}
    for name in names:
        try:
            task = load(name)
            if task.name in [other.name for other in tasks.values()]:
                raise ValueError(f"another task is named {task.name}, too; rename the file.")
            tasks[name] = task
        except (DataNotFoundError, ValueError) as error:  # the second: a file that cannot be used
            console.print(f"[yellow]Left out {name}:[/] {error}", highlight=False)
    return tasks


def compare(
    steps: Mapping[str, int],
    methods: Sequence[str],
    *,
    seed: int,
    device: str,
    workers: int,
    out: Path,
    console: Console,
) -> int:
    """Run every method on every task named in `steps`; the exit code: 0, 1 if a cell failed, 130 after Ctrl-C.

    Whatever happens, the finished cells are on disk, printed and reported.
    """
    store = Store(out)
    store.start()
    tasks = load_tasks(steps, console)
    if not tasks:
        console.print("[red]No task is left to run.[/]")
        return 1
    for task in tasks.values():
        store.add_arrays(task.name, task_arrays(task))
    cells = [Cell(name, method, steps[name], seed, device) for name in tasks for method in methods]
    interrupted = False
    try:
        run_cells(cells, workers, store, console)
    except KeyboardInterrupt:
        interrupted = True
        console.print("[yellow]Interrupted.[/] What was finished is kept.")
    results, failures, _ = store.load()
    print_wide(console, tables(results, store))
    for failure in failures:
        console.print(f"[red]Failed:[/] {failure.method} on {failure.task}: {failure.error}", highlight=False)
    console.print(f"Numbers: {store.write_json()}", f"Report:  {write_report(store)}", sep="\n", highlight=False)
    return INTERRUPTED if interrupted else int(bool(failures))


def run_cells(cells: list[Cell], workers: int, store: Store, console: Console) -> None:
    """Run the cells and put each on disk as soon as it is done."""
    run = {**provenance(), "workers": f"{workers}, one thread each"}
    with Progress(*PROGRESS_COLUMNS, console=console) as progress:
        bar = progress.add_task("steps", total=sum(cell.steps for cell in cells))
        for _, outcome, arrays in run_all(cells, workers, lambda done: progress.update(bar, completed=done)):
            if isinstance(outcome, Result):
                store.add_arrays(outcome.name, arrays)
            store.add(outcome, run)
            progress.console.print(sentence(outcome), highlight=False, soft_wrap=True)


def sentence(outcome: Result | Failure) -> str:
    if isinstance(outcome, Failure):
        return f"{outcome.task:<14}{outcome.method:<28}failed: {outcome.error}"
    score, seconds = outcome.log_likelihood, outcome.training_seconds
    return f"{outcome.task:<14}{outcome.method:<28}{with_error(score):>17} nats   trained in {seconds:5.1f} s"


def tables(results: list[Result], store: Store) -> list[Table]:
    """One table a task, the best test log-likelihood in bold, and one of what the swap changed."""
    made = [
        rich_table(f"{task}: {chosen[0].steps} steps", COLUMNS, chosen, best_of(chosen))
        for task, chosen in by_task(results).items()
    ]
    changes = gains(results, store)
    return [*made, rich_table("What the swap changed", GAIN_COLUMNS, changes)] if changes else made
