"""Run tasks x methods x seeds, choose learning rates first if asked to, and leave tables, JSON and a report."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from rich.console import Console
from rich.progress import Progress

from comparisons.cells import Cell, Finished, key_of, loaded, task_arrays
from comparisons.methods import Method
from comparisons.provenance import provenance
from comparisons.report import terminal_tables, write_markdown, write_report
from comparisons.results import Failure, Result, SettingsError, Store, Trial
from comparisons.settings import INTERRUPTED, INTERRUPTED_WORDS, PAUSED, Budget, Machine
from comparisons.tables import bar, print_lines, print_wide
from comparisons.tasks import Task, is_file
from comparisons.workers import Broken, Left, Outcome, outcomes, steady

INSIDE = "ours"  # the method that is looked into


@dataclass(frozen=True)
class Plan:
    """What to run, and how.

    Args:
        tasks: names or paths of files; `columns` of these are the context.
        budgets: of single tasks, where they differ from `budget`.
        tune: try every learning rate of a method's grid on every task, in a third of the budget with the first seed,
            and take the one with the best validation; else the method's own.
        rates_of: the folder of a run whose choice is taken over, and tried no more.
        workers: cells that run side by side, each with one thread.
        piece: seconds after which the run pauses, to go on when it is started again; None for never.
        deadline: of `time.monotonic`, when that is; set when the cells begin.
        fresh: throw away what is in the folder; else go on with it.
    """

    tasks: Sequence[str]
    methods: Sequence[Method]
    seeds: Sequence[int]
    budget: Budget
    out: Path
    columns: tuple[str, ...] = ()
    budgets: dict[str, Budget] = field(default_factory=dict)
    tune: bool = False
    rates_of: Path | None = None
    machine: Machine = field(default_factory=Machine)
    workers: int = 2
    piece: float | None = None
    deadline: float = math.inf
    fresh: bool = False
    tensorboard: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What all cells of a folder must have in common."""
        return {
            "budget": asdict(self.budget),
            "budgets": {task: asdict(budget) for task, budget in self.budgets.items()},
            "tune": self.tune,
            "rates_of": None if self.rates_of is None else str(self.rates_of),
            "columns": self.columns,
            "device": self.machine.device,
            "precision": self.machine.precision,
        }

    def cell(self, task: str, method: Method, seed: int, rate: float, **more: Any) -> Cell:
        columns, budget = self.columns if is_file(task) else (), self.budgets.get(task, self.budget)
        return Cell(task, columns, method, seed, rate, budget, self.machine, deadline=self.deadline, **more)


def run(plan: Plan, console: Console) -> int:
    """Run what is not yet done; the exit code: 0, 1 if a cell failed or nothing could be run, 75 paused, 130 Ctrl-C.

    Whatever happens, the finished cells are on disk, printed and reported.
    """
    fabric = plan.machine.fabric()
    if plan.machine.parallel:
        fabric.launch()
    steady()
    if not fabric.is_global_zero:
        console = Console(quiet=True)
    store = Store(plan.out)
    try:
        if fabric.is_global_zero:
            store.start(plan.settings, plan.fresh)
            if plan.rates_of is not None:
                store.take_trials(Store(plan.rates_of))
    except SettingsError as error:
        console.print(f"[red]{error}[/]", highlight=False)
        return 1
    fabric.barrier()
    tasks = load_tasks(plan, console)
    if not tasks:
        console.print("[red]No task is left to run.[/]")
        return 1
    interrupted, left = False, 0
    try:
        left = run_cells(plan, tasks, store, fabric, console)
    except KeyboardInterrupt:
        interrupted = True
        console.print(INTERRUPTED_WORDS)
    results, failures, _ = store.load()
    if fabric.is_global_zero:
        finish(store, results, failures, console)
    if interrupted:
        return INTERRUPTED
    return PAUSED if left else 1 if failures else 0


