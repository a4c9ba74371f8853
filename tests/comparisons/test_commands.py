"""The command line, as a user meets it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from rich.console import Console
from typer.testing import CliRunner

from comparisons import workers
from comparisons.__main__ import app
from comparisons.bench import bench
from comparisons.cells import Cell
from comparisons.methods import METHODS
from comparisons.results import Trial
from comparisons.settings import PAUSED
from comparisons.speed import FULL, ClassifierSize
from comparisons.tasks.sources import REPOSITORY
from comparisons.training import OnProgress
from comparisons.workers import Broken, Outcome

Command = Callable[..., "subprocess.Popen[str]"]


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and everything printed, without the frames and line breaks of a terminal."""
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


COMMANDS = ["quickstart", "run", "swap", "classify", "bench", "property-kit", "report", "figures", "data"]


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)])
def test_help_explains_itself(arguments: list[str]) -> None:
    code, output = run(*arguments, "--help")
    assert code == 0 and "Usage" in output
    assert all(command in output for command in COMMANDS) or arguments


@pytest.mark.parametrize(
    ("option", "some"),
    [("--task", ["checkerboard", "gas-turbine"]), ("--method", ["nflows-maf"]), ("--suite", ["toy", "tabular"])],
)
def test_a_wrong_name_lists_the_right_ones(option: str, some: list[str]) -> None:
    code, output = run("run", option, "chekerboard")
    assert code == 2
    assert "'chekerboard'" in output and all(name in output for name in some)


def test_a_wrong_device_is_refused() -> None:
    code, output = run("run", "--device", "abacus", "--task", "rings")
    assert code == 2 and "cpu, cuda" in output


def test_nothing_to_run_is_said() -> None:
    code, output = run("run")
    assert code == 2 and "--suite" in output


@pytest.mark.parametrize(("asked", "done"), [([], 3), (["--steps", "500"], 500)])
def test_a_smoke_run_is_short_unless_steps_are_asked_for(asked: list[str], done: int, tmp_path: Path) -> None:
    code, output = run("run", "--suite", "smoke", "--method", "made", *asked, "--workers", "1", "--out", str(tmp_path))
    assert code == 0, output
    (cell,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert cell["steps"] == done


def test_the_rates_of_a_tuned_run_are_taken(tmp_path: Path) -> None:
    made = ["run", "--suite", "smoke", "--method", "made", "--workers", "1"]
    code, output = run(*made, "--tune", "--out", str(tmp_path / "tuned"))
    assert code == 0, output
    again = [*made, "--rates-of", str(tmp_path / "tuned")]
    code, output = run(*again, "--seconds", "0.1", "--out", str(tmp_path / "next"))
    assert code == 0 and "validation" not in output, output  # nothing is tried again
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("tuned", "next"))
    assert first["results"][0]["learning_rate"] == second["results"][0]["learning_rate"]
    assert (tmp_path / "next" / "tuning.jsonl").read_text() == (tmp_path / "tuned" / "tuning.jsonl").read_text()

    (tmp_path / "tuned" / "tuning.jsonl").unlink()
    code, output = run(*again, "--out", str(tmp_path / "third"))
    assert code == 1 and "holds no learning rates" in output


def test_a_run_in_pieces_ends_with_the_same_numbers(tmp_path: Path) -> None:
    wanted = ["run", "--task", "two-moons", "--method", "made", "--method", "nice", "--steps", "400", "--workers", "1"]
    code, output = run(*wanted, "--out", str(tmp_path / "whole"))
    assert code == 0, output
    for _ in range(60):
        code, output = run(*wanted, "--piece", "1", "--out", str(tmp_path / "pieces"))
        if code != PAUSED:
            break
        assert "the same command goes on" in output
    else:
        pytest.fail("60 pieces of a second were not enough for 800 steps")
    assert code == 0, output
    whole, pieces = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "pieces"))
    for one, other in zip(whole["results"], pieces["results"], strict=True):
        assert (one["method"], one["log_likelihood"]) == (other["method"], other["log_likelihood"])


