"""What a run leaves on disk, in one folder.

settings.json   what all cells have in common: a run that goes on must have the same
results.jsonl   a line a cell: its numbers, or the error it ended in, and where and when they were made
tuning.jsonl    a line a learning rate that was tried
arrays/         what pictures are drawn from, per task and per cell
work/           error against cost inside one of our flows, per task
checkpoints/    of the cells that are not finished
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comparisons.diagnostics import BlockRow, RoundTrip
from comparisons.metrics import Estimate
from comparisons.provenance import together
from comparisons.training import History
from comparisons.two_sample import WithFloor

Key = tuple[str, str, int]  # task, method, seed


@dataclass(frozen=True)
class Result:
    """The numbers of one cell: one method on one task with one seed.

    Likelihoods are of the preprocessed data, in nats, unless they are called raw. Errors are over test points, or over
    groups of them where they depend on each other.
    """

    task: str
    method: str
    seed: int
    steps: int
    parameters: int
    learning_rate: float
    validation: float  # the best loss seen
    log_likelihood: Estimate  # of the test points
    raw_log_likelihood: float  # in the units of the data before preprocessing
    bits_per_dimension: float | None  # where the data is quantised
    log_det_error: float  # bound on what the log-det adds to the error of the mean; 0: exact
    distances: dict[str, WithFloor]  # of samples to test points, beside that of validation points
    lost_samples: float  # share that is not finite
    training_seconds: float
    density_seconds: float  # of one point in a batch
    sampling_seconds: float
    memory: float | None  # MB at the peak of a training step; None where nothing is trained
    inverse: RoundTrip | None  # None where there is no way back
    blocks: list[BlockRow]  # the residual blocks, from data to noise
    history: History
    swap: str  # what was swapped for what; empty for an original
    bits_error: float | None = None  # standard error of the bits per dimension

    @property
    def key(self) -> Key:
        return self.task, self.method, self.seed

    @property
    def name(self) -> str:
        """Under which its arrays are kept."""
        return cell_name(self.key)

    @property
    def step_seconds(self) -> float | None:
        return self.training_seconds / self.steps if self.steps else None

    @property
    def lipschitz_bound(self) -> float | None:
        """The largest certified bound of a residual branch; None without any."""
        return max((block.bound for block in self.blocks), default=None)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Result:
        inverse = record["inverse"]
        return cls(
            **{
                **record,
                "log_likelihood": Estimate(**record["log_likelihood"]),
                "distances": {name: WithFloor(**pair) for name, pair in record["distances"].items()},
                "inverse": None if inverse is None else RoundTrip(**inverse),
                "blocks": [BlockRow(**row) for row in record["blocks"]],
                "history": History(**record["history"]),
            }
        )


@dataclass(frozen=True)
class Failure:
    """A cell that ended in an error."""

    task: str
    method: str
    seed: int
    error: str

    @property
    def key(self) -> Key:
        return self.task, self.method, self.seed


@dataclass(frozen=True)
class Trial:
    """A learning rate that was tried: the best validation loss of a short training, None where that failed."""

    task: str
    method: str
    learning_rate: float
    validation: float | None


def cell_name(key: Key) -> str:
    task, method, seed = key
    return f"{task}--{method}--{seed}"


class SettingsError(ValueError):
    """The folder holds a run with other settings."""


class Store:
    """The folder of a run. What is finished stays finished: a run that is started again does the rest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = folder / "results.jsonl"
        self.trials = folder / "tuning.jsonl"
        self.settings = folder / "settings.json"
        self.arrays = folder / "arrays"
        self.work = folder / "work"
        self.checkpoints = folder / "checkpoints"

    def start(self, settings: dict[str, Any], fresh: bool = False) -> None:
        """Begin, or go on if the settings are those of the run that is here; `fresh` throws that away."""
        if fresh:
            self.clear()
        if self.lines.is_file() and not self.settings.is_file():
            raise SettingsError(
                f"{self.folder} holds results without {self.settings.name}, so nobody knows what they belong to. Take "
                "another folder, or --fresh to throw them away."
            )
        settings = json.loads(json.dumps(settings))  # as it will be read
        old = json.loads(self.settings.read_text()) if self.settings.is_file() else settings
        changed = [
            f"{name} was {old.get(name)!r} and is {settings.get(name)!r}"
            for name in old | settings
            if old.get(name) != settings.get(name)
        ]
        if changed:
            raise SettingsError(
                f"{self.folder} holds a run with other settings: {'; '.join(changed)}. Take another folder, the same "
                "settings, or --fresh to throw the old run away."
            )
        for folder in (self.arrays, self.work, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
        self.settings.write_text(json.dumps(settings, indent=1) + "\n")

    def clear(self) -> None:
        for file in (self.lines, self.trials, self.settings):
            file.unlink(missing_ok=True)
        for folder in (self.arrays, self.work, self.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)

    # cells

    def add(self, cell: Result | Failure, run: dict[str, Any]) -> None:
        """On disk when it returns, so that an end at any moment loses only the cells that are running."""
        append(self.lines, {**asdict(cell), "run": run})

    def load(self) -> tuple[list[Result], list[Failure], dict[str, Any]]:
        """All finished cells in the order in which they finished, and their provenance.

        A cell that failed and was run again counts once, as what it was last.
        """
        cells: dict[Key, Result | Failure] = {}
        runs: list[dict[str, Any]] = []
        for record in records(self.lines):
            runs.append(record.pop("run"))
            cell = Failure(**record) if "error" in record else Result.from_json(record)
            cells.pop(cell.key, None)
            cells[cell.key] = cell
        results = [cell for cell in cells.values() if isinstance(cell, Result)]
        return results, [cell for cell in cells.values() if isinstance(cell, Failure)], together(runs)

    # learning rates

    def add_trial(self, trial: Trial) -> None:
        append(self.trials, asdict(trial))

    def take_trials(self, other: Store) -> None:
        """Those of another run, unless some are here already.

        Raises:
            SettingsError: if the other run has none.
        """
        if not other.load_trials():
            raise SettingsError(f"{other.folder} holds no learning rates; they are left by a run with --tune.")
        if not self.trials.is_file():
            shutil.copyfile(other.trials, self.trials)

    def load_trials(self) -> list[Trial]:
        return [Trial(**record) for record in records(self.trials)]

    # pictures

    def add_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        np.savez_compressed(self.arrays / f"{name}.npz", **arrays)  # pyright: ignore[reportArgumentType]

    def load_arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.arrays / f"{name}.npz", allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    def add_work(self, name: str, rows: dict[str, list[dict[str, Any]]]) -> None:
        (self.work / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")

    def load_work(self, name: str) -> dict[str, list[dict[str, Any]]]:
        """Rows of `InverseWork` and `LogDetWork` as dictionaries; none where nothing was measured."""
        path = self.work / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def checkpoint(self, key: Key, *more: str) -> Path:
        """Of a cell, with whatever else makes it another training."""
        return self.checkpoints / f"{'--'.join([cell_name(key), *more])}.ckpt"

    def write_json(self) -> Path:
        """One JSON file of the run: what, where, when, and all numbers."""
        results, failures, run = self.load()
        path = self.folder / "results.json"
        content = {"run": run, "results": as_dicts(results), "failures": as_dicts(failures)}
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line. One that a kill has torn is ended first, so that it costs nothing but itself."""
    torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write(("\n" if torn else "") + json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def records(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # torn by a kill: that cell will be run again
            continue
    return found


def as_dicts(items: Iterable[Result | Failure]) -> list[dict[str, Any]]:
    return [asdict(item) for item in items]
