"""Two-dimensional toy densities: each a function (n, generator) -> samples of shape (n, 2)."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

CHECKERBOARD_ENTROPY = math.log(32.0)  # uniform on 8 squares of side 2


def checkerboard(n: int, generator: Generator | None = None) -> Tensor:
    """Uniform on the 8 dark squares, of side 2, of a board covering [-4, 4]^2."""
    x = 8 * torch.rand(n, generator=generator) - 4
    column = torch.div(x, 2, rounding_mode="floor")
    row = 2 * torch.randint(0, 2, (n,), generator=generator) + column.remainder(2)  # dark rows of this column, 0 to 3
    y = 2 * (row + torch.rand(n, generator=generator)) - 4
    return torch.stack([x, y], dim=1)


def two_spirals(n: int, generator: Generator | None = None) -> Tensor:
    """Two interleaved arms of one and a half turns (as in FFJORD, Grathwohl et al. 2019, arXiv 1810.01367)."""
    angle = torch.rand(n, generator=generator).sqrt() * 3 * math.pi
    arm = torch.stack([-angle.cos() * angle, angle.sin() * angle], dim=1) + 0.5 * torch.rand(n, 2, generator=generator)
    sign = 2 * torch.randint(0, 2, (n, 1), generator=generator) - 1
    return sign * arm / 3 + 0.1 * torch.randn(n, 2, generator=generator)


def rings(n: int, generator: Generator | None = None) -> Tensor:
    """Four concentric rings of radius 0.75, 1.5, 2.25 and 3, equally likely, blurred with deviation 0.08."""
    radius = 0.75 * torch.randint(1, 5, (n, 1), generator=generator)
    angle = 2 * math.pi * torch.rand(n, 1, generator=generator)
    return radius * torch.cat([angle.cos(), angle.sin()], dim=1) + 0.08 * torch.randn(n, 2, generator=generator)


def pinwheel(n: int, generator: Generator | None = None) -> Tensor:
    """Five Gaussian blades, sheared into a wheel (Johnson et al. 2016, arXiv 1603.06277)."""
    blade = torch.randn(n, 2, generator=generator) * torch.tensor([0.3, 0.1]) + torch.tensor([1.0, 0.0])
    turn = 2 * math.pi / 5 * torch.randint(0, 5, (n,), generator=generator) + 0.25 * blade[:, 0].exp()
    x = blade[:, 0] * turn.cos() + blade[:, 1] * turn.sin()
    y = blade[:, 1] * turn.cos() - blade[:, 0] * turn.sin()
    return 2 * torch.stack([x, y], dim=1)
