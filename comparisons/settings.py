"""What a run may spend, and where it runs: the flags of the command line as values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lightning.fabric import Fabric


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
