"""A user's file: good ones become tasks, bad ones get a sentence with the remedy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from comparisons.tasks import Task, load

N = 200


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(rng.normal(size=(N, 3)) * [1, 10, 100] + [0, 5, 7], columns=["a", "b", "c"])


def write(frame: pd.DataFrame, folder: Path, **options) -> Path:
    path = folder / "mine.csv"
    frame.to_csv(path, **{"index": False, **options})
    return path


def points_of(task: Task) -> torch.Tensor:
    """Validation and test rows in raw units, sorted by the first column."""
    rows = task.restore(torch.cat([task.validation.x, task.test.x]))
    return rows[rows[:, 0].argsort()]


def same(first: Task, second: Task) -> bool:
    return torch.equal(first.test.x, second.test.x) and torch.equal(first.validation.x, second.validation.x)


def test_a_csv(frame: pd.DataFrame, tmp_path: Path) -> None:
    task = load(write(frame, tmp_path))
    assert (task.name, task.kind, task.columns, task.batch) == ("mine.csv", "table", ("a", "b", "c"), 256)
    assert (len(task.validation), len(task.test)) == (18, 20)
    drawn = task.restore(task.draw(3000, torch.Generator().manual_seed(0)).x)
    everything = torch.cat([points_of(task), drawn]).double()
    raw = torch.tensor(frame.to_numpy())
    assert (torch.cdist(everything / raw.std(0), raw / raw.std(0)).amin(1) < 1e-5).all()  # each is a row of the file
    assert not torch.isin(task.test.x[:, 0], task.draw(3000, torch.Generator().manual_seed(0)).x[:, 0]).any()
    assert same(task, load(write(frame, tmp_path)))


@pytest.mark.parametrize("options", [{"sep": ";"}, {"sep": "\t"}, {"header": False}, {"index": True}])
def test_a_csv_in_other_dialects(options: dict, frame: pd.DataFrame, tmp_path: Path) -> None:
    plain = load(write(frame, tmp_path))
    other = load(write(frame, tmp_path, **options))
    assert same(plain, other)
    assert other.columns == (("column 0", "column 1", "column 2") if "header" in options else ("a", "b", "c"))
    if "index" in options:
        assert any("it counts the rows" in sentence for sentence in other.preprocessing)


def test_what_is_dropped_is_told(frame: pd.DataFrame, tmp_path: Path) -> None:
    frame = frame.assign(town=["Ulm", "Bonn"] * (N // 2), same=4, copy=2 * frame.a, none=np.nan)
    frame.loc[[3, 5], "b"] = np.nan
    frame.loc[7, "c"] = np.inf
    task = load(write(frame, tmp_path))
    assert task.columns == ("a", "b", "c") and len(task.test) == 19
    assert {
        "dropped town (text: 0 of 200 entries are numbers)",
        "dropped none (empty)",
        "dropped same (always 4)",
        "dropped copy (correlation 1.000 with a)",
        "dropped 3 of 200 rows with missing or infinite values",
        "split at random, 81 % train, 9 % validation, 10 % test",
        "standardised by the 161 train rows",
    } == set(task.preprocessing)


def test_a_few_entries_that_are_no_numbers_count_as_missing(frame: pd.DataFrame, tmp_path: Path) -> None:
    frame = frame.astype({"b": object})
    frame.loc[4, "b"], frame.loc[9, "b"] = "n.a.", "?"
    assert "dropped 2 of 200 rows with missing or infinite values" in load(write(frame, tmp_path)).preprocessing


def test_rows_that_repeat_are_kept_and_told(frame: pd.DataFrame, tmp_path: Path) -> None:
    assert "kept 5 rows that repeat another" in load(write(pd.concat([frame, frame[:5]]), tmp_path)).preprocessing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine.csv is empty"),
        ("a,b\n", "has no column of numbers"),
        ("a,b\n" + "1.5,2\n2,7\n" * 20, "has 40 complete rows; a comparison needs at least 50"),
        ("a,b\n" + "x,y\n" * 100, r"no column of numbers to model; dropped a \(text"),
        ("a,b\n" + "1,5\n" * 100, "at least two columns, and 0 are left.*dropped a .always 1."),
        ("a,b\n" + "1,2,3\n" * 100, "more entries in a line than names"),
        ("a,b\n1,2\n1,2,3\n", "no table of separated values"),
        ("a;b\n" + "1,5;2,5\n" * 100, "with a decimal point"),
    ],
)
def test_a_csv_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "mine.csv")


def test_many_missing_values_are_refused(frame: pd.DataFrame, tmp_path: Path) -> None:
    frame.loc[::10, "b"] = np.nan
    with pytest.raises(ValueError, match=r"20 of 200 rows have missing .* most often in 'b'.* Fill them in"):
        load(write(frame, tmp_path))


def test_one_column_is_too_few(frame: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two columns, and 1 are left"):
        load(write(frame[["a"]], tmp_path))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.csv"):
        load(tmp_path / "nowhere.csv")


def test_a_context_of_labels_and_numbers(frame: pd.DataFrame, tmp_path: Path) -> None:
    frame = frame.assign(town=["Ulm" if a > 0 else "Bonn" for a in frame.a])
    task = load(write(frame, tmp_path), context=["town", "c"])
    assert task.columns == ("a", "b") and task.context_features == 3 and task.test.context is not None
    is_ulm = task.restore(task.test.x)[:, 0] > 0
    assert torch.equal(task.test.context[:, 1] == 1, is_ulm) and torch.equal(task.test.context[:, 0] == 0, is_ulm)
    assert {"context town: 2 classes, one-hot", "context c: standardised"} <= set(task.preprocessing)


def test_a_context_must_be_there(frame: pd.DataFrame, tmp_path: Path) -> None:
    path = write(frame.assign(name=[f"row {number}" for number in range(N)]), tmp_path)
    with pytest.raises(ValueError, match="no column 'd' for the context; it has: a, b, c, name"):
        load(path, context=["d"])
    with pytest.raises(ValueError, match="text with 200 distinct values"):
        load(path, context=["name"])
    with pytest.raises(ValueError, match="no column of numbers to model"):
        load(path, context=["a", "b", "c"])


def test_arrays(frame: pd.DataFrame, tmp_path: Path) -> None:
    x = frame.to_numpy()
    np.save(tmp_path / "mine.npy", x)
    np.savez(tmp_path / "mine.npz", x=x, columns=np.array(["a", "b", "c"]))
    plain = load(write(frame, tmp_path))
    assert same(plain, load(tmp_path / "mine.npy")) and same(plain, load(tmp_path / "mine.npz"))
    assert load(tmp_path / "mine.npz").columns == ("a", "b", "c")


def test_an_archive_with_a_split_of_its_own(frame: pd.DataFrame, tmp_path: Path) -> None:
    x, split = frame.to_numpy(), np.repeat([0, 1, 2], [150, 30, 20])
    np.savez(tmp_path / "split.npz", x=x, split=split)
    np.savez(tmp_path / "parts.npz", train=x[:150], validation=x[150:180], test=x[180:])
    first, second = load(tmp_path / "split.npz"), load(tmp_path / "parts.npz")
    assert same(first, second) and len(first.test) == 20
    torch.testing.assert_close(first.restore(first.test.x), torch.from_numpy(x[180:]).float(), rtol=1e-4, atol=1e-4)


def test_a_label_beside_the_rows(frame: pd.DataFrame, tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", x=frame.to_numpy(), label=np.arange(N) % 3)
    assert load(tmp_path / "mine.npz", context=["label"]).context_features == 3


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((100, 2, 2))}, "shape .100, 2, 2."),
        ({"x": np.array([["a", "b"]])}, "rows are numbers"),
        ({"x": np.array([{}, {}])}, "cannot be read as arrays of numbers"),
        ({"left": np.zeros((60, 2)), "right": np.zeros((60, 2))}, "holds left, right; it should hold"),
        ({"x": np.random.rand(60, 2), "split": np.zeros(59)}, "'split' has shape .59,.; x has 60 rows"),
        ({"x": np.random.rand(60, 2), "split": np.arange(60)}, "values other than 0"),
        ({"x": np.random.rand(60, 2), "split": np.zeros(60)}, "60 train, 0 validation and 0 test rows"),
        ({"x": np.random.rand(60, 2), "columns": np.array(["a"])}, "names 1 different columns; the rows have 2"),
    ],
)
def test_an_archive_that_cannot_be_used(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "mine.npz")


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "mine.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(ValueError, match="cannot be read as arrays"):
        load(tmp_path / "mine.npz")