def test_a_rate_that_fails_is_no_failure_of_its_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a finished cell is not touched by trials: there are none where nothing is left to run."""

    def run_trial(cell: Cell, fabric: Fabric, on_progress: OnProgress) -> Trial:
        if cell.rate == 1e-2:
            raise FloatingPointError("too fast")
        return Trial("smoke", "made", cell.rate, -cell.rate)

    monkeypatch.setattr("comparisons.cells.run_trial", run_trial)
    wanted = ["run", "--suite", "smoke", "--method", "made", "--tune", "--workers", "1", "--out", str(tmp_path)]
    code, output = run(*wanted)
    assert code == 0 and "learning rate 0.01: failed: FloatingPointError: too fast" in output, output
    (cell,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert cell["learning_rate"] == 3e-3
    assert "0.01: –" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr("comparisons.cells.run_trial", lambda *_: pytest.fail("nothing is left to be decided"))
    (tmp_path / "tuning.jsonl").unlink()
    code, output = run(*wanted)
    assert code == 0, output


def test_a_context_without_files_is_refused(tmp_path: Path) -> None:
    code, output = run("run", "--suite", "smoke", "--context", "label", "--out", str(tmp_path))
    assert code == 2 and "--data" in output


@pytest.mark.parametrize(
    "wrong", [["--table", "--c", "0.9"], ["--size", "published", "--hybrid", "1"], ["--vanilla", "--hybrid", "1"]]
)
def test_wishes_of_classify_that_contradict_each_other_are_refused(wrong: list[str], tmp_path: Path) -> None:
    code, output = run("classify", *wrong, "--out", str(tmp_path))
    assert code == 2, output


def test_a_run_leaves_tables_json_and_report(tmp_path: Path) -> None:
    methods = ["nflows-maf", "nflows-maf-swapped", "ours"]
    options = [part for name in methods for part in ("--method", name)]
    command = ["run", "--suite", "smoke", *options, "--seeds", "2", "--workers", "1", "--out", str(tmp_path), "--tune"]
    code, output = run(*command, "--tensorboard")
    assert code == 0, output
    assert "What the swap changed" in output and "learning rate 0.01: validation" in output

    content = json.loads((tmp_path / "results.json").read_text())
    assert [(cell["method"], cell["seed"]) for cell in content["results"]] == [
        (method, seed) for seed in (0, 1) for method in methods
    ]
    trials = [json.loads(line) for line in (tmp_path / "tuning.jsonl").read_text().splitlines()]
    assert len(trials) == 9  # as many for every method
    for cell in content["results"]:
        assert cell["log_likelihood"]["error"] > 0 and cell["parameters"] > 1000
        assert (cell["blocks"] == []) == (cell["method"] == "nflows-maf")
        own = [trial for trial in trials if trial["method"] == cell["method"]]
        assert cell["learning_rate"] == min(own, key=lambda trial: trial["validation"])["learning_rate"]
        assert set(cell["distances"]) == {"energy distance", "sliced Wasserstein", "MMD²"}
    assert content["run"]["versions"]["torch"] and content["run"]["machine"]["cores"] and not content["failures"]
    assert not list((tmp_path / "checkpoints").iterdir())  # of what is finished
    assert list((tmp_path / "tensorboard").rglob("events.out*"))

    page = (tmp_path / "report.html").read_text()
    assert (
        page.count("data:image/") == 9
    )  # differences, dynamics; densities, samples, curves, speed, blocks, work twice
    assert "http" not in page.replace("http-equiv", "")  # self-contained
    assert all(method in page for method in methods)
    assert "| ours |" in (tmp_path / "report.md").read_text()

    (tmp_path / "report.html").unlink()
    code, _ = run("report", str(tmp_path))  # from what lies on the disk
    assert code == 0 and (tmp_path / "report.html").exists()
    code, output = run("figures", str(tmp_path))
    assert code == 0 and (tmp_path / "figures" / "smoke-density.png").is_file()

    code, output = run(*command, "--steps", "7")  # another budget in the same folder
    assert code == 1 and "other settings" in output and "'steps': 7" in output and "--fresh" in output
    code, output = run(*command)  # the same again: nothing is left to do
    assert code == 0 and "6 cells were finished before; 0 are left" in output
    (tmp_path / "settings.json").unlink()
    code, output = run(*command)
    assert code == 1 and "holds results without settings.json" in output and (tmp_path / "results.jsonl").is_file()


@pytest.mark.timeout(900)
def test_a_minute_of_images(tmp_path: Path) -> None:
    """Two steps on 8 x 8 digits in both hosts: bits per dimension with errors, pictures, and who has no answer."""
    methods = ["ours", "alternating", "nflows-glow", "normflows-glow", "nice", "gaussian", "nflows-nsf"]
    options = [part for name in methods for part in ("--method", name)]
    limits = ["--steps", "2", "--parameters", "12000", "--workers", "1"]
    code, output = run("run", "--task", "digits-image", *options, *limits, "--out", str(tmp_path))
    assert code == 0 and "bits/dim" in output, output
    assert "Left out nflows-nsf on digits-image: nflows-nsf models vectors" in output
    cells = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [cell["method"] for cell in cells] == methods[:-1]
    for cell in cells:
        assert 0 < cell["bits_per_dimension"] < 10 and 0 < cell["bits_error"] < 0.1
        assert cell["inverse"]["failed"] == 0 and cell["inverse"]["largest"] < 1e-4
    page = (tmp_path / "report.html").read_text()
    for picture in ("samples", "cool-samples", "reconstructions", "interpolations"):
        assert f"digits-image-{picture}" in page


@pytest.mark.timeout(900)  # several processes, each of which imports everything
def test_the_smoke_suite_runs_every_method(command: Command, tmp_path: Path) -> None:
    process = command("run", "--suite", "smoke", "--out", "out")
    output, errors = process.communicate(timeout=800)
    assert process.returncode == 0, output + errors
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {cell["method"] for cell in content["results"]} == set(METHODS)
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == len(METHODS)


def test_a_cell_that_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comparisons import cells

    build = cells.build

    def broken(method, features, parameters, context):
        if method.name == "nflows-nsf":
            raise RuntimeError("no luck")
        return build(method, features, parameters, context)

    monkeypatch.setattr(cells, "build", broken)
    options = ["--task", "smoke", "--method", "nflows-nsf", "--method", "nflows-maf", "--steps", "1", "--workers", "1"]
    code, output = run("run", *options, "--out", str(tmp_path))
    assert code == 1 and "no luck" in output
    content = json.loads((tmp_path / "results.json").read_text())
    assert [cell["method"] for cell in content["results"]] == ["nflows-maf"]
    assert content["failures"][0]["error"] == "RuntimeError: no luck"
    monkeypatch.undo()
    assert run("run", *options, "--out", str(tmp_path))[0] == 0  # what failed is tried again
    assert json.loads((tmp_path / "results.json").read_text())["failures"] == []


def test_no_cell_is_run_at_a_rate_that_is_not_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that died with its worker is tried again, and is no verdict on its rate."""
    monkeypatch.setattr(workers, "attempt", lambda job, *_: Outcome(job, Broken("a worker process died", died=True)))
    options = ["--task", "smoke", "--method", "nflows-maf", "--steps", "3", "--tune", "--workers", "1"]
    code, output = run("run", *options, "--out", str(tmp_path))
    assert code == PAUSED and "goes on" in output and not (tmp_path / "results.jsonl").exists()
    monkeypatch.undo()
    assert run("run", *options, "--out", str(tmp_path))[0] == 0


