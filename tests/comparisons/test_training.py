"""The loop lowers the loss of every kind of method, the same way twice, and counts only its own time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lightning.fabric import Fabric, seed_everything

from comparisons import metrics
from comparisons.methods import METHODS, Density, build
from comparisons.tasks import TASKS, Task
from comparisons.training import History, train


def small(task: str) -> Task:
    task_ = TASKS[task]()
    return replace(task_, validation=task_.validation[:200], test=task_.test[:200], batch=64, parameters=3_000)


def trained(name: str, fabric: Fabric, steps: int = 40) -> tuple[Density, History, int]:
    task, calls = small("pinwheel"), []
    seed_everything(0, verbose=False)
    density = build(METHODS[name], task.features, task.parameters)
    history = train(density, task, METHODS[name], steps=steps, seed=0, fabric=fabric, on_step=lambda: calls.append(1))
    return density, history, len(calls)


@pytest.mark.parametrize("name", ["ours", "nflows-realnvp-swapped", "normflows-realnvp", "normflows-residual"])
def test_training_lowers_the_validation_loss(name: str, fabric: Fabric) -> None:
    density, history, calls = trained(name, fabric)
    assert calls == 40 and history.steps[0] == 1 and history.steps[-1] == 40
    assert history.seconds == sorted(history.seconds)
    assert min(history.validation) < history.validation[0] - 0.02
    kept = metrics.test_log_likelihood(density, small("pinwheel").validation, fabric)
    assert -kept.mean == pytest.approx(
        min(history.validation), abs=1e-4
    )  # it ends with the weights of the best validation


def test_one_seed_suffices(fabric: Fabric) -> None:
    first, second = (trained("nflows-maf-swapped", fabric, steps=5)[1].validation for _ in range(2))
    assert first == second


def test_metrics_of_a_residual_flow(fabric: Fabric) -> None:
    density, _, _ = trained("ours", fabric, steps=3)
    x = small("pinwheel").test
    assert metrics.inverse_error(density, x, fabric) < 1e-4
    assert metrics.density_seconds(density, x, fabric) > 0
    assert metrics.sampling_seconds(density, 2, fabric.device) > 0
    bound = metrics.largest_lipschitz_bound(density)
    assert bound is not None and 0 < bound < 1


def test_hosts_flows_have_no_lipschitz_bound(fabric: Fabric) -> None:
    assert metrics.largest_lipschitz_bound(build(METHODS["nflows-maf"], 2, 3_000)) is None


def test_the_standard_error_is_that_of_a_mean() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 3 + 1
    estimate = metrics.Estimate.of(values)
    assert estimate.error == pytest.approx(0.03, rel=0.05)
    assert abs(estimate.mean - 1) < 4 * estimate.error
