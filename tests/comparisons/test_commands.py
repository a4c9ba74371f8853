"""The command line, as a user meets it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from comparisons.__main__ import app

Command = Callable[..., "subprocess.Popen[str]"]


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and everything printed, without the frames and line breaks of a terminal."""
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


@pytest.mark.parametrize("arguments", [[], ["quickstart"], ["train"], ["bench"], ["report"]])
def test_help_explains_itself(arguments: list[str]) -> None:
    code, output = run(*arguments, "--help")
    assert code == 0 and "Usage" in output


@pytest.mark.parametrize(
    ("option", "some"), [("--task", ["checkerboard", "gas-turbine"]), ("--method", ["nflows-maf"])]
)
@pytest.mark.parametrize("command", ["quickstart", "train"])
def test_a_wrong_name_lists_the_right_ones(command: str, option: str, some: list[str]) -> None:
    code, output = run(command, option, "chekerboard")
    assert code == 2
    assert "'chekerboard'" in output and all(name in output for name in some)


def test_a_wrong_device_is_refused() -> None:
    code, output = run("quickstart", "--device", "abacus")
    assert code == 2 and "cpu, cuda" in output


def test_quickstart_leaves_table_json_and_report(tmp_path: Path) -> None:
    methods = ["nflows-maf", "nflows-maf-swapped"]
    options = [part for name in methods for part in ("--method", name)]
    tasks = ["--task", "checkerboard", "--task", "digits"]
    code, output = run("quickstart", *tasks, *options, "--steps", "2", "--workers", "1", "--out", str(tmp_path))
    assert code == 0, output
    assert "What the swap changed" in output

    content = json.loads((tmp_path / "results.json").read_text())
    assert {(cell["task"], cell["method"]) for cell in content["results"]} == {
        (task, method) for task in ("checkerboard", "digits") for method in methods
    }
    for cell in content["results"]:
        assert cell["log_likelihood"]["error"] > 0 and cell["parameters"] > 1000 and cell["seed"] == 0
        assert (cell["lipschitz_bound"] is None) == (not cell["method"].endswith("-swapped"))
    assert content["run"]["versions"]["torch"] and content["run"]["machine"]["cores"] and not content["failures"]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(content["results"])

    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5  # density, samples, curves; samples, curves
    assert "http" not in page.replace("http-equiv", "")  # self-contained
    assert all(method in page for method in methods)

    (tmp_path / "report.html").unlink()
    code, _ = run("report", str(tmp_path))  # from what lies on the disk
    assert code == 0 and (tmp_path / "report.html").exists()


def test_a_cell_that_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comparisons import cells

    build = cells.build

    def broken(method, features, parameters):
        if method.name == "nflows-nsf":
            raise RuntimeError("no luck")
        return build(method, features, parameters)

    monkeypatch.setattr(cells, "build", broken)
    options = ["--task", "rings", "--method", "nflows-nsf", "--method", "nflows-maf", "--steps", "1", "--workers", "1"]
    code, output = run("quickstart", *options, "--out", str(tmp_path))
    assert code == 1 and "no luck" in output
    content = json.loads((tmp_path / "results.json").read_text())
    assert [cell["method"] for cell in content["results"]] == ["nflows-maf"]
    assert content["failures"][0]["error"] == "RuntimeError: no luck"


def test_data_that_is_not_here_is_left_out_politely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comparisons.tasks.sources.data_folders", lambda: [tmp_path / "nowhere"])
    options = ["--task", "gas-turbine", "--task", "rings", "--method", "nflows-maf", "--steps", "1", "--workers", "1"]
    code, output = run("quickstart", *options, "--out", str(tmp_path / "out"))
    assert code == 0
    assert "Left out gas-turbine" in output and "nowhere" in output
    assert [cell["task"] for cell in json.loads((tmp_path / "out" / "results.json").read_text())["results"]] == [
        "rings"
    ]


def test_a_file_of_the_user_is_a_task(tmp_path: Path) -> None:
    rows = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    np.savetxt(tmp_path / "mine.csv", rows.numpy(), delimiter=",", header="a,b,c", comments="")
    (tmp_path / "bad.csv").write_text("")
    files = ["--task", str(tmp_path / "mine.csv"), "--task", str(tmp_path / "bad.csv")]
    options = ["--method", "nflows-maf", "--steps", "1", "--workers", "1", "--out", str(tmp_path / "out")]
    code, output = run("quickstart", *files, *options)
    assert code == 0 and "bad.csv is empty" in output
    (cell,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert cell["task"] == "mine.csv" and "mine.csv" in (tmp_path / "out" / "report.html").read_text()
    assert run("quickstart", *files[2:], *options)[0] == 1  # nothing left to run


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    code, output = run("train", "--task", str(tmp_path / "nowhere.csv"))
    assert code == 2 and "there is no file" in output


def test_a_conditional_task_fails_with_words_while_no_method_takes_a_context(tmp_path: Path) -> None:
    options = ["--method", "nflows-maf", "--steps", "1", "--workers", "1", "--out", str(tmp_path)]
    code, output = run("quickstart", "--task", "two-moons-conditional", *options)
    assert code == 1 and "1 context numbers; no method takes any yet" in output


def test_ctrl_c_leaves_finished_results(command: Command, tmp_path: Path) -> None:
    methods = ["nflows-maf", "normflows-realnvp", "nflows-nsf", "ours", "nflows-maf-swapped", "nflows-realnvp"]
    options = [part for name in methods for part in ("--method", name)]
    process = command("quickstart", "--task", "rings", *options, "--steps", "10", "--out", "out")
    lines = tmp_path / "out" / "results.jsonl"
    deadline = time.monotonic() + 200
    while not (lines.exists() and len(lines.read_text().splitlines()) >= 1):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "Interrupted" in output
    finished = [json.loads(line)["method"] for line in lines.read_text().splitlines()]
    assert 1 <= len(finished) < len(methods)
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [cell["method"] for cell in content["results"]] == finished
    assert (tmp_path / "out" / "report.html").exists()


def test_bench_quick(tmp_path: Path) -> None:
    code, output = run("bench", "--quick", "--out", str(tmp_path))
    assert code == 0, output
    assert "training step" in output and "cost of the certificate" in output
    content = json.loads((tmp_path / "bench.json").read_text())
    assert {row["method"] for row in content["throughput"]} >= {"ours", "nflows-realnvp", "normflows-glow"}
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in content["side_by_side"])
    assert "| quantity" in (tmp_path / "bench.md").read_text()


def test_property_kit_names_what_is_sound_and_what_is_not(tmp_path):
    from rich.console import Console

    from comparisons.property_kit import FILE, property_kit

    assert property_kit(["nflows RandomPermutation", "normflows ActNorm"], tmp_path, Console(quiet=True)) == 0
    written = (tmp_path / FILE).read_text()
    row = next(line for line in written.splitlines() if line.startswith("| nflows RandomPermutation"))
    assert row.endswith("| - |")
    assert "**normflows ActNorm**, `log_det_has_a_number_per_sample`" in written
