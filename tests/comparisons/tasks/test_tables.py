"""Every task of the table, and the real data sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from comparisons.tasks import SUITES, TASKS, DataNotFoundError, load
from comparisons.tasks.sources import load_arrays
from comparisons.tasks.tables import first_of_each, random_split
from tests.comparisons.tasks.helpers import generator, loaded

FLAT = [name for name in TASKS if name not in SUITES["image"]]  # the others: test_images.py


@pytest.mark.parametrize("name", FLAT)
def test_a_task_draws_batches_like_its_test_points(name: str) -> None:
    task = loaded(name)
    batch = task.draw(2000, generator(1))
    assert task.name == name and task.batch in (64, 256, 512)
    assert batch.x.shape == (2000, task.features) and batch.x.dtype == task.test.x.dtype == torch.float32
    assert len(task.columns) == task.features >= 2
    assert torch.equal(batch.x, task.draw(2000, generator(1)).x)
    assert not torch.equal(batch.x, task.draw(2000, generator(2)).x)
    difference = (batch.x.mean(0) - task.test.x.mean(0)) / batch.x.std(0)
    assert difference.abs().max() < 5 / len(task.test) ** 0.5 + 0.12  # tests of wine have 17 rows
    if task.kind != "plane":
        assert batch.x.std(0).sub(1).abs().max() < 0.3
        assert torch.equal(task.test.x, load(name).test.x)  # dequantised once and for all
        assert torch.isfinite(task.restore(task.test.x)).all() and task.preprocessing


@pytest.mark.parametrize("name", FLAT)
def test_a_context_comes_with_every_point_of_conditional_tasks_alone(name: str) -> None:
    task = loaded(name)
    assert (task.context_features is not None) == (name in SUITES["conditional"])
    if task.context_features is not None:
        batch = task.draw(50, generator(0))
        assert batch.context is not None and batch.context.shape == (50, task.context_features)
        assert batch.context.dtype == torch.float32 and torch.isfinite(batch.context).all()


@pytest.mark.parametrize(("name", "label"), [("digits-conditional", 10), ("magic-conditional", 2)])
def test_labels_belong_to_their_rows(name: str, label: int) -> None:
    """Each class's mean in the batches is that class's mean in the test points, and no other's."""
    task = loaded(name)
    batch = task.draw(4000, generator(0))
    assert batch.context is not None and task.test.context is not None
    assert torch.equal(batch.context.sum(1), torch.ones(4000)) and task.context_features == label
    drawn, tested = (points.context.T @ points.x / points.context.sum(0)[:, None] for points in (batch, task.test))  # type: ignore[union-attr]
    assert torch.equal(torch.cdist(drawn, tested).argmin(1), torch.arange(label))


def test_gas_turbine_given_the_weather() -> None:
    task, whole = loaded("gas-turbine-conditional"), loaded("gas-turbine")
    assert set(task.columns).isdisjoint({"AT", "AP", "AH", "TEY"})
    assert set(task.columns) | {"AT", "AP", "AH"} == set(whole.columns)
    assert task.test.context is not None
    ambient = [whole.columns.index(name) for name in ("AT", "AH")]
    torch.testing.assert_close(task.test.context[:, [0, 2]], whole.test.x[:, ambient], atol=1e-4, rtol=0)


def test_gas_turbine_says_what_was_done() -> None:
    sentences = loaded("gas-turbine").preprocessing
    assert sentences[0] == "dropped 7 rows that repeat another"
    assert "dropped TEY (correlation 0.989 with CDP)" in sentences
    assert "dequantised TIT by noise on [0, 0.1)" in sentences
    assert sentences[-1] == "standardised by the 29750 train rows"


def test_power_loses_the_column_that_repeats_another() -> None:
    task = loaded("power")
    assert "Global_intensity" not in task.columns and len(task.columns) == 7
    assert {f"dequantised Sub_metering_{number} by noise on [0, 1)" for number in (1, 2, 3)} <= set(task.preprocessing)


def test_bsds300_is_on_the_scale_of_the_maf_paper() -> None:
    """A full-covariance Gaussian scores 96.97 nats (data README): +- 0.28 over patches, but 3.0 by photographs."""
    task = loaded("bsds300")
    train, test = task.draw(100_000, generator(0)).x.double(), task.test.x.double()
    scores = MultivariateNormal(train.mean(0), train.T.cov()).log_prob(test) + task.log_volume
    assert scores.mean().item() == pytest.approx(96.97, abs=0.1)
    assert task.groups is not None and len(task.groups) == len(test)
    by_photograph = [scores[task.groups == photograph].mean().item() for photograph in task.groups.unique()]
    assert len(by_photograph) == 100
    assert np.std(by_photograph) / 10 > 3 * scores.std().item() / len(scores) ** 0.5  # what `groups` is for


def test_restored_digits_are_grey_values() -> None:
    task = load("digits")
    pixels = task.restore(task.test.x)
    assert pixels.min() > -0.51 and pixels.max() < 16.51


def test_digits_are_split_as_in_the_shared_file() -> None:
    task = load("digits")
    try:
        shared = load_arrays("sklearn_digits8x8")
    except DataNotFoundError as error:
        pytest.skip(str(error))
    theirs = shared["x"][shared["split"] == 2].reshape(-1, 64)
    ours = task.restore(task.test.x).round().numpy()
    assert np.abs(np.sort(ours.sum(1)) - np.sort(theirs.sum(1))).max() < 30  # noise of 64 pixels; an image holds 300
    assert np.abs(np.sort(ours, axis=0).mean(0) - np.sort(theirs, axis=0).mean(0)).max() < 0.15


def test_a_random_split_has_the_shares_of_the_shared_files() -> None:
    split = random_split(1797)
    assert np.bincount(split).tolist() == [1457, 161, 179]


def test_the_copy_in_the_train_rows_stays() -> None:
    x = np.array([[1, 2], [3, 4], [1, 2], [5, 6], [3, 4]])
    split = np.array([2, 1, 0, 0, 1])
    kept, noted = first_of_each(x, split)
    assert kept.tolist() == [1, 2, 3] and noted == ("dropped 2 rows that repeat another",)
