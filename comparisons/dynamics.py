"""The dynamics figure: what plain and invertible residual blocks do to a line (after Behrmann et al. 2019, figure 1).

Both networks learn the same map of an interval, one that goes up, down and up again. Plain blocks x + g(x) follow it by
letting trajectories cross, so that several inputs meet. Blocks with Lip(g) < 1 are increasing in one dimension: their
trajectories keep their order, and the net can at most find the best increasing fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.isotonic import IsotonicRegression
from torch import Tensor, nn

from comparisons.figures import INK, PANEL
from iresflow_plugin import ResidualBlock
from iresflow_plugin.log_det import Omitted
from iresflow_plugin.nets import LipschitzMLP

BLOCKS = 8
WIDTH = 32
LIMIT = 2.0  # inputs in [-LIMIT, LIMIT]
STEPS = 300
BATCH = 128
LEARNING_RATE = 3e-3
TRAJECTORIES = 41


def cubic(x: Tensor) -> Tensor:
    """x^3 - 2x: falls between the turning points at ±0.82, and is 12 times steeper at the ends than blocks may fall."""
    return x**3 - 2 * x


@dataclass(frozen=True)
class Dynamics:
    """Where every input is after each block; row 0 holds the inputs, row k what block k made of them.

    Attributes:
        plain, invertible: shape (blocks + 1, inputs), the trajectories through either trained net.
        target: shape (inputs,), where they should end.
    """

    plain: np.ndarray
    invertible: np.ndarray
    target: np.ndarray


class PlainBlock(nn.Module):
    """x + g(x) with a free g: the block of a ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class InvertibleBlock(nn.Module):
    """x + g(x) with Lip(g) < 1 and layers as wide; the log-det is not asked for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = ResidualBlock(LipschitzMLP([1, width, width, 1]), log_det=Omitted())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)[0]


def dynamics(target: Callable[[Tensor], Tensor] = cubic, blocks: int = BLOCKS, seed: int = 0) -> Dynamics:
    """Train both nets on the target and follow a line of inputs through them."""
    x = torch.linspace(-LIMIT, LIMIT, TRAJECTORIES, dtype=torch.float64)[:, None]
    plain, invertible = (trained(kind, target, blocks, seed) for kind in (PlainBlock, InvertibleBlock))
    return Dynamics(trajectories(plain, x), trajectories(invertible, x), target(x)[:, 0].numpy())


def trained(
    kind: Callable[[int], nn.Module], target: Callable[[Tensor], Tensor], blocks: int, seed: int
) -> nn.Sequential:
    """Blocks of one kind, fitted by least squares with Adam on fresh inputs, the same for every kind.

    In double precision: a slope squeezed to (1 - L)^blocks must not become a tie.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(*[kind(WIDTH) for _ in range(blocks)]).double()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        x = LIMIT * (2 * torch.rand(BATCH, 1, generator=generator, dtype=torch.float64) - 1)
        optimizer.zero_grad()
        (net(x) - target(x)).square().mean().backward()
        optimizer.step()
        schedule.step()
    return net


@torch.no_grad()
def trajectories(net: nn.Sequential, x: Tensor) -> np.ndarray:
    """The inputs and what every block makes of them, shape (blocks + 1, inputs)."""
    places = [x]
    for block in net:
        places.append(block(places[-1]))
    return torch.cat(places, dim=1).T.numpy()


def crossings(places: np.ndarray) -> np.ndarray:
    """After each block, how many neighbouring inputs have met or changed sides, shape (blocks + 1,)."""
    return (np.diff(places, axis=1) <= 0).sum(axis=1)


def fit_error(places: np.ndarray, target: np.ndarray) -> float:
    """Root mean square distance of the ends from the target."""
    return float(np.sqrt(np.square(places[-1] - target).mean()))


def least_increasing_error(found: Dynamics) -> float:
    """The error that no increasing map of these inputs can beat."""
    best = IsotonicRegression().fit_transform(found.plain[0], found.target)
    return fit_error(best[None], found.target)


def dynamics_figure(found: Dynamics) -> Figure:
    """Trajectories block by block, coloured by where they start, with the target at the right edge."""
    figure = Figure(figsize=(4 * PANEL, 1.6 * PANEL), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    inputs = found.plain[0]
    colours = colormaps["plasma"](0.88 * (inputs - inputs.min()) / np.ptp(inputs))
    names = "plain residual blocks", "ours, Lip(g) < 1"
    for panel, name, places in zip(panels, names, (found.plain, found.invertible), strict=True):
        last = len(places) - 1
        for path, goal, colour in zip(places.T, found.target, colours, strict=True):
            panel.plot(path, color=colour, linewidth=0.9)
            panel.plot(last + 0.25, goal, marker="_", color=colour, markersize=7, clip_on=False)
        met = crossings(places).max()
        order = f"{met} of {len(inputs) - 1} neighbours out of order" if met else "order kept in every block"
        panel.set_title(f"{name}: {order}\nerror of the fit {fit_error(places, found.target):.3f}", fontsize=9)
        panel.set(xlim=(0, last + 0.4), xticks=range(last + 1), xlabel="block (dashes: target)")
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("x")
    least = least_increasing_error(found)
    figure.suptitle(
        f"A line of inputs through two trained nets; no increasing map comes closer than {least:.3f}",
        fontsize=11,
        color=INK,
    )
    return figure
