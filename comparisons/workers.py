"""Cells side by side: each in a process of its own with one thread, which suits nets as small as these."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context, parent_process
from typing import Any

import torch
from lightning.fabric import Fabric

from comparisons.cells import Arrays, Cell, Work, key_of, run_cell, run_trial
from comparisons.results import Failure, Result, Trial
from comparisons.training import OnProgress, PausedError, common

LOOK_AGAIN = 0.2  # seconds between two looks at the workers


@dataclass(frozen=True)
class Left:
    """A cell that is not finished, and that the same command goes on with."""

    words: str


@dataclass(frozen=True)
class Outcome:
    """What became of a cell."""

    cell: Cell
    found: Result | Trial | Failure | Left
    arrays: Arrays = field(default_factory=dict)
    work: Work = field(default_factory=dict)


def attempt(cell: Cell, fabric: Fabric, on_progress: OnProgress) -> Outcome:
    """Run a cell; what goes wrong in it becomes a `Failure`, so that the others go on."""
    if common(float(cell.over), fabric):
        return Outcome(cell, Left("not begun in this piece"))
    try:
        if cell.trial:
            return Outcome(cell, run_trial(cell, fabric, on_progress))
        return Outcome(cell, *run_cell(cell, fabric, on_progress))
    except PausedError as paused:
        return Outcome(cell, Left(str(paused)))
    except Exception as error:  # whatever a host may throw
        return failed(cell, f"{type(error).__name__}: {error}")


def failed(cell: Cell, error: str) -> Outcome:
    return Outcome(cell, Failure(*key_of(cell), error))


def in_turn(cells: Sequence[Cell], fabric: Fabric, on_progress: Callable[[float], None]) -> Iterator[Outcome]:
    """Outcomes as they come; `on_progress` is told the weight of what has been done in all."""
    done = 0.0
    for cell in cells:
        yield attempt(cell, fabric, lambda share, cell=cell, done=done: on_progress(done + share * cell.weight))
        done += cell.weight
        on_progress(done)


def side_by_side(cells: Sequence[Cell], workers: int, on_progress: Callable[[float], None]) -> Iterator[Outcome]:
    """As `in_turn`, several at a time."""
    context = get_context("spawn")  # a fork of a process that has used torch may hang
    done, stop = context.Value("d", 0.0), context.Event()
    with ProcessPoolExecutor(workers, context, initializer=become_worker, initargs=(done, stop)) as pool:
        pending: dict[Future[Outcome], Cell] = {pool.submit(attempt_alone, cell): cell for cell in cells}
        try:
            while pending:
                finished, _ = wait(pending, timeout=LOOK_AGAIN, return_when=FIRST_COMPLETED)
                on_progress(done.value)
                for future in finished:
                    yield outcome_of(future, pending.pop(future))
        finally:  # also when the reader is interrupted: the cells that run end at their next step
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def outcome_of(future: Future[Outcome], cell: Cell) -> Outcome:
    """What a worker handed back. If it died, so did those beside it: cells failed, and trials are to be done again."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        words = f"a worker process died: {error}"
        return Outcome(cell, Left(words)) if cell.trial else failed(cell, words)


class StoppedError(BaseException):
    """Ends a cell whose outcome nobody waits for; no `Exception`, so that it is not taken for a failure of the cell."""


def become_worker(done: Any, stop: Any) -> None:
    """What workers share: the weight done, and the sign to stop. Ctrl-C is for the main process, which gives it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    work_alone()
    global DONE, STOP
    DONE, STOP = done, stop


def work_alone() -> None:
    """Steady, and with the main process at its end."""
    threading.Thread(target=die_with_parent, daemon=True).start()
    steady()


def steady() -> None:
    """What makes numbers comparable: one thread, no denormals, and single precision that is single on a GPU, too."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.backends.cudnn.allow_tf32 = False


def die_with_parent() -> None:
    """A main process that was killed cannot say so; its workers must not go on writing beside those of the next run."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def attempt_alone(cell: Cell) -> Outcome:
    counted = [0.0]
    outcome = attempt(cell, cell.machine.fabric(), partial(count, cell, counted))
    count(cell, counted, 1.0)
    return outcome


def count(cell: Cell, counted: list[float], share: float) -> None:
    """Add what is new to the common count."""
    with DONE.get_lock():
        DONE.value += (share - counted[0]) * cell.weight
    counted[0] = share
    if STOP.is_set():
        raise StoppedError
