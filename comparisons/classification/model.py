"""The i-ResNet classifier, its way back from the features to the image, and its vanilla twin.

    pad by zero channels -> stages of [block, ActNorm] with a squeeze between them -> features
    features -> ActNorm -> ELU -> pooling -> linear -> logits

All of the first line is injective. The way back runs through the same steps, and says how far off it may be. ActNorm
stands between the blocks, outside of the branch: there any scale is invertible, and the certificate of x + g(x) is
that of g alone. It stands behind a block and not before it, since padded channels have no scale before the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from nflows.transforms import ActNorm
from torch import Tensor, nn
from torch.nn.utils import parametrize

from comparisons.methods import Density
from iresflow_plugin import ResidualBlock
from iresflow_plugin.inverse import FixedPoint, Solution
from iresflow_plugin.lipschitz import MaxMin
from iresflow_plugin.log_det import Omitted
from iresflow_plugin.nets import LipschitzConvNet
from iresflow_plugin.torch_state import norms

LAYERS = 3  # of a branch: 3x3, 1x1, 3x3
VANILLA_STEPS = 100  # of the fixed point, which nothing proves to suffice
SETTLED = 1e-5  # relative residual at which a vanilla block counts as solved

# as published; the default of our nets; one that keeps all norms, but has no second derivative
ACTIVATIONS: dict[str, type[nn.Module] | None] = {"elu": nn.ELU, "waves": None, "maxmin": MaxMin}


@dataclass(frozen=True)
class Size:
    """How large a classifier is.

    Args:
        channels: of the padded image, behind the first squeeze if there is one; an image of more channels keeps them.
        stages: (blocks, hidden channels) of each; a squeeze stands between two stages.
        squeeze_first: begin with a squeeze, before padding: cheaper by four.
    """

    channels: int
    stages: tuple[tuple[int, int], ...]
    squeeze_first: bool = False


SIZES = {
    "smoke": Size(8, ((2, 16), (2, 16))),
    "small": Size(8, ((2, 16), (6, 32)), squeeze_first=True),
    "paper": Size(16, ((13, 32), (13, 48), (13, 16))),  # narrowed at the end: weights and momentum take 15 MB
    "published": Size(16, ((13, 32), (13, 64), (13, 128))),  # 9 million parameters, checkpoints of 72 MB
}


def branch_bound(c: float) -> float:
    """Lip(g) of a branch whose three layers are held to c each, as the paper counts: c^3.

    >>> round(branch_bound(0.9), 3)
    0.729
    """
    if not 0 < c < 1:
        raise ValueError(f"c bounds every layer and must lie in (0, 1), got {c}; the paper has 0.5 to 0.9.")
    return c**LAYERS


# the steps of the network: forward, back, and how far errors are stretched on the way back -------------------


class Step(nn.Module):
    """One injective step."""

    def back(self, y: Tensor) -> Solution:
        """The x that gave y."""
        raise NotImplementedError

    def stretch(self) -> float:
        """A certified Lipschitz bound of `back`: what it makes of an error of its input."""
        raise NotImplementedError


class Squeeze(Step):
    """2 x 2 pixels become four channels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 2)

    def back(self, y: Tensor) -> Solution:
        return exactly(F.pixel_shuffle(y, 2))

    def stretch(self) -> float:
        return 1.0


class Pad(Step):
    """Zero channels behind the image's own. The way back drops them, which projects features that no image has."""

    def __init__(self, own: int, channels: int) -> None:
        super().__init__()
        self.own, self.added = own, channels - own

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, self.added))

    def back(self, y: Tensor) -> Solution:
        return exactly(y[:, : self.own])

    def stretch(self) -> float:
        return 1.0


class Normalise(Step):
    """nflows' ActNorm, without its log-det."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm: Any = ActNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)[0]

    def back(self, y: Tensor) -> Solution:
        scale, shift = (p.view(-1, 1, 1) for p in (self.norm.scale, self.norm.shift))
        rounding = 2 * torch.finfo(y.dtype).eps * norms((y.abs() + shift.abs()) / scale)
        return exactly(self.norm.inverse(y)[0], rounding)

    def stretch(self) -> float:
        return float(torch.exp(-self.norm.log_scale.detach()).max())


class Invertible(Step):
    """Our block: no log-det, since no volume is asked for."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.block = ResidualBlock(branch, log_det=Omitted(), inverse=FixedPoint(on_failure="return"))

    @property
    def branch(self) -> nn.Module:
        return self.block.branch

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)[0]

    def back(self, y: Tensor) -> Solution:
        return self.block.solve(y)

    def stretch(self) -> float:
        return 1 / (1 - self.block.certificate().value)


