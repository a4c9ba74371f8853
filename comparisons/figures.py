"""The pictures of a report. Each function draws one task and returns a matplotlib Figure."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from comparisons.methods import METHODS, TWINS
from comparisons.results import Result

PANEL = 2.4  # inches
INK = "#333333"
FAMILIES = [name for name in METHODS if name not in TWINS.values()]
ORDER = [name for family in FAMILIES for name in (family, TWINS.get(family, family))]
COLOURS = {name: colormaps["tab20"](number) for number, name in enumerate(FAMILIES)}

Arrays = dict[str, np.ndarray]


def pairs_of_panels(methods: list[str]) -> list[tuple[str | None, str | None]]:
    """Columns of two panels: the data and methods without a twin first, then each original above its swapped twin."""
    families = list(dict.fromkeys(family(method) for method in methods))
    twins = [(name, TWINS[name]) for name in families if name in TWINS]
    singles = ["data", *(name for name in families if name not in TWINS)]
    columns = [*zip_longest(singles[::2], singles[1::2]), *twins]
    present = {"data", *methods}
    return [(above if above in present else None, below if below in present else None) for above, below in columns]


def family(method: str) -> str:
    return method.removesuffix("-swapped")


def panels(cells: dict[str, Arrays], title: str, extra_width: float = 0.0) -> tuple[Figure, dict[str, Axes]]:
    """A grid of square panels, one for the data and one for each method with its test score, by name."""
    columns = pairs_of_panels(list(cells))
    rows = 2 if any(below for _, below in columns) else 1
    figure = Figure(figsize=(PANEL * len(columns) + extra_width, (PANEL + 0.25) * rows + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(rows, len(columns), squeeze=False)
    axes = {}
    for number, column in enumerate(columns):
        for row in range(rows):
            name, panel = column[row], grid[row][number]
            if name is None:
                panel.axis("off")
                continue
            score = "" if name == "data" else f"\n{cells[name]['scores'].mean():.3f} nats"
            panel.set_title(name + score, fontsize=9)
            panel.tick_params(labelsize=7)
            axes[name] = panel
    return figure, axes


def densities(task: str, data: Arrays, cells: dict[str, Arrays]) -> Figure:
    """Heat maps of the data's density and of every method's, on one colour scale."""
    figure, axes = panels(cells, f"{task}: density", extra_width=0.8)
    limit = float(data["limit"])
    top = 1.5 * float(np.quantile(data["density"][data["density"] > 0], 0.95))
    # a coupling can overflow far from the data and return NaN: there it has no density
    maps = {
        "data": data["density"],
        **{name: np.exp(np.nan_to_num(arrays["log_density"], nan=-np.inf)) for name, arrays in cells.items()},
    }
    scale = Normalize(0, top)
    for name, panel in axes.items():
        panel.imshow(
            maps[name].T,
            origin="lower",
            extent=(-limit, limit, -limit, limit),
            norm=scale,
            cmap="viridis",
            interpolation="nearest",
        )
    colours = ScalarMappable(scale, "viridis")
    figure.colorbar(colours, ax=list(axes.values()), label="density", extend="max", fraction=0.03, aspect=30)
    return figure


def plane_samples(task: str, data: Arrays, cells: dict[str, Arrays]) -> Figure:
    """Scatter plots of data and of samples."""
    figure, axes = panels(cells, f"{task}: {len(data['data'])} test points and as many samples of each method")
    limit = float(data["limit"])
    for name, panel in axes.items():
        points = data["data"] if name == "data" else cells[name]["samples"]
        panel.plot(*points.T, ".", markersize=2, color=INK, alpha=0.4, markeredgewidth=0)
        panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    return figure


def image_samples(task: str, data: Arrays, cells: dict[str, Arrays]) -> Figure:
    """A sheet of images from the test set and one from each method."""
    figure, axes = panels(cells, f"{task}: test images and samples of each method")
    for name, panel in axes.items():
        images = data["data"] if name == "data" else cells[name]["samples"]
        panel.imshow(sheet(images), vmin=0, vmax=16, cmap="gray_r", interpolation="nearest")
        panel.set(xticks=[], yticks=[])
    return figure


def sheet(images: np.ndarray) -> np.ndarray:
    """Square images as rows of pixels, (n, side^2), to one big image with a border of one white pixel between them."""
    columns, side = int(np.sqrt(len(images))), int(np.sqrt(images.shape[1]))
    framed = np.pad(images.reshape(-1, side, side), ((0, 0), (0, 1), (0, 1)))[: columns * columns]
    return (
        framed.reshape(columns, columns, side + 1, side + 1)
        .transpose(0, 2, 1, 3)
        .reshape(columns * (side + 1), -1)[:-1, :-1]
    )


def table_samples(task: str, data: Arrays, cells: dict[str, Arrays]) -> Figure:
    """Data and samples on the two main axes of the data."""
    figure, axes = panels(cells, f"{task}: test points (grey) and samples, on the data's first two principal axes")
    centre = data["data"].mean(0)
    _, spread, directions = np.linalg.svd(data["data"] - centre, full_matrices=False)
    share = spread[:2] ** 2 / (spread**2).sum()
    shown = (data["data"] - centre) @ directions[:2].T
    low, high = np.quantile(shown, [0.001, 0.999], axis=0)
    margin = 0.1 * (high - low)
    for name, panel in axes.items():
        panel.plot(*shown.T, ".", markersize=2, color="#bbbbbb", markeredgewidth=0)
        if name != "data":
            points = (cells[name]["samples"] - centre) @ directions[:2].T
            panel.plot(*points.T, ".", markersize=2, color=COLOURS[family(name)], alpha=0.5, markeredgewidth=0)
        panel.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    axes["data"].set_xlabel(f"axis 1 ({share[0]:.0%} of variance)", fontsize=8)
    axes["data"].set_ylabel(f"axis 2 ({share[1]:.0%})", fontsize=8)
    return figure


SAMPLES = {"plane": plane_samples, "image": image_samples, "table": table_samples}


def learning_curves(task: str, results: list[Result], entropy: float | None) -> Figure:
    """Validation loss against steps and seconds: an original dashed, its swapped twin solid in the same colour."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    figure.suptitle(f"{task}: validation loss", fontsize=12)
    left, right = figure.subplots(1, 2, sharey=True)
    for result in results:
        dashed = result.method in TWINS
        style = {"color": COLOURS[family(result.method)], "linestyle": "--" if dashed else "-", "linewidth": 1.5}
        left.plot(result.history.steps, result.history.validation, label=result.method, **style)
        right.plot(result.history.seconds, result.history.validation, **style)
    if entropy is not None:
        for panel in (left, right):
            panel.axhline(entropy, color=INK, linewidth=0.8, linestyle=":")
        left.annotate(
            "entropy of the data", (1, entropy), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7
        )
    ends = [loss for result in results for loss in result.history.validation[len(result.history.validation) // 4 :]]
    floor = min(ends) if entropy is None else entropy
    span = max(ends) - floor or 1.0  # the first quarter may leave the frame: the rest is what differs
    left.set_ylim(floor - 0.08 * span, floor + span)
    left.set(xlabel="steps", ylabel="nats per point")
    right.set(xlabel="seconds of training")
    right.set_xscale("log")
    right.set_xlim(left=min(result.history.seconds[:2][-1] for result in results))  # from the second validation on
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure
