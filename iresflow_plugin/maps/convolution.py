"""A convolution as a map, and its description."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iresflow_plugin.errors import NotContractiveError
from iresflow_plugin.maps.layers import Weighted
from iresflow_plugin.maps.map import Linearised
from iresflow_plugin.maps.rounding import Products, Rounded

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_STRAIGHT = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True)
class ConvSpec:
    """How a kernel of shape (c_out, c_in / groups, *kernel) moves over images; per axis where there are several.

    Attributes:
        kernel, stride, dilation: sizes.
        padding: entries in front and behind.
        mode: "zeros" or "circular".
        groups: of channels.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str = "zeros"
    groups: int = 1

    @staticmethod
    def of(layer: nn.Module) -> ConvSpec:
        """That of a layer; its attributes are read anew, since they can be edited."""
        layer = cast(nn.Conv2d, layer)
        if layer.padding_mode not in ("zeros", "circular"):
            raise NotContractiveError(
                f"padding_mode='{layer.padding_mode}' copies border pixels, which stretches images by more than the "
                "bounds here cover; use padding_mode='zeros' or 'circular'.",
                layer,
            )
        return ConvSpec(
            layer.kernel_size, layer.stride, layer.dilation, _padding(layer), layer.padding_mode, layer.groups
        )

    @property
    def interleaved(self) -> tuple[int, ...]:
        """The stride that splits images into independent ones; ones where dilation or circular padding ties them.

        The operator of that stride bounds the convolution, which takes a part of its outputs.
        """
        plain = self.mode == "zeros" and all(d == 1 for d in self.dilation)
        return self.stride if plain else (1,) * len(self.stride)

    @property
    def gain(self) -> float:
        """Root of how often circular padding wider than the kernel can repeat an output."""
        if self.mode == "zeros":
            return 1.0
        return math.sqrt(math.prod(map(_copies, self.kernel, self.dilation, self.padding)))


@dataclass(eq=False)
class Convolution(Weighted):
    """x -> K * x + b on the last 1 + d dimensions (channels, *sizes), d = 1, 2 or 3."""

    spec: ConvSpec

    def __call__(self, x: Tensor) -> Tensor:
        channels, d = self.weight.shape[1] * self.spec.groups, self.weight.ndim - 2
        if x.ndim < d + 2 or x.shape[-1 - d] != channels:
            raise ValueError(
                f"A {d}-d convolution of the branch takes {channels} channels in front of {d} sizes, and its inputs "
                f"have shape {tuple(x.shape)}."
            )
        return self._forward(x, self.weight, self.bias)

    def linearise(self, x: Tensor) -> Linearised:
        sizes = x.shape[x.ndim - self.weight.ndim + 2 :]
        return Linearised(self(x), lambda t: self._forward(t, self.weight, None), lambda v: self._backward(v, sizes))

    def rounded(self, x: Rounded, products: Products) -> Rounded:
        def size(weight: Tensor) -> Tensor:
            taps = torch.linalg.vector_norm(weight.flatten(2), dim=(0, 1))  # each an operator of its own on all pixels
            return taps.sum() * self.spec.gain

        product = products.multiply(self._forward, x, self.weight, self.weight[0].numel(), size)
        return self.plus_bias(product.plus(self.bound * x.error), products)

    def _forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        spec, d = self.spec, weight.ndim - 2
        leading = x.shape[: x.ndim - d - 1]
        inside, outside = self._padding
        x = x.reshape(-1, *x.shape[len(leading) :])
        if any(map(any, outside)):
            sides = [side for pair in reversed(outside) for side in pair]
            x = F.pad(x, sides, mode="circular" if spec.mode == "circular" else "constant")
        y = _convolve(x, weight, bias, spec, inside)
        return y.reshape(*leading, *y.shape[1:])

    def _backward(self, v: Tensor, sizes: Sequence[int]) -> Tensor:
        """K^T v, an event of these sizes."""
        spec, d = self.spec, self.weight.ndim - 2
        leading = v.shape[: v.ndim - d - 1]
        inside, outside = self._padding
        v = v.reshape(-1, *v.shape[len(leading) :])
        padded = [n + sum(sides) for n, sides in zip(sizes, outside, strict=True)]
        unseen = [
            (n + 2 * p - d * (k - 1) - 1) % s
            for n, p, d, k, s in zip(padded, inside, spec.dilation, spec.kernel, spec.stride, strict=True)
        ]
        u = _TRANSPOSED[d - 1](v, self.weight, None, spec.stride, inside, unseen, spec.groups, spec.dilation)
        for axis, (sides, n) in enumerate(zip(outside, sizes, strict=True), start=2):
            u = _unpad(u, axis, sides, n, spec.mode == "circular")
        return u.reshape(*leading, *u.shape[1:])

    @property
    def _padding(self) -> tuple[list[int], list[tuple[int, int]]]:
        """What torch's convolution pads by itself, and what is padded before."""
        padding, nothing = self.spec.padding, len(self.spec.padding)
        if self.spec.mode == "zeros" and all(front == behind for front, behind in padding):
            return [front for front, _ in padding], [(0, 0)] * nothing
        return [0] * nothing, list(padding)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec, padding: Sequence[int]) -> Tensor:
    """torch's convolution; in double precision on a CPU the transposed one of the turned kernel where that is faster.

    There torch copies the inputs of every output pixel, and the transposed one every input pixel's outputs.
    """
    d, fewer = weight.ndim - 2, 2 * weight.shape[0] < weight.shape[1]
    rest = [dilation * (k - 1) - p for dilation, k, p in zip(spec.dilation, spec.kernel, padding, strict=True)]
    slow = x.dtype == torch.float64 and x.device.type == "cpu"
    if slow and fewer and spec.groups == 1 and min(rest) >= 0 and all(s == 1 for s in spec.stride):
        turned = weight.transpose(0, 1).flip(tuple(range(2, weight.ndim)))
        return _TRANSPOSED[d - 1](x, turned, bias, 1, rest, 0, 1, spec.dilation)
    return _STRAIGHT[d - 1](x, weight, bias, spec.stride, padding, spec.dilation, spec.groups)


def _unpad(u: Tensor, axis: int, sides: tuple[int, int], size: int, circular: bool) -> Tensor:
    """The transpose of padding one axis: cut the borders off, and add them to where they were copied from."""
    front, behind = sides
    middle = u.narrow(axis, front, size)
    if not circular or not any(sides):
        return middle

    def borders(first: Tensor, last: Tensor, gap: int) -> Tensor:
        shape = [gap if i == axis else n for i, n in enumerate(u.shape)]
        return torch.cat([first, u.new_zeros(shape), last], axis)

    head, tail = u.narrow(axis, front + size, behind), u.narrow(axis, 0, front)
    nothing = u.narrow(axis, 0, 0)
    return middle + borders(head, nothing, size - behind) + borders(nothing, tail, size - front)


def _padding(layer: nn.Conv2d) -> tuple[tuple[int, int], ...]:
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if layer.padding == "valid":
        return ((0, 0),) * len(layer.kernel_size)
    return tuple((side, side) for side in cast(tuple[int, ...], layer.padding))


def _copies(size: int, dilation: int, sides: tuple[int, int]) -> int:
    """How often circular padding can repeat an output: an axis of n >= padding pixels has n + surplus outputs."""
    surplus = sum(sides) - dilation * (size - 1)
    return 1 + math.ceil(surplus / max(sides)) if surplus > 0 else 1