def load_tasks(plan: Plan, console: Console) -> dict[str, Task]:
    """The tasks whose data is here and sound, by the name or path asked for; the others are named and left out."""
    tasks: dict[str, Task] = {}
    for name in plan.tasks:
        try:
            task = loaded(name, plan.columns if is_file(name) else ())
            if task.name in [other.name for other in tasks.values()]:
                raise ValueError(f"another task is named {task.name}, too; rename the file.")
            tasks[name] = task
        except (FileNotFoundError, ValueError) as error:  # the second: a file that cannot be used
            console.print(f"[yellow]Left out {name}:[/] {error}", highlight=False)
    return tasks


def run_cells(plan: Plan, tasks: dict[str, Task], store: Store, fabric: Fabric, console: Console) -> int:
    """Try learning rates, then run the cells; each is on disk as soon as it is done, and not run again.

    Returns how many are left for another piece.
    """
    if fabric.is_global_zero:
        for task in tasks.values():
            store.add_arrays(task.name, task_arrays(task))
    pairs = [(name, method) for name in tasks for method in plan.methods if takes(tasks[name], method, console)]
    if plan.piece is not None:  # counted from here, so that a slow start does not eat a piece
        plan = replace(plan, deadline=time.monotonic() + plan.piece)
    wanted = wanted_cells(plan, tasks, pairs, store, console)
    undecided = list(dict.fromkeys((name, method) for name, method, _ in wanted))
    trials = list(wanted_trials(plan, tasks, undecided, store)) if plan.tune else []
    fabric.barrier()  # all processes have read the same
    at_once = plan.machine.at_once(plan.workers)
    information = {**provenance(), "workers": f"{at_once}, one thread each"}  # now: files may change
    left = 0
    with bar(sum(cell.weight for cell in trials) + len(wanted), console) as (progress, advance):
        for outcome in outcomes(trials, at_once, fabric, advance):
            left += note(outcome, information, store, fabric, progress)
        fabric.barrier()  # what the first process wrote, all may read
        if left:  # no cell is run at a rate that is not decided yet
            return left
        rates = best_rates(store.load_trials())
        if plan.rates_of is not None and (unknown := [pair for pair in undecided if named(pair, tasks) not in rates]):
            pairs_text = ", ".join(f"{method.name} on {name}" for name, method in unknown)
            progress.console.print(f"[yellow]No rate in {plan.rates_of}, so the usual one:[/] {pairs_text}.")
        finals = [final(plan, tasks[name], name, method, seed, rates, store) for name, method, seed in wanted]
        before = sum(cell.weight for cell in trials)
        for outcome in outcomes(finals, at_once, fabric, lambda done: advance(before + done)):
            left += note(outcome, information, store, fabric, progress)
    return left


def named(pair: tuple[str, Method], tasks: dict[str, Task]) -> tuple[str, str]:
    return tasks[pair[0]].name, pair[1].name


def note(outcome: Outcome[Cell], information: dict[str, Any], store: Store, fabric: Fabric, progress: Progress) -> bool:
    """On disk and on the terminal, by the first process; returns whether the cell is left for another piece."""
    left = to_be_done_again(outcome)
    if fabric.is_global_zero:
        if not left:
            keep(outcome, store, information)
        print_lines(progress.console, sentence(outcome))
    return left


def to_be_done_again(outcome: Outcome[Cell]) -> bool:
    """What was paused, and a trial that died with its worker: that says nothing of its learning rate."""
    found = outcome.found
    return isinstance(found, Left) or (isinstance(found, Broken) and found.died and outcome.job.trial)


def wanted_cells(
    plan: Plan, tasks: dict[str, Task], pairs: Sequence[tuple[str, Method]], store: Store, console: Console
) -> list[tuple[str, Method, int]]:
    """What is not yet done. Seeds come last: a run that is broken off has all methods."""
    done = {result.key for result in store.load()[0]}
    wanted = [
        (name, method, seed)
        for seed in plan.seeds
        for name, method in pairs
        if (tasks[name].name, method.name, seed) not in done
    ]
    if done:
        console.print(f"{len(done)} cells were finished before; {len(wanted)} are left.", highlight=False)
    return wanted


