"""Where the real data lies and how it is read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
VARIABLE = "IRESFLOW_DATA"


class DataNotFoundError(FileNotFoundError):
    """A data set is in none of the folders searched."""


def data_folders() -> list[Path]:
    """The folders searched, in order: `$IRESFLOW_DATA` where it is set, then `../shared/data` beside the repository."""
    own = os.environ.get(VARIABLE)
    return ([Path(own).expanduser()] if own else []) + [REPOSITORY.parent / "shared" / "data"]


def read_archive(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file."""
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def load_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of `<name>.npz` from the first folder that holds it."""
    for folder in data_folders():
        path = folder / f"{name}.npz"
        if path.is_file():
            return read_archive(path)
    searched = " and ".join(str(folder) for folder in data_folders())
    raise DataNotFoundError(f"{name}.npz is not in {searched}; set ${VARIABLE} to the folder that holds it.")
