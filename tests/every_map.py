"""One map of each kind, for tests of what all of them promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from iresflow_plugin import maps
from iresflow_plugin.inverse.implicit import Derivative, Transposed
from iresflow_plugin.lipschitz import (
    Chain,
    CLipSwish,
    CPila,
    LearnableConcatenate,
    MaxMin,
    SinCos,
    certified_map,
    constrain,
)
from iresflow_plugin.maps.rounding import Products, Rounded
from tests.helpers import gentle_sine, scale_weights, svd_norm


def affine(rows: int, columns: int, bias: bool = True) -> maps.Affine:
    weight = torch.randn(rows, columns, dtype=torch.float64)
    return maps.Affine(weight, torch.randn(rows).double() if bias else None, svd_norm(weight), math.inf)


def sine() -> maps.Elementwise:
    return maps.Elementwise(torch.sin, lambda x: (x.sin(), x.cos()), 1.0)


class Mixing(nn.Module):
    """A module that states its bound, with a weight, a buffer, a count and perhaps a context."""

    def __init__(self, conditional: bool = False) -> None:
        super().__init__()
        self.takes_context = conditional
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.register_buffer("shift", torch.randn(4, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.sin(self.weight * x + self.shift) * x.flip(1) / self.count + (0 if context is None else context)

    def lipschitz_bound(self) -> float:
        return math.inf


def as_image(channels: int) -> maps.Reshape:
    return maps.Reshape(1, 1, (channels, 4 // channels))


def convolution(*shape: int, spec: maps.ConvSpec, bias: bool = True) -> maps.Convolution:
    """With its own norm over all pixels as the bound of what is known."""
    weight = torch.randn(shape, dtype=torch.float64)
    taps = torch.linalg.matrix_norm(weight.flatten(2).movedim(2, 0), ord=2).sum().item()
    shift = torch.randn(shape[0], dtype=torch.float64) if bias else None
    return maps.Convolution(weight, shift, taps * spec.gain, math.inf, spec)


def watched(module: nn.Module) -> maps.Map:
    module.register_forward_hook(lambda module, inputs, output: None)
    return certified_map(module)


def branch() -> maps.Map:
    """Without a last bias, on which no derivative depends."""
    net = Chain(nn.Linear(4, 6), gentle_sine(6), nn.Linear(6, 4, bias=False))
    return certified_map(scale_weights(constrain(net, 0.9)).double())


def kinds() -> dict[str, maps.Map]:
    """One of each, for events of shape (4,) and batches of 5."""
    torch.manual_seed(0)
    a, b = affine(4, 4), affine(3, 4, bias=False)
    same = maps.ConvSpec((3,), (1,), (1,), ((1, 1),))
    circular = maps.ConvSpec((3,), (2,), (2,), ((3, 2),), "circular")
    grouped = maps.ConvSpec((2,), (1,), (1,), ((1, 0),), groups=2)
    shares = LearnableConcatenate(nn.Linear(4, 2), nn.Linear(4, 3)).double()
    shares.log_shares.data = torch.tensor([0.3, -0.4], dtype=torch.float64)
    return {
        "Affine": a,
        "Affine without bias": b,
        "Affine with a tensor as its norm": maps.Affine(b.weight, None, torch.tensor(b.norm, dtype=torch.float64), 7.0),
        "Convolution": maps.Composition((as_image(2), convolution(3, 2, 3, spec=same), maps.Reshape(1, 2, ()))),
        "Convolution, circular": maps.Composition((as_image(1), convolution(2, 1, 3, spec=circular, bias=False))),
        "Convolution, grouped": maps.Composition((as_image(2), convolution(4, 1, 2, spec=grouped))),
        "Scaling": maps.Scaling(-0.5, 0.5),
        "Scaling by a tensor": maps.Scaling(torch.linspace(-1, 1, 4).double(), 1.0),
        "Shift": maps.Shift(torch.randn(5, 4).double()),
        "Shift of one row": maps.Shift(torch.randn(1, 4).double()),
        "Elementwise": sine(),
        "Elementwise with parameters": certified_map(gentle_sine(4).double()),
        "Sort": certified_map(MaxMin(4)),
        "Circle": certified_map(SinCos(4, low=0.5, high=3.0).double()),
        "Mirrored": certified_map(CLipSwish(4).double()),
        "Mirrored without parameters": certified_map(CPila(4)),
        "Reshape": maps.Reshape(1, 1, (2, 2)),
        "Stated": certified_map(Mixing()),
        "Stated with context": certified_map(Mixing(True), torch.randn(5, 4).double()),
        "Watched": watched(nn.Linear(4, 3).double()),
        "Endomap": maps.Endomap(a),
        "Composition": maps.Composition((b, sine(), affine(4, 3))),
        "empty Composition": maps.Composition(()),
        "Sum": maps.Sum((a, sine(), maps.Shift(torch.randn(5, 4).double()))),
        "Concatenation": maps.Concatenation((a, b, sine()), -1),
        "Shares": certified_map(shares),
        "Derivative": Derivative(branch(), torch.randn(5, 4).double()),
        "Transposed": Transposed(branch(), torch.randn(5, 4).double()),
    }


every_kind = pytest.mark.parametrize("label", kinds())


def points(batch: int = 5, size: int = 4) -> Tensor:
    return torch.randn(batch, size, dtype=torch.float64)


def dense(g: maps.Map, x: Tensor) -> Tensor:
    """(B, out, in) by reverse mode through __call__, one sample at a time."""
    blocks = []
    for i in range(len(x)):
        row = g.rows(torch.tensor([i]))
        blocks.append(torch.autograd.functional.jacobian(lambda t, row=row: row(t[None])[0].flatten(), x[i]))
    return torch.stack(blocks)


def known(x: Tensor, products: Products, off: Tensor | float = 0.0) -> tuple[Rounded, Products]:
    """Numbers that are off by so much, and by whom they are judged."""
    size = products.norms(x)
    return Rounded(x, off + torch.zeros_like(size), size), products
