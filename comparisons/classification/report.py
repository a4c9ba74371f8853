"""The table of error rates beside the paper's, and the picture of reconstructions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comparisons.classification.results import Trained
from comparisons.provenance import together
from comparisons.results import Store, records
from comparisons.statistics import over_seeds
from comparisons.tables import NOTHING, Columns, Grid

# Behrmann et al. 2019, table 2: error in percent, by c a layer; None is vanilla
PAPER: dict[str, dict[float | None, float]] = {
    "mnist": {None: 0.38, 0.9: 0.40, 0.8: 0.42, 0.7: 0.40, 0.6: 0.42, 0.5: 0.86},
    "cifar10": {None: 6.69, 0.9: 6.78, 0.8: 6.86, 0.7: 6.93, 0.6: 7.72, 0.5: 8.71},
}
NOTES = """\
Error: of test images, in percent; first its standard error for the number of test images (binomial), then over seeds.
c holds every one of the three layers of a branch, so that the branch is held to c³. "Slope seen" is the largest at
test images, by power iteration: above 1, x + g(x) has no certificate. The way back leads from the features of the last
layer to the image, |x - x'| in the 2-norm, in units of the grey range; "certified" bounds it for the given features by
the error of every block's solve, stretched by all blocks before it. An image is lost if it is off by more than a grey
level (1/255, root mean square). Vanilla runs the same fixed-point iteration, 100 steps a block.
"""
Seeds = list[Trained]  # of one method


def by_method(results: Sequence[Trained]) -> list[Seeds]:
    return [list(group) for _, group in groupby(results, key=lambda network: (network.data, network.method))]


COLUMNS: Columns[Seeds] = {
    "network": lambda seeds: seeds[0].method,
    "seeds": lambda seeds: str(len(seeds)),
    "test error (%)": lambda seeds: error_rate(seeds),
    "paper (%)": lambda seeds: number(paper(seeds[0]), ".2f"),
    "bits/dim": lambda seeds: number(mean([s.bits_per_dimension for s in seeds]), ".3f"),
    "certified Lip(g)": lambda seeds: f"{max(s.slopes.bound for s in seeds):.3f}",
    "slope seen": lambda seeds: f"{max(s.slopes.seen for s in seeds):.2f}",
    "largest error back, double": lambda seeds: f"{max(s.double.largest for s in seeds):.1e}",
    "certified, double": lambda seeds: largest([s.double.bound for s in seeds]),
    "a block's solve": lambda seeds: largest([s.double.solve for s in seeds]),
    "largest error back, single": lambda seeds: f"{max(s.single.largest for s in seeds):.1e}",
    "median, single": lambda seeds: f"{np.median([s.single.median for s in seeds]):.1e}",
    "images lost": lambda seeds: f"{np.mean([s.single.lost for s in seeds]):.0%}",
    "evaluations a block": lambda seeds: number(mean([s.single.evaluations for s in seeds]), ".1f"),
    "parameters": lambda seeds: f"{seeds[0].parameters:,}",
    "steps": lambda seeds: f"{np.mean([s.steps for s in seeds]):.0f}",
    "training (s)": lambda seeds: f"{np.mean([s.seconds for s in seeds]):.0f}",
}


def table(results: Sequence[Trained]) -> Grid:
    data = ", ".join(sorted({network.data for network in results}))
    return Grid.of(f"Classification: {data}", COLUMNS, by_method(results))


def image_sources(results: Sequence[Trained]) -> list[str]:
    """What the numbers rest on, for each set of images, in a sentence."""
    return sorted({f"Images of {network.data}: {network.images}." for network in results if network.images})


def error_rate(seeds: Seeds) -> str:
    """With its two standard errors."""
    mean = 100 * float(np.mean([s.error for s in seeds]))
    text = f"{mean:.2f} ± {100 * float(np.mean([s.binomial for s in seeds])):.2f}"
    return text if len(seeds) < 2 else f"{text} ± {over_seeds([100 * s.error for s in seeds]).error:.2f}"


def paper(network: Trained) -> float | None:
    """The published error of the same classifier; hybrids have none."""
    hybrid = network.bits_per_dimension is not None
    return None if hybrid else PAPER.get(network.data, {}).get(network.c)


def mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def number(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def largest(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    return NOTHING if not there else "none" if max(there) == np.inf else f"{max(there):.1e}"


def sentence(network: Trained) -> str:
    """What is printed when a network is done."""
    return (
        f"{network.data:<10}{network.method:<14}seed {network.seed}  error {100 * network.error:.2f} ± "
        f"{100 * network.binomial:.2f} %, largest |x - x'| {network.single.largest:.1e}, "
        f"{network.single.lost:.0%} lost, {network.steps} steps in {network.seconds:.0f} s"
    )


def write_markdown(store: Store, results: Sequence[Trained], settings: dict[str, Any]) -> Path:
    grid, path = table(results), store.folder / "classification.md"
    origin = {"settings": settings, **together([record["run"] for record in records(store.lines)])}
    head = [f"# {grid.title}", NOTES, *[f"{source}\n" for source in image_sources(results)]]
    parts = [*head, grid.markdown(), "", f"```json\n{json.dumps(origin, indent=1)}\n```"]
    path.write_text("\n".join(parts) + "\n")
    return path


def write_picture(store: Store, results: Sequence[Trained]) -> Path:
    """Test images in the first row, below them what the features of each network give back."""
    names = list(dict.fromkeys((network.data, network.method) for network in results))
    rows: list[tuple[str, np.ndarray]] = []
    for data, method in names:
        if not (store.arrays / f"{data}--{method}.npz").is_file():
            continue  # its first seed is not done
        arrays = store.load_arrays(f"{data}--{method}")
        if not rows:
            rows.append(("test images", arrays["images"]))
        rows.append((method, arrays["reconstructions"]))
        if "samples" in arrays:
            rows.append(("samples", arrays["samples"]))
    path = store.folder / "reconstructions.png"
    draw(rows).savefig(path, dpi=150)
    return path


def draw(rows: Sequence[tuple[str, np.ndarray]]) -> Figure:
    count = len(rows[0][1]) if rows else 1
    figure = Figure(figsize=(0.7 * count + 1.2, 0.75 * max(len(rows), 1)), layout="constrained")
    for number, (name, images) in enumerate(rows):
        for place, image in enumerate(images):
            axes: Axes = figure.add_subplot(len(rows), count, number * count + place + 1)
            axes.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            if place == 0:
                axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return figure
