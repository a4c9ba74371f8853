"""The tasks of the comparisons: toys with known densities, real tables, and files of the user.

`load("rings")` or `load("path/to/file.csv")` gives a `Task`. A new task is a function without arguments in `TASKS`.
A point is a vector, except in the suite "image", where it has the shape (channels, height, width).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from comparisons.tasks import images, tables, toys
from comparisons.tasks.files import SUFFIXES, load_file
from comparisons.tasks.sources import DataNotFoundError
from comparisons.tasks.task import Draw, Points, Task

__all__ = ["SUITES", "TASKS", "DataNotFoundError", "Draw", "Points", "Task", "is_file", "load"]


def smoke() -> Task:
    """A task to see whether things run at all."""
    task = toys.toy_task("checkerboard")
    few, other = task.test[:1000], task.validation[:1000]
    return replace(task, name="smoke", batch=64, parameters=3_000, test=few, validation=other)


TASKS: dict[str, Callable[[], Task]] = {
    **{name: partial(toys.toy_task, name) for name in toys.TOYS},
    "gas-turbine": tables.gas_turbine,
    "magic": tables.magic,
    "power": tables.power,
    "bsds300": tables.bsds300,
    "digits": tables.digits,
    "breast-cancer": tables.breast_cancer,
    "diabetes": tables.diabetes,
    "wine": tables.wine,
    "two-moons-conditional": toys.two_moons_conditional,
    "digits-conditional": tables.digits_conditional,
    "magic-conditional": tables.magic_conditional,
    "gas-turbine-conditional": tables.gas_turbine_conditional,
    "digits-image": images.digits_image,
    "digits-image-conditional": images.digits_image_conditional,
    "mnist-small": images.mnist_small,
    "mnist": images.mnist,
    "mnist-conditional": images.mnist_conditional,
    "cifar10": images.cifar10,
    "smoke": smoke,
}

SUITES: dict[str, list[str]] = {
    "toy": list(toys.TOYS),
    "tabular": ["gas-turbine", "magic", "power", "bsds300", "digits", "breast-cancer", "diabetes", "wine"],
    "image": ["digits-image", "digits-image-conditional", "mnist-small", "mnist", "mnist-conditional", "cifar10"],
    "conditional": ["two-moons-conditional", "digits-conditional", "magic-conditional", "gas-turbine-conditional"],
    "smoke": ["smoke"],
}


def is_file(name: str) -> bool:
    """Whether a name is that of a file rather than that of a task."""
    return Path(name).suffix.lower() in SUFFIXES


def load(name_or_path: str | Path, context: Sequence[str] = ()) -> Task:
    """A task of the table by its name, or the rows of a `.npy`, `.npz` or `.csv` file, given its `context` columns."""
    name = str(name_or_path)
    if is_file(name):
        return load_file(Path(name), context)
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(TASKS)}."
        raise ValueError(f"there is no task {name!r}, nor does it end in {', '.join(SUFFIXES)}; {hint}")
    if context:
        raise ValueError(f"context columns are chosen for files; for {name!r} see {', '.join(SUITES['conditional'])}.")
    return TASKS[name]()
