"""Where the real data lies and how it is read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
VARIABLE = "IRESFLOW_DATA"


class DataNotFoundError(FileNotFoundError):
    """A data set is in none of the folders searched."""


def data_folders() -> list[Path]:
    """The folders searched, in order: `$IRESFLOW_DATA` where it is set, then `../shared/data` beside the repository."""
    own = os.environ.get(VARIABLE)
    return ([Path(own).expanduser()] if own else []) + [REPOSITORY.parent / "shared" / "data"]


def load_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of `<name>.npz` from the first folder that holds it."""
    for folder in data_folders():
        path = folder / f"{name}.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
    searched = " and ".join(str(folder) for folder in data_folders())
    raise DataNotFoundError(f"{name}.npz is not in {searched}; set ${VARIABLE} to the folder that holds it.")


def load_gas_turbine() -> tuple[list[np.ndarray], list[str]]:
    """Train, validation and test rows of UCI gas turbine and the names of its columns, without TEY.

    TEY and CDP correlate at 0.989, which makes a density nearly degenerate, so one of them goes.
    """
    arrays = load_arrays("uci_gas_turbine")
    kept = arrays["columns"] != "TEY"
    rows = [arrays["x"][arrays["split"] == part][:, kept] for part in (0, 1, 2)]
    return rows, [str(column) for column in arrays["columns"][kept]]


def load_digits() -> list[np.ndarray]:
    """Train, validation and test images (n, 64), grey values 0 to 16, of the digits inside scikit-learn.

    The split is that of the shared `sklearn_digits8x8.npz`: of a permutation the last tenth is test, of the rest the
    last tenth validation.
    """
    from sklearn import datasets

    images = datasets.load_digits().data.astype(np.float32)
    images = images[np.random.RandomState(42).permutation(len(images))]
    test = len(images) // 10
    validation = (len(images) - test) // 10
    return [images[: -test - validation], images[-test - validation : -test], images[-test:]]
