"""A store as a run leaves it, made up in a moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from comparisons.diagnostics import BlockRow, InverseWork, LogDetWork, RoundTrip
from comparisons.methods import METHODS
from comparisons.metrics import Estimate
from comparisons.results import Failure, Key, Result, Store, Trial
from comparisons.training import History
from comparisons.two_sample import DISTANCES, WithFloor
from iresflow_plugin.log_det import Exact

RESIDUAL = ("ours", "i-resnet", "residual-flow", "i-densenet", "alternating", "impflow")


def make_result(method: str = "ours", mean: float = 0.0, seed: int = 0, task: str = "t", **changes) -> Result:
    """A cell with plausible numbers, the given mean, and what is to be different."""
    random = np.random.default_rng([seed, *method.encode()])
    fitted = bool(METHODS[method].fit)
    seconds = random.uniform(5, 50)
    steps = [0] if fitted else list(range(0, 1501, 75))
    loss = [-mean + 2 * np.exp(-step / 200) + 0.01 * random.normal() for step in steps] if not fitted else [-mean]
    residual = method in RESIDUAL or method.endswith("-swapped")
    bound = 0.97
    blocks = [
        BlockRow(k, bound, bound * random.uniform(0.6, 0.98), bound * random.uniform(0.2, 0.5), random.uniform(5, 30))
        for k in range(1, 17)
    ]
    values = dict(
        task=task,
        method=method,
        seed=seed,
        steps=0 if fitted else 1500,
        parameters=int(random.integers(20_000, 36_000)),
        learning_rate=METHODS[method].learning_rate,
        validation=min(loss),
        log_likelihood=Estimate(mean, 0.01),
        raw_log_likelihood=mean - 1.0,
        bits_per_dimension=None,
        log_det_error=0.0,
        distances={name: WithFloor(random.uniform(0.01, 0.1), 0.01) for name in DISTANCES},
        lost_samples=0.0,
        training_seconds=seconds,
        density_seconds=1e-6 * np.exp(random.normal(3, 1)),
        sampling_seconds=1e-6 * np.exp(random.normal(3, 1)),
        memory=None if fitted else random.uniform(5, 50),
        inverse=None if method == "kde" else RoundTrip(1e-7, 1e-5, 0),
        blocks=blocks if residual else [],
        history=History(steps, [seconds * (step + 20) / 1520 for step in steps], loss),
        swap="AffineCoupling → ResidualBlock" if method.endswith("-swapped") else "",
    )
    return Result(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def make_scores(mean: float, points: int = 400, seed: int = 0) -> np.ndarray:
    """With this mean: points are equally hard for all methods, up to a little noise."""
    hard = np.random.default_rng(0).normal(0, 0.5, points)
    noise = np.random.default_rng([seed, int(abs(mean) * 1e6)]).normal(0, 0.05, points)
    return mean + hard - hard.mean() + noise - noise.mean()


def make_store(
    folder: Path,
    methods: Sequence[str] = tuple(METHODS),
    kinds: Iterable[str] = ("plane", "table"),
    seeds: int = 3,
    failures: Sequence[Failure] = (),
    diverged: Iterable[Key] = (),
    grid: int = 40,
) -> Store:
    """A task of each kind, named like it."""
    store = Store(folder)
    store.start({"budget": "1500 steps", "suite": "synthetic", "seeds": seeds})
    for shift, name in enumerate(kinds):
        store.add_arrays(name, task_arrays(name, grid))
        for number, method in enumerate(methods):
            for seed in range(seeds):
                key = (name, method, seed)
                if key in [failure.key for failure in failures]:
                    continue
                mean = round(
                    -3.5
                    - 0.3 * abs(np.sin(5.0 * number + shift))
                    + np.random.default_rng([seed, number]).normal(0, 0.01),
                    6,
                )
                scores = make_scores(mean, seed=seed)
                if key in diverged:
                    scores[3] = -np.inf
                    mean = -np.inf
                arrays = {"scores": scores} | (cell_arrays(name, number, grid) if seed == 0 else {})
                result = make_result(method, float(mean), seed, name)
                store.add(result, {"command": "python -m comparisons", "machine": {"cores": 2}})
                store.add_arrays(result.name, arrays)
    for failure in failures:
        store.add(failure, {"command": "python -m comparisons", "machine": {"cores": 2}})
    for name in kinds:
        store.add_work(name, {"inverse": inverse_rows(), "log_det": log_det_rows()})
        for rate in (1e-3, 1e-2):
            store.add_trial(Trial(name, methods[0], rate, 3.5 + rate))
    store.add_arrays("dynamics", dynamics_arrays())
    return store


def task_arrays(kind: str, grid: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    arrays = {"kind": np.str_(kind), "about": np.str_(f"A made-up {kind}"), "features": np.int64(2)}
    if kind == "plane":
        axis = np.linspace(-3, 3, grid)
        density = ring(*np.meshgrid(axis, axis))
        arrays |= {"data": ring_points(random), "density": density, "limit": np.float64(3), "entropy": np.float64(3.45)}
        return {**arrays, "preprocessing": np.array([], dtype=str)}
    data = random.normal(size=(1000, 6)) if kind == "table" else random.uniform(0, 16, (64, 64))
    return {**arrays, "data": data, "preprocessing": np.array(["Made up.", "Standardised."])}


def ring(x: np.ndarray, y: np.ndarray, radius: float = 2.0) -> np.ndarray:
    return np.exp(-((np.hypot(x, y) - radius) ** 2) / 0.05) / (2 * np.pi * radius * np.sqrt(0.05 * np.pi))


def ring_points(random: np.random.Generator, blur: float = 0.16) -> np.ndarray:
    angle, radius = random.uniform(0, 2 * np.pi, 2000), random.normal(2, blur, 2000)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def cell_arrays(kind: str, number: int, grid: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(number)
    if kind == "plane":
        axis = np.linspace(-3, 3, grid)
        log_density = np.log(ring(*np.meshgrid(axis, axis), radius=2 - 0.02 * number) + 1e-9)
        return {"samples": ring_points(random, 0.16 + 0.02 * number), "log_density": log_density}
    samples = random.normal(size=(1000, 6)) if kind == "table" else random.uniform(0, 16, (64, 64))
    return {"samples": samples}


def inverse_rows() -> list[dict]:
    rows = [
        InverseWork(name, 10.0**-k, speed * k, 2 * int(speed * k), 10.0 ** (-k - 1), 10.0**-k, 1.0, 1e-6)
        for k in range(1, 10)
        for name, speed in (("fixed point", 9.0), ("Anderson", 4.0), ("Newton", 2.0))
    ]
    return [row.__dict__ for row in rows]


def log_det_rows() -> list[dict]:
    rows = [
        LogDetWork(family, Exact(), 0, 0, cost / n, cost / n, n, cost * n, 1e-6 * n)
        for n in (1, 2, 4, 8)
        for family, cost in (("series, 1 probe", 1.0), ("series, 4 probes", 0.4))
    ]
    return [{**row.__dict__, "estimator": repr(row.estimator)} for row in rows]


def dynamics_arrays() -> dict[str, np.ndarray]:
    places = np.linspace(-2, 2, 11) * np.linspace(1, 2, 4)[:, None]
    return {"plain": places, "invertible": places, "target": places[-1]}
