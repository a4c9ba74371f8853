"""What a run may spend, and where it runs: the flags of the command line as values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from lightning.fabric import Fabric

INTERRUPTED = 130  # exit code: what a shell calls an end by Ctrl-C
INTERRUPTED_WORDS = "[yellow]Interrupted.[/] What was finished is kept; the same command goes on from here."
PAUSED = 75  # exit code: what a shell calls a failure that another try may mend

Optimizer = Literal["adam", "adamax", "sgd"]
Schedule = Literal["cosine", "steps", "constant"]
Keep = Literal["best", "last"]
DROPS = (0.3, 0.6, 0.8)  # shares of the training after which the rate of "steps" drops: epochs 60, 120, 160 of 200
DROP = 0.2


@dataclass(frozen=True)
class Budget:
    """What every method may spend on a task.

    Equal steps, or equal seconds of training where `seconds` is given; equal parameters in either case.

    Args:
        steps: of the optimiser; with `seconds` no limit.
        seconds: of training, validation not counted, and on a CPU of its own work alone, so that a busy machine is
            fair; None for a budget in steps.
        parameters: of every model; None takes what the task says.
        batch: points in a step; None takes what the task says.
    """

    steps: int = 1500
    seconds: float | None = None
    parameters: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "seconds", "parameters", "batch"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")

    def spent(self, step: int, seconds: float) -> float:
        """The share that is used up; 1 ends the training."""
        return step / self.steps if self.seconds is None else seconds / self.seconds

    def part(self, share: float) -> Budget:
        """So much of it, for a shorter training."""
        seconds = None if self.seconds is None else self.seconds * share
        return replace(self, steps=math.ceil(self.steps * share), seconds=seconds)

    def __str__(self) -> str:
        length = f"{self.steps} steps" if self.seconds is None else f"{self.seconds:g} seconds of training"
        size = "the task's number of parameters" if self.parameters is None else f"{self.parameters:,} parameters"
        return f"{length}, {size}" + ("" if self.batch is None else f", batches of {self.batch}")


@dataclass(frozen=True)
class Optimisation:
    """How a training goes, beside its length and its learning rate. The default is Adam with a cosine schedule.

    Args:
        optimizer: "adam", "adamax" or "sgd" (with momentum).
        momentum: of sgd.
        weight_decay: added to the gradients, times the weights.
        warm_up: share of the training over which the learning rate rises from 0.
        schedule: what follows: "cosine" falls to 0, "steps" drops to a fifth three times, "constant".
        average: decay of a running average of the weights, which is then what is validated and kept; None for none.
            Averaged are the free weights; what is computed of them is constrained again, hence certified.
        clip: largest norm of a gradient; None for any.
        accumulate: parts of a batch that go through the network one by one, where it does not fit at once.
        compile: by torch.compile.
        keep: weights of the "best" validation, or of the "last" step, which need no place in a checkpoint.
    """

    optimizer: Optimizer = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    warm_up: float = 0.0
    schedule: Schedule = "cosine"
    average: float | None = None
    clip: float | None = 5.0
    accumulate: int = 1
    compile: bool = False
    keep: Keep = "best"

    def __post_init__(self) -> None:
        for name, values in {"optimizer": Optimizer, "schedule": Schedule, "keep": Keep}.items():
            if getattr(self, name) not in get_args(values):
                raise ValueError(f"{name} must be one of {', '.join(get_args(values))}, got {getattr(self, name)!r}.")
        for name in ("momentum", "warm_up", "average"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}.")
        if self.weight_decay < 0 or self.accumulate < 1 or (self.clip is not None and self.clip <= 0):
            raise ValueError(
                "weight_decay must not be negative, accumulate be at least 1 and clip positive or None; got "
                f"{self.weight_decay}, {self.accumulate} and {self.clip}."
            )

    def build(self, parameters: Iterable[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, rate, momentum=self.momentum, weight_decay=self.weight_decay)
        kind: Callable[..., torch.optim.Optimizer] = {"adam": torch.optim.Adam, "adamax": torch.optim.Adamax}[
            self.optimizer
        ]
        return kind(parameters, lr=rate, weight_decay=self.weight_decay)

    def factor(self, spent: float) -> float:
        """Of the learning rate, when this share of the training is done."""
        if spent < self.warm_up:
            return spent / self.warm_up
        share = (spent - self.warm_up) / (1 - self.warm_up)
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * share)) / 2
        return DROP ** sum(spent >= drop for drop in DROPS) if self.schedule == "steps" else 1.0


@dataclass(frozen=True)
class Machine:
    """Where cells run. More than one device or node means data-parallel training of every cell, cell after cell.

    Args:
        device: cpu or cuda.
        precision: of lightning Fabric: 32-true, 64-true, bf16-mixed, 16-mixed.
        devices: processes on this node.
        nodes: started on each by torchrun.
    """

    device: str = "cpu"
    precision: str = "32-true"
    devices: int = 1
    nodes: int = 1

    @property
    def parallel(self) -> bool:
        return self.devices * self.nodes > 1

    def at_once(self, workers: int) -> int:
        """Cells at a time, of so many wished for. On a GPU one: its clock would count what the neighbours do."""
        return 1 if self.parallel or self.device != "cpu" else workers

    def fabric(self) -> Fabric:
        # hosts have parameters that some passes leave alone, such as those of a skipped split
        strategy = "ddp_find_unused_parameters_true" if self.parallel else "auto"
        return Fabric(
            accelerator=self.device,
            strategy=strategy,
            devices=self.devices,
            num_nodes=self.nodes,
            precision=self.precision,  # pyright: ignore[reportArgumentType]
        )
