"""Tasks by name."""

from __future__ import annotations

import pytest

from comparisons.tasks import SUITES, TASKS, load


def test_suites_hold_tasks_and_every_task_is_in_one() -> None:
    assert sorted(name for suite in SUITES.values() for name in suite) == sorted(TASKS)
    assert len(SUITES["toy"]) == 8 and set(SUITES) == {"toy", "tabular", "image", "conditional", "smoke"}


@pytest.mark.parametrize(("name", "hint"), [("chekerboard", "did you mean 'checkerboard'?"), ("xyz", "there are: ")])
def test_an_unknown_name_gets_a_hint(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match="there is no task") as error:
        load(name)
    assert hint in str(error.value) and ".csv" in str(error.value)


def test_a_context_is_for_files() -> None:
    with pytest.raises(ValueError, match="two-moons-conditional"):
        load("two-moons", context=["label"])


def test_the_smoke_task_is_small() -> None:
    task = load("smoke")
    assert (task.parameters, task.batch, task.name) == (3_000, 64, "smoke")
    assert task.entropy == load("checkerboard").entropy
