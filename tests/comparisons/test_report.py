"""The report is one file, names every method and failure, tells losses, and survives gaps in the run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from comparisons import columns, methods, report, wording
from comparisons.columns import MEANING, gap_text, with_error
from comparisons.results import Failure, Store
from comparisons.standings import Gap, standings
from comparisons.statistics import Interval
from comparisons.tables import Grid
from tests.comparisons.synthetic import make_result, make_scores, make_store

METHODS = ("ours", "nice", "nflows-maf", "nflows-maf-swapped", "gaussian", "planar")
FAILURE = Failure("plane", "ffjord", 1, "RuntimeError: <stiff>")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("run")
    return make_store(folder, METHODS, seeds=2, failures=[FAILURE], diverged=[("plane", "planar", 1)], grid=20)


@pytest.fixture(scope="module")
def page(store: Store) -> str:
    return report.write_report(store).read_text()


def test_the_page_needs_no_other_file(page: str) -> None:
    assert "http" not in page
    assert set(re.findall(r'(?:src|href)="(.)', page)) == {"d", "#"}  # data, and places in the page
    targets, names = (set(re.findall(rf'{kind}="#?([\w-]+)"', page)) for kind in ("href", "id"))
    assert targets <= names


def test_the_page_has_every_method_picture_and_failure(store: Store, page: str) -> None:
    for method in METHODS:
        assert f"<td>{method}</td>" in page
    pictures = [picture.name for picture in report.all_pictures(store, report.read(store))]
    assert re.findall(r'<img id="([\w-]+)"', page) == pictures
    assert {"differences", "plane-density", "table-samples", "plane-lipschitz", "table-log-det", "dynamics"} <= set(
        pictures
    )
    assert "ffjord on plane, seed 1: RuntimeError: &lt;stiff&gt;" in page
    assert "entropy: no method can do better" in page and "Standardised." in page and "1500 steps" in page


def test_the_text_tells_losses(store: Store, page: str) -> None:
    chapter = report.read(store).chapters[0]
    sentence = wording.outcome(chapter.standings)
    assert sentence in page and "Ours ranks" in sentence and "not comparable with planar (diverged)" in sentence
    worse = [standing for standing in chapter.standings if standing.gap and standing.gap.verdict == "worse"]
    assert all(f"{standing.method} by " in sentence for standing in worse)


def test_markdown_has_the_same_tables(store: Store) -> None:
    text = report.write_markdown(store).read_text()
    for chapter in report.read(store).chapters:
        assert all(grid.markdown() in text for grid in chapter.grids)
    assert "\n\n\n\n" not in text


def test_figures_are_files_that_markdown_shows(store: Store) -> None:
    paths = report.write_figures(store)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    shown = re.findall(r"\]\((figures/.*?)\)", report.write_markdown(store).read_text())
    assert sorted(shown) == sorted(f"figures/{path.name}" for path in paths)


def test_terminal_tables(store: Store) -> None:
    titles = [str(table.title) for table in report.terminal_tables(store)]
    assert [title.split(":")[0] for title in titles[:2]] == ["plane", "table"]
    assert titles[2] == "What the swap changed" and len(titles) == 5


def test_every_column_is_explained(store: Store) -> None:
    tables = (columns.QUALITY, columns.COST, columns.GUARANTEES, columns.COMPACT)
    headings = {heading for table in tables for heading in table}
    headings |= set(columns.samples_columns(report.read(store).chapters[0].standings))
    assert headings - set(MEANING) == {"method"}


def test_a_run_without_results_has_a_report(tmp_path: Path) -> None:
    store = make_store(tmp_path, METHODS[:1], kinds=["plane"], seeds=1, failures=[Failure("plane", "ours", 0, "no")])
    assert "ours on plane, seed 0: no" in report.write_report(store).read_text()
    assert report.terminal_tables(store) == []


@pytest.mark.parametrize("methods", [["ours"], ["nice", "gaussian"]])
def test_little_to_compare(tmp_path: Path, methods: list[str]) -> None:
    store = make_store(tmp_path, methods, kinds=["table"], seeds=1, grid=20)
    page = report.write_report(store).read_text()
    assert ("Ours ran alone" in page) == (methods == ["ours"])
    assert ("Ours" in page.split("How to read")[0]) == (methods == ["ours"])
    assert report.write_markdown(store).is_file() and len(report.terminal_tables(store)) == 1


def test_one_seed_is_marked(tmp_path: Path) -> None:
    store = make_store(tmp_path, ["ours", "nice"], kinds=["table"], seeds=1, grid=20)
    (chapter,) = report.read(store).chapters
    assert all("†" in columns.score_text(standing) for standing in chapter.standings)
    assert "errors are over test points alone" in wording.outcome(chapter.standings)


@pytest.mark.parametrize(("task", "published"), [("mnist-small", "1.05"), ("cifar10", "3.35"), ("digits-image", "–")])
def test_published_numbers_stand_beside_those_of_the_same_data(task: str, published: str) -> None:
    results = [make_result("nflows-glow", task=task), make_result("ours", task=task)]
    glow, ours = standings(results, {result.key: make_scores(0.0) for result in results})
    assert {glow.method: columns.published_text(glow), ours.method: columns.published_text(ours)} == {
        "nflows-glow": published,
        "ours": "–",
    }
    assert set(columns.PUBLISHED) <= set(methods.METHODS)


def test_dynamics_are_trained_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "dynamics", lambda: pytest.fail("trained again"))
    assert report.drawn_dynamics(store).axes


def test_text_of_numbers() -> None:
    assert with_error(Interval(0.12345, 0.0123, 3)) == "0.123 ± 0.012"
    assert with_error(Interval(0.12345, 0.00012, 3), "+") == "+0.1235 ± 0.0001"
    assert with_error(Interval(0.5, 0.0, 3)) == "0.500 ± 0.000"
    assert gap_text(Gap(Interval(-0.5, 0.01, 9), 1)) == "-0.500 ± 0.010 † ▼"
    assert gap_text(Gap(None, 2, "diverged")) == "diverged ?"


def test_columns_without_numbers_are_left_out() -> None:
    grid = Grid.of("title", {"a": str, "b": lambda row: "–"}, [1, 2]).with_line({"a": "end", "b": "no"})
    assert list(grid.headings) == ["a"] and [list(row) for row in grid.rows] == [["1"], ["2"], ["end"]]
    assert grid.rich().row_count == 3 and grid.markdown().count("\n") == 4


def test_lists_in_words() -> None:
    assert [wording.listed(list("abcdefg")[:n], 4) for n in (1, 2, 4, 5)] == [
        "a",
        "a and b",
        "a, b, c and d",
        "a, b, c and 2 more",
    ]
