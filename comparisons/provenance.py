"""Where, when, with what and by which command numbers were measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import iresflow_plugin
from comparisons.tasks.sources import REPOSITORY

PACKAGES = ("torch", "nflows", "normflows", "lightning", "zuko", "numpy", "scikit-learn")


def provenance() -> dict[str, Any]:
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


def together(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The provenance of several measurements in one: where they differ, all values, and from when to when."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        values: list[Any] = []
        for run in runs:
            if name in run and run[name] not in values:
                values.append(run[name])
        found[name] = values[0] if len(values) == 1 else values
    if isinstance(found.get("date"), list):
        found["date"] = f"{min(found['date'])} to {max(found['date'])}"
    return found


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
