"""Real data in rows: sensors, telescopes, households, digits and patches of photographs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from torch import Generator, Tensor

from comparisons.tasks.preprocess import Dequantise, DropColumn, DropDegenerate, Patches, Standardise, Step, fit
from comparisons.tasks.sources import load_arrays
from comparisons.tasks.task import Points, Task

NOISE_SEED = 7  # one fixed draw of the noise of validation and test rows, so that every method meets the same points
USUAL: tuple[Step, ...] = (DropDegenerate(), Dequantise(), Standardise())

Parts = Sequence[Points]  # raw train, validation and test rows


def table_task(
    name: str,
    about: str,
    parts: Parts,
    columns: Sequence[str],
    steps: Sequence[Step] = USUAL,
    *,
    noted: Sequence[str] = (),
    kind: str = "table",
    parameters: int = 40_000,
    levels: float | None = None,
    groups: Tensor | None = None,
) -> Task:
    """Fit the steps on the train rows; batches are rows drawn with replacement. `noted`: what was done to raw rows."""
    train, validation, test = parts
    fitted = fit(steps, train.x, tuple(columns))
    if len(fitted.columns) < 2:
        done = "; ".join([*noted, *fitted.describe()])
        raise ValueError(f"{name}: a density needs at least two columns, and {len(fitted.columns)} are left. {done}.")

    def prepared(rows: Points, generator: Generator) -> Points:
        return Points(fitted.apply(rows.x, generator), rows.context)

    def draw(n: int, generator: Generator) -> Points:
        return prepared(train[torch.randint(len(train), (n,), generator=generator)], generator)

    fixed = torch.Generator().manual_seed(NOISE_SEED)
    return Task(
        name,
        f"{about}: {len(fitted.columns)} columns, {len(train)} train rows",
        kind,
        draw,
        validation=prepared(validation, fixed),
        test=prepared(test, fixed),
        batch=256,
        parameters=parameters,
        columns=fitted.columns,
        preprocessing=(*noted, *fitted.describe()),
        log_volume=fitted.log_volume,
        levels=levels,
        groups=groups,
        restore=fitted.restore,
    )


def parts_of(x: np.ndarray, split: np.ndarray, context: Tensor | None = None) -> list[Points]:
    """Train, validation and test rows: those of split 0, 1 and 2."""
    points = Points(torch.from_numpy(x), context)
    return [points[torch.from_numpy(np.flatnonzero(split == part))] for part in range(3)]


def random_split(n: int) -> np.ndarray:
    """The split of the shared files: of a permutation the last tenth is test, of the rest the last tenth validation."""
    order = np.random.RandomState(42).permutation(n)
    test = n // 10
    validation = (n - test) // 10
    split = np.zeros(n, dtype=np.uint8)
    split[order[n - test - validation : n - test]] = 1
    split[order[n - test :]] = 2
    return split


def first_of_each(x: np.ndarray, split: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Which rows to keep so that none repeats another, and a sentence on it.

    Two equal rows of continuous values are one row recorded twice. In train and test at once it would reward
    memory, so the copy in the train rows stays.
    """
    order = np.argsort(split, kind="stable")
    kept = np.sort(order[np.unique(x[order], axis=0, return_index=True)[1]])
    repeated = len(x) - len(kept)
    return kept, ((f"dropped {repeated} rows that repeat another",) if repeated else ())


def one_hot(labels: np.ndarray) -> Tensor:
    return torch.nn.functional.one_hot(torch.from_numpy(labels.astype(np.int64))).float()


def standardised(context: np.ndarray, split: np.ndarray) -> Tensor:
    """Covariates on the scale that nets like, by the train rows; a condition has no density, so nothing else counts."""
    train = context[split == 0].astype(np.float64)
    return torch.from_numpy((context - train.mean(0)) / train.std(0)).float()


# UCI -------------------------------------------------------------------------------------------------

AMBIENT = ("AT", "AP", "AH")


