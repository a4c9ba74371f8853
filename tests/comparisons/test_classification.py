"""The invertible classifier gives its images back, after training too; its vanilla twin does not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from typer.testing import CliRunner

from comparisons.__main__ import app
from comparisons.classification import measure, report, run
from comparisons.classification.hybrid import HYBRID_SIZES, Hybrid, HybridNet
from comparisons.classification.model import SIZES, Classifier, InvertibleClassifier, Size, branch_bound
from comparisons.classification.recipes import RECIPES
from comparisons.classification.results import Trained, read
from comparisons.classification.tasks import load_task, moved
from comparisons.methods import parameter_count
from comparisons.tasks import Points
from comparisons.training import evaluating, log_likelihoods, meet
from iresflow_plugin import using
from iresflow_plugin.inverse import FixedPoint
from iresflow_plugin.lipschitz import lipschitz_bound
from iresflow_plugin.log_det import Exact

SHAPE = (1, 8, 8)


def classifier(c: float | None, scale: float = 1.0, size: Size = SIZES["smoke"], seed: int = 0) -> Classifier:
    """In double precision, its raw branch weights scaled, its ActNorms set."""
    torch.manual_seed(seed)
    net = InvertibleClassifier(SHAPE, 10, size, c).double()
    for block in net.blocks:
        for parameter in block.branch.parameters():
            parameter.data.mul_(scale)
    density = Classifier(net, 1)
    meet(density, Points(*double_points(64)))
    return density.eval()


def double_points(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    part = load_task("digits").test[:n]
    assert part.context is not None
    return part.x.double(), part.context.double()


@pytest.mark.parametrize("c", [0.9, 0.5])
@pytest.mark.parametrize("scale", [1.0, 20.0])  # the second: the constraint binds
def test_features_give_the_image_back(c: float, scale: float) -> None:
    density, x = classifier(c, scale), double_points(50)[0]
    net: InvertibleClassifier = density.flow
    found = net.reconstruct(net.features(x))
    errors = (found.x - x).flatten(1).norm(dim=1)
    assert errors.max() < 1e-5 and bool(found.converged.all())
    assert bool((errors <= found.error_bound + 1e-12).all()) and found.error_bound.max() < 1e-3
    assert found.block_errors.shape == (len(net.blocks), 50) and found.block_errors.max() < 1e-8
    assert found.outside.max() < 1e-8  # the padded channels are zero again


def test_c_counts_per_layer() -> None:
    assert branch_bound(0.9) == pytest.approx(0.729)
    for block in classifier(0.9, 20.0).flow.blocks:
        bound = lipschitz_bound(block.branch)
        assert bound.certified and bound.value == pytest.approx(0.729, rel=1e-3)
    with pytest.raises(ValueError, match="every layer"):
        InvertibleClassifier(SHAPE, 10, SIZES["smoke"], 1.0)


def test_a_certified_bound_covers_a_loose_solve() -> None:
    """With a solve that stops early the error is large, is told, and is within the bound."""
    density, x = classifier(0.9, 20.0), double_points(20)[0]
    net: InvertibleClassifier = density.flow
    with using(net, inverse=FixedPoint(max_evaluations=4, on_failure="return")):
        found = net.reconstruct(net.features(x))
    errors = (found.x - x).flatten(1).norm(dim=1)
    assert errors.max() > 1e-6 and not bool(found.converged.any())
    assert bool((errors <= found.error_bound).all())


def test_features_of_no_image_are_projected() -> None:
    density, x = classifier(0.9), double_points(20)[0]
    net: InvertibleClassifier = density.flow
    features = net.features(x)
    found = net.reconstruct(features + 0.1 * torch.randn_like(features))
    assert found.x.shape == x.shape and found.outside.min() > 1e-3


def test_the_vanilla_twin_is_the_same_network_and_cannot_go_back(fabric: Fabric) -> None:
    free, held = classifier(None, 4.0), classifier(0.9, 4.0)
    assert parameter_count(free) == parameter_count(held)
    points = load_task("digits").test
    lost, kept = (measure.inversion(density, points, fabric, torch.float64) for density in (free, held))
    assert lost.lost == 1.0 and lost.bound == math.inf
    assert kept.lost == 0.0 and kept.largest < 1e-5
    assert measure.slopes(free, points, fabric).seen > 1 > measure.slopes(held, points, fabric).bound


def test_a_shape_that_cannot_be_squeezed_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        InvertibleClassifier((1, 6, 6), 10, SIZES["small"], 0.9)


@pytest.mark.parametrize("activation", ["elu", "waves", "maxmin"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("size", ["smoke", "small"])
def test_every_size_takes_the_images_of_every_data_set(size: str, shape: tuple[int, ...], activation: str) -> None:
    """Padded, or with more channels than the size asks for."""
    net, x = InvertibleClassifier(shape, 10, SIZES[size], 0.9, activation), torch.rand(2, *shape)
    assert net(x).shape == (2, 10)
    torch.testing.assert_close(net.reconstruct(net.features(x)).x, x, atol=1e-4, rtol=0)


def test_the_evaluation_needs_the_class() -> None:
    density, (x, y) = classifier(0.9), double_points(5)
    assert density.log_prob(x, y).shape == (5,)
    with pytest.raises(ValueError, match="one column"):
        density.log_prob(x)


def test_the_paper_size_travels() -> None:
    """39 blocks, 13 padded channels; weights and momentum in single precision stay below 16 MB."""
    size = SIZES["paper"]
    assert sum(blocks for blocks, _ in size.stages) == 39 and size.channels == 3 + 13
    net = InvertibleClassifier((3, 32, 32), 10, size, None)
    copies = 2 if RECIPES["paper"].optimisation.keep == "last" else 3
    assert copies * 4 * parameter_count(net) < 15.5e6


def test_moved_images_are_moved() -> None:
    x = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32) + 1
    for seed in range(5):
        y = moved(x, torch.Generator().manual_seed(seed))
        assert y.shape == x.shape
        middle = y[:, :, 8:24, 8:24]  # never touches the border
        assert bool((middle > 0).all())
        step = middle[:, :, :, 1:] - middle[:, :, :, :-1]
        assert set(step.flatten(1).unique(dim=1).abs().flatten().tolist()) == {1}


def test_the_hybrid_is_a_density_and_a_classifier(fabric: Fabric) -> None:
    torch.manual_seed(0)
    density = Hybrid(HybridNet(SHAPE, 10, HYBRID_SIZES["smoke"], 0.9, weight=0.5), 1).double()
    task = load_task("digits", dequantise=True)
    part = task.draw(64, torch.Generator().manual_seed(0))
    x, y = part.x.double(), part.context
    with torch.no_grad():
        density.train()(x, y)
    with evaluating(density, 64, Exact()):
        alone, (joint, classes) = density.density_alone().log_prob(x[:8]), density.both(x[:8], y[:8])
        assert torch.allclose(alone, joint) and bool((classes < 0).all())
        assert torch.allclose(density.log_prob(x[:8], y[:8]), joint / 64 + 0.5 * classes)
        jacobian = torch.autograd.functional.jacobian(density.to_noise, x[:1]).reshape(64, 64)
        noise = density.to_noise(x[:1])
        exact = -noise.square().sum() / 2 - 32 * math.log(2 * math.pi) + torch.linalg.slogdet(jacobian)[1]
        assert joint[0].item() == pytest.approx(exact.item(), abs=1e-6)
        assert torch.allclose(density.to_data(density.to_noise(x[:8])), x[:8], atol=1e-6)
    assert log_likelihoods(density, task.validation[:50], fabric).shape == (50,)


def test_the_smoke_command(tmp_path: Path) -> None:
    """Trains, pauses, goes on, measures; after training all images come back but those of vanilla."""
    options = ["classify", "--vanilla", "--c", "0.9", "--steps", "80", "--average", "0.9", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*options, "--piece", "1"])
    pauses = 0
    while result.exit_code == 75 and pauses < 40:
        pauses += 1
        assert "goes on" in result.output or "not begun" in result.output
        result = CliRunner().invoke(app, [*options, "--piece", "4"])
    assert result.exit_code == 0, result.output
    vanilla, held = read(tmp_path / "results.jsonl")
    assert isinstance(held, Trained) and (vanilla.c, held.c) == (None, 0.9)
    assert vanilla.error < 0.7 and vanilla.steps == held.steps == 80  # 0.9 by guessing
    assert vanilla.single.lost == 1.0 and held.single.lost == 0.0
    assert held.double.largest < 1e-5 and held.slopes.seen <= held.slopes.bound <= 0.729 + 1e-6
    assert not list((tmp_path / "checkpoints").iterdir())
    written = (tmp_path / "classification.md").read_text()
    assert "| c=0.9 |" in written and "Images of digits: 1497 train and 300 test images" in written
    assert (tmp_path / "reconstructions.png").stat().st_size > 1000
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])["run"]["versions"]["torch"]
    assert CliRunner().invoke(app, [*options, "--rate", "0.5"]).exit_code == 1  # another run in the same folder


def test_a_training_that_breaks_down_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = run.train

    def broken(density, task, method, **more):
        if method.name == "vanilla":
            raise RuntimeError("gradients are not finite")
        return train(density, task, method, **more)

    monkeypatch.setattr(run, "train", broken)
    command = ["classify", "--vanilla", "--c", "0.9", "--steps", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and "vanilla, seed 0 failed: RuntimeError: gradients are not finite" in result.output
    assert [found.method for found in read(tmp_path / "results.jsonl")] == ["c=0.9"]


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = run.train

    def interrupted(density, task, method, **more):
        if method.name == "c=0.5":
            raise KeyboardInterrupt
        return train(density, task, method, **more)

    monkeypatch.setattr(run, "train", interrupted)
    result = CliRunner().invoke(app, ["classify", "--steps", "2", "--out", str(tmp_path)])
    assert result.exit_code == 130 and "Interrupted" in result.output
    assert [found.method for found in read(tmp_path / "results.jsonl")] == ["c=0.9"]
    assert (tmp_path / "classification.md").is_file()


def test_side_by_side_as_in_turn(tmp_path: Path) -> None:
    options = ["classify", "--c", "0.9", "--c", "0.5", "--steps", "3"]
    for workers in ("1", "2"):
        result = CliRunner().invoke(app, [*options, "--workers", workers, "--out", str(tmp_path / workers)])
        assert result.exit_code == 0, result.output
    in_turn, side_by_side = (read(tmp_path / workers / "results.jsonl") for workers in ("1", "2"))
    assert [found.error for found in in_turn] == [found.error for found in side_by_side]
    assert [found.slopes for found in in_turn] == [found.slopes for found in side_by_side]


def test_a_hybrid_by_the_command(tmp_path: Path) -> None:
    command = ["classify", "--hybrid", "1", "--c", "0.9", "--steps", "6", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (found,) = read(tmp_path / "results.jsonl")
    assert found.bits_per_dimension is not None and 0 < found.bits_per_dimension < 20
    assert found.single.lost == 0.0 and "bits/dim" in (tmp_path / "classification.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "letters"], "digits, mnist, cifar10"),
        (["--size", "huge"], "smoke, small, paper"),
        (["--c", "1.5"], "every layer"),
        (["--optimizer", "lion"], "adam, adamax, sgd"),
        (["--hybrid", "1", "--vanilla"], "no density"),
        (["--hybrid", "1", "--activation", "maxmin"], "no second derivative"),
    ],
)
def test_a_wrong_option_is_refused(options: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["classify", *options], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and said in result.output


def test_the_papers_table_is_beside_ours() -> None:
    assert report.PAPER["mnist"][0.9] == 0.40 and report.PAPER["cifar10"][None] == 6.69
