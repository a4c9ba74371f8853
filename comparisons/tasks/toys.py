"""Two-dimensional toy densities, all known exactly: samples, log density, entropy.

Most are a curve with Gaussian noise, at the scales of FFJORD (Grathwohl et al. 2019, arXiv 1810.01367).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Generator, Tensor

from comparisons.tasks.task import Draw, Points, Task

TEST_SEED = 11
NODES = 8000  # of the integral along a curve: a multiple of every number of arms
ROWS = 500  # points whose log density is taken at a time


class Toy(Protocol):
    """A density in the plane."""

    @property
    def about(self) -> str: ...

    def sample(self, n: int, generator: Generator | None = None) -> Tensor: ...  # (n, 2)

    def log_density(self, x: Tensor) -> Tensor: ...  # (n, 2) -> (n,)

    def entropy(self) -> float: ...  # nats


@dataclass(frozen=True)
class BlurredCurve:
    """Points of a curve with Gaussian noise of the same deviation in both directions.

    `curve` takes u, uniform on [0, 1), to the plane; several arms share the interval. The density
    p(x) = ∫ N(x; curve(u), deviation²) du is a mean over evenly spaced u, which lie far closer than the noise is wide.
    """

    about: str
    curve: Callable[[Tensor], Tensor]
    deviation: float

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        return self.curve(torch.rand(n, generator=generator)) + self.deviation * torch.randn(n, 2, generator=generator)

    @cached_property
    def nodes(self) -> Tensor:
        return self.curve((torch.arange(NODES, dtype=torch.float64) + 0.5) / NODES)

    def log_density(self, x: Tensor) -> Tensor:
        constant = math.log(NODES * 2 * math.pi * self.deviation**2)
        parts = [torch.cdist(rows, self.nodes) / self.deviation for rows in x.double().split(ROWS)]
        return torch.cat([(-(part**2) / 2).logsumexp(dim=1) for part in parts]).sub(constant).to(x.dtype)

    def density_on_grid(self, x: Tensor, y: Tensor) -> Tensor:
        """p at all pairs of coordinates: the noise factorises, so that it is a product of two matrices."""
        along = [
            torch.exp(-(((axis.double() - node[:, None]) / self.deviation) ** 2) / 2)
            for axis, node in zip((x, y), self.nodes.T, strict=True)
        ]
        return along[0].T @ along[1] / (NODES * 2 * math.pi * self.deviation**2)

    def entropy(self) -> float:
        """-∫ p log p by the midpoint rule, which is all but exact at steps well below the deviation."""
        step, margin = self.deviation / 4, 8 * self.deviation
        x, y = (
            torch.arange(node.min().item() - margin, node.max().item() + margin, step, dtype=torch.float64)
            for node in self.nodes.T
        )
        density = self.density_on_grid(x, y)
        return -torch.xlogy(density, density).sum().item() * step**2


def arms(u: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which of the arms, each equally likely, and how far along it, in [0, 1)."""
    arm = (u * count).floor()
    return arm, u * count - arm


