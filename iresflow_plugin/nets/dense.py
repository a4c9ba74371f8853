"""The densely connected branch, for vectors and for images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from iresflow_plugin.errors import check_whole
from iresflow_plugin.lipschitz import Chain, Constraint, LearnableConcatenate, Spectral, constrain
from iresflow_plugin.nets.conv import convolution
from iresflow_plugin.nets.layers import (
    MakeActivation,
    check_context,
    check_kernel,
    check_sizes,
    hidden_layer,
    image_entry,
    vector_entry,
    waves,
)


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
        activation: MakeActivation | None = None,
        lipschitz: float = 0.97,
        constraint: type[Constraint] = Spectral,
    ) -> None:
        super().__init__()
        check_whole("features", features)
        check_sizes("growth", growth, 1, "[64, 64]")
        if kernel is not None:
            check_kernel(kernel)
        elif context_channels is not None:
            raise ValueError(f"context_channels={context_channels} needs images: give kernel=3, or context_features.")
        check_context(context_features, context_channels, hidden=len(growth))
        activation = waves(features, growth[0]) if activation is None else activation
        dims, width = (0 if kernel is None else 2), features
        if kernel is None:
            layer, last, entry = nn.Linear, nn.Linear, partial(vector_entry, context_features)
        else:
            layer, last = partial(convolution, kernel=kernel), partial(convolution, kernel=1)
            entry = partial(image_entry, context_features, context_channels)
        for size in growth:
            modules, added = hidden_layer(layer, width, size, activation, entry, dims)
            self.append(LearnableConcatenate(Chain(), Chain(*modules), dim=-1 - dims))
            width += added
        self.append(last(width, features))
        constrain(self, lipschitz, constraint)
