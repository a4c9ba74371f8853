"""A user's own rows as a task: `.csv`, `.npy` or `.npz`."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from comparisons.tasks.tables import parts_of, random_split, standardised, table_task
from comparisons.tasks.task import Task

FEWEST_ROWS = 50
FEWEST_IN_A_PART = 5
NUMBERS = 0.95  # share of a column's entries that must be numbers; the others of it count as missing
MISSING = 0.05  # share of the rows that may have missing values: more may well not be missing at random
CLASSES = 20  # most distinct values of a context column that is taken for a label

Split = np.ndarray | None
Notes = list[str]


def load_file(path: Path, context: Sequence[str] = ()) -> Task:
    """The numeric columns of a file, given its `context` columns; what was left out is told in `preprocessing`."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} (looked in {Path.cwd()}); check the path.")
    frame, split = READERS[path.suffix.lower()](path, context)
    unknown = [name for name in context if name not in frame]
    if unknown:
        raise ValueError(f"{path.name} has no column {unknown[0]!r} for the context; it has: {', '.join(frame)}.")
    notes: Notes = []
    frame = numeric(frame, context, notes, path.name)
    frame, split = complete(frame, split, notes, path.name)
    split = checked(split, len(frame), path.name, notes)
    rows = frame.drop(columns=list(context))
    repeated = int(rows.duplicated().sum())
    if repeated:
        notes.append(f"kept {repeated} rows that repeat another")
    given = conditions(frame[list(context)], split, notes) if context else None
    about = f"rows of {path.name}" + (f", given {', '.join(context)}" if context else "")
    return table_task(
        path.name, about, parts_of(rows.to_numpy(np.float64, copy=True), split, given), list(rows), noted=notes
    )


# what is in the columns ------------------------------------------------------------------------------


def numeric(frame: pd.DataFrame, context: Sequence[str], notes: Notes, name: str) -> pd.DataFrame:
    """The columns of numbers, and those of the context whatever they hold."""
    columns: dict[str, pd.Series] = {}
    frame = frame.replace([np.inf, -np.inf], np.nan)
    for column in frame:
        values = frame[column]
        numbers = pd.to_numeric(values, errors="coerce")
        present = int(values.notna().sum())
        if column in context:
            columns[column] = values
        elif present == 0:
            notes.append(f"dropped {column} (empty)")
        elif numbers.notna().sum() < NUMBERS * present:
            notes.append(f"dropped {column} (text: {numbers.notna().sum()} of {present} entries are numbers)")
        elif counts_rows(numbers):
            notes.append(f"dropped {column} (it counts the rows)")
        else:
            columns[column] = numbers.astype(np.float64)
    if len(columns) == len(context):
        dropped = f"; {'; '.join(notes)}" if notes else ""
        raise ValueError(f"{name} has no column of numbers to model{dropped}. Write numbers with a decimal point.")
    return pd.DataFrame(columns)


def counts_rows(values: pd.Series) -> bool:
    """Whether a column is the row's number, which a spreadsheet or pandas may have written along."""
    return len(values) > 1 and bool((values.diff().iloc[1:] == 1).all())


def complete(frame: pd.DataFrame, split: Split, notes: Notes, name: str) -> tuple[pd.DataFrame, Split]:
    """The rows without missing values."""
    whole = frame.notna().all(axis=1).to_numpy()
    missing = len(frame) - int(whole.sum())
    if missing > MISSING * len(frame):
        worst = frame.isna().sum().idxmax()
        raise ValueError(
            f"{name}: {missing} of {len(frame)} rows have missing or infinite values, most often in {worst!r}; "
            f"at most {MISSING:.0%} are dropped. Fill them in or leave the column out."
        )
    if missing:
        notes.append(f"dropped {missing} of {len(frame)} rows with missing or infinite values")
    return frame[whole].reset_index(drop=True), None if split is None else split[whole]


def checked(split: Split, n: int, name: str, notes: Notes) -> np.ndarray:
    """The split of the file, or a random one."""
    if n < FEWEST_ROWS:
        raise ValueError(f"{name} has {n} complete rows; a comparison needs at least {FEWEST_ROWS}.")
    if split is None:
        notes.append("split at random, 81 % train, 9 % validation, 10 % test")
        return random_split(n)
    sizes = [int((split == part).sum()) for part in range(3)]
    if sum(sizes) != n:
        raise ValueError(f"{name}: 'split' holds values other than 0 (train), 1 (validation) and 2 (test).")
    if min(sizes) < FEWEST_IN_A_PART:
        raise ValueError(
            f"{name} has {sizes[0]} train, {sizes[1]} validation and {sizes[2]} test rows; "
            f"each part needs at least {FEWEST_IN_A_PART}."
        )
    return split


