"""The pictures of a report. Each function draws one task, or all, and returns a matplotlib Figure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from comparisons.methods import METHODS, TWINS
from comparisons.results import Result
from comparisons.standings import OURS, Gap, Opponent, Standing

PANEL = 2.4  # inches
LETTERS = 11  # of a title, in an inch
COLUMNS = 8  # panels in a row of a grid over methods
STRIP = 12  # images in a row of reconstructions
INK = "#333333"
HIGHLIGHT = "#c0392b"  # ours
KINDS = {  # colours of the families of methods
    "coupling": "#2f6db3",
    "autoregressive": "#e08214",
    "elementary": "#7b4fa3",
    "continuous": "#8c564b",
    "residual": "#1b8a5a",
    "floor": "#444444",
    "yours": "#e08214",  # flows of the user
}
VERDICTS = {"better": "#1b8a5a", "worse": HIGHLIGHT, "within 2 standard errors": "#777777"}
# First digits of the ticks of a logarithmic axis that spans less than so much.
TICKS: dict[float, tuple[float, ...]] = {
    3: (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
    10: (1, 1.5, 2, 3, 5, 7),
    1e3: (1, 2, 5),
    math.inf: (1,),
}

# Groups that stay side by side: ours, the pair of the i-ResNet paper's figure, and every original with its twin.
GROUPS = [
    [OURS],
    ["i-resnet", "normflows-glow", "normflows-glow-swapped"],
    *([name, TWINS[name]] if name in TWINS else [name] for name in METHODS if name not in TWINS.values()),
]
ORDER = list(dict.fromkeys(name for group in GROUPS for name in group))

Arrays = dict[str, np.ndarray]


def kind(method: str) -> str:
    return METHODS[method].family if method in METHODS else "yours"


def colour(method: str) -> str:
    return HIGHLIGHT if method == OURS else KINDS[kind(method)]


def in_order(methods: Iterable[str]) -> list[str]:
    """Relatives side by side; unknown names last."""
    return sorted(methods, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def clusters(methods: Iterable[str]) -> list[list[str]]:
    """The methods in their groups."""
    left, found = in_order(methods), []
    while left:
        group = next((group for group in GROUPS if left[0] in group), [left[0]])
        found.append([name for name in left if name in group])
        left = [name for name in left if name not in group]
    return found


def wrapped(groups: Iterable[Sequence[str]], columns: int = COLUMNS) -> list[list[str]]:
    """Rows of names; a group goes to the first row with room for all of it."""
    rows: list[list[str]] = []
    for group in groups:
        row = next((row for row in rows if len(row) + len(group) <= columns), None)
        if row is None:
            rows.append(row := [])
        row.extend(group)
    return rows


def panels(
    methods: Sequence[str], title: str, captions: Mapping[str, str], extra_width: float = 0.0
) -> tuple[Figure, dict[str, Axes]]:
    """A grid of small square panels without ticks, the data first and then the methods, by name."""
    rows = wrapped([["data"], *clusters(methods)])
    columns, side = max(map(len, rows)), 1.45
    width = side * columns + extra_width
    lines = textwrap.wrap(title, int(LETTERS * width))
    size = width, (side + 0.3) * len(rows) + 0.2 * (len(lines) + 1)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03))
    figure.suptitle("\n".join(lines), fontsize=11)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for panel in grid.flat:
        panel.axis("off")
    axes = {name: grid[i][j] for i, row in enumerate(rows) for j, name in enumerate(row)}
    for name, panel in axes.items():
        panel.axis("on")
        panel.set(xticks=[], yticks=[])
        panel.set_box_aspect(1)
        panel.set_title(
            f"{name}\n{captions.get(name, '')}".strip(),
            fontsize=7,
            pad=3,
            color=HIGHLIGHT if name == OURS else INK,
            fontweight="bold" if name in (OURS, "data") else None,
        )
    return figure, axes


def captions(standings: Iterable[Standing]) -> dict[str, str]:
    """The score of each method."""
    return {
        standing.method: "diverged" if standing.diverged else f"{standing.score.mean:.3f} nats"
        for standing in standings
    }


def densities(task: str, data: Arrays, cells: Mapping[str, Arrays], scores: Mapping[str, str]) -> Figure:
    """Heat maps of the data's density and of every method's, on one colour scale."""
    shown = {name: arrays["log_density"] for name, arrays in cells.items() if "log_density" in arrays}
    figure, axes = panels(list(shown), f"{task}: density", scores, extra_width=0.6)
    limit = float(data["limit"])
    scale = Normalize(0, 1.5 * float(np.quantile(data["density"][data["density"] > 0], 0.95)))
    for name, panel in axes.items():
        panel.imshow(
            data["density"].T if name == "data" else density(shown[name]).T,
            origin="lower",
            extent=(-limit, limit, -limit, limit),
            norm=scale,
            cmap="viridis",
            interpolation="nearest",
        )
    colours = ScalarMappable(scale, "viridis")
    bar = figure.colorbar(colours, ax=list(axes.values()), extend="max", fraction=0.02, aspect=40, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    return figure


def density(log_density: np.ndarray) -> np.ndarray:
    """A coupling can overflow far from the data and return NaN: there it has no density."""
    return np.exp(np.minimum(np.nan_to_num(log_density.astype(float), nan=-np.inf), 700.0))


def plane_samples(task: str, data: Arrays, cells: Mapping[str, Arrays], scores: Mapping[str, str]) -> Figure:
    """Scatter plots of data and of samples."""
    title = f"{task}: test points (grey) and as many samples"
    limit = float(data["limit"])
    return scatter(title, data["data"], cells, scores, np.full(2, -limit), np.full(2, limit))


def table_samples(task: str, data: Arrays, cells: Mapping[str, Arrays], scores: Mapping[str, str]) -> Figure:
    """Data and samples on the two main axes of the data."""
    centre = data["data"].mean(0)
    _, spread, directions = np.linalg.svd(data["data"] - centre, full_matrices=False)
    first, second = spread[:2] ** 2 / (spread**2).sum()
    title = f"{task}: test points (grey) and samples on the data's main axes ({first:.0%} and {second:.0%} of variance)"

    def project(points: np.ndarray) -> np.ndarray:
        return (points[np.isfinite(points).all(1)] - centre) @ directions[:2].T

    shown = project(data["data"])
    low, high = np.quantile(shown, [0.001, 0.999], axis=0)
    margin = 0.1 * (high - low)
    projected = {name: {"samples": project(arrays["samples"])} for name, arrays in cells.items()}
    return scatter(title, shown, projected, scores, low - margin, high + margin)


def scatter(
    title: str,
    data: np.ndarray,
    cells: Mapping[str, Arrays],
    scores: Mapping[str, str],
    low: np.ndarray,
    high: np.ndarray,
) -> Figure:
    """Samples of each method over the data, from `low` to `high`."""
    figure, axes = panels(list(cells), title, scores)
    for name, panel in axes.items():
        panel.plot(*data.T, ".", markersize=1.5, color="#bbbbbb" if name != "data" else INK, markeredgewidth=0)
        if name != "data":
            panel.plot(*cells[name]["samples"].T, ".", markersize=1.5, color=colour(name), alpha=0.5, markeredgewidth=0)
        panel.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    return figure


def image_samples(
    task: str,
    data: Arrays,
    cells: Mapping[str, Arrays],
    scores: Mapping[str, str],
    shown: str = "samples",
    title: str = "test images and samples of each method",
) -> Figure:
    """A sheet of images from the test set and one from each method that has them under the name of `shown`."""
    found = {name: arrays[shown] for name, arrays in cells.items() if shown in arrays}
    figure, axes = panels(list(found), f"{task}: {title}", scores)
    limits = grey_limits(data)
    for name, panel in axes.items():
        show(panel, sheet(data["data"] if name == "data" else found[name]), limits)
    return figure


def reconstructions(task: str, data: Arrays, cells: Mapping[str, Arrays]) -> Figure:
    """Test images; below each method's x -> z -> x and what is between, on a scale of its own, whose end is named."""
    found = {name: arrays["reconstructions"] for name, arrays in cells.items() if "reconstructions" in arrays}
    limits = grey_limits(data)
    originals = as_images(data["data"])[:STRIP]
    strips = [("test images", INK, originals, limits)]
    for name in in_order(found):
        images = as_images(found[name])[:STRIP]
        lost = np.abs(images - originals)
        largest = float(np.nan_to_num(lost, nan=np.inf).max())
        strips.append((name, colour(name), images, limits))
        strips.append((f"error ≤ {largest:.1e}", INK, lost, (0.0, float(np.nanmax(lost)) or 1.0)))
    figure = Figure(figsize=(7.5, 0.42 * len(strips) + 0.6), layout=ConstrainedLayoutEngine(h_pad=0.01))
    figure.suptitle(f"{task}: images, their noise turned back into images, and the difference", fontsize=11)
    for panel, (label, shade, images, scale) in zip(
        figure.subplots(len(strips), squeeze=False).flat, strips, strict=True
    ):
        show(panel, sheet(images, columns=STRIP), scale)
        panel.set(xticks=[], yticks=[], anchor="E")  # the labels need the room on the left
        panel.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7, color=shade)
    return figure


