"""The loop lowers the loss of every kind of method, the same way twice, in one process or two, killed or not."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric, seed_everything
from lightning.fabric.plugins import MixedPrecision

from comparisons import diagnostics, metrics, training
from comparisons.methods import METHODS, Density, build
from comparisons.methods.continuous import EXACT_UP_TO as EXACT_FFJORD
from comparisons.settings import Budget, Machine
from comparisons.tasks import TASKS, Points, Task
from comparisons.tasks.sources import REPOSITORY
from comparisons.training import History, has_blocks, log_likelihoods, ready, train


def small(task: str = "pinwheel") -> Task:
    task_ = TASKS[task]()
    return replace(task_, validation=task_.validation[:200], test=task_.test[:200], batch=64, parameters=3_000)


def trained(
    name: str, fabric: Fabric, budget: Budget | None = None, checkpoint: Path | None = None
) -> tuple[Density, History, list[float]]:
    task, shares = small(), []
    seed_everything(0, verbose=False)
    method = METHODS[name]
    density = build(method, task.features, task.parameters)
    history = train(
        density,
        task,
        method,
        rate=method.learning_rate,
        budget=budget or Budget(steps=40),
        seed=0,
        fabric=fabric,
        on_progress=shares.append,
        checkpoint=checkpoint,
    )
    return density, history, shares


@pytest.mark.parametrize("name", ["ours", "nflows-realnvp-swapped", "normflows-realnvp", "normflows-residual"])
def test_training_lowers_the_validation_loss(name: str, fabric: Fabric) -> None:
    density, history, shares = trained(name, fabric)
    assert shares == pytest.approx([step / 40 for step in range(1, 41)])
    assert history.steps[0] == 1 and history.steps[-1] == 40
    assert history.seconds == sorted(history.seconds)
    assert history.best < history.validation[0] - 0.02
    kept = metrics.Estimate.of(log_likelihoods(density, small().validation, fabric))
    assert -kept.mean == pytest.approx(history.best, abs=1e-4)  # it ends with the weights of the best validation


def test_one_seed_suffices(fabric: Fabric) -> None:
    first, second = (trained("nflows-maf-swapped", fabric, Budget(steps=5))[1].validation for _ in range(2))
    assert first == second


def test_a_budget_in_seconds_ends_the_training_in_time(fabric: Fabric) -> None:
    _, history, shares = trained("nflows-maf", fabric, Budget(seconds=0.4))
    before = [seconds for seconds in history.seconds if seconds < 0.4]
    assert len(before) == len(history.seconds) - 1  # the step in which the time ran out was the last
    assert shares[-1] == 1.0 and history.steps[-1] == len(shares)


@pytest.mark.parametrize("name", ["ours", "residual-flow", "normflows-glow"])
def test_a_training_that_was_broken_off_ends_with_the_same_numbers(
    name: str, fabric: Fabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(name, fabric, Budget(steps=12))
    file, saved = tmp_path / "cell.ckpt", []
    save = training.save

    def save_and_break(*arguments: object) -> None:
        save(*arguments)  # pyright: ignore[reportArgumentType]
        saved.append(1)
        if len(saved) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save", save_and_break)
    with pytest.raises(KeyboardInterrupt):
        trained(name, fabric, Budget(steps=12), file)
    monkeypatch.setattr(training, "save", save)
    again = trained(name, fabric, Budget(steps=12), file)
    assert len(again[2]) < 12  # it did not begin anew
    assert again[1].validation == whole[1].validation and again[1].steps == whole[1].steps
    for one, other in zip(again[0].state_dict().values(), whole[0].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_is_never_half_written(fabric: Fabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = torch.nn.Linear(2, 2)
    optimizer, generator = torch.optim.Adam(net.parameters()), torch.Generator()
    file = tmp_path / "cell.ckpt"
    training.save(file, training.State(best=training.snapshot(net), step=1), net, optimizer, generator, fabric)

    def torn(content: object, path: Path) -> None:
        Path(path).write_bytes(b"half of")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        training.save(file, training.State(best=training.snapshot(net), step=2), net, optimizer, generator, fabric)
    assert training.load(file, net, optimizer, generator, fabric).step == 1


@pytest.mark.parametrize("name", ["nflows-realnvp-swapped", "normflows-glow"])  # the second holds ActNorms
def test_two_processes_train_as_one(name: str, fabric: Fabric, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.comparisons.two_processes", name, str(tmp_path)]
    subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, timeout=300, capture_output=True)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["validation"] == second["validation"]
    assert all(torch.equal(first["state"][key], second["state"][key]) for key in first["state"])  # buffers, too
    _, history, _ = trained(name, fabric, Budget(steps=10))
    # not the weights: Adam's first steps turn the sign of a gradient near 0, rounding, into a step of full length
    assert first["validation"] == pytest.approx(history.validation, abs=2e-3)


def test_double_precision_is_double(fabric: Fabric) -> None:
    double = Machine(precision="64-true").fabric()
    density, history, _ = trained("ours", double, Budget(steps=3))
    assert next(density.parameters()).dtype == torch.float64
    assert ready(small().test, density, double).x.dtype == torch.float64
    assert history.validation == pytest.approx(trained("ours", fabric, Budget(steps=3))[1].validation, abs=1e-3)


def test_a_batch_without_a_finite_gradient_is_left_out(fabric: Fabric) -> None:
    task = small()
    method, calls = METHODS["nflows-maf"], []

    def draw(n: int, generator: torch.Generator) -> Points:
        calls.append(n)
        points = task.draw(n, generator)
        return Points(points.x * (math.inf if len(calls) == 3 else 1.0))

    density = build(method, 2, 3_000)
    options = {"rate": 1e-3, "budget": Budget(steps=6), "seed": 0, "fabric": fabric, "on_progress": lambda share: None}
    history = train(density, replace(task, draw=draw), method, **options)
    assert len(calls) == 7 and all(map(math.isfinite, history.validation))  # the first is to meet the data


def half_precision(scale: float) -> tuple[Fabric, torch.amp.GradScaler]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]), scaler


def test_half_precision_finds_its_scale() -> None:
    """The scaler begins too high and lowers its scale batch by batch, until gradients are finite."""
    fabric, scaler = half_precision(2.0**24)
    _, history, _ = trained("nice", fabric, Budget(steps=30))
    assert scaler.get_scale() < 2.0**20
    assert history.validation[-1] < history.validation[0]  # no step had been taken there


def test_a_training_in_half_precision_goes_on_at_its_scale(tmp_path: Path) -> None:
    (fabric, scaler), (again, fresh) = half_precision(2.0**7), half_precision(2.0**24)
    net = torch.nn.Linear(2, 2)
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters()))
    fabric.backward(model(torch.ones(1, 2)).sum())  # a scaler has no scale before it has scaled
    generator, file = torch.Generator(), tmp_path / "cell.ckpt"
    training.save(file, training.State(best=training.snapshot(net)), net, optimizer, generator, fabric)
    training.load(file, net, optimizer, generator, again)
    assert fresh.get_scale() == scaler.get_scale() == 2.0**7


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"seconds": -1.0}, {"parameters": 0}, {"batch": 0}])
def test_a_budget_of_nothing_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be positive"):
        Budget(**wrong)


def test_a_sorted_file_is_validated_on_all_its_length(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    density, task = build(METHODS["nflows-maf"], 2, 3_000), small()
    scores = log_likelihoods(density, task.validation, fabric)
    state, task = training.State(best=None), replace(task, validation=task.validation[scores.argsort()])
    monkeypatch.setattr(training, "VALIDATION_POINTS", 40)
    training.validate(state, density, task, fabric)
    assert state.history.validation[0] == pytest.approx(-scores.mean().item(), abs=scores.std().item() / 10)


def log_det_error(density: Density, points: Points) -> float:
    visits = diagnostics.visit_blocks(density, points.x) if has_blocks(density) else []
    return diagnostics.log_det_error(density, visits, points, len(points))


def test_metrics_of_a_residual_flow(fabric: Fabric) -> None:
    density, _, _ = trained("ours", fabric, Budget(steps=3))
    points = small().test
    assert metrics.density_seconds(density, points, fabric.device) > 0
    assert metrics.sampling_seconds(density, points, fabric.device) > 0
    assert log_det_error(density, points) == 0.0
    distances, lost = metrics.sample_distances(density, small(), fabric)
    assert lost == 0 and distances["energy distance"].distance > distances["energy distance"].floor


def test_the_error_of_a_log_det_that_is_not_exact_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    density = build(METHODS["ours"], 20, 20_000).double()
    for parameter in density.parameters():
        parameter.data.mul_(10)  # at its bound
    points = small().test
    wide = type(points)(torch.randn(100, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(diagnostics, "EXACT_UP_TO", 10)
    monkeypatch.setattr(training, "EXACT_UP_TO", 10)
    with training.evaluating(density, 20):
        estimated = density.log_prob(wide.x).mean().item()
    told = log_det_error(density, wide)
    monkeypatch.setattr(training, "EXACT_UP_TO", 64)
    with training.evaluating(density, 20):
        exact = density.log_prob(wide.x).mean().item()
    assert 0 <= told < 1 and abs(estimated - exact) < 3 * told + 1e-6  # two standard errors and more: fails in < 1e-4


def test_the_error_of_a_trace_that_is_not_exact_is_told() -> None:
    density = build(METHODS["ffjord"], EXACT_FFJORD + 1, 10_000).double()
    for parameter in density.parameters():
        parameter.data.mul_(2)  # a fresh field bends nothing
    generator = torch.Generator().manual_seed(0)
    points = Points(torch.randn(200, EXACT_FFJORD + 1, dtype=torch.float64, generator=generator))
    torch.manual_seed(0)
    told = log_det_error(density, points)
    with training.evaluating(density, EXACT_FFJORD + 1):
        estimated = density.log_prob(points.x).mean().item()
        density.flow.transform.exact = True
        exact = density.log_prob(points.x).mean().item()
        assert log_det_error(density, points) == 0.0
    assert 1e-3 < told < 1 and abs(estimated - exact) < 2 * told  # four standard errors: fails in 1e-4


def test_the_standard_error_is_that_of_a_mean() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 3 + 1
    estimate = metrics.Estimate.of(values)
    assert estimate.error == pytest.approx(0.03, rel=0.05)
    assert abs(estimate.mean - 1) < 4 * estimate.error


def test_a_history_without_any_number_is_as_bad_as_can_be() -> None:
    assert History([1], [0.1], [math.nan]).best == math.inf
