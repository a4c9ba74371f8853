"""Preprocessing: steps fitted on the train rows alone, each of which says what it did and what that does to densities.

A step is a small value with `fit(train, columns) -> Fitted`. A fitted step maps rows (`apply`), knows the names of the
columns that are left, and tells the constant by which log densities of its output fall short of those of its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Generator, Tensor

FIT_SEED = 5  # of the noise of dequantisation, while later steps are fitted
NEARLY_EQUAL = 0.98  # correlation at which one of two columns goes
EXPLAINED = 0.9999  # share of the variance that other columns explain, at which a column goes
COMMON = 0.05  # share of the rows with the same value from which a column counts as quantised
REPEATED = 20  # rows for every distinct value from which a column counts as quantised
ROUNDING = 1e-12  # of decimal fractions in double precision
LATTICE = 10_000  # most steps between the extremes of a column that counts as quantised rather than continuous


class Fitted(Protocol):
    @property
    def columns(self) -> tuple[str, ...]: ...  # of the output

    @property
    def log_volume(self) -> float: ...  # nats: log p(input) = log p(output) + log_volume

    def apply(self, x: Tensor, generator: Generator) -> Tensor: ...

    def restore(self, x: Tensor) -> Tensor: ...  # back to the units of the input, without the columns dropped

    def describe(self) -> tuple[str, ...]: ...  # a sentence for each thing done


class Step(Protocol):
    def fit(self, train: Tensor, columns: tuple[str, ...]) -> Fitted: ...


@dataclass(frozen=True)
class Chain:
    """Fitted steps one after the other."""

    steps: tuple[Fitted, ...]
    columns: tuple[str, ...]

    @property
    def log_volume(self) -> float:
        return sum(step.log_volume for step in self.steps)

    def apply(self, x: Tensor, generator: Generator) -> Tensor:
        """In double precision within, float32 at the end: raw values may be large beside what tells them apart."""
        x = x.double()
        for step in self.steps:
            x = step.apply(x, generator)
        return x.float()

    def restore(self, x: Tensor) -> Tensor:
        for step in reversed(self.steps):
            x = step.restore(x)
        return x

    def describe(self) -> tuple[str, ...]:
        return tuple(sentence for step in self.steps for sentence in step.describe())


def fit(steps: Sequence[Step], train: Tensor, columns: tuple[str, ...]) -> Chain:
    """Fit each step on what the steps before it make of the train rows."""
    generator = torch.Generator().manual_seed(FIT_SEED)
    x, fitted = train.double(), []
    for step in steps:
        fitted.append(step.fit(x, columns))
        x, columns = fitted[-1].apply(x, generator), fitted[-1].columns
        if not columns:
            break
    return Chain(tuple(fitted), columns)


# columns ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Kept:
    """Some of the columns, and why the others went."""

    indices: Tensor
    columns: tuple[str, ...]
    reasons: tuple[str, ...]
    log_volume: float = 0.0

    def apply(self, x: Tensor, generator: Generator) -> Tensor:
        return x[:, self.indices]

    def restore(self, x: Tensor) -> Tensor:
        return x

    def describe(self) -> tuple[str, ...]:
        return self.reasons


def without(columns: tuple[str, ...], reasons: dict[str, str]) -> Kept:
    kept = [number for number, column in enumerate(columns) if column not in reasons]
    sentences = tuple(f"dropped {column} ({reason})" for column, reason in reasons.items())
    return Kept(torch.tensor(kept, dtype=torch.long), tuple(columns[number] for number in kept), sentences)


@dataclass(frozen=True)
class DropColumn:
    """Leave out a column by name."""

    column: str
    reason: str

    def fit(self, train: Tensor, columns: tuple[str, ...]) -> Kept:
        if self.column not in columns:
            raise ValueError(f"there is no column {self.column!r} to drop; there are: {', '.join(columns)}.")
        return without(columns, {self.column: self.reason})


@dataclass(frozen=True)
class DropDegenerate:
    """Leave out columns on which a density is unbounded: constant, a copy or a linear function of columns before them,
    or continuous but for one common value."""

    def fit(self, train: Tensor, columns: tuple[str, ...]) -> Kept:
        reasons: dict[str, str] = {}
        kept: list[int] = []
        correlation = np.nan_to_num(np.atleast_2d(torch.corrcoef(train.double().T).numpy()))
        for number, column in enumerate(columns):
            values = train[:, number].double().numpy()
            reason = alone(values) or beside(correlation[:, kept], number, [columns[k] for k in kept], kept)
            if reason:
                reasons[column] = reason
            else:
                kept.append(number)
        return without(columns, reasons)


def alone(values: np.ndarray) -> str:
    """What is wrong with a column by itself; empty if nothing is."""
    if np.ptp(values) <= ROUNDING * np.abs(values).max():
        return f"always {values[0]:g}"
    if not is_quantised(values) or lattice_step(values) is not None:
        return ""
    common, share = commonest(values)
    return f"{share:.0%} of the rows are {common:g}, and its values lie on no lattice that noise could fill"


def beside(correlation: np.ndarray, number: int, names: list[str], kept: list[int]) -> str:
    """What is wrong with a column beside those kept before it, given all columns' correlations with these."""
    if not kept:
        return ""
    own = correlation[number]
    closest = int(np.abs(own).argmax())
    if abs(own[closest]) > NEARLY_EQUAL:
        return f"correlation {own[closest]:.3f} with {names[closest]}"
    explained = own @ np.linalg.lstsq(correlation[kept], own, rcond=None)[0]
    return f"a linear function of the columns before it, R² = {explained:.5f}" if explained > EXPLAINED else ""


