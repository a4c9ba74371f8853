"""What a run leaves on disk: one line of JSON a finished cell, and the arrays that its pictures are drawn from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

import iresflow_plugin
from comparisons.metrics import Estimate
from comparisons.tasks.sources import REPOSITORY
from comparisons.training import History

PACKAGES = ("torch", "nflows", "normflows", "lightning", "zuko", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Result:
    """The numbers of one cell: one method on one task with one seed. `error` says why there are none."""

    task: str
    method: str
    seed: int
    steps: int
    parameters: int
    log_likelihood: Estimate
    training_seconds: float
    density_seconds: float
    sampling_seconds: float
    inverse_error: float
    lipschitz_bound: float | None
    history: History
    swap: str  # what was swapped for what; empty for an original

    @property
    def name(self) -> str:
        """Under which its arrays are kept."""
        return f"{self.task}--{self.method}"

    @classmethod
    def from_json(cls, record: dict) -> Result:
        return cls(
            **{
                **record,
                "log_likelihood": Estimate(**record["log_likelihood"]),
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


def provenance() -> dict[str, object]:
    """Where, when, with what and by which command numbers were measured."""
    return {
        "command": " ".join(["python -m comparisons", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git": git_revision(),
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "iresflow_plugin": iresflow_plugin.__version__,
            "python": platform.python_version(),
            **{name: installed(name) for name in PACKAGES},
        },
    }


def git_revision() -> str | None:
    """The commit of this checkout, marked where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """The processor's name as Linux gives it, else as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Store:
    """A folder of results. A new run in the same folder replaces the old one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = folder / "results.jsonl"
        self.arrays = folder / "arrays"

    def start(self) -> None:
        self.arrays.mkdir(parents=True, exist_ok=True)
        for old in self.arrays.glob("*.npz"):
            old.unlink()
        self.lines.write_text("")

    def add(self, cell: Result | Failure, run: dict[str, object]) -> None:
        """On disk when it returns, so that an interrupt loses only the cell that is running."""
        with self.lines.open("a") as file:
            file.write(json.dumps({**asdict(cell), "run": run}) + "\n")

    def add_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        np.savez_compressed(self.arrays / f"{name}.npz", **arrays)  # pyright: ignore[reportArgumentType]

    def load_arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.arrays / f"{name}.npz", allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    def load(self) -> tuple[list[Result], list[Failure], dict]:
        """All finished cells, in the order in which they finished, and the provenance of the last."""
        results, failures, run = [], [], {}
        for line in self.lines.read_text().splitlines():
            record = json.loads(line)
            run = record.pop("run")
            if "error" in record:
                failures.append(Failure(**record))
            else:
                results.append(Result.from_json(record))
        return results, failures, run

    def write_json(self) -> Path:
        """One JSON file of the run: what, where, when, and all numbers."""
        results, failures, run = self.load()
        path = self.folder / "results.json"
        content = {"run": run, "results": as_dicts(results), "failures": as_dicts(failures)}
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


def as_dicts(items: Iterable[Result | Failure]) -> list[dict]:
    return [asdict(item) for item in items]