def test_scores_that_are_not_finite_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comparisons import cells

    monkeypatch.setattr(cells, "log_likelihoods", lambda density, points, fabric: torch.full((10,), float("nan")))
    options = ["--task", "smoke", "--method", "nflows-maf", "--steps", "1", "--workers", "1", "--out", str(tmp_path)]
    code, output = run("run", *options)
    assert code == 1 and "10 of 10 test points is not finite" in output


def test_data_that_is_not_here_is_left_out_politely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comparisons.cells import loaded

    loaded.cache_clear()
    monkeypatch.setattr("comparisons.tasks.sources.data_folders", lambda: [tmp_path / "nowhere"])
    options = ["--task", "gas-turbine", "--task", "smoke", "--method", "nflows-maf", "--steps", "1", "--workers", "1"]
    code, output = run("run", *options, "--out", str(tmp_path / "out"))
    assert code == 0
    assert "Left out gas-turbine" in output and "nowhere" in output
    assert [cell["task"] for cell in json.loads((tmp_path / "out" / "results.json").read_text())["results"]] == [
        "smoke"
    ]


def table(path: Path, header: str = "a,b,c") -> Path:
    rows = torch.randn(100, header.count(",") + 1, generator=torch.Generator().manual_seed(0))
    np.savetxt(path, rows.numpy(), delimiter=",", header=header, comments="")
    return path


