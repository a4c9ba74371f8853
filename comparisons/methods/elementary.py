"""Planar and radial flows: many maps of a handful of parameters each, along one direction or around one point.

normflows has them from noise to data, without an inverse, hence without the density of given data. Turned round, from
data to noise, the density is exact and cheap, and samples need the inverse. That is an equation in one unknown, which
`Planar` and `Radial` here solve to round-off.

They start as the identity, or so many in a row would not train. They have no width: the number of maps grows with the
budget instead, up to `DEEPEST`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import normflows
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comparisons.methods.density import ONE, Method
from comparisons.methods.hosts import NormflowsDensity, normflows_flow

DEEPEST = 128  # the usual budgets would hold thousands of maps in a row: slow, and worse to train than these
HALVINGS = 40  # more than the bits of a float's mantissa


class Planar(normflows.flows.Planar):
    """y = x + u tanh(w x + b), with its inverse: a = w x solves a + (w u) tanh(a + b) = w y, which grows with a."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.u.data = ONE * self.w.data / self.w.data.square().sum()

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        free = (self.w * self.u).sum()
        along = F.softplus(free) - 1  # w u as normflows constrains it, above -1
        u = self.u + (along - free) * self.w / self.w.square().sum()
        target = (self.w * z).sum(1, keepdim=True)
        low, high = target - along.abs(), target + along.abs()
        for _ in range(HALVINGS):
            a = (low + high) / 2
            below = a + along * torch.tanh(a + self.b) < target
            low, high = torch.where(below, a, low), torch.where(below, high, a)
        x = z - u * torch.tanh((low + high) / 2 + self.b)
        return x, -self.forward(x)[1]


class Radial(normflows.flows.Radial):
    """y = x + beta (x - z_0) / (alpha + r), r = |x - z_0|, with its inverse: r + beta r / (alpha + r) = |y - z_0|."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.alpha.data.fill_(1.0)
        self.beta.data.fill_(ONE)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alpha.abs()
        beta = F.softplus(self.beta) - alpha
        away = z - self.z_0
        length = torch.linalg.vector_norm(away, dim=1, keepdim=True)
        half = (length - alpha - beta) / 2
        r = half + (half.square() + alpha * length).sqrt()  # the root that is not negative
        x = self.z_0 + away / (1 + beta / (alpha + r))
        return x, -self.forward(x)[1]


def elementary(
    flow: Callable[[tuple[int, ...]], nn.Module], features: int, width: int, context_features: int | None
) -> nn.Module:
    """`width` maps in a row, from data to noise."""
    return normflows_flow(features, [normflows.flows.Reverse(flow((features,))) for _ in range(width)])


METHODS = (
    Method(
        "planar",
        f"Planar flow of normflows from data to noise, at most {DEEPEST} maps, inverted by bisection",
        "elementary",
        "Rezende and Mohamed 2015, arXiv 1505.05770",
        partial(elementary, Planar),
        NormflowsDensity,
        learning_rate=3e-2,
        grid=(3e-3, 1e-2, 3e-2),
        conditional=False,
        largest=DEEPEST,
    ),
    Method(
        "radial",
        f"Radial flow of normflows from data to noise, at most {DEEPEST} maps, inverted in closed form",
        "elementary",
        "Rezende and Mohamed 2015, arXiv 1505.05770",
        partial(elementary, Radial),
        NormflowsDensity,
        learning_rate=3e-2,
        grid=(3e-3, 1e-2, 3e-2),
        conditional=False,
        largest=DEEPEST,
    ),
)
