"""The convolutional branch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import nn

from iresflow_plugin.lipschitz import Chain, Constraint, Spectral, constrain
from iresflow_plugin.nets.layers import MakeActivation, check_context, check_sizes, hidden_layer, image_entry, waves

Padding = Literal["zeros", "circular"]


class LipschitzConvNet(Chain):
    """g(x; c) = K_m * a(... a(K_1 * x + b_1 + C_1 c)) on images with Lip(g) <= `lipschitz` in x, of every size.

    The pattern 3-1-3 is that of Behrmann et al. 2019 (arXiv 1811.00995). Each of the m convolutions gets the m-th root
    of the bound, by the norm of the operator itself. Padding keeps the size of the image. No activation stands in front
    of the first layer. A context enters every hidden layer additively, through free layers.

    Args:
        channels: [c, h, ..., c], of the image and of the hidden layers.
        kernels: odd sizes, one a layer; None is 3-1-...-1-3.
        context_features: size of a context vector, shape (B, context_features), that shifts channels; or
        context_channels: channels of a context image, shape (B, context_channels, height, width) as large as x.
        activation: as for `LipschitzMLP`.
        lipschitz: bound of the whole branch, in (0, 1).
        constraint: `Spectral`, `AlmostOrthogonal` or `Frobenius`.
        padding_mode: "zeros" or "circular".

    Raises:
        ValueError: names the argument that does not fit.

    >>> import torch
    >>> LipschitzConvNet([3, 16, 16, 3])(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        channels: Sequence[int],
        kernels: Sequence[int] | None = None,
        context_features: int | None = None,
        context_channels: int | None = None,
        activation: MakeActivation | None = None,
        lipschitz: float = 0.97,
        constraint: type[Constraint] = Spectral,
        padding_mode: Padding = "zeros",
    ) -> None:
        super().__init__()
        check_sizes("channels", channels, 2, "[3, 64, 64, 3]")
        kernels = usual_kernels(len(channels) - 1) if kernels is None else kernels
        if len(kernels) != len(channels) - 1 or any(not isinstance(k, int) or k < 1 or k % 2 == 0 for k in kernels):
            raise ValueError(
                f"kernels must be {len(channels) - 1} odd sizes, one for each layer of channels={channels!r}, "
                f"got {kernels!r}."
            )
        check_context(context_features, context_channels, hidden=len(channels) - 2)
        activation = waves(channels[0], channels[1]) if activation is None else activation
        width, entry = channels[0], partial(image_entry, context_features, context_channels)
        for size, kernel in zip(channels[1:-1], kernels[:-1], strict=True):
            layer = partial(convolution, kernel=kernel, padding_mode=padding_mode)
            modules, width = hidden_layer(layer, width, size, activation, entry, spatial_dims=2)
            self.extend(modules)
        self.append(convolution(width, channels[-1], kernels[-1], padding_mode))
        constrain(self, lipschitz, constraint)


def usual_kernels(layers: int) -> list[int]:
    """3-1-...-1-3: wide where the image comes in and goes out.

    >>> usual_kernels(3)
    [3, 1, 3]
    """
    return [3] if layers == 1 else [3, *[1] * (layers - 2), 3]


def convolution(channels: int, units: int, kernel: int, padding_mode: Padding = "zeros") -> nn.Conv2d:
    """One that keeps the size of the image."""
    return nn.Conv2d(channels, units, kernel, padding=kernel // 2, padding_mode=padding_mode)
