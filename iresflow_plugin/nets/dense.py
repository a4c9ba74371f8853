"""The densely connected branch, for vectors and for images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from iresflow_plugin.lipschitz import (
    AddContext,
    Chain,
    Constraint,
    LearnableConcatenate,
    Spectral,
    build_activation,
    constrain,
)
from iresflow_plugin.nets.conv import check_context, context_entry, convolution
from iresflow_plugin.nets.mlp import waves


class LipschitzDenseNet(Chain):
    """g = W_m h_{m-1}, h_i = [eta_i h_{i-1}; eta'_i a(W_i h_{i-1} + b_i + C_i c)], h_0 = x, with Lip(g) <= `lipschitz`.

    i-DenseNet (Perugachi-Diaz et al. 2021, arXiv 2102.02694): every layer sees the input and all activations so far.
    The learnable eta_i, eta'_i > 0 have eta_i^2 + eta'_i^2 = 1, so no concatenation stretches anything.

    Args:
        features: of the vector x, or channels of the image x.
        growth: [h_1, ..., h_(m-1)], how many features each layer adds.
        kernel: odd size of the convolutions, for images; the last one is 1 x 1. None for vectors.
        context_features: size of a context vector, None for an unconditional branch.
        context_channels: channels of a context image as large as x; for images.
        activation: as for `LipschitzMLP`.
        lipschitz: bound of the whole branch, in (0, 1).
        constraint: `Spectral`, `AlmostOrthogonal`, `Frobenius`, or, for vectors, `Bjorck`.

    Raises:
        ValueError: names the argument that does not fit.

    >>> import torch
    >>> LipschitzDenseNet(2, [16, 16])(torch.randn(5, 2)).shape
    torch.Size([5, 2])
    >>> LipschitzDenseNet(3, [16, 16], kernel=3)(torch.randn(5, 3, 8, 8)).shape
    torch.Size([5, 3, 8, 8])
    """

    def __init__(
        self,
        features: int,
        growth: Sequence[int],
        kernel: int | None = None,
        context_features: int | None = None,
        context_channels: int | None = None,
        activation: nn.Module | Callable[..., nn.Module] | None = None,
        lipschitz: float = 0.97,
        constraint: type[Constraint] = Spectral,
    ) -> None:
        super().__init__()
        if not isinstance(features, int) or features < 1:
            raise ValueError(f"features must be a positive number, got {features!r}.")
        if not isinstance(growth, Sequence) or any(not isinstance(n, int) or n < 1 for n in growth) or not growth:
            raise ValueError(f"growth must be at least one positive number, such as [64, 64], got {growth!r}.")
        if kernel is not None and (not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0):
            raise ValueError(f"kernel must be an odd size, or None for vectors, got {kernel!r}.")
        if kernel is None and context_channels is not None:
            raise ValueError(f"context_channels={context_channels} needs images: give kernel=3, or context_features.")
        check_context(context_features, context_channels, hidden=len(growth))
        if activation is None:
            activation = waves(features, growth[0])
        dims, width = (0 if kernel is None else 2), features
        for size in growth:
            act = build_activation(activation, size, spatial_dims=dims)
            expansion = getattr(act, "expansion", 1)
            units = math.ceil(size / expansion)
            if kernel is None:
                layer: nn.Module = nn.Linear(width, units)
                free = nn.Linear(context_features, units, bias=False) if context_features is not None else None
                entry = [AddContext(free)] if free is not None else []
            else:
                layer = convolution(width, units, kernel)
                entry = context_entry(context_features, context_channels, units)
            self.append(LearnableConcatenate(Chain(), Chain(layer, *entry, act), dim=-1 - dims))
            width += units * expansion
        self.append(nn.Linear(width, features) if kernel is None else convolution(width, features, 1))
        constrain(self, lipschitz, constraint)
