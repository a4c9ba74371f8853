"""The pictures of the diagnostics. Each function takes the rows of one measurement and returns a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import AbstractPathEffect, withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from comparisons.diagnostics import BlockRow, InverseWork, LogDetWork
from comparisons.figures import HIGHLIGHT, INK, KINDS, PANEL, colour, kind, plain_ticks
from comparisons.standings import OURS, Standing

MARKERS = "osD^vPX*"
ROUNDING = 1e-9  # nats: an estimator with smaller errors counts as exact
HALO: list[AbstractPathEffect] = [withStroke(linewidth=2, foreground="white")]  # keeps a label legible on lines
Row = TypeVar("Row")


def lipschitz_figure(blocks: Mapping[str, Sequence[BlockRow]], title: str, columns: int = 3) -> Figure:
    """The certified bound of every block over what its Jacobian does at the data, a panel a method: the gap is room
    not used."""
    columns = min(columns, len(blocks))
    rows = -(-len(blocks) // columns)
    figure = Figure(figsize=(3.3 * columns + 1.7, 1.9 * rows + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for panel in list(grid.flat)[len(blocks) :]:
        panel.remove()
    for panel, (method, own) in zip(grid.flat, blocks.items(), strict=False):
        bounds_and_norms(panel, own)
        panel.set_title(method, fontsize=9, color=colour(method) if method == OURS else INK)
    grid[0][0].set(ylim=(0, max(1.05, *(1.05 * row.bound for own in blocks.values() for row in own))))
    figure.supxlabel("block, from data to noise", fontsize=8)
    figure.supylabel("Lipschitz constant of g", fontsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    return figure


def bounds_and_norms(panel: Axes, rows: Sequence[BlockRow]) -> None:
    numbers = [row.block for row in rows]
    panel.axhline(1, color=INK, linewidth=0.8, linestyle=":", label="limit of invertibility")
    panel.bar(numbers, [row.measured for row in rows], width=0.6, color="#9db8d9", label="largest measured norm")
    width = max(2.0, min(14.0, 150 / len(rows)))
    bound = {"color": "#c0392b", "markersize": 1.3 * width, "markeredgewidth": 1.8}
    panel.plot(numbers, [row.bound for row in rows], "_", label="certified bound", **bound)
    panel.plot(numbers, [row.median for row in rows], "_", color=INK, markersize=width, label="median measured norm")
    panel.set(xticks=thinned(numbers))
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)


def thinned(numbers: Sequence[int], most: int = 16) -> list[int]:
    """At most so many of the numbers, evenly spaced, for ticks that can be read."""
    return list(numbers[:: -(-len(numbers) // most)])


def inverse_figure(rows: Sequence[InverseWork], title: str) -> Figure:
    """The true error of every solver against its evaluations, and above it the error that it certified (dotted)."""
    figure, panel = single(title)
    for number, (name, line) in enumerate(lines(rows, lambda row: row.name).items()):
        cost, shade = [row.evaluations for row in line], colormaps["tab10"](number)
        width = max(1.0, 3.0 - number)  # lines that coincide stay visible
        panel.plot(
            cost,
            [row.error for row in line],
            MARKERS[number] + "-",
            color=shade,
            label=name,
            linewidth=width,
            markersize=2 * width + 1.5,
        )
        panel.plot(cost, [row.certified for row in line], ":", color=shade, linewidth=1.2)
    panel.plot([], [], ":", color=INK, linewidth=1.2, label="certified error")
    log_axes(panel)
    panel.set(xlabel="evaluations of g per point and block (mean)", ylabel="largest error |x − x*|")
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def log_det_figure(rows: Sequence[LogDetWork], title: str) -> Figure:
    """The error of every estimator against evaluations and against time; along a line its number of terms grows."""
    figure = Figure(figsize=(4.4 * PANEL, 1.7 * PANEL), layout="constrained")
    figure.suptitle(title, fontsize=12)
    left, right = figure.subplots(1, 2, sharey=True)
    costs: list[Callable[[LogDetWork], float]] = [lambda row: row.evaluations, lambda row: 1e6 * row.seconds]
    for panel, cost in zip((left, right), costs, strict=True):
        for number, (name, line) in enumerate(lines(rows, lambda row: row.family).items()):
            style = {"color": colormaps["tab10"](number), "markersize": 5, "linewidth": 1.2}
            label = name if panel is left else None
            if all(row.rms < ROUNDING for row in line):  # a point so far down would squeeze all others
                panel.axvline(cost(line[0]), linestyle="--", color=style["color"], label=label and f"{label} (error 0)")
                continue
            panel.plot(
                [cost(row) for row in line], [row.rms for row in line], MARKERS[number] + "-", label=label, **style
            )
        log_axes(panel)
    left.set_ylim(bottom=max(left.get_ylim()[0], ROUNDING))
    left.set(
        xlabel="evaluations of g and Jacobian products per point", ylabel="error of log det (nats, root mean square)"
    )
    right.set_xlabel("time per point (µs)")
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def speed_quality_figure(standings: Sequence[Standing], title: str) -> Figure:
    """Test log-likelihood against the time of one density; a line leads from a hollow original to its swapped twin.

    Methods far below the rest stand on the lower edge, as triangles, so that the others can be told apart.
    """
    figure, panel = single(title, width=3.9 * PANEL, height=2.5 * PANEL)
    found = {standing.method: standing for standing in standings if not standing.diverged}
    low = lower_edge([standing.score.mean for standing in found.values()])
    places = {
        method: (1e6 * (standing.median(lambda result: result.density_seconds) or 0), max(standing.score.mean, low))
        for method, standing in found.items()
    }
    pairs = [(method, twin) for method in places if (twin := f"{method}-swapped") in places]
    hollow = {original for original, _ in pairs}
    for method, standing in found.items():
        inside = standing.score.mean >= low
        panel.errorbar(
            *places[method],
            yerr=2 * standing.score.error if inside else None,
            fmt="*" if method == OURS else "o" if inside else "v",
            color=colour(method),
            markerfacecolor="white" if method in hollow else None,
            markersize=11 if method == OURS else 6,
        )
    for original, twin in pairs:
        ends = zip(places[original], places[twin], strict=True)
        panel.plot(*ends, color=colour(original), linewidth=0.8, alpha=0.6, zorder=0)
    panel.margins(0.12)
    log_axes(panel, y=False)
    panel.set(
        xlabel="time of one log-density, within a batch (µs)", ylabel="test log-likelihood (nats ± 2 standard errors)"
    )
    figure.legend(
        handles=keys(list(found), bool(pairs)), loc="outside lower center", ncols=5, fontsize=8, frameon=False
    )
    place_labels(figure, panel, places)
    return figure


def lower_edge(scores: Sequence[float]) -> float:
    """Nothing is cut off unless it lies three times as far below the best as the median does."""
    if not scores:
        return 0.0
    return max(min(scores), max(scores) - 3 * (max(scores) - float(np.median(scores))))


def keys(methods: Sequence[str], pairs: bool) -> list[Line2D]:
    """The legend of families, ours, and the lines."""
    kinds = [name for name in KINDS if any(kind(method) == name for method in methods if method != OURS)]
    found = [Line2D([], [], color=KINDS[name], marker="o", linestyle="", label=name) for name in kinds]
    if OURS in methods:
        found.append(Line2D([], [], color=HIGHLIGHT, marker="*", markersize=10, linestyle="", label=OURS))
    if pairs:
        found.append(Line2D([], [], color=INK, linewidth=0.8, label="original (hollow) to its swapped twin"))
    return found


# shared ----------------------------------------------------------------------------------------------


def single(title: str, width: float = 2.7 * PANEL, height: float = 1.7 * PANEL) -> tuple[Figure, Axes]:
    """One panel."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panel = figure.subplots()
    panel.set_title(title, fontsize=10)
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)
    return figure, panel


