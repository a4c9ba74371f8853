"""The numbers of a trained classifier, as they lie on disk: a line of JSON each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from comparisons.classification.measure import Inversion, Slopes
from comparisons.results import records


@dataclass(frozen=True)
class Trained:
    """One network with one seed.

    Attributes:
        c: bound of every layer of a branch; None for vanilla.
        seconds: of training.
        error: share of test images with a wrong class.
        double, single: the way back in double and in single precision.
        bits_per_dimension: of a hybrid.
        images: how many there were, and where they came from.
    """

    data: str
    method: str
    c: float | None
    seed: int
    steps: int
    seconds: float
    parameters: int
    error: float
    test_images: int
    slopes: Slopes
    double: Inversion
    single: Inversion
    bits_per_dimension: float | None = None
    images: str = ""

    @property
    def binomial(self) -> float:
        """Standard error of the error rate for want of more test images."""
        return math.sqrt(self.error * (1 - self.error) / self.test_images)


def method_name(c: float | None, hybrid: float | None) -> str:
    kind = "" if hybrid is None else "hybrid "
    return f"{kind}vanilla" if c is None else f"{kind}c={c:g}"


def read(path: Path) -> list[Trained]:
    """The finished networks of a run, the loosest bound first, after vanilla."""
    found = []
    for record in records(path):
        record.pop("run")
        inversions = {name: Inversion(**record[name]) for name in ("double", "single")}
        found.append(Trained(**{**record, **inversions, "slopes": Slopes(**record["slopes"])}))
    return sorted(found, key=lambda network: (-math.inf if network.c is None else -network.c, network.seed))
