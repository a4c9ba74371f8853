"""The report of a run: tables for the terminal, a Markdown file, pictures, and one HTML page without outside files.

All are made from what lies in the folder of the run:

    terminal_tables(store)    rankings, swaps and summary
    write_markdown(store)     report.md
    write_figures(store)      figures/*.png
    write_report(store)       report.html
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from rich.table import Table

from comparisons import diagnostic_figures, figures, wording
from comparisons.cells import TEMPERATURE
from comparisons.columns import COMPACT, GAINS, LEGEND, MEANING, number, ours_row, summary_grids, task_grids
from comparisons.diagnostics import InverseWork, LogDetWork
from comparisons.dynamics import Dynamics, dynamics, dynamics_figure
from comparisons.methods import METHODS, Method
from comparisons.results import Failure, Result, Store, Trial
from comparisons.standings import OURS, Gain, Opponent, Standing, by_method, gains, opponents, standings
from comparisons.tables import Grid

WEB_DPI, WEB_QUALITY = 120, 80  # of embedded pictures: a few hundred KB a task
FILE_DPI = 160

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Chapter:
    """All that is known of one task."""

    task: str
    data: Arrays
    standings: list[Standing]
    gains: list[Gain]
    cells: Mapping[str, Arrays]  # by method: the arrays for pictures, of the first seed that has them
    work: dict[str, list[dict[str, Any]]]
    trials: list[Trial]
    failures: list[Failure]

    @property
    def entropy(self) -> float | None:
        return float(self.data["entropy"]) if "entropy" in self.data else None

    @property
    def about(self) -> str:
        about = str(self.data["about"])
        return about[:1].upper() + about[1:]

    @property
    def preprocessing(self) -> list[str]:
        return [str(step) for step in np.atleast_1d(self.data.get("preprocessing", []))]

    @property
    def grids(self) -> list[Grid]:
        return task_grids(self.standings, self.entropy)

    @property
    def sentences(self) -> list[str]:
        return [
            sentence
            for sentence in (wording.outcome(self.standings, self.failures), wording.price(self.standings))
            if sentence
        ]

    @property
    def swaps(self) -> dict[str, str]:
        """What was replaced by what, by method."""
        return {standing.method: swap for standing in self.standings if (swap := standing.results[0].swap)}

    @property
    def rates(self) -> Grid:
        """The learning rates that were tried, with the best validation loss of each."""
        tried: dict[str, list[Trial]] = {}
        for trial in self.trials:
            tried.setdefault(trial.method, []).append(trial)
        columns: dict[str, Callable[[list[Trial]], str]] = {
            "method": lambda trials: trials[0].method,
            "learning rate: validation loss": lambda trials: ", ".join(
                f"{trial.learning_rate:g}: {number(trial.validation, '.3f')}" for trial in trials
            ),
        }
        return Grid.of("Learning rates tried", columns, list(tried.values()))


@dataclass(frozen=True)
class Book:
    """All that is known of a run."""

    chapters: list[Chapter]
    failures: list[Failure]
    run: dict[str, Any]
    settings: dict[str, Any]

    @property
    def tasks(self) -> list[str]:
        return [chapter.task for chapter in self.chapters]

    @property
    def opponents(self) -> list[Opponent]:
        found = {opponent.method: opponent for opponent in opponents([chapter.standings for chapter in self.chapters])}
        return [found[method] for method in figures.in_order(found)]

    @property
    def gains(self) -> list[Gain]:
        return [gain for chapter in self.chapters for gain in chapter.gains]

    @property
    def methods(self) -> list[Method]:
        """Those that ran or were to run."""
        names = {standing.method for chapter in self.chapters for standing in chapter.standings}
        names |= {failure.method for failure in self.failures}
        return [METHODS[name] for name in figures.in_order(names) if name in METHODS]

    @property
    def sentences(self) -> list[str]:
        swaps = [wording.of_swaps(self.gains)] if self.gains else []
        return [wording.over_all(self.opponents, len(self.chapters)), *swaps]

    @property
    def summary_grids(self) -> list[Grid]:
        """Over several tasks; one task has all of it in its own tables."""
        return summary_grids(self.opponents, self.tasks) if self.opponents and len(self.chapters) > 1 else []

    @property
    def gain_grid(self) -> Grid:
        return Grid.of("What the swap changed", GAINS, self.gains)


@dataclass(frozen=True)
class Picture:
    """A figure that has yet to be drawn."""

    name: str  # of its file
    caption: str
    draw: Callable[[], Figure]


# reading ---------------------------------------------------------------------------------------------


def read(store: Store) -> Book:
    results, failures, run = store.load()
    trials = store.load_trials()
    settings = json.loads(store.settings.read_text()) if store.settings.is_file() else {}
    chapters = [
        read_chapter(
            store,
            [result for result in results if result.task == task],
            [failure for failure in failures if failure.task == task],
            [trial for trial in trials if trial.task == task],
        )
        for task in dict.fromkeys(result.task for result in results)
    ]
    return Book(chapters, failures, run, settings)


def read_chapter(store: Store, results: list[Result], failures: list[Failure], trials: list[Trial]) -> Chapter:
    task = results[0].task
    data = store.load_arrays(task)
    arrays = {result.key: store.load_arrays(result.name) for result in results}
    scores = {key: cell["scores"] for key, cell in arrays.items()}
    drawn = {
        method: [cell for result in chosen if "samples" in (cell := arrays[result.key])]
        for method, chosen in by_method(results).items()
    }
    return Chapter(
        task,
        data,
        standings(results, scores, data.get("groups"), failures),
        gains(results, scores, data.get("groups")),
        {method: cells[0] for method, cells in drawn.items() if cells},
        store.load_work(task),
        trials,
        failures,
    )


# pictures --------------------------------------------------------------------------------------------


def summary_pictures(book: Book) -> list[Picture]:
    if not book.opponents:
        return []
    return [
        Picture(
            "differences",
            "Ours minus every other method, with 95 % intervals over seeds and test points. Where differences differ "
            "much in size, the axis is linear up to the marks next to 0 and logarithmic beyond. A cross: left open.",
            lambda: figures.difference_figure(book.opponents, book.tasks),
        )
    ]


def task_pictures(chapter: Chapter) -> list[Picture]:
    """All pictures of one task for which there is something to show."""
    task, data, cells, table = chapter.task, chapter.data, chapter.cells, chapter.standings
    kind, scores = str(data["kind"]), figures.captions(table)
    blocks = blocks_of(table)
    work, trained = chapter.work, any(len(standing.results[0].history.steps) > 1 for standing in table)

    def has(name: str) -> bool:
        return any(name in arrays for arrays in cells.values())

    shown: dict[str, tuple[object, str, Callable[[], Figure]]] = {
        "density": (
            "density" in data and has("log_density"),
            "Densities of the data and of every method on one colour scale, each from one seed; below the name the "
            "mean score over seeds.",
            lambda: figures.densities(task, data, cells, scores),
        ),
        "samples": (
            cells,
            "Samples of every method, each from one seed."
            + (" Sample by sample, the contexts are those of the data shown." if data.get("given", False) else ""),
            lambda: figures.SAMPLES[kind](task, data, cells, scores),
        ),
        "cool-samples": (
            has("cool_samples"),
            f"Samples at temperature {TEMPERATURE}: the noise is drawn with that standard deviation.",
            lambda: figures.image_samples(
                task, data, cells, scores, "cool_samples", f"samples at temperature {TEMPERATURE}"
            ),
        ),
        "reconstructions": (
            has("reconstructions"),
            "Test images to noise and back in single precision. The differences, in grey values, are on a scale of "
            "their own, whose end is given.",
            lambda: figures.reconstructions(task, data, cells),
        ),
        "interpolations": (
            has("interpolations"),
            "From one test image, left, to another, right, along a path through the noise of each method.",
            lambda: figures.image_samples(task, data, cells, scores, "interpolations", "paths through the noise"),
        ),
        "learning-curves": (
            trained,
            "Validation loss, mean over seeds and their range. Grey: all other methods. Losses far above the rest "
            "leave the frame.",
            lambda: figures.learning_curves(task, table, chapter.entropy),
        ),
        "speed-quality": (
            table,
            "Quality against speed: up and left is better. A triangle on the lower edge stands for a method that lies "
            "below it; those that diverged are left out.",
            lambda: diagnostic_figures.speed_quality_figure(table, f"{task}: speed and quality"),
        ),
        "lipschitz": (
            blocks,
            "How much of its certified bound every residual block uses at test points.",
            lambda: diagnostic_figures.lipschitz_figure(blocks, f"{task}: certified bound and measured norm"),
        ),
        "inverse": (
            work.get("inverse"),
            "Error of the inverse of ours against evaluations of g, for every solver; dotted the error it certified.",
            lambda: diagnostic_figures.inverse_figure(
                [InverseWork(**row) for row in work["inverse"]], f"{task}: inverse of ours"
            ),
        ),
        "log-det": (
            work.get("log_det"),
            "Error of the log-determinant of ours against its cost, for every estimator.",
            lambda: diagnostic_figures.log_det_figure(
                [LogDetWork(**row) for row in work["log_det"]], f"{task}: log-determinant of ours"
            ),
        ),
    }
    stem = re.sub(r"[^\w.-]+", "-", task)  # tasks of users' files have any name
    return [Picture(f"{stem}-{name}", caption, draw) for name, (there, caption, draw) in shown.items() if there]


def blocks_of(table: Sequence[Standing]) -> dict[str, list]:
    """The residual blocks of every method that has any, of its first seed; ours first."""
    blocks = {standing.method: standing.results[0].blocks for standing in table if standing.results[0].blocks}
    return {method: blocks[method] for method in figures.in_order(blocks)}


def dynamics_picture(store: Store) -> Picture:
    return Picture(
        "dynamics",
        "What residual blocks do to a line of inputs: plain ones may cross trajectories, invertible ones cannot.",
        partial(drawn_dynamics, store),
    )


def drawn_dynamics(store: Store) -> Figure:
    """Trained once in a folder: the nets take some seconds."""
    if not (store.arrays / "dynamics.npz").is_file():
        store.add_arrays("dynamics", asdict(dynamics()))
    return dynamics_figure(Dynamics(**store.load_arrays("dynamics")))


def all_pictures(store: Store, book: Book) -> list[Picture]:
    return [
        *summary_pictures(book),
        *(picture for chapter in book.chapters for picture in task_pictures(chapter)),
        dynamics_picture(store),
    ]


def embedded(picture: Picture) -> str:
    """The figure as a data URL."""
    buffer = BytesIO()
    picture.draw().savefig(buffer, format="webp", dpi=WEB_DPI, pil_kwargs={"quality": WEB_QUALITY, "method": 4})
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_figures(store: Store) -> list[Path]:
    """Every picture as a PNG file under `figures`."""
    folder = store.folder / "figures"
    folder.mkdir(exist_ok=True)
    paths = []
    for picture in all_pictures(store, read(store)):
        paths.append(folder / f"{picture.name}.png")
        picture.draw().savefig(paths[-1], dpi=FILE_DPI)
    return paths


# tables and pages ------------------------------------------------------------------------------------


def terminal_tables(store: Store) -> list[Table]:
    """A ranking of each task, what the swap changed, and over several tasks how often ours is ahead."""
    book = read(store)
    grids = [
        Grid.of(f"{chapter.task}: {chapter.about}", COMPACT, chapter.standings, ours_row(chapter.standings))
        for chapter in book.chapters
    ]
    if book.gains:
        grids.append(book.gain_grid)
    return [grid.rich() for grid in [*grids, *book.summary_grids]]


def write_markdown(store: Store) -> Path:
    """Build `report.md`; it shows the pictures that `write_figures` has left."""
    return write_page(store, "report.md", lambda picture: f"figures/{picture.name}.png")


def write_report(store: Store) -> Path:
    """Build `report.html`, one file with all pictures in it."""
    return write_page(store, "report.html", embedded)


def write_page(store: Store, name: str, source: Callable[[Picture], str]) -> Path:
    """Fill the template of that name; `source` tells it where a picture is."""
    book, path = read(store), store.folder / name
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"source": source, "plain": plain, "mood": mood}
    page = environment.get_template(f"{name}.jinja").render(
        book=book,
        summary_pictures=summary_pictures(book),
        task_pictures=task_pictures,
        dynamics_picture=dynamics_picture(store),
        exists=lambda picture: (store.folder / source(picture)).is_file(),
        legend=LEGEND,
        meaning=MEANING,
        ours=OURS,
    )
    path.write_text(page, encoding="utf-8")
    return path


def plain(value: object) -> str:
    """A setting in words."""
    if value in (None, [], {}, ""):
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return " ".join(str(value).split())


def mood(cell: str) -> Literal["ahead", "behind", ""]:
    """The colour of a cell with a verdict."""
    return "ahead" if cell.endswith("▲") else "behind" if cell.endswith("▼") else ""