def test_a_file_of_the_user_is_a_task(tmp_path: Path) -> None:
    good, empty, messy = table(tmp_path / "mine.csv"), tmp_path / "empty.csv", tmp_path / "messy.csv"
    empty.write_text("")
    lines = good.read_text().splitlines()
    messy.write_text("\n".join(["a,b,c,d,e", *(f"{line},word{number},7" for number, line in enumerate(lines[1:]))]))
    messy.write_text(messy.read_text().replace(messy.read_text().splitlines()[3], "1.0,,2.0,x,7"))  # a hole
    files = [part for path in (good, empty, messy) for part in ("--data", str(path))]
    options = ["--method", "nflows-maf", "--steps", "1", "--workers", "1", "--out", str(tmp_path / "out")]
    code, output = run("run", *files, *options)
    assert code == 0 and "empty.csv is empty" in output
    first, second = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert first["task"] == "mine.csv" and second["task"] == "messy.csv"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "mine.csv" in page and "dropped e (always 7)" in page and "dropped d (text" in page
    assert run("run", *files[2:4], *options)[0] == 1  # nothing left to run


def test_columns_of_a_file_may_be_the_context(tmp_path: Path) -> None:
    path = table(tmp_path / "mine.csv", "a,b,c,d")
    options = ["--method", "nflows-maf", "--method", "planar", "--steps", "1", "--workers", "1"]
    code, output = run("run", "--data", str(path), "--context", "d", *options, "--out", str(tmp_path / "out"))
    assert code == 0, output
    with np.load(tmp_path / "out" / "arrays" / "mine.csv.npz") as arrays:
        assert arrays["features"] == 3
    code, output = run("run", "--data", str(path), "--context", "z", *options, "--out", str(tmp_path / "other"))
    assert code == 1 and "'z'" in output


@pytest.mark.parametrize("task", ["two-moons-conditional", "digits-conditional"])
def test_a_conditional_task_is_run_by_methods_that_take_a_context(tmp_path: Path, task: str) -> None:
    options = ["--method", "nflows-maf-swapped", "--method", "ffjord", "--method", "normflows-residual"]
    code, output = run("run", "--task", task, *options, "--steps", "1", "--workers", "1", "--out", str(tmp_path))
    assert code == 0, output
    assert f"Left out normflows-residual on {task}" in output
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 2


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    code, output = run("run", "--data", str(tmp_path / "nowhere.csv"))
    assert code == 2 and "there is no file" in output


def test_data_tells_what_the_tasks_are(tmp_path: Path) -> None:
    code, output = run("data", "checkerboard", str(table(tmp_path / "mine.csv")), str(tmp_path / "nowhere.csv"))
    assert code == 0 and "checkerboard" in output and "nowhere" in output


def test_swap_takes_a_flow_of_the_user(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from nflows.flows import SimpleRealNVP\n"
        "def make():\n    return SimpleRealNVP(features=3, hidden_features=16, num_layers=2, num_blocks_per_layer=1)\n"
    )
    table(tmp_path / "mine.csv")
    output, errors = command(
        "swap", "mine:make", "--data", "mine.csv", "--steps", "3", "--out", "out", "--workers", "2"
    ).communicate(timeout=300)
    assert "What the swap changed" in output, output + errors
    first, second = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert {first["method"], second["method"]} == {"mine:make", "mine:make-swapped"}
    assert abs(first["parameters"] / second["parameters"] - 1) < 0.1
    assert "mine:make-swapped" in (tmp_path / "out" / "report.html").read_text()