def conditions(frame: pd.DataFrame, split: np.ndarray, notes: Notes) -> Tensor:
    """Labels one-hot, numbers standardised by the train rows."""
    parts = []
    for column in frame:
        values = frame[column]
        if values.nunique() <= CLASSES or not pd.api.types.is_numeric_dtype(values):
            classes = pd.get_dummies(values)
            if classes.shape[1] > CLASSES:
                raise ValueError(
                    f"context column {column!r} is text with {classes.shape[1]} distinct values; at most {CLASSES} are "
                    "taken for labels. Choose another column, or turn it into numbers."
                )
            parts.append(torch.tensor(classes.to_numpy(np.float32)))
            notes.append(f"context {column}: {classes.shape[1]} classes, one-hot")
        else:
            parts.append(standardised(values.to_numpy(np.float64)[:, None], split))
            notes.append(f"context {column}: standardised")
    return torch.cat(parts, dim=1)


# what is in the files --------------------------------------------------------------------------------


def read_csv(path: Path, context: Sequence[str]) -> tuple[pd.DataFrame, Split]:
    """Separated by commas, semicolons or tabs, with or without a line of names."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            first_line = lines.readline()
        separator = max(",;\t", key=first_line.count)
        first = pd.read_csv(path, sep=separator, header=None, nrows=1, encoding="utf-8-sig")
        named = not all(pd.api.types.is_numeric_dtype(kind) for kind in first.dtypes)
        frame = pd.read_csv(
            path, sep=separator, header=0 if named else None, encoding="utf-8-sig", na_values=["?"], low_memory=False
        )
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path.name} is empty; it needs column names and a line of numbers a row.") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is no table of separated values: {error}") from None
    if not isinstance(frame.index, pd.RangeIndex):  # pandas took the entries beyond the names for an index
        raise ValueError(f"{path.name} has more entries in a line than names of columns; name every column.")
    return frame.rename(columns=str if named else "column {}".format), None


def read_npy(path: Path, context: Sequence[str]) -> tuple[pd.DataFrame, Split]:
    return table(loaded(path)[""], path.name, None), None


def read_npz(path: Path, context: Sequence[str]) -> tuple[pd.DataFrame, Split]:
    """Arrays train, validation and test; or x and perhaps split (0, 1, 2); or one array. `columns` names them.

    A context may also be an array of its own beside x, with an entry for each row.
    """
    arrays = loaded(path)
    parts = [arrays.get(part) for part in ("train", "validation", "test")]
    split = arrays.get("split")
    if all(part is not None for part in parts):
        tables = [table(part, path.name, arrays.get("columns")) for part in parts if part is not None]
        return pd.concat(tables, ignore_index=True), np.repeat(range(3), [len(part) for part in tables])
    if "x" not in arrays and len(arrays) != 1:
        raise ValueError(
            f"{path.name} holds {', '.join(arrays)}; it should hold train, validation and test, or x and perhaps split."
        )
    frame = table(arrays["x"] if "x" in arrays else next(iter(arrays.values())), path.name, arrays.get("columns"))
    for name in ["split", *context]:
        if name in arrays and arrays[name].shape != (len(frame),):
            raise ValueError(f"{path.name}: {name!r} has shape {arrays[name].shape}; x has {len(frame)} rows.")
    beside = {name: arrays[name] for name in context if name in arrays and name not in frame}
    return frame.assign(**beside), split


def loaded(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive by name, or a lone array under the empty name."""
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {"": content}
        with content:
            return {name: content[name] for name in content.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} cannot be read as arrays of numbers: {error}") from None


def table(x: np.ndarray, name: str, columns: np.ndarray | None) -> pd.DataFrame:
    if x.ndim != 2 or x.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {x.dtype} of shape {x.shape}; rows are numbers of shape (rows, columns).")
    if columns is None:
        columns = np.array([f"column {number}" for number in range(x.shape[1])])
    if len(set(columns.tolist())) != x.shape[1]:
        raise ValueError(f"{name} names {len(set(columns.tolist()))} different columns; the rows have {x.shape[1]}.")
    return pd.DataFrame(x, columns=[str(column) for column in columns])


READERS: dict[str, Callable[[Path, Sequence[str]], tuple[pd.DataFrame, Split]]] = {
    ".csv": read_csv,
    ".npy": read_npy,
    ".npz": read_npz,
}
SUFFIXES = tuple(READERS)
