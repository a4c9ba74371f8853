"""Every method has its panel or line, relatives stand together, and broken numbers do not break a picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from comparisons.figures import (
    COLUMNS,
    ORDER,
    captions,
    clusters,
    densities,
    density,
    difference_figure,
    image_samples,
    learning_curves,
    loss_limits,
    plane_samples,
    reconstructions,
    sheet,
    table_samples,
    wrapped,
)
from comparisons.methods import METHODS, TWINS
from comparisons.standings import Gap, Opponent, standings
from comparisons.statistics import Interval
from comparisons.training import History
from tests.comparisons.synthetic import cell_arrays, make_result, make_scores, task_arrays


def titles(figure: Figure) -> list[str]:
    return [panel.get_title().split("\n")[0] for panel in figure.axes if panel.get_title()]


def test_order_has_every_method_once() -> None:
    assert sorted(ORDER) == sorted(METHODS)


def test_relatives_share_a_row() -> None:
    rows = wrapped([["data"], *clusters(METHODS)])
    assert sorted(name for row in rows for name in row) == sorted(["data", *METHODS])
    assert max(map(len, rows)) <= COLUMNS
    for pair in [*TWINS.items(), ("i-resnet", "normflows-glow")]:
        (row,) = [row for row in rows if pair[0] in row]
        assert row.index(pair[1]) == row.index(pair[0]) + 1


def test_groups_survive_missing_members() -> None:
    assert clusters(["normflows-glow-swapped", "made", "i-resnet"]) == [
        ["i-resnet", "normflows-glow-swapped"],
        ["made"],
    ]


@pytest.mark.parametrize(
    ("kind", "draw"),
    [("plane", densities), ("plane", plane_samples), ("table", table_samples), ("image", image_samples)],
)
def test_every_method_has_a_panel(kind: str, draw) -> None:
    cells = {name: cell_arrays(kind, number, 20) for number, name in enumerate(METHODS)}
    cells["made"]["samples"][0] = np.nan
    figure = draw("task", task_arrays(kind, 20), cells, dict.fromkeys(METHODS, "-1.000 nats"))
    assert sorted(titles(figure)) == sorted(["data", *METHODS])
    figure.draw_without_rendering()


def test_densities_leave_out_who_has_none() -> None:
    cells = {"ours": cell_arrays("plane", 0, 20), "made": {"samples": np.zeros((3, 2))}}
    assert titles(densities("task", task_arrays("plane", 20), cells, {})) == ["data", "ours"]


def test_an_overflow_has_no_density() -> None:
    assert density(np.array([np.nan, -np.inf, 0.0])).tolist() == [0, 0, 1]
    assert np.isfinite(density(np.array([np.inf, 1e4]))).all()


def test_captions_name_who_diverged() -> None:
    results = [make_result("ours"), make_result("made")]
    scores = {results[0].key: make_scores(-1.0), results[1].key: np.full(400, np.nan)}
    assert captions(standings(results, scores)) == {"ours": "-1.000 nats", "made": "diverged"}


def test_sheet_takes_images_of_any_shape() -> None:
    assert sheet(np.zeros((10, 16))).shape == sheet(np.zeros((10, 1, 4, 4))).shape == (14, 14, 1)
    assert sheet(np.zeros((10, 3, 4, 6)), columns=5).shape == (9, 34, 3)


def test_sheet_puts_images_in_their_places() -> None:
    images = np.random.default_rng(0).normal(size=(4, 3, 5, 6))
    found = sheet(images)
    assert np.array_equal(found[6:, :6], images[2].transpose(1, 2, 0)) and not found[5].any()


@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_pictures_of_all_that_was_done_to_them(channels: int) -> None:
    random = np.random.default_rng(0)
    data = {"data": random.uniform(0, 256, (64, channels, 8, 8)), "value_range": np.array([0.0, 256.0])}
    cells = {
        name: {what: data["data"] + 1e-3 for what in ("samples", "reconstructions", "interpolations", "cool_samples")}
        for name in ("ours", "made")
    }
    cells["made"]["reconstructions"][0] = np.nan
    cells["kde"] = {"samples": data["data"]}
    figure = reconstructions("task", data, cells)
    labels = [panel.get_ylabel() for panel in figure.axes]
    assert labels == ["test images", "ours", "difference, up to 1.0e-03", "made", "difference, up to inf"]
    figure.draw_without_rendering()
    figure = image_samples("task", data, cells, {}, "interpolations")
    assert titles(figure) == ["data", "ours", "made"]
    figure.draw_without_rendering()


def curves(seeds: int = 2) -> Figure:
    results = [make_result(name, -1.0, seed) for name in METHODS for seed in range(seeds)]
    return learning_curves("task", standings(results, {result.key: make_scores(-1.0) for result in results}), 0.9)


def test_learning_curves_have_a_column_for_each_family_and_a_line_for_each_method() -> None:
    figure = curves()
    kinds = dict.fromkeys(method.family for method in METHODS.values() if method.family != "floor")
    assert len(figure.axes) == 2 * len(kinds)
    below = figure.axes[len(kinds) :]
    named = {text.get_text() for panel in below if (legend := panel.get_legend()) for text in legend.get_texts()}
    assert named - {"entropy of the data"} == {name for name in METHODS if METHODS[name].family != "floor"}
    assert all(len(panel.collections) for panel in figure.axes)  # the ranges over seeds
    figure.draw_without_rendering()


def test_one_seed_has_no_range() -> None:
    assert not any(len(panel.collections) for panel in curves(seeds=1).axes)


def test_broken_losses_leave_limits_finite() -> None:
    sound = make_result("ours", -1.0)
    broken = replace(sound, history=History([0, 1], [0.0, 1.0], [float("nan"), float("inf")]))
    low, high = loss_limits([sound, broken], None)
    assert low < 1.0 < 1.1 < high < 4
    assert np.isfinite(loss_limits([broken], None)).all()


def test_differences_have_a_row_for_each_method() -> None:
    gaps = {"a": Gap(Interval(0.1, 0.01, 10), 3), "b": Gap(None, 0, "diverged"), "c": Gap(Interval(-50.0, 0.0, 5), 1)}
    figure = difference_figure([Opponent("made", gaps), Opponent("nice", {"a": gaps["a"]})], ["a", "b", "c"])
    assert titles(figure) == ["a", "b", "c"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["nice", "made"]
    figure.draw_without_rendering()
