"""The report: one HTML page without outside files, built from what lies in the folder of a run."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from comparisons import figures
from comparisons.methods import METHODS, TWINS
from comparisons.metrics import Estimate
from comparisons.results import Result, Store
from comparisons.tables import Columns

COLUMNS: Columns[Result] = {
    "method": lambda result: result.method,
    "test log-likelihood (nats)": lambda result: with_error(result.log_likelihood),
    "training (s)": lambda result: f"{result.training_seconds:.1f}",
    "density (µs/point)": lambda result: f"{1e6 * result.density_seconds:.1f}",
    "sampling (µs/sample)": lambda result: f"{1e6 * result.sampling_seconds:.1f}",
    "inverse error": lambda result: f"{result.inverse_error:.1e}",
    "Lipschitz bound": lambda result: "-" if result.lipschitz_bound is None else f"{result.lipschitz_bound:.3f}",
    "parameters": lambda result: f"{result.parameters:,}",
}


@dataclass(frozen=True)
class Gain:
    """What swapping did on one task: twin minus original, point by point on the same test set."""

    task: str
    original: str
    log_likelihood: Estimate
    training: float  # times the original's seconds
    density: float
    sampling: float


GAIN_COLUMNS: Columns[Gain] = {
    "swapped": lambda gain: f"{gain.task}: {gain.original}",
    "gain in test log-likelihood (nats)": lambda gain: with_error(gain.log_likelihood, sign="+"),
    "training time": lambda gain: f"x {gain.training:.2g}",
    "density time": lambda gain: f"x {gain.density:.2g}",
    "sampling time": lambda gain: f"x {gain.sampling:.2g}",
}


def with_error(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.mean:{sign}.3f} ± {estimate.error:.3f}"


def by_task(results: list[Result]) -> dict[str, list[Result]]:
    """The results of each task, every twin behind its original."""
    ordered = sorted(results, key=lambda result: figures.ORDER.index(result.method))
    tasks = dict.fromkeys(result.task for result in results)  # in the order of the run
    return {task: [result for result in ordered if result.task == task] for task in tasks}


def best_of(results: list[Result]) -> Result:
    """The one with the highest test log-likelihood."""
    return max(results, key=lambda result: result.log_likelihood.mean)


def gains(results: list[Result], store: Store) -> list[Gain]:
    """Every pair of original and twin of which both are finished."""
    found = {(result.task, result.method): result for result in results}
    pairs = [
        (result, found[result.task, TWINS[result.method]])
        for chosen in by_task(results).values()
        for result in chosen
        if (result.task, TWINS.get(result.method)) in found
    ]
    return [
        Gain(
            old.task,
            old.method,
            Estimate.of(torch.from_numpy(scores(new, store) - scores(old, store))),
            new.training_seconds / old.training_seconds,
            new.density_seconds / old.density_seconds,
            new.sampling_seconds / old.sampling_seconds,
        )
        for old, new in pairs
    ]


def scores(result: Result, store: Store) -> np.ndarray:
    """The test log-likelihood point by point."""
    return store.load_arrays(result.name)["scores"]


def pictures(task: str, results: list[Result], store: Store) -> list[Figure]:
    """All pictures of one task."""
    data = store.load_arrays(task)
    cells = {result.method: store.load_arrays(result.name) for result in results}
    kind = str(data["kind"])
    drawn = [figures.densities(task, data, cells)] if kind == "plane" else []
    entropy = float(data["entropy"]) if "entropy" in data else None
    return [*drawn, figures.SAMPLES[kind](task, data, cells), figures.learning_curves(task, results, entropy)]


def embedded(figure: Figure) -> str:
    """The figure as a data URL."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_report(store: Store) -> Path:
    """Build `report.html` from the finished cells in the folder."""
    results, failures, run = store.load()
    tasks = {
        task: {
            "about": str(store.load_arrays(task)["about"]),
            "results": chosen,
            "best": best_of(chosen),
            "pictures": [embedded(figure) for figure in pictures(task, chosen, store)],
        }
        for task, chosen in by_task(results).items()
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        tasks=tasks,
        failures=failures,
        run=run,
        columns=COLUMNS,
        gains=gains(results, store),
        gain_columns=GAIN_COLUMNS,
        methods=METHODS,
    )
    path = store.folder / "report.html"
    path.write_text(page)
    return path
