"""What to train and how: the recipe of each size, and what a run was asked for instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from comparisons.classification.hybrid import HYBRID_SIZES
from comparisons.classification.model import ACTIVATIONS, SIZES, branch_bound
from comparisons.settings import Budget, Machine, Optimisation

EPOCHS, TRAIN_IMAGES, BATCH = 200, 50_000, 128  # of the paper
PAPER_BOUNDS = (0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class Recipe:
    """Learning rate, optimiser and length."""

    rate: float
    optimisation: Optimisation
    budget: Budget


QUICK = Optimisation(optimizer="adam", warm_up=0.05)
# clip: without, momentum throws the ActNorms off within the first steps; sgd and "last" keep checkpoints small
AS_PUBLISHED = Optimisation(optimizer="sgd", weight_decay=5e-4, warm_up=0.005, schedule="steps", clip=0.2, keep="last")
PUBLISHED = Recipe(0.1, AS_PUBLISHED, Budget(steps=EPOCHS * TRAIN_IMAGES // BATCH, batch=BATCH))

RECIPES = {
    "smoke": Recipe(1e-2, QUICK, Budget(steps=150)),
    "small": Recipe(5e-3, QUICK, Budget(seconds=1100)),  # three networks on two cores: half an hour
    "paper": PUBLISHED,
    "published": PUBLISHED,
}


@dataclass(frozen=True)
class Plan:
    """What to train, and how.

    Args:
        bounds: c, the bound of every layer of a branch; None for the vanilla twin.
        hybrid: weight of log p(y | x) beside log p(x) / D; None for classifiers alone.
        piece: seconds after which the run pauses, to go on when it is started again; None for never.
        workers: trainings side by side, each with one thread; on a GPU take one.
    """

    data: str
    size: str
    bounds: tuple[float | None, ...]
    seeds: Sequence[int]
    budget: Budget
    rate: float
    out: Path
    optimisation: Optimisation = field(default_factory=Optimisation)
    activation: str = "elu"
    hybrid: float | None = None
    piece: float | None = None
    machine: Machine = field(default_factory=Machine)
    workers: int = 1
    fresh: bool = False

    def __post_init__(self) -> None:
        for c in self.bounds:
            if c is not None:
                branch_bound(c)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"there is no activation {self.activation!r}; there are: {', '.join(ACTIVATIONS)}.")
        if self.hybrid is None:
            return
        if None in self.bounds:
            raise ValueError("the vanilla twin has no inverse, hence no density; leave out --vanilla or --hybrid.")
        if self.size not in HYBRID_SIZES:
            raise ValueError(f"there is no hybrid of size {self.size!r}; there are: {', '.join(HYBRID_SIZES)}.")
        if not getattr(ACTIVATIONS[self.activation], "smooth", True):
            raise ValueError(
                f"{self.activation} has no second derivative, so that a log-det has no gradient in biases and inputs; "
                "for a hybrid take --activation waves or elu."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What all trainings of a folder must have in common."""
        shared = ("data", "size", "rate", "activation", "hybrid")
        return {
            **{name: getattr(self, name) for name in shared},
            "budget": asdict(self.budget),
            "optimisation": asdict(self.optimisation),
            "device": self.machine.device,
            "precision": self.machine.precision,
        }


def planned(
    data: str,
    size: str,
    wishes: Mapping[str, Any],
    budget: tuple[int | None, float | None, int | None],
    rate: float | None,
    **more: Any,
) -> Plan:
    """The size's recipe, with what is not None in its place.

    Args:
        wishes: fields of `Optimisation`.
        budget: steps, seconds and batch.
        more: the other fields of a plan.
    """
    if size not in RECIPES:
        raise ValueError(f"there is no size {size!r}; there are: {', '.join(SIZES)}.")
    recipe, (steps, seconds, batch) = RECIPES[size], budget
    length = recipe.budget if steps is None and seconds is None else Budget(steps or 1, seconds)
    return Plan(
        data=data,
        size=size,
        rate=recipe.rate if rate is None else rate,
        budget=replace(length, batch=batch or recipe.budget.batch),
        optimisation=replace(
            recipe.optimisation, **{name: value for name, value in wishes.items() if value is not None}
        ),
        **more,
    )
