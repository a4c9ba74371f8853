"""The convolutional branch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from iresflow_plugin.lipschitz import AddContext, Chain, Constraint, Spectral, build_activation, constrain
from iresflow_plugin.nets.mlp import waves

Padding = Literal["zeros", "circular"]


class PerChannel(nn.Linear):
    """A vector of context, (B, F), to one number per channel, (B, C, 1, 1)."""

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Linear
        return super().forward(input)[..., None, None]


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
        activation: nn.Module | Callable[..., nn.Module] | None = None,
        lipschitz: float = 0.97,
        constraint: type[Constraint] = Spectral,
        padding_mode: Padding = "zeros",
    ) -> None:
        super().__init__()
        if len(channels) < 2 or any(not isinstance(n, int) or n < 1 for n in channels):
            raise ValueError(
                f"channels must be at least two positive numbers, such as [3, 64, 64, 3], got {channels!r}."
            )
        kernels = usual_kernels(len(channels) - 1) if kernels is None else kernels
        if len(kernels) != len(channels) - 1 or any(not isinstance(k, int) or k < 1 or k % 2 == 0 for k in kernels):
            raise ValueError(
                f"kernels must be {len(channels) - 1} odd sizes, one for each layer of channels={channels!r}, "
                f"got {kernels!r}."
            )
        check_context(context_features, context_channels, hidden=len(channels) - 2)
        if activation is None:
            activation = waves(channels[0], channels[1])
        width = channels[0]
        for size, kernel in zip(channels[1:-1], kernels[:-1], strict=True):
            act = build_activation(activation, size, spatial_dims=2)
            expansion = getattr(act, "expansion", 1)
            units = math.ceil(size / expansion)
            self.append(convolution(width, units, kernel, padding_mode))
            self.extend(context_entry(context_features, context_channels, units))
            self.append(act)
            width = units * expansion
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


def context_entry(features: int | None, channels: int | None, units: int) -> list[AddContext]:
    """The entry of a context vector or a context image into a hidden layer of so many channels, if there is one."""
    if features is not None:
        return [AddContext(PerChannel(features, units, bias=False))]
    if channels is not None:
        return [AddContext(nn.Conv2d(channels, units, 3, padding=1, bias=False))]
    return []


def check_context(features: int | None, channels: int | None, hidden: int) -> None:
    """A vector or an image, and a hidden layer for it to enter."""
    for name, size in {"context_features": features, "context_channels": channels}.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be None or positive, got {size}.")
    if features is not None and channels is not None:
        raise ValueError(
            f"A context is a vector or an image, got context_features={features} and context_channels={channels}; "
            "to use both, spread the vector over the image."
        )
    if hidden < 1 and (features is not None or channels is not None):
        raise ValueError("A context enters hidden layers, and this net has none.")
