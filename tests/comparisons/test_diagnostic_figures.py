"""The pictures show every row, name their units, and keep their labels apart."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.text import Annotation

from comparisons.diagnostic_figures import (
    inverse_figure,
    lipschitz_figure,
    log_det_figure,
    overlap,
    speed_quality_figure,
)
from comparisons.diagnostics import BlockRow, InverseWork, LogDetWork
from comparisons.methods import METHODS, TWINS
from comparisons.standings import Standing
from comparisons.statistics import Interval
from iresflow_plugin.log_det import Exact, PowerSeries
from tests.comparisons.synthetic import make_result


def standing(method: str, seconds: float, mean: float) -> Standing:
    runs = [make_result(method, mean, seed, density_seconds=seconds) for seed in range(3)]
    return Standing(method, 1, runs, 0, Interval(mean, 0.01, 2), None)


def crowd() -> list[Standing]:
    """Every method in a narrow cluster."""
    random = np.random.default_rng(0)
    return [standing(name, 1e-6 * random.uniform(8, 12), random.normal(0, 0.02)) for name in METHODS]


def test_lipschitz_figure_draws_every_block() -> None:
    rows = [BlockRow(number, 0.97, 0.5, 0.2, 4.0) for number in range(1, 101)]
    figure = lipschitz_figure({"ours": rows, "i-resnet": rows[:4]}, "100 blocks")
    assert [panel.get_title() for panel in figure.axes] == ["ours", "i-resnet"]
    assert [len(panel.patches) for panel in figure.axes] == [100, 4]
    assert len(figure.axes[0].get_xticks()) <= 16


def test_inverse_figure_has_the_true_and_the_certified_error() -> None:
    rows = [
        InverseWork(name, 10.0**-k, 2 * k, 3 * k, 10.0 ** (-k - 1), 10.0**-k, 1.0, 1e-6)
        for k in (1, 2, 3)
        for name in ("a", "b")
    ]
    (panel,) = inverse_figure(rows, "title").axes
    assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
    drawn = [line for line in panel.lines if len(line.get_xdata())]
    assert len(drawn) == 4
    assert list(drawn[0].get_ydata()) == [1e-2, 1e-3, 1e-4] and list(drawn[1].get_ydata()) == [1e-1, 1e-2, 1e-3]


def test_log_det_figure_has_both_costs() -> None:
    rows = [LogDetWork("series", PowerSeries(terms=n), 0, 0, 0.1 / n, 0.1 / n, n, 10 * n, 1e-6 * n) for n in (1, 2, 4)]
    left, right = log_det_figure(rows, "title").axes
    assert list(left.lines[0].get_xdata()) == [10, 20, 40]
    assert list(right.lines[0].get_xdata()) == pytest.approx([1, 2, 4])
    assert "nats" in left.get_ylabel() and "µs" in right.get_xlabel()


def test_an_exact_log_det_does_not_stretch_the_axis() -> None:
    rows = [LogDetWork("series", PowerSeries(terms=n), 0, 0, 0.1 / n, 0.1 / n, n, 10 * n, 1e-6 * n) for n in (1, 2, 4)]
    exact = LogDetWork("exact", Exact(), 0, 0, 0, 1e-15, 1, 5, 1e-6)
    left, right = log_det_figure([exact, *rows], "title").axes
    assert min(left.get_ylim()) > 1e-3
    assert list(left.lines[0].get_xdata()) == [5, 5] and len(right.lines) == 2


def test_who_is_far_below_stands_on_the_edge_and_who_diverged_is_left_out() -> None:
    far = [standing("radial", 1e-5, -1e6), standing("planar", 1e-5, float("nan"))]
    (panel,) = speed_quality_figure(
        [*(row for row in crowd() if row.method not in ("radial", "planar")), *far], ""
    ).axes
    labels = [child.get_text() for child in panel.get_children() if isinstance(child, Annotation)]
    assert "radial" in labels and "planar" not in labels
    assert panel.get_ylim()[0] > -1


def test_labels_of_a_crowd_do_not_cover_each_other() -> None:
    figure = speed_quality_figure(crowd(), "crowd")
    (panel,) = figure.axes
    labels = [child for child in panel.get_children() if isinstance(child, Annotation)]
    assert sorted(label.get_text() for label in labels) == sorted(METHODS)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in labels]
    assert sum(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i]) < 0.02 * sum(
        b.width * b.height for b in boxes
    )


def test_a_line_leads_from_each_original_to_its_twin() -> None:
    original, twin = next(iter(TWINS.items()))
    pair = [standing(original, 1e-6, 0.0), standing(twin, 3e-6, 1.0)]
    (panel,) = speed_quality_figure(pair, "pair").axes
    assert any(list(line.get_xdata()) == pytest.approx([1, 3]) for line in panel.lines if len(line.get_xdata()) == 2)
    (panel,) = speed_quality_figure(pair[:1], "alone").axes
    assert not any(len(line.get_xdata()) == 2 for line in panel.lines)