def test_swap_takes_a_flow_of_images(command: Command, tmp_path: Path) -> None:
    """Of normflows, whose multi-scale flow wants a class or none, and of nflows, whose noise is an image here."""
    (tmp_path / "mine.py").write_text(
        "import normflows as nf\n"
        "from nflows import distributions, flows, transforms\n"
        "from nflows.nn.nets import ConvResidualNet\n"
        "def glow():\n"
        "    levels = [[nf.flows.GlowBlock(4, 8), nf.flows.GlowBlock(4, 8), nf.flows.Squeeze()]]\n"
        "    noise = [nf.distributions.DiagGaussian((4, 4, 4), False)]\n"
        "    return nf.MultiscaleFlow(noise, levels, [], class_cond=False)\n"
        "def single():\n"
        "    coupling = transforms.AffineCouplingTransform([0, 1, 0, 1], lambda i, o: ConvResidualNet(i, o, 8))\n"
        "    stack = transforms.CompositeTransform([transforms.SqueezeTransform(), coupling])\n"
        "    return flows.Flow(stack, distributions.StandardNormal([4, 4, 4]))\n"
    )
    for name in ("glow", "single"):
        line = ["swap", f"mine:{name}", "--task", "digits-image", "--steps", "3", "--out", name, "--workers", "2"]
        output, errors = command(*line).communicate(timeout=300)
        assert "What the swap changed" in output, output + errors
        first, second = json.loads((tmp_path / name / "results.json").read_text())["results"]
        assert "LipschitzConvNet" in first["swap"] + second["swap"]
        assert abs(first["parameters"] / second["parameters"] - 1) < 0.1
        report = (tmp_path / name / "report.html").read_text()
        assert "digits-image-interpolations" in report


@pytest.mark.parametrize(
    ("where", "words"), [("nothing", "MODULE:FLOW"), ("no_such:flow", "no_such"), ("math:pi", "nflows.flows.Flow")]
)
def test_swap_says_what_is_no_flow(where: str, words: str) -> None:
    code, output = run("swap", where)
    assert code == 2 and words in output


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def test_ctrl_c_leaves_finished_results(command: Command, tmp_path: Path) -> None:
    methods = ["nflows-maf", "normflows-realnvp", "nflows-nsf", "ours", "nflows-maf-swapped", "nflows-realnvp"]
    options = [part for name in methods for part in ("--method", name)]
    process = command("run", "--task", "smoke", *options, "--steps", "200", "--out", "out")
    lines = tmp_path / "out" / "results.jsonl"
    wait_for(lambda: lines.exists() and len(lines.read_text().splitlines()) >= 1, process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 130, errors
    assert "Interrupted" in output
    finished = [json.loads(line)["method"] for line in lines.read_text().splitlines()]
    assert 1 <= len(finished) < len(methods)
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [cell["method"] for cell in content["results"]] == finished
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.timeout(900)  # several processes, each of which imports everything
def test_a_killed_run_goes_on_to_the_same_numbers(command: Command, tmp_path: Path) -> None:
    options = ["--task", "smoke", "--method", "nflows-maf", "--method", "ours", "--steps", "60"]
    whole = command("run", *options, "--out", "whole")
    assert whole.wait(timeout=300) == 0

    process = command("run", *options, "--out", "killed")
    checkpoint = tmp_path / "killed" / "checkpoints" / "smoke--ours--0--0.01.ckpt"
    wait_for(checkpoint.exists, process)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in children):  # none goes on writing
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert checkpoint.exists()  # it was killed in the middle of a cell
    lines = tmp_path / "killed" / "results.jsonl"
    with lines.open("a") as file:
        file.write('{"task": "smoke", "meth')  # and, at worst, in the middle of a line

    again = command("run", *options, "--out", "killed")
    assert again.wait(timeout=300) == 0
    first, second = (
        {cell["method"]: cell for cell in json.loads((tmp_path / folder / "results.json").read_text())["results"]}
        for folder in ("whole", "killed")
    )
    assert set(first) == set(second) == {"nflows-maf", "ours"}
    for method in first:
        assert first[method]["log_likelihood"] == second[method]["log_likelihood"]
        assert first[method]["history"]["validation"] == second[method]["history"]["validation"]
        assert first[method]["distances"] == second[method]["distances"]


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be buried does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_two_devices_share_a_run(command: Command, tmp_path: Path) -> None:
    options = ["--task", "smoke", "--method", "nflows-maf", "--steps", "5"]
    two, one = command("run", *options, "--devices", "2", "--out", "two"), command("run", *options, "--out", "one")
    assert two.wait(timeout=300) == 0 and one.wait(timeout=300) == 0
    (alone,), (shared,) = (
        json.loads((tmp_path / folder / "results.json").read_text())["results"] for folder in ("one", "two")
    )
    assert shared["history"]["validation"] == pytest.approx(alone["history"]["validation"], abs=2e-3)
    assert shared["log_likelihood"]["mean"] == pytest.approx(alone["log_likelihood"]["mean"], abs=2e-3)
    assert len((tmp_path / "two" / "results.jsonl").read_text().splitlines()) == 1