def polar(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def two_moons(u: Tensor) -> Tensor:
    arm, t = arms(u, 2)
    moon = polar(torch.ones_like(t), math.pi * (arm + t))
    return 2 * (moon + (arm[:, None] - 0.5) * torch.tensor([1.0, 0.5], dtype=u.dtype))


def upper_moon(u: Tensor) -> Tensor:
    return two_moons(u / 2)


def lower_moon(u: Tensor) -> Tensor:
    return two_moons(u / 2 + 0.5)


def circles(u: Tensor) -> Tensor:
    arm, t = arms(u, 2)
    return polar(1.5 * (arm + 1), 2 * math.pi * t)


def rings(u: Tensor) -> Tensor:
    arm, t = arms(u, 4)
    return polar(0.75 * (arm + 1), 2 * math.pi * t)


def pinwheel(u: Tensor) -> Tensor:
    """After Johnson et al. 2016 (arXiv 1603.06277), whose noise is tangential."""
    arm, t = arms(u, 5)
    radius = 1 + 0.3 * torch.special.ndtri(t.clamp(1e-6, 1 - 1e-6))
    return 2 * polar(radius, -(0.4 * math.pi * arm + 0.25 * radius.exp()))


def two_spirals(u: Tensor) -> Tensor:
    arm, t = arms(u, 2)
    angle = 3 * math.pi * t.sqrt()
    return (2 * arm[:, None] - 1) * (polar(angle, math.pi - angle) + 0.25) / 3


def eight_centres(u: Tensor) -> Tensor:
    arm, _ = arms(u, 8)
    return polar(torch.full_like(u, 4 / math.sqrt(2)), math.pi / 4 * arm)


def swiss_roll(u: Tensor) -> Tensor:
    angle = 1.5 * math.pi * (1 + 2 * u)
    return polar(angle, angle) / 5


@dataclass(frozen=True)
class Checkerboard:
    """Uniform on the 8 dark squares, of side 2, of a board covering [-4, 4]^2."""

    about: str = "uniform on 8 squares of [-4, 4]^2, entropy log 32 = 3.466 nats"

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        x = 8 * torch.rand(n, generator=generator) - 4
        column = torch.div(x, 2, rounding_mode="floor")
        row = 2 * torch.randint(0, 2, (n,), generator=generator) + column.remainder(2)  # dark rows of this column
        y = 2 * (row + torch.rand(n, generator=generator)) - 4
        return torch.stack([x, y], dim=1)

    def log_density(self, x: Tensor) -> Tensor:
        on_board = (x.abs() <= 4).all(dim=1)
        dark = (x / 2).floor().sum(dim=1).remainder(2) == 0
        return torch.where(on_board & dark, -self.entropy(), -math.inf)

    def entropy(self) -> float:
        return math.log(32.0)


# FFJORD blurs the spirals by Gaussian noise of deviation 0.1 and by a square of side 0.5 / 3: one Gaussian for both.
SPIRAL_DEVIATION = math.sqrt(0.1**2 + (0.5 / 3) ** 2 / 12)

TOYS: dict[str, Toy] = {
    "checkerboard": Checkerboard(),
    "two-moons": BlurredCurve("two half circles that reach into each other, noise 0.2", two_moons, 0.2),
    "circles": BlurredCurve("two circles of radius 1.5 and 3, noise 0.24", circles, 0.24),
    "rings": BlurredCurve("four concentric rings of radius 0.75 to 3, noise 0.08", rings, 0.08),
    "pinwheel": BlurredCurve("five curved blades", pinwheel, 0.15),
    "two-spirals": BlurredCurve("two interleaved arms of one and a half turns", two_spirals, SPIRAL_DEVIATION),
    "eight-gaussians": BlurredCurve("eight Gaussians on a circle", eight_centres, 0.5 / math.sqrt(2)),
    "swiss-roll": BlurredCurve("one arm of one and a half turns, noise 0.2", swiss_roll, 0.2),
}


def toy_task(name: str) -> Task:
    """A toy with fresh samples at every step."""
    toy = TOYS[name]
    return plane_task(
        name,
        toy.about,
        lambda n, generator: Points(toy.sample(n, generator)),
        lambda points: toy.log_density(points.x),
        toy.entropy(),
    )


def two_moons_conditional() -> Task:
    """Which moon is told: the context is 0 for the upper and 1 for the lower."""
    upper, lower = BlurredCurve("upper moon", upper_moon, 0.2), BlurredCurve("lower moon", lower_moon, 0.2)

    def draw(n: int, generator: Generator) -> Points:
        label = torch.randint(0, 2, (n, 1), generator=generator)
        return Points(torch.where(label == 0, upper.sample(n, generator), lower.sample(n, generator)), label.float())

    def log_density(points: Points) -> Tensor:
        label = points.context
        if label is None:
            raise ValueError("two-moons-conditional needs to know which moon: a context of 0 or 1 for each point.")
        return torch.where(label[:, 0] == 0, upper.log_density(points.x), lower.log_density(points.x))

    about = "two half circles that reach into each other, given which of the two"
    return plane_task("two-moons-conditional", about, draw, log_density, (upper.entropy() + lower.entropy()) / 2)


def plane_task(name: str, about: str, draw: Draw, log_density: Callable[[Points], Tensor], entropy: float) -> Task:
    """2000 validation and 10000 test points."""
    fixed = draw(12_000, torch.Generator().manual_seed(TEST_SEED))
    return Task(
        name,
        about,
        "plane",
        draw,
        validation=fixed[:2_000],
        test=fixed[2_000:],
        batch=512,
        parameters=37_000,
        entropy=entropy,
        log_density=log_density,
        columns=("x", "y"),
    )
