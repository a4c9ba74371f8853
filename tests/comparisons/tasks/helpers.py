"""What the tests of the tasks share."""

from __future__ import annotations

import pytest
import torch

from comparisons.tasks import DataNotFoundError, Task, load


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loaded(name: str) -> Task:
    """The task, or a skipped test where its data is not at hand."""
    try:
        return load(name)
    except DataNotFoundError as error:
        pytest.skip(str(error))