def test_bench_quick(tmp_path: Path) -> None:
    code, output = run("bench", "--quick", "--out", str(tmp_path))
    assert code == 0, output
    assert "training step" in output and "cost of the certificate" in output
    content = json.loads((tmp_path / "bench.json").read_text())
    assert {row["method"] for row in content["throughput"]} >= {"ours", "nflows-realnvp", "normflows-glow"}
    for part in ("side_by_side", "side_by_side_images"):
        assert all(row["ours"] > 0 and row["theirs"] > 0 for row in content[part])
    assert [row["size"] for row in content["certificate_images"]] == ["2x4x4, 4 hidden"] * 2
    assert "| quantity" in (tmp_path / "bench.md").read_text()


def test_bench_of_classifiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their networks go through torch.compile, here by a compiler that does nothing."""
    monkeypatch.setattr("torch.compile", lambda module: module)
    tiny = ClassifierSize("smoke", (1, 8, 8), compiled=True)
    settings = replace(FULL.smaller(), classifiers=(tiny,))
    bench(settings, ["classifiers", "classifiers"], 0, tmp_path, Console(quiet=True))
    content = json.loads((tmp_path / "bench.json").read_text())
    assert [row["size"] for row in content["certificate_classifiers"]] == ["smoke, 1x8x8"]
    assert [row["network"] for row in content["compiled_classifiers"]] == ["vanilla", "c = 0.9"]
    assert all(row["eager"] > 0 and row["compiled"] > 0 for row in content["compiled_classifiers"])


def test_the_script_for_a_gpu(tmp_path: Path) -> None:
    """On the CPU, with the least to do."""

    def script(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "DEVICE": "cpu", "OUT": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # `python` is this one
        line = ["bash", "comparisons/gpu.sh", *arguments]
        return subprocess.run(line, env={**environment, "PATH": path}, cwd=REPOSITORY, capture_output=True, text=True)

    content = {}
    for part in ("bench", "bench-classifiers"):
        done = script(part, "--quick")
        assert done.returncode == 0, done.stdout + done.stderr
        content |= json.loads((tmp_path / part / "bench.json").read_text())
    assert content["side_by_side"] and content["side_by_side_images"] and content["certificate_classifiers"]
    paused = script("classify", "--data", "digits", "--size", "smoke", "--seconds", "30", "--piece", "1")
    assert paused.returncode == PAUSED, paused.stdout + paused.stderr
    assert script("nothing").returncode == 2


def test_property_kit_names_what_is_sound_and_what_is_not(tmp_path):
    from comparisons.property_kit import FILE, property_kit

    assert property_kit(["nflows RandomPermutation", "normflows ActNorm"], tmp_path, Console(quiet=True)) == 0
    written = (tmp_path / FILE).read_text()
    row = next(line for line in written.splitlines() if line.startswith("| nflows RandomPermutation"))
    assert row.endswith("| - |")
    assert "**normflows ActNorm**, `log_det_has_a_number_per_sample`" in written
