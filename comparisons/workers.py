"""Jobs in turn, or side by side: each in a process of its own with one thread, which suits nets as small as these."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from typing import Any, Generic, Protocol, TypeVar

import torch
from lightning.fabric import Fabric

from comparisons.settings import Machine
from comparisons.training import OnProgress, PausedError, common

LOOK_AGAIN = 0.2  # seconds between two looks at the workers


class Job(Protocol):
    """What can be worked on: a cell of a comparison, a classifier."""

    @property
    def machine(self) -> Machine: ...

    @property
    def over(self) -> bool:
        """Whether it is past its deadline."""
        ...

    @property
    def weight(self) -> float:
        """Its part of the progress bar."""
        ...

    def work(self, fabric: Fabric, on_progress: OnProgress) -> Any:
        """Do it.

        Raises:
            PausedError: when it is past its deadline, and has kept what the same command goes on with.
        """
        ...


J = TypeVar("J", bound=Job)


@dataclass(frozen=True)
class Left:
    """In place of a result: the job is not finished, and the same command goes on with it."""

    words: str


@dataclass(frozen=True)
class Broken:
    """In place of a result: the job ended with an error, or with the process that it ran in."""

    words: str
    died: bool = False


@dataclass(frozen=True)
class Outcome(Generic[J]):
    """What became of a job: the result of its work, `Left` or `Broken`."""

    job: J
    found: Any


def outcomes(
    jobs: Sequence[J], at_once: int, fabric: Fabric, on_progress: Callable[[float], None]
) -> Iterator[Outcome[J]]:
    """As they come, from one process or several; `on_progress` is told the weight of what has been done in all."""
    return in_turn(jobs, fabric, on_progress) if at_once == 1 else side_by_side(jobs, at_once, on_progress)


def attempt(job: J, fabric: Fabric, on_progress: OnProgress) -> Outcome[J]:
    """Do a job; what goes wrong in it becomes its outcome, so that the others go on."""
    if common(float(job.over), fabric):
        return Outcome(job, Left("not begun in this piece"))
    try:
        return Outcome(job, job.work(fabric, on_progress))
    except PausedError as paused:
        return Outcome(job, Left(str(paused)))
    except Exception as error:  # whatever a host may throw
        return Outcome(job, Broken(f"{type(error).__name__}: {error}"))


def in_turn(jobs: Sequence[J], fabric: Fabric, on_progress: Callable[[float], None]) -> Iterator[Outcome[J]]:
    done = 0.0
    for job in jobs:
        yield attempt(job, fabric, lambda share, job=job, done=done: on_progress(done + share * job.weight))
        done += job.weight
        on_progress(done)


def side_by_side(jobs: Sequence[J], at_once: int, on_progress: Callable[[float], None]) -> Iterator[Outcome[J]]:
    context = get_context("spawn")  # a fork of a process that has used torch may hang
    done, stop = context.Value("d", 0.0), context.Event()
    with ProcessPoolExecutor(at_once, context, initializer=become_worker, initargs=(done, stop)) as pool:
        pending: dict[Future[Outcome[J]], J] = {pool.submit(attempt_alone, job): job for job in jobs}
        try:
            while pending:
                finished, _ = wait(pending, timeout=LOOK_AGAIN, return_when=FIRST_COMPLETED)
                on_progress(done.value)
                for future in finished:
                    yield outcome_of(future, pending.pop(future))
        finally:  # also when the reader is interrupted: the jobs that run end at their next step
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def outcome_of(future: Future[Outcome[J]], job: J) -> Outcome[J]:
    """What a worker handed back. If it died, so did those beside it."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        return Outcome(job, Broken(f"a worker process died: {error}", died=True))


class StoppedError(BaseException):
    """Ends a job whose outcome nobody waits for; no `Exception`, so that it is not taken for a failure of the job."""


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


def attempt_alone(job: J) -> Outcome[J]:
    counted = [0.0]
    outcome = attempt(job, job.machine.fabric(), partial(count, job, counted))
    count(job, counted, 1.0)
    return outcome


def count(job: Job, counted: list[float], share: float) -> None:
    """Add what is new to the common count."""
    with DONE.get_lock():
        DONE.value += (share - counted[0]) * job.weight
    counted[0] = share
    if STOP.is_set():
        raise StoppedError