# quantised values ------------------------------------------------------------------------------------


def commonest(values: np.ndarray) -> tuple[float, float]:
    """The most frequent value and its share."""
    distinct, counts = np.unique(values, return_counts=True)
    return distinct[counts.argmax()], counts.max() / len(values)


def is_quantised(values: np.ndarray) -> bool:
    """Whether values come back so often that a density could rise without bound at them."""
    return commonest(values)[1] > COMMON or len(np.unique(values)) * REPEATED < len(values)


def lattice_step(values: np.ndarray) -> float | None:
    """The smallest gap between distinct values; None where it is too small for them to lie on a lattice."""
    distinct = np.unique(values)
    gaps = np.diff(distinct)
    rounding = 1e-6 * np.abs(distinct[1:]) + ROUNDING * np.abs(distinct).max()  # of float32, of decimal fractions
    gaps = gaps[gaps > rounding]
    if not len(gaps) or np.ptp(values) > LATTICE * gaps.min():
        return None
    return float(f"{gaps[gaps < 1.5 * gaps.min()].mean():.2g}")  # the mean, since float32 moves single values


@dataclass(frozen=True, eq=False)
class Dequantised:
    """Uniform noise as wide as the quantisation step, drawn anew at every call; 0 for continuous columns."""

    columns: tuple[str, ...]
    widths: Tensor
    log_volume: float = 0.0  # a density of the dequantised values is in their own units

    def apply(self, x: Tensor, generator: Generator) -> Tensor:
        return x + self.widths * torch.rand(x.shape, generator=generator, dtype=x.dtype)

    def restore(self, x: Tensor) -> Tensor:
        return x - self.widths.to(x.dtype) / 2

    def describe(self) -> tuple[str, ...]:
        noisy = {name: width for name, width in zip(self.columns, self.widths.tolist(), strict=True) if width > 0}
        if len(noisy) > 3 and len(set(noisy.values())) == 1:
            return (f"dequantised {len(noisy)} columns by noise on [0, {min(noisy.values()):g})",)
        return tuple(f"dequantised {name} by noise on [0, {width:g})" for name, width in noisy.items())


@dataclass(frozen=True)
class Dequantise:
    """Fill the gaps between values with uniform noise: in all columns at the step given, or where values repeat."""

    step: float | None = None

    def fit(self, train: Tensor, columns: tuple[str, ...]) -> Dequantised:
        if self.step is not None:
            return Dequantised(columns, torch.full((len(columns),), self.step, dtype=torch.float64))
        widths = [(lattice_step(values) or 0.0) if is_quantised(values) else 0.0 for values in train.double().T.numpy()]
        return Dequantised(columns, torch.tensor(widths, dtype=torch.float64))


# scale -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Standardised:
    columns: tuple[str, ...]
    mean: Tensor
    deviation: Tensor
    rows: int

    @property
    def log_volume(self) -> float:
        return -self.deviation.log().sum().item()

    def apply(self, x: Tensor, generator: Generator) -> Tensor:
        return (x - self.mean) / self.deviation

    def restore(self, x: Tensor) -> Tensor:
        return x * self.deviation.to(x.dtype) + self.mean.to(x.dtype)

    def describe(self) -> tuple[str, ...]:
        return (f"standardised by the {self.rows} train rows",)


@dataclass(frozen=True)
class Standardise:
    """Mean 0 and deviation 1 in every column of the train rows."""

    def fit(self, train: Tensor, columns: tuple[str, ...]) -> Standardised:
        mean, deviation = train.mean(0), train.std(0)
        for column, value in zip(columns, deviation.tolist(), strict=True):
            if not value > 0:
                raise ValueError(f"column {column!r} is constant in the train rows; put DropDegenerate() before.")
        return Standardised(columns, mean, deviation, len(train))


@dataclass(frozen=True)
class Patches:
    """Grey patches as in the MAF paper (Papamakarios et al. 2017, arXiv 1705.07057): noise on [0, 1), divided by 256,
    less their mean, without the last pixel. The result is what the paper calls raw, so the volume counts from here."""

    columns: tuple[str, ...] = ()
    log_volume: float = 0.0

    def fit(self, train: Tensor, columns: tuple[str, ...]) -> Patches:
        return Patches(columns[:-1])

    def apply(self, x: Tensor, generator: Generator) -> Tensor:
        x = (x + torch.rand(x.shape, generator=generator, dtype=x.dtype)) / 256
        return (x - x.mean(dim=1, keepdim=True))[:, :-1]

    def restore(self, x: Tensor) -> Tensor:
        return x

    def describe(self) -> tuple[str, ...]:
        return ("dequantised by noise on [0, 1), divided by 256, less the patch mean, without the last pixel",)
