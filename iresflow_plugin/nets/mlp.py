"""The dense branch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from iresflow_plugin.lipschitz import Chain, Constraint, Spectral, constrain
from iresflow_plugin.nets.layers import MakeActivation, check_context, check_sizes, hidden_layer, vector_entry, waves


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
        activation: MakeActivation | None = None,
        lipschitz: float = 0.97,
        constraint: type[Constraint] = Spectral,
    ) -> None:
        super().__init__()
        check_sizes("layers", layers, 2, "[2, 64, 64, 2]" if not isinstance(layers, int) else _guess(layers))
        check_context(context_features, None, hidden=len(layers) - 2)
        activation = waves(layers[0], layers[1]) if activation is None else activation
        width, entry = layers[0], partial(vector_entry, context_features)
        for size in layers[1:-1]:
            modules, width = hidden_layer(nn.Linear, width, size, activation, entry)
            self.extend(modules)
        self.append(nn.Linear(width, layers[-1]))
        constrain(self, lipschitz, constraint)


def _guess(size: int) -> str:
    """What somebody meant who wrote LipschitzMLP(8, 64, 8)."""
    return f"[{size}, 64, {size}]"
