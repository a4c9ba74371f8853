"""What all nets are made of: a layer, the entry of a context, an activation; and the checks of their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from iresflow_plugin.errors import check_whole
from iresflow_plugin.lipschitz import AddContext, SinCos, build_activation

MakeActivation = nn.Module | Callable[..., nn.Module]

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


def hidden_layer(
    layer: Callable[[int, int], nn.Module],
    width: int,
    size: int,
    activation: MakeActivation,
    entry: Callable[[int], list[AddContext]],
    spatial_dims: int = 0,
) -> tuple[list[nn.Module], int]:
    """A layer of `size` features behind its activation, and how many there are: an odd number cannot be doubled."""
    act = build_activation(activation, size, spatial_dims)
    expansion = getattr(act, "expansion", 1)
    units = math.ceil(size / expansion)
    return [layer(width, units), *entry(units), act], units * expansion


class PerChannel(nn.Linear):
    """A vector of context, (B, F), to one number per channel, (B, C, 1, 1)."""

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Linear
        return super().forward(input)[..., None, None]


def vector_entry(features: int | None, units: int) -> list[AddContext]:
    """The entry of a context vector into a hidden layer of so many units, if there is one."""
    return [] if features is None else [AddContext(nn.Linear(features, units, bias=False))]


def image_entry(features: int | None, channels: int | None, units: int) -> list[AddContext]:
    """The entry of a context vector or a context image into a hidden layer of so many channels, if there is one."""
    if features is not None:
        return [AddContext(PerChannel(features, units, bias=False))]
    return [] if channels is None else [AddContext(nn.Conv2d(channels, units, 3, padding=1, bias=False))]


def check_sizes(name: str, sizes: Sequence[int], least: int, example: str) -> None:
    """A list of positive sizes."""
    if not isinstance(sizes, Sequence):
        raise TypeError(f"{name} must be a list of sizes, such as {example}, got {sizes!r}.")
    if len(sizes) < least or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in sizes):
        raise ValueError(f"{name} must be {least} or more positive sizes, such as {example}, got {sizes!r}.")


def check_kernel(kernel: int) -> None:
    """An odd size, so that the image keeps its own."""
    if not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be an odd size, or None for vectors, got {kernel!r}.")


def check_context(features: int | None, channels: int | None, hidden: int) -> None:
    """A vector or an image, and a hidden layer for it to enter."""
    for name, size in {"context_features": features, "context_channels": channels}.items():
        if size is not None:
            check_whole(name, size)
    if features is not None and channels is not None:
        raise ValueError(
            f"A context is a vector or an image, got context_features={features} and context_channels={channels}; "
            "to use both, spread the vector over the image."
        )
    if hidden < 1 and (features is not None or channels is not None):
        raise ValueError("A context enters hidden layers, and this net has none.")