def takes(task: Task, method: Method, console: Console) -> bool:
    """Whether the method has an answer to this kind of task."""
    refusal = method.refusal(task.shape, task.context_features)
    if refusal:
        console.print(f"[yellow]Left out {method.name} on {task.name}:[/] {refusal}", highlight=False)
    return not refusal


def wanted_trials(
    plan: Plan, tasks: dict[str, Task], pairs: Iterable[tuple[str, Method]], store: Store
) -> Iterator[Cell]:
    tried = {(trial.task, trial.method, trial.learning_rate) for trial in store.load_trials()}
    for name, method in pairs:
        key = tasks[name].name, method.name, plan.seeds[0]
        for rate in method.grid:
            if (*key[:2], rate) not in tried:
                file = store.checkpoint(key, f"{rate:g}", "trial")
                yield plan.cell(name, method, plan.seeds[0], rate, trial=True, checkpoint=file)


def best_rates(trials: Iterable[Trial]) -> dict[tuple[str, str], float]:
    """By task and method, the learning rate with the least validation loss."""
    best: dict[tuple[str, str], Trial] = {}
    for trial in trials:
        old = best.get((trial.task, trial.method))
        if old is None or loss(trial) < loss(old):
            best[trial.task, trial.method] = trial
    return {key: trial.learning_rate for key, trial in best.items() if trial.validation is not None}


def loss(trial: Trial) -> float:
    return math.inf if trial.validation is None else trial.validation


def final(
    plan: Plan, task: Task, name: str, method: Method, seed: int, rates: dict[tuple[str, str], float], store: Store
) -> Cell:
    first, rate = seed == plan.seeds[0], rates.get((task.name, method.name), method.learning_rate)
    return plan.cell(
        name,
        method,
        seed,
        rate,
        pictures=first,
        look_inside=first and method.name == INSIDE,
        checkpoint=store.checkpoint((task.name, method.name, seed), f"{rate:g}"),
        tensorboard=store.folder / "tensorboard" if plan.tensorboard else None,
    )


def keep(outcome: Outcome[Cell], store: Store, information: dict[str, Any]) -> None:
    found, cell = outcome.found, outcome.job
    if isinstance(found, Trial):
        store.add_trial(found)
    elif isinstance(found, Finished):
        store.add_arrays(found.result.name, found.arrays)  # before the line that says that the cell is done
        if found.costs:
            store.add_work(found.result.task, found.costs)
        store.add(found.result, information)
    elif cell.trial:  # a rate that cannot be trained with, and no failure of the cell
        store.add_trial(Trial(*key_of(cell)[:2], cell.rate, None))
    else:
        store.add(Failure(*key_of(cell), found.words), information)
        return  # its checkpoint is for another try
    if cell.checkpoint is not None:
        cell.checkpoint.unlink(missing_ok=True)


def finish(store: Store, results: list[Result], failures: list[Failure], console: Console) -> None:
    print_wide(console, terminal_tables(store))
    for failure in failures:
        console.print(
            f"[red]Failed:[/] {failure.method} on {failure.task}, seed {failure.seed}: {failure.error}", highlight=False
        )
    paths = [f"Numbers: {store.write_json()}"]
    if results:
        paths += [f"Tables:  {write_markdown(store)}", f"Report:  {write_report(store)}"]
    print_lines(console, *paths)


def sentence(outcome: Outcome[Cell]) -> str:
    """What is printed when a cell is done."""
    found, cell = outcome.found, outcome.job
    name, method, _ = key_of(cell)
    head = f"{name:<16} {method:<28}"
    which = f"learning rate {cell.rate:g}:" if cell.trial else f"seed {cell.seed} "
    if to_be_done_again(outcome):
        return f"{head}{which} {found.words}; the same command goes on"
    if isinstance(found, Broken):
        return f"{head}{which} failed: {found.words}"
    if isinstance(found, Trial):
        worth = "no finite loss" if found.validation is None else f"validation {found.validation:.3f}"
        return f"{head}{which} {worth}"
    score, seconds = found.result.log_likelihood, found.result.training_seconds
    return f"{head}{which} {score.mean:.3f} ± {score.error:.3f} nats, trained in {seconds:.1f} s"
