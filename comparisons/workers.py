"""Cells side by side: each in a process of its own with one thread, which suits nets as small as these."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from lightning.fabric import Fabric

from comparisons.cells import Arrays, run_cell
from comparisons.results import Failure, Result
from comparisons.tasks import load

LOOK_AGAIN = 0.2  # seconds between two looks at the workers


@dataclass(frozen=True)
class Cell:
    """What is to be run."""

    task: str
    method: str
    steps: int
    seed: int
    device: str


Outcome = tuple[Cell, Result | Failure, Arrays]


def attempt(cell: Cell, on_step: Callable[[], None]) -> Outcome:
    """Run a cell; what goes wrong in it becomes a `Failure`, so that the others go on."""
    torch.set_num_threads(1)
    try:
        fabric = Fabric(accelerator=cell.device, devices=1)
        task = load(cell.task)
        result, arrays = run_cell(task, cell.method, steps=cell.steps, seed=cell.seed, fabric=fabric, on_step=on_step)
    except Exception as error:  # whatever a host may throw
        return cell, Failure(cell.task, cell.method, cell.seed, f"{type(error).__name__}: {error}"), {}
    return cell, result, arrays


def run_all(cells: list[Cell], workers: int, on_progress: Callable[[int], None]) -> Iterator[Outcome]:
    """Outcomes as they come; `on_progress` is told how many training steps have been done in all."""
    return side_by_side(cells, workers, on_progress) if workers > 1 else in_turn(cells, on_progress)


def in_turn(cells: list[Cell], on_progress: Callable[[int], None]) -> Iterator[Outcome]:
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        on_progress(done)

    for cell in cells:
        yield attempt(cell, on_step)


def side_by_side(cells: list[Cell], workers: int, on_progress: Callable[[int], None]) -> Iterator[Outcome]:
    context = get_context("spawn")  # a fork of a process that has used torch may hang
    steps, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, initializer=become_worker, initargs=(steps, stop)) as pool:
        pending: dict[Future[Outcome], Cell] = {pool.submit(attempt, cell, count_step): cell for cell in cells}
        try:
            while pending:
                finished, _ = wait(pending, timeout=LOOK_AGAIN, return_when=FIRST_COMPLETED)
                on_progress(steps.value)
                for future in finished:
                    yield outcome_of(future, pending.pop(future))
        finally:  # also when the reader is interrupted: the cells that run end at their next step
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def outcome_of(future: Future[Outcome], cell: Cell) -> Outcome:
    """What a worker handed back, or a failure if it died, which also ends the cells that were waiting for it."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        return cell, Failure(cell.task, cell.method, cell.seed, f"a worker process died: {error}"), {}


class StoppedError(BaseException):
    """Ends a cell whose outcome nobody waits for; no `Exception`, so that it is not taken for a failure of the cell."""


def become_worker(steps: Any, stop: Any) -> None:
    """What workers share: the count of steps, and the sign to stop. Ctrl-C is for the main process, which gives it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    global STEPS, STOP
    STEPS, STOP = steps, stop


def count_step() -> None:
    with STEPS.get_lock():
        STEPS.value += 1
    if STOP.is_set():
        raise StoppedError