def gas_turbine(given: Sequence[str] = ()) -> Task:
    """Sensors of a gas turbine; `given` columns become the context."""
    arrays = load_arrays("uci_gas_turbine")
    kept, noted = first_of_each(arrays["x"], arrays["split"])
    x, split, columns = arrays["x"][kept], arrays["split"][kept], [str(column) for column in arrays["columns"]]
    is_given = np.isin(columns, given)
    about = "UCI gas turbine, by a random split (a time series: neighbours in time fall on both sides)"
    return table_task(
        "gas-turbine-conditional" if given else "gas-turbine",
        f"{about}, given {', '.join(given)}" if given else about,
        parts_of(x[:, ~is_given], split, standardised(x[:, is_given], split) if given else None),
        [column for column in columns if column not in given],
        [DropColumn("TEY", "correlation 0.989 with CDP"), *USUAL],
        noted=noted,
    )


def gas_turbine_conditional() -> Task:
    return gas_turbine(AMBIENT)


def magic(conditional: bool = False) -> Task:
    """Image parameters of showers seen by the MAGIC telescope; the context is gamma or hadron."""
    arrays = load_arrays("uci_magic")
    labelled = np.column_stack([arrays["x"], arrays["label"]])
    kept, noted = first_of_each(labelled if conditional else arrays["x"], arrays["split"])
    return table_task(
        "magic-conditional" if conditional else "magic",
        "UCI MAGIC telescope, given the label" if conditional else "UCI MAGIC telescope, gamma and hadron together",
        parts_of(arrays["x"][kept], arrays["split"][kept], one_hot(arrays["label"][kept]) if conditional else None),
        [str(column) for column in arrays["columns"]],
        noted=noted,
    )


def magic_conditional() -> Task:
    return magic(conditional=True)


def power() -> Task:
    """A household's electric power, minute by minute."""
    arrays = load_arrays("uci_power_first37283")
    return table_task(
        "power",
        "UCI household power, the first 26 days by a random split (not comparable with published POWER numbers)",
        parts_of(arrays["x"], arrays["split"]),
        [str(column) for column in arrays["columns"]],
    )


# images in rows --------------------------------------------------------------------------------------


def bsds300() -> Task:
    """Patches of 8 x 8 grey pixels. Patches of one photograph depend on each other: `groups` tells them apart."""
    arrays = load_arrays("bsds300_patches8x8")
    return table_task(
        "bsds300",
        "patches of BSDS300 photographs, raw units those of the MAF paper (other patches of the same photographs)",
        [Points(torch.from_numpy(arrays[f"x_{part}"])) for part in ("train", "val", "test")],
        [f"pixel {number}" for number in range(64)],
        [Patches(), Standardise()],
        parameters=250_000,
        levels=256,
        groups=torch.from_numpy(arrays["img_test"].astype(np.int64)),
    )


def digits(conditional: bool = False) -> Task:
    """scikit-learn's 8x8 digits, grey values 0 to 16; the context is the digit."""
    bunch = datasets.load_digits()
    x, labels = bunch.data.astype(np.float32), bunch.target
    return table_task(
        "digits-conditional" if conditional else "digits",
        "scikit-learn digits 8x8, given the digit" if conditional else "scikit-learn digits 8x8",
        parts_of(x, random_split(len(x)), one_hot(labels) if conditional else None),
        [f"pixel {number}" for number in range(64)],
        [Dequantise(1.0), Standardise()],  # pixels that are always 0 stay: noise is all they have
        kind="image",
        parameters=250_000,
        levels=1,
    )


def digits_conditional() -> Task:
    return digits(conditional=True)


# scikit-learn's bundled sets; iris is left out, since 15 test rows tell nothing apart ---------------------


def bundled(name: str, about: str, load: Callable[[], Any]) -> Task:
    """A set inside scikit-learn, which needs no download."""
    bunch = load()
    rows = np.asarray(bunch.data)
    about = f"scikit-learn's {about}, small: {len(rows)} rows in all"
    return table_task(name, about, parts_of(rows, random_split(len(rows))), [str(c) for c in bunch.feature_names])


def breast_cancer() -> Task:
    return bundled("breast-cancer", "breast cancer", datasets.load_breast_cancer)


def diabetes() -> Task:
    return bundled("diabetes", "diabetes", lambda: datasets.load_diabetes(scaled=False))


def wine() -> Task:
    return bundled("wine", "wine", datasets.load_wine)
