"""A task: what is to be modelled, by which split, with which budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True, eq=False)
class Points:
    """Points x of shape (n, ...) and, where the task is conditional, a context of shape (n, k) for each."""

    x: Tensor
    context: Tensor | None = None

    def __post_init__(self) -> None:
        if self.context is not None and len(self.context) != len(self.x):
            raise ValueError(f"{len(self.x)} points have {len(self.context)} contexts; each point needs one.")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | Tensor) -> Points:
        return Points(self.x[rows], None if self.context is None else self.context[rows])

    def spread(self, n: int) -> Points:
        """At most n of them, evenly spaced: files are often sorted by time or by class, so the first are no sample."""
        return self if len(self) <= n else self[torch.arange(n) * len(self) // n]

    def split(self, n: int) -> list[Points]:
        """Runs of n points; the last may be shorter."""
        return [self[start : start + n] for start in range(0, len(self), n)]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Points:
        where = {"device": device, "dtype": dtype}  # None leaves it as it is
        return Points(self.x.to(**where), None if self.context is None else self.context.to(**where))


Draw = Callable[[int, Generator], Points]


@dataclass(frozen=True, eq=False)
class Task:
    """One density to learn, p(x) or p(x | context).

    `draw(n, generator)` gives a training batch: fresh samples of a toy, random rows of a data set (with fresh
    dequantisation noise). `validation` and `test` are fixed. `parameters` is the size of every model.

    Models see preprocessed data. `log_volume` is what to add to their log densities, in nats, for those of the raw
    data: numbers in raw units compare with other people's, who may have scaled differently.
    """

    name: str
    about: str
    kind: str  # plane, table or image: what its pictures look like
    draw: Draw
    validation: Points
    test: Points
    batch: int
    parameters: int
    entropy: float | None = None  # nats, of the preprocessed data: no model can have a lower expected test loss
    log_density: Callable[[Points], Tensor] | None = None  # of the preprocessed data, where it is known
    columns: tuple[str, ...] = ()
    preprocessing: tuple[str, ...] = ()  # what was done to the raw data, in order, a sentence a step
    log_volume: float = 0.0
    levels: float | None = None  # quantisation steps in one raw unit; None where bits per dimension mean nothing
    groups: Tensor | None = None  # test points of one group depend on each other: take error bars over groups
    restore: Callable[[Tensor], Tensor] = lambda x: x  # back to the units of the raw data, for pictures
    value_range: tuple[float, float] | None = None  # of restored grey values, where it is known

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one point."""
        return tuple(self.test.x.shape[1:])

    @property
    def features(self) -> int:
        return math.prod(self.shape)

    @property
    def context_features(self) -> int | None:
        """Numbers in the context of a point; None where the task is unconditional."""
        return None if self.test.context is None else self.test.context.shape[1]

    def bits_per_dimension(self, log_likelihood: float) -> float | None:
        """What the image literature reports, for a mean log-likelihood of preprocessed data in nats.

        A dequantised density bounds the probability of a quantised point from below, at one volume unit a point:
        -(log p + log_volume) / (D log 2) in raw units, plus log2(levels) where a raw unit holds so many grey levels.
        None where the data is not quantised.
        """
        if self.levels is None:
            return None
        return math.log2(self.levels) - (log_likelihood + self.log_volume) * self.bits_per_nat

    @property
    def bits_per_nat(self) -> float:
        """Bits per dimension in a nat per point."""
        return 1 / (self.features * math.log(2))
