"""The dense branch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from iresflow_plugin.lipschitz import (
    AddContext,
    Chain,
    Constraint,
    SinCos,
    Spectral,
    build_activation,
    constrain,
)

# Frequencies in radians per unit of x, for data of unit variance; a compromise of checkerboard, gas turbine and MAGIC:
# higher ones draw sharper edges, and learn a small data set by heart.
LOWEST, HIGHEST = 1.0, 12.0


def waves(inputs: int, hidden: int) -> Callable[..., nn.Module]:
    """`SinCos` with frequencies between `LOWEST` and `HIGHEST` as the data sees them.

    A first layer of spectral norm one with more units than inputs has rows of length sqrt(inputs / units), so that a
    unit sees the data shrunk by that factor; its frequencies are stretched by as much.
    """
    stretch = max(1.0, hidden / 2 / inputs) ** 0.5
    return partial(SinCos, low=LOWEST * stretch, high=HIGHEST * stretch)


class LipschitzMLP(Chain):
    """g(x; c) = W_m a(... a(W_1 x + b_1 + C_1 c)) with Lip(g) <= `lipschitz` in x, whatever the context.

    Each of the m layers gets the m-th root of the bound. No activation stands in front of the first layer. A context
    enters every hidden layer additively, through free linear layers.

    Args:
        layers: sizes [d, h, ..., d], as in normflows' `LipschitzMLP`.
        context_features: size of the context, None for an unconditional branch.
        activation: an activation of `iresflow_plugin.lipschitz` (class or function of the number of features), or a
            torch activation with a known constant (class or module). None is `SinCos` with the frequencies of `waves`.
            One that makes two features of each, as `SinCos` does, stands behind a layer of half the size.
        lipschitz: bound of the whole branch, in (0, 1).
        constraint: `Spectral`, `AlmostOrthogonal`, `Bjorck` or `Frobenius`.

    >>> LipschitzMLP([2, 16, 2])
    LipschitzMLP(...)
    """

    def __init__(
        self,
        layers: Sequence[int],
        context_features: int | None = None,
        activation: nn.Module | Callable[..., nn.Module] | None = None,
        lipschitz: float = 0.97,
        constraint: type[Constraint] = Spectral,
    ) -> None:
        super().__init__()
        if len(layers) < 2 or any(not isinstance(n, int) or n < 1 for n in layers):
            raise ValueError(f"layers must be at least two positive sizes, such as [2, 64, 64, 2], got {layers!r}.")
        if context_features is not None and context_features < 1:
            raise ValueError(f"context_features must be None or positive, got {context_features}.")
        if context_features is not None and len(layers) < 3:
            raise ValueError(f"A context enters hidden layers, and layers={layers!r} has none.")
        if activation is None:
            activation = waves(layers[0], layers[1])
        width = layers[0]
        for size in layers[1:-1]:
            act = build_activation(activation, size)
            expansion = getattr(act, "expansion", 1)
            units = math.ceil(size / expansion)
            self.append(nn.Linear(width, units))
            if context_features is not None:
                self.append(AddContext(nn.Linear(context_features, units, bias=False)))
            self.append(act)
            width = units * expansion
        self.append(nn.Linear(width, layers[-1]))
        constrain(self, lipschitz, constraint)