def grey_limits(data: Arrays) -> tuple[float, float]:
    """The values of black and white."""
    low, high = data["value_range"] if "value_range" in data else np.quantile(data["data"], [0.001, 0.999])
    return float(low), float(high)


def show(panel: Axes, image: np.ndarray, limits: tuple[float, float]) -> None:
    """Grey values with dark ink on white, as digits are written; colours as they are."""
    low, high = limits
    if image.shape[-1] == 1:
        panel.imshow(image[..., 0], vmin=low, vmax=high, cmap="gray_r", interpolation="nearest")
    else:
        panel.imshow(np.clip(np.nan_to_num((image - low) / (high - low)), 0, 1), interpolation="nearest")


def as_images(images: np.ndarray) -> np.ndarray:
    """Rows of pixels of square grey images as (n, 1, side, side); images as they are."""
    side = math.isqrt(images[0].size)
    return images if images.ndim == 4 else images.reshape(-1, 1, side, side)


def sheet(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Images to a big one, (height, width, channels), with a border of one pixel between them; whole rows alone."""
    images = as_images(images)
    columns = columns or math.isqrt(len(images))
    rows = len(images) // columns
    framed = np.pad(images[: rows * columns], ((0, 0), (0, 0), (0, 1), (0, 1)))
    _, channels, height, width = framed.shape
    placed = framed.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    return placed.reshape(rows * height, columns * width, channels)[:-1, :-1]


SAMPLES = {"plane": plane_samples, "image": image_samples, "table": table_samples}


# learning curves -------------------------------------------------------------------------------------


def learning_curves(task: str, standings: Sequence[Standing], entropy: float | None) -> Figure:
    """Validation loss against steps and seconds, mean over seeds with their range: a column for each family, with all
    other methods behind it in grey and ours in red everywhere."""
    methods = {standing.method: standing.results for standing in standings}
    kinds = [name for name in KINDS if name != "floor" and any(kind(method) == name for method in methods)]
    figure = Figure(figsize=(2.55 * max(len(kinds), 2), 5.6), layout="constrained")
    figure.suptitle(f"{task}: validation loss (nats per point)", fontsize=11)
    grid = figure.subplots(2, max(len(kinds), 1), sharey=True, squeeze=False)
    for column, name in enumerate(kinds):
        own = [method for method in in_order(methods) if kind(method) == name or method == OURS]
        for row, axis in enumerate(("steps", "seconds")):
            panel = grid[row][column]
            for method in methods:
                if method not in own:
                    curve(panel, methods[method], axis, {"color": "#d9d9d9", "linewidth": 0.7, "zorder": 0})
            for method, style in styles(own).items():
                curve(panel, methods[method], axis, style, band=True)
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_xlabel({"steps": "steps", "seconds": "seconds of training"}[axis], fontsize=8)
            if axis == "seconds":
                panel.set_xscale("log")
            if entropy is not None:
                panel.axhline(entropy, color=INK, linewidth=0.8, linestyle=":")
        grid[0][column].set_title(name, fontsize=9)
        handles = [Line2D([], [], label=method, **style) for method, style in styles(own).items()]
        if entropy is not None:
            handles.append(Line2D([], [], color=INK, linewidth=0.8, linestyle=":", label="entropy of the data"))
        grid[1][column].legend(
            handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.34), fontsize=7, frameon=False
        )
    runs = [run for chosen in methods.values() for run in chosen]
    low, high = loss_limits(runs, entropy)
    grid[0][0].set_ylim(low, high)
    entries = [time for run in runs if len(run.history.steps) > 1 for time in first_below(run, high)]
    for panel in grid[1]:
        panel.set_xlim(left=0.8 * min(entries, default=1.25))  # what comes before is above the frame
        plain_ticks(panel, widest=1e3)
    return figure


def plain_ticks(panel: Axes, widest: float = 3) -> None:
    """Plain numbers at the ticks of a logarithmic horizontal axis, as many as suit its span; few in a narrow panel,
    whose span counts as at least `widest`."""
    low, high = panel.get_xlim()
    digits = next(digits for span, digits in TICKS.items() if high / low < span and span >= widest)
    panel.xaxis.set_major_locator(LogLocator(subs=digits))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def first_below(run: Result, loss: float) -> list[float]:
    """The seconds after which a run gets below a loss, in a list that is empty if it never does."""
    times = zip(run.history.seconds, run.history.validation, strict=True)
    return [seconds for seconds, validation in times if validation < loss and seconds > 0][:1]


def styles(methods: Sequence[str]) -> dict[str, dict]:
    """A colour for every method and its twin; originals that were swapped are dashed; ours thick and red."""
    names = list(dict.fromkeys(method.removesuffix("-swapped") for method in methods if method != OURS))
    colours = {name: colormaps["tab10"](number + (number > 2)) for number, name in enumerate(names)}  # without its red
    return {
        method: {"color": HIGHLIGHT, "linewidth": 2.0, "zorder": 3}
        if method == OURS
        else {
            "color": colours[method.removesuffix("-swapped")],
            "linewidth": 1.2,
            "linestyle": "--" if f"{method}-swapped" in methods else "-",
        }
        for method in methods
    }


def curve(panel: Axes, results: Sequence[Result], axis: str, style: dict, band: bool = False) -> None:
    """The mean over seeds by validation: the k-th comes at the same share of the budget in all of them."""
    count = min(len(result.history.steps) for result in results)
    if count < 2:
        if band:
            panel.axhline(float(np.mean([result.validation for result in results])), **style)  # fitted in one go
        return
    losses = np.array([result.history.validation[:count] for result in results], float)
    along = np.mean([getattr(result.history, axis)[:count] for result in results], axis=0)
    panel.plot(along, losses.mean(0), **style)
    if band and len(results) > 1:
        panel.fill_between(along, losses.min(0), losses.max(0), color=style["color"], alpha=0.15, linewidth=0)


def loss_limits(results: Sequence[Result], entropy: float | None) -> tuple[float, float]:
    """From the lowest loss to the highest after a quarter of the training: starts leave the frame, and so do losses far
    above most, since the rest is what differs."""
    ends = [np.array(result.history.validation, float) for result in results]
    ends = [part[np.isfinite(part)] for loss in ends if len(part := loss[len(loss) // 4 :])]
    ends = [part for part in ends if len(part)]
    if not ends:
        return 0.0, 1.0
    floor = min(part.min() for part in ends) if entropy is None else entropy
    first, last = (np.array([part[place] for part in ends]) for place in (0, -1))
    most = max(4 * (np.median(last) - floor), np.median(first) - floor)
    top = min(max(part.max() for part in ends), floor + most)
    span = max(top - floor, last.min() - floor, 1e-3)
    return float(floor - 0.06 * span), float(floor + 1.05 * span)


# differences -----------------------------------------------------------------------------------------


def difference_figure(opponents: Sequence[Opponent], tasks: Sequence[str], columns: int = 4) -> Figure:
    """Ours minus theirs with 95 % intervals, a panel a task, a row a method. Where differences differ
    much in size, the axis is linear about 0 and logarithmic beyond."""
    gaps = {opponent.method: opponent.gaps for opponent in opponents}
    methods = in_order(gaps)
    columns = min(columns, len(tasks))
    rows = -(-len(tasks) // columns)
    size = max(2.3 * columns, 4.6) + 1.7, rows * (0.165 * len(methods) + 0.75) + 0.6
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle("Ours minus theirs (nats, 95 % intervals): right of 0 ours is better", fontsize=11)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for panel in list(grid.flat)[len(tasks) :]:
        panel.axis("off")
    for panel, task in zip(grid.flat, tasks, strict=False):
        differences(panel, {method: gaps[method].get(task) for method in methods})
        panel.set_title(task, fontsize=9)
    grid[0][0].set(yticks=range(len(methods)), yticklabels=methods, ylim=(len(methods) - 0.4, -0.6))
    labels = {"better": "ours ahead", "worse": "ours behind", "within 2 standard errors": "too close to call"}
    figure.legend(
        handles=[Line2D([], [], color=VERDICTS[name], marker="o", label=label) for name, label in labels.items()],
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    return figure


def differences(panel: Axes, gaps: Mapping[str, Gap | None]) -> None:
    """One task; a cross at 0 where a difference is left open."""
    panel.axvline(0, color=INK, linewidth=0.8)
    for row, gap in enumerate(gaps.values()):
        if gap is None:
            continue
        if gap.interval is None or gap.verdict is None:
            panel.plot(0, row, "x", color=INK, markersize=4)
            continue
        shade = VERDICTS[gap.verdict]
        panel.plot([gap.interval.low, gap.interval.high], [row, row], color=shade, linewidth=1.3)
        panel.plot(gap.interval.mean, row, "o", color=shade, markersize=3.5)
    means = [abs(gap.interval.mean) for gap in gaps.values() if gap and gap.interval and gap.interval.mean]
    usual = float(np.median(means)) if means else 1.0
    ends = [end for gap in gaps.values() if gap and gap.interval for end in (gap.interval.low, gap.interval.high)]
    reach = 1.15 * max([usual, *map(abs, ends)])
    if reach > 10 * usual:  # some differences would hide all others
        unit = 10.0 ** math.floor(math.log10(usual))
        panel.set_xscale("symlog", linthresh=unit)
        powers = [unit * 10.0**k for k in range(math.floor(math.log10(reach / unit)) + 1)]
        ticks = [-power for power in powers[::-1]] + [0.0] + powers
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
    panel.set_xlim(-reach, reach)
    panel.tick_params(axis="x", labelsize=6)
    panel.tick_params(axis="y", labelsize=7, length=0)
    panel.grid(axis="y", color="#eeeeee", linewidth=0.6)
    panel.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
