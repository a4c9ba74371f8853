"""Loaders: what they find, and what they say when they do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from comparisons import data


def test_a_missing_file_is_named_with_the_folders_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    with pytest.raises(data.DataNotFoundError, match=r"no_such_set\.npz is not in .*IRESFLOW_DATA") as error:
        data.load_arrays("no_such_set")
    assert str(tmp_path) in str(error.value)
    assert str(data.REPOSITORY.parent / "shared" / "data") in str(error.value)


def test_the_own_folder_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    np.savez(tmp_path / "uci_gas_turbine.npz", x=np.zeros(3))
    assert data.load_arrays("uci_gas_turbine")["x"].shape == (3,)


def test_gas_turbine_drops_tey_and_keeps_the_given_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    split = np.array([0, 0, 1, 2, 0, 1, 2, 2])
    np.savez(tmp_path / "uci_gas_turbine.npz", x=x, columns=np.array(["AT", "TEY", "CO"]), split=split)
    rows, columns = data.load_gas_turbine()
    assert columns == ["AT", "CO"]
    assert [part.shape for part in rows] == [(3, 2), (2, 2), (3, 2)]
    np.testing.assert_array_equal(rows[1], x[[2, 5]][:, [0, 2]])


def test_digits_are_split_without_overlap() -> None:
    train, validation, test = data.load_digits()
    assert (len(train), len(validation), len(test)) == (1457, 161, 179)
    assert {part.shape[1] for part in (train, validation, test)} == {64}
    assert train.min() == 0 and train.max() == 16


def test_digits_split_is_that_of_the_shared_file() -> None:
    try:
        shared = data.load_arrays("sklearn_digits8x8")
    except data.DataNotFoundError:
        pytest.skip("the shared file is not here")
    for part, rows in enumerate(data.load_digits()):
        theirs = shared["x"][shared["split"] == part].reshape(-1, 64)
        np.testing.assert_array_equal(np.sort(rows.sum(1)), np.sort(theirs.sum(1)))