class Vanilla(Step):
    """An ordinary residual block. Its way back is the same iteration, which here nothing makes converge."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    @torch.no_grad()
    def back(self, y: Tensor) -> Solution:
        x = y
        for _ in range(VANILLA_STEPS):
            x = y - self.branch(x)
        residual = norms(y - x - self.branch(x)).nan_to_num(math.inf)
        steps = torch.full((len(y),), VANILLA_STEPS + 1, device=y.device)
        return Solution(x, torch.full_like(residual, math.inf), steps, residual <= SETTLED * norms(y))

    def stretch(self) -> float:
        return math.inf


def exactly(x: Tensor, rounding: Tensor | None = None) -> Solution:
    """For steps that need no solver."""
    nothing = x.new_zeros(len(x))
    error = nothing if rounding is None else rounding
    return Solution(x, error, torch.zeros_like(nothing, dtype=torch.int64), torch.ones_like(nothing).bool())


def freed(branch: nn.Module) -> nn.Module:
    """The same branch with the same raw weights, and no constraint."""
    for module in list(branch.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(cast(nn.Module, module), "weight", leave_parametrized=False)
    return branch


# the network ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reconstruction:
    """The image behind given features.

    Attributes:
        x: shape (B, *image).
        error_bound: per sample, shape (B,): certified, |x - x*| is at most this for the x* of exactly these features.
        block_errors: shape (blocks, B), from the last block to the first: the certified error of each solve alone.
        evaluations: per sample, shape (B,): of branches, in all blocks.
        converged: per sample, shape (B,): whether every block was solved to what the dtype can hold.
        outside: per sample, shape (B,): size of the channels that padding had made zero; features of an image leave
            nothing there, and others are projected.
    """

    x: Tensor
    error_bound: Tensor
    block_errors: Tensor
    evaluations: Tensor
    converged: Tensor
    outside: Tensor


class InvertibleClassifier(nn.Module):
    """Logits by a network whose features give the image back (Behrmann et al. 2019, arXiv 1811.00995).

    Args:
        shape: (channels, height, width) of the image.
        classes: how many.
        size: padding, blocks and widths.
        c: bound of every layer of a branch, hence c^3 of the branch; None is the vanilla twin, without a constraint.
        activation: "elu", as published, "waves", the default of our nets, or "maxmin".

    >>> net = InvertibleClassifier((1, 8, 8), 10, SIZES["smoke"], c=0.9)
    >>> x = torch.rand(5, 1, 8, 8)
    >>> net(x).shape, torch.allclose(net.reconstruct(net.features(x)).x, x, atol=1e-4)
    (torch.Size([5, 10]), True)
    """

    def __init__(
        self, shape: tuple[int, ...], classes: int, size: Size, c: float | None, activation: str = "elu"
    ) -> None:
        super().__init__()
        check_shape(shape, size)
        if activation not in ACTIVATIONS:
            raise ValueError(f"there is no activation {activation!r}; there are: {', '.join(ACTIVATIONS)}.")
        self.shape, self.c = shape, c
        first: list[Step] = [Squeeze()] if size.squeeze_first else []
        own = shape[0] * 4 ** len(first)
        channels = max(own, size.channels)
        steps: list[Step] = [*first, Pad(own, channels)]
        for stage, (blocks, width) in enumerate(size.stages):
            if stage:
                steps.append(Squeeze())
                channels *= 4
            for _ in range(blocks):
                steps += [residual_step(channels, width, c, activation), Normalise(channels)]
        self.steps = nn.ModuleList(steps)
        self.head = nn.Sequential(nn.ELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))

    @property
    def blocks(self) -> list[Invertible | Vanilla]:
        return [step for step in self.steps if isinstance(step, (Invertible, Vanilla))]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Of the last layer before the head."""
        for step in self.steps:
            x = step(x)
        return x

    @torch.no_grad()
    def reconstruct(self, features: Tensor) -> Reconstruction:
        """The image with these features, step by step from the last to the first.

        A step turns an error d of its input into one of `stretch` d, to which a block adds that of its own solve.
        """
        x, bound = features, features.new_zeros(len(features), dtype=torch.float64)
        outside, errors, evaluations, converged = bound, [], torch.zeros_like(bound).long(), torch.ones_like(bound) > 0
        for step in reversed(list(self.steps)):
            step = cast(Step, step)
            if isinstance(step, Pad):
                outside = norms(x[:, step.own :])
            found = step.back(x)
            bound = torch.where(bound > 0, step.stretch() * bound, 0) + found.error_bound  # 0 stays 0, also at inf
            if isinstance(step, (Invertible, Vanilla)):
                errors.append(found.error_bound)
            evaluations, converged, x = evaluations + found.evaluations, converged & found.converged, found.x
        return Reconstruction(x, bound, torch.stack(errors), evaluations, converged, outside)


def residual_step(channels: int, width: int, c: float | None, activation: str) -> Step:
    """A bottleneck 3-1-3, held to c a layer, or free."""
    branch = LipschitzConvNet(
        [channels, width, width, channels],
        activation=ACTIVATIONS[activation],
        lipschitz=branch_bound(0.9 if c is None else c),
    )
    return Vanilla(freed(branch)) if c is None else Invertible(branch)


def check_shape(shape: tuple[int, ...], size: Size) -> None:
    """Every squeeze halves height and width."""
    squeezes = len(size.stages) - 1 + size.squeeze_first
    if len(shape) != 3 or any(n % 2**squeezes for n in shape[1:]):
        raise ValueError(
            f"an image must have (channels, height, width) with sizes that {squeezes} squeezes can halve, multiples of "
            f"{2**squeezes}; got {shape}."
        )


class Classifier(Density):
    """p(y | x) under the names of a density: x is the image, the context its class, as one column of numbers."""

    volume = False

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(y | x), shape (B,)."""
        return -F.cross_entropy(self.flow(x), labels(context), reduction="none")


def labels(context: Tensor | None) -> Tensor:
    """Classes from a context column."""
    if context is None or context.ndim != 2 or context.shape[1] != 1:
        got = None if context is None else tuple(context.shape)
        raise ValueError(f"a classifier needs the class as context, one column of shape (n, 1), got {got}.")
    return context[:, 0].long()