def lines(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """The rows of each line, in the order of their first appearance."""
    return {name: [row for row in rows if key(row) == name] for name in dict.fromkeys(map(key, rows))}


def log_axes(panel: Axes, y: bool = True) -> None:
    """Logarithmic axes; the horizontal one with plain numbers, since costs rarely span many decades."""
    panel.set_xscale("log")
    plain_ticks(panel)
    if y:
        panel.set_yscale("log")
    panel.grid(color="#e4e4e4", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)


# Where a label may stand: points to the right and up, and its alignment.
Corner = tuple[float, float, str, str]
CORNERS: list[Corner] = [
    (distance * x, distance * y, {-1: "right", 0: "center", 1: "left"}[x], {-1: "top", 0: "center", 1: "bottom"}[y])
    for distance in (6, 14, 24)
    for x, y in ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
]


def place_labels(figure: Figure, panel: Axes, places: dict[str, tuple[float, float]]) -> None:
    """Names beside their points, each at the nearest corner where it covers the least of other names and points."""
    figure.draw_without_rendering()  # settles where things are
    marks = panel.transData.transform(list(places.values()))
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in marks]
    frame = panel.get_window_extent()
    for name, place in places.items():
        label = panel.annotate(name, place, (0, 0), textcoords="offset points", fontsize=7, color=colour(name))
        label.set_path_effects(HALO)

        def cost(corner: Corner, label: Annotation = label) -> float:
            box = put(label, corner)
            return box.width * box.height - overlap(box, frame) + sum(overlap(box, other) for other in taken)

        taken.append(put(label, min(CORNERS, key=cost)).padded(3))


def put(label: Annotation, corner: Corner) -> Bbox:
    """Move a label; the space that it then takes."""
    right, up, horizontal, vertical = corner
    label.set(position=(right, up), horizontalalignment=horizontal, verticalalignment=vertical)
    return label.get_window_extent()


def overlap(a: Bbox, b: Bbox) -> float:
    """The area common to both, in pixels."""
    shared = Bbox.intersection(a, b)
    return 0.0 if shared is None else float(shared.width * shared.height)
