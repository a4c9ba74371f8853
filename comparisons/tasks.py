"""The tasks: what is to be modelled, by which split, with which budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from comparisons import data, toys

Draw = Callable[[int, Generator], Tensor]

DEQUANTISE_SEED = (
    7  # one fixed draw of the noise of validation and test digits, so that every method meets the same points
)
TOY_TEST_SEED = 11


@dataclass(frozen=True, eq=False)
class Task:
    """One density to learn.

    `draw(n, generator)` gives a training batch: fresh samples of a toy, random rows of a data set (with fresh
    dequantisation noise for images). `validation` and `test` are fixed. `parameters` is the size of every model.
    """

    name: str
    about: str
    kind: str  # plane, table or image: what its pictures look like
    draw: Draw
    validation: Tensor
    test: Tensor
    batch: int
    parameters: int
    entropy: float | None = None  # nats, where it is known: no model can score a lower test loss
    columns: tuple[str, ...] = ()
    restore: Callable[[Tensor], Tensor] = lambda x: x  # back to the units of the raw data, for pictures

    @property
    def features(self) -> int:
        return self.test.shape[1]


def toy(name: str, about: str, sampler: Draw, entropy: float | None = None) -> Task:
    """A 2-D density with fresh samples at every step."""
    fixed = sampler(12_000, torch.Generator().manual_seed(TOY_TEST_SEED))
    return Task(
        name,
        about,
        "plane",
        sampler,
        fixed[:2_000],
        fixed[2_000:],
        batch=512,
        parameters=37_000,
        entropy=entropy,
        columns=("x", "y"),
    )


def gas_turbine() -> Task:
    """Ten sensors of a gas turbine, standardised by the train rows."""
    rows, columns = data.load_gas_turbine()
    train, validation, test = (torch.from_numpy(part) for part in rows)
    mean, deviation = train.mean(0), train.std(0)
    train, validation, test = ((part - mean) / deviation for part in (train, validation, test))
    return Task(
        "gas-turbine",
        f"UCI gas turbine, {len(columns)} columns (without TEY), {len(train)} train rows, standardised",
        "table",
        random_rows(train),
        validation,
        test,
        batch=256,
        parameters=40_000,
        columns=tuple(columns),
    )


def digits() -> Task:
    """scikit-learn's 8x8 digits with uniform noise added, standardised by the train images."""
    train, validation, test = (torch.from_numpy(part) for part in data.load_digits())
    mean = train.mean(0) + 0.5
    deviation = (
        train.var(0) + 1 / 12
    ) ** 0.5  # pixel and noise; some pixels are always 0, so the noise is all they have

    def dequantise(images: Tensor, generator: Generator) -> Tensor:
        return (images + torch.rand(images.shape, generator=generator) - mean) / deviation

    def draw(n: int, generator: Generator) -> Tensor:
        return dequantise(random_rows(train)(n, generator), generator)

    fixed = torch.Generator().manual_seed(DEQUANTISE_SEED)
    return Task(
        "digits",
        f"scikit-learn digits 8x8, {len(train)} train images, dequantised, standardised",
        "image",
        draw,
        dequantise(validation, fixed),
        dequantise(test, fixed),
        batch=128,
        parameters=250_000,
        restore=lambda x: x * deviation + mean - 0.5,
    )


def random_rows(x: Tensor) -> Draw:
    """Batches of rows drawn with replacement."""
    return lambda n, generator: x[torch.randint(len(x), (n,), generator=generator)]


TASKS: dict[str, Callable[[], Task]] = {
    "checkerboard": lambda: toy(
        "checkerboard",
        "uniform on 8 squares of [-4, 4]^2, entropy log 32 = 3.466 nats",
        toys.checkerboard,
        toys.CHECKERBOARD_ENTROPY,
    ),
    "two-spirals": lambda: toy("two-spirals", "two interleaved arms", toys.two_spirals),
    "rings": lambda: toy("rings", "four concentric rings", toys.rings),
    "pinwheel": lambda: toy("pinwheel", "five curved blades", toys.pinwheel),
    "digits": digits,
    "gas-turbine": gas_turbine,
}
