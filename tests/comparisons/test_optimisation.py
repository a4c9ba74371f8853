"""Optimisers, schedules, averages: the default is today's, a broken training ends with the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric, seed_everything

from comparisons.methods import METHODS, Density, build
from comparisons.settings import Budget, Optimisation
from comparisons.training import History, PausedError, train
from iresflow_plugin import ResidualBlock
from tests.comparisons.test_training import small

STEPS = 12
EVERYTHING = Optimisation("sgd", weight_decay=1e-4, warm_up=0.2, schedule="steps", average=0.9, clip=None, keep="last")
SETTINGS = {
    "adamax": Optimisation("adamax", warm_up=0.3),
    "everything": EVERYTHING,
    "average": Optimisation(average=0.9),
    "constant": Optimisation(schedule="constant", accumulate=3),
}


class Pause:
    """Says yes at one step."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def trained(how: Optimisation, fabric: Fabric, checkpoint: Path | None = None, **more) -> tuple[Density, History]:
    task, method = small(), replace(METHODS["i-resnet"], optimisation=how)
    seed_everything(0, verbose=False)
    density = build(method, task.features, task.parameters)
    rest = {"fabric": fabric, "on_progress": lambda share: None, "checkpoint": checkpoint, **more}
    return density, train(density, task, method, rate=3e-3, budget=Budget(steps=STEPS), seed=0, **rest)


@pytest.mark.parametrize("how", SETTINGS.values(), ids=SETTINGS)
def test_a_training_in_pieces_ends_with_the_same_numbers(how: Optimisation, fabric: Fabric, tmp_path: Path) -> None:
    whole, history = trained(how, fabric)
    file = tmp_path / "cell.ckpt"
    for step in (5, 4):
        with pytest.raises(PausedError, match="steps"):
            trained(how, fabric, file, pause=Pause(step))
    again, after = trained(how, fabric, file)
    assert after.validation == history.validation and after.steps == history.steps
    for one, other in zip(again.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(fabric: Fabric) -> None:
    once, thrice = (trained(Optimisation(accumulate=n), fabric)[1].validation for n in (1, 3))
    assert thrice == pytest.approx(once, abs=1e-3)


def test_an_average_of_weights_is_certified_again(fabric: Fabric) -> None:
    """Averaged are free weights far outside of the bound; what blocks compute of them obeys it."""
    averaged, _ = trained(Optimisation(average=0.99, keep="last"), fabric)
    last, _ = trained(Optimisation(keep="last"), fabric)
    assert not all(torch.equal(a, b) for a, b in zip(averaged.parameters(), last.parameters(), strict=True))
    other = {name: 30 * torch.randn_like(value) for name, value in last.named_parameters() if "original" in name}
    mixed = {name: 0.5 * (value + other[name]) for name, value in averaged.named_parameters() if name in other}
    averaged.load_state_dict(mixed, strict=False)
    blocks = [module for module in averaged.modules() if isinstance(module, ResidualBlock)]
    assert blocks and mixed
    for block in blocks:
        assert block.certificate().certified and 0.6 < block.certificate().value < 1  # at its bound
        y = 3 * torch.randn(20, 2)
        x = block.preimage(y)
        assert torch.allclose(block(x)[0], y, atol=1e-5)


def test_the_default_is_a_cosine() -> None:
    assert [Optimisation().factor(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])


def test_schedules() -> None:
    steps = Optimisation(warm_up=0.1, schedule="steps")
    assert [steps.factor(s) for s in (0.0, 0.05, 0.2, 0.4, 0.7, 0.9)] == pytest.approx([0, 0.5, 1, 0.2, 0.04, 0.008])
    assert Optimisation(warm_up=0.5).factor(0.75) == pytest.approx(0.5)
    assert Optimisation(schedule="constant").factor(0.9) == 1.0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"optimizer": "lion"}, "adam, adamax, sgd"),
        ({"schedule": "saw"}, "cosine, steps, constant"),
        ({"warm_up": 1.0}, r"warm_up must lie in \[0, 1\)"),
        ({"average": 1.5}, "average must lie"),
        ({"accumulate": 0}, "accumulate"),
        ({"clip": -1.0}, "clip"),
    ],
)
def test_a_wrong_setting_is_refused(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Optimisation(**wrong)
