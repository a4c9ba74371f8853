"""Sources: what they find, and what they say when they do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from comparisons.tasks import sources


def test_a_missing_file_is_named_with_the_folders_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sources.VARIABLE, str(tmp_path))
    with pytest.raises(sources.DataNotFoundError, match=r"no_such_set\.npz is not in .*IRESFLOW_DATA") as error:
        sources.load_arrays("no_such_set")
    assert str(tmp_path) in str(error.value)
    assert str(sources.REPOSITORY.parent / "shared" / "data") in str(error.value)


def test_the_own_folder_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sources.VARIABLE, str(tmp_path))
    np.savez(tmp_path / "uci_gas_turbine.npz", x=np.zeros(3))
    assert sources.load_arrays("uci_gas_turbine")["x"].shape == (3,)
