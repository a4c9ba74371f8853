"""The methods: flows as people write them in their own library, and the same flows with residual blocks swapped in.

A stack is a function (features, width) -> host flow with `BLOCKS` transforms of that hidden width. The width is not
written down: `build` takes the largest that keeps the flow within the task's number of parameters, so that all methods
are of one size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import normflows
import torch
from nflows.distributions.normal import StandardNormal
from nflows.flows import Flow
from nflows.nn.nets import ResidualNet
from nflows.transforms import (
    ActNorm,
    AffineCouplingTransform,
    CompositeTransform,
    MaskedAffineAutoregressiveTransform,
    Permutation,
    PiecewiseRationalQuadraticCouplingTransform,
    RandomPermutation,
    ReversePermutation,
    Transform,
)
from nflows.utils.torchutils import create_alternating_binary_mask
from torch import Tensor, nn

from iresflow_plugin.adapters.nflows import ResidualTransform
from iresflow_plugin.nets import LipschitzMLP
from iresflow_plugin.swap import swap_transforms

warnings.filterwarnings("ignore", message="torch.lu is deprecated")  # normflows still calls it

BLOCKS = 8

Stack = Callable[[int, int], nn.Module]


class Density(nn.Module):
    """A host's flow under one set of names. Calling it gives the mean negative log-likelihood: the training loss."""

    flow: Any

    def __init__(self, flow: nn.Module, swap: str = "") -> None:
        super().__init__()
        self.flow = flow
        self.swap = swap  # the report of what was swapped for residual blocks; empty for an original

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return -self.log_prob(x, context).mean()

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow.log_prob(x) if context is None else self.flow.log_prob(x, context)

    def sample(self, n: int) -> Tensor:
        raise NotImplementedError

    def to_noise(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def to_data(self, z: Tensor) -> Tensor:
        raise NotImplementedError


class NflowsDensity(Density):
    """An `nflows.flows.Flow`."""

    def sample(self, n: int) -> Tensor:
        return self.flow.sample(n)

    def to_noise(self, x: Tensor) -> Tensor:
        return self.flow.transform_to_noise(x)

    def to_data(self, z: Tensor) -> Tensor:
        return self.flow._transform.inverse(z)[0]  # nflows has no public name for it


class NormflowsDensity(Density):
    """A `normflows.NormalizingFlow`."""

    def sample(self, n: int) -> Tensor:
        return self.flow.sample(n)[0]

    def to_noise(self, x: Tensor) -> Tensor:
        return self.flow.inverse(x)

    def to_data(self, z: Tensor) -> Tensor:
        return self.flow.forward(z)


# nflows ----------------------------------------------------------------------------------------------


def nflows_flow(features: int, transforms: Sequence[Transform]) -> Flow:
    return Flow(CompositeTransform(transforms), StandardNormal([features]))


def permutation(features: int) -> Permutation:
    """A random one, except in the plane, where every second draw would leave a coupling its old half."""
    return ReversePermutation(features) if features == 2 else RandomPermutation(features)


def conditioner(width: int) -> Callable[[int, int], nn.Module]:
    return lambda inputs, outputs: ResidualNet(inputs, outputs, hidden_features=width, num_blocks=2)


def nflows_realnvp(features: int, width: int) -> nn.Module:
    """Affine couplings. ActNorm between them, because nflows bounds their scales by 1: alone they cannot stretch."""
    mask = create_alternating_binary_mask(features)
    transforms: list[Transform] = []
    for _ in range(BLOCKS):
        transforms += [ActNorm(features), AffineCouplingTransform(mask, conditioner(width)), permutation(features)]
    return nflows_flow(features, transforms)


def nflows_maf(features: int, width: int) -> nn.Module:
    transforms: list[Transform] = []
    for _ in range(BLOCKS):
        transforms += [
            ReversePermutation(features),
            MaskedAffineAutoregressiveTransform(features, hidden_features=width),
        ]
    return nflows_flow(features, transforms)


def nflows_spline(features: int, width: int) -> nn.Module:
    mask = create_alternating_binary_mask(features)
    transforms: list[Transform] = []
    for _ in range(BLOCKS):
        spline = PiecewiseRationalQuadraticCouplingTransform(
            mask, conditioner(width), num_bins=8, tails="linear", tail_bound=5.0
        )
        transforms += [spline, permutation(features)]
    return nflows_flow(features, transforms)


def residual(features: int, width: int) -> nn.Module:
    blocks = [ResidualTransform(LipschitzMLP([features, width, width, features])) for _ in range(BLOCKS)]
    return nflows_flow(features, blocks)


# normflows -------------------------------------------------------------------------------------------


def normflows_flow(features: int, flows: Sequence[nn.Module]) -> nn.Module:
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(features, trainable=False), flows)


def normflows_realnvp(features: int, width: int) -> nn.Module:
    kept = (features + 1) // 2
    flows: list[nn.Module] = []
    for _ in range(BLOCKS):
        net = normflows.nets.MLP([kept, width, width, 2 * (features - kept)], init_zeros=True)
        permute = normflows.flows.Permute(features, mode="swap" if features == 2 else "shuffle")
        flows += [normflows.flows.AffineCouplingBlock(net), permute, normflows.flows.ActNorm(features)]
    return normflows_flow(features, flows)


def normflows_glow(features: int, width: int) -> nn.Module:
    """Glow's step for vectors: coupling with sigmoid scale, invertible linear map for the 1x1 convolution, ActNorm."""
    kept = (features + 1) // 2
    flows: list[nn.Module] = []
    for _ in range(BLOCKS):
        net = normflows.nets.MLP([kept, width, width, 2 * (features - kept)], init_zeros=True)
        coupling = normflows.flows.AffineCouplingBlock(net, scale_map="sigmoid")
        flows += [coupling, normflows.flows.InvertibleAffine(features), normflows.flows.ActNorm(features)]
    return normflows_flow(features, flows)


def normflows_residual(features: int, width: int) -> nn.Module:
    """As in the normflows example of a residual flow."""
    flows: list[nn.Module] = []
    for _ in range(BLOCKS):
        net = normflows.nets.LipschitzMLP([features, width, width, features], lipschitz_const=0.9, init_zeros=True)
        flows += [normflows.flows.Residual(net), normflows.flows.ActNorm(features)]
    return normflows_flow(features, flows)


def update_lipschitz(density: Density) -> None:
    """normflows leaves its contraction to the trainer: call this after every step."""
    normflows.utils.update_lipschitz(density.flow, 5)


# the table -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """How to build one flow, and how it likes to be trained."""

    name: str
    about: str
    stack: Stack
    host: type[Density]
    learning_rate: float
    swapped: type[nn.Module] | None = None  # the transforms to be replaced by residual blocks
    after_step: Callable[[Density], None] | None = None


def named(*methods: Method) -> dict[str, Method]:
    return {method.name: method for method in methods}


def swapped(name: str, swap: type[nn.Module]) -> Method:
    """The twin of an original: the same stack with its transforms replaced, at equal parameters."""
    original = ORIGINALS[name]
    about = f"{original.about}, its {swap.__name__}s swapped for residual blocks"
    return Method(f"{name}-swapped", about, original.stack, original.host, RESIDUAL_RATE, swapped=swap)


# Learning rates: the best of 1e-3, 2e-3, 5e-3, 1e-2 by validation in short runs on checkerboard, digits, gas turbine.
RESIDUAL_RATE = 1e-2

ORIGINALS = named(
    Method("nflows-realnvp", "Real NVP of nflows with ActNorm", nflows_realnvp, NflowsDensity, 1e-2),
    Method("nflows-maf", "masked autoregressive flow of nflows", nflows_maf, NflowsDensity, 1e-2),
    Method("nflows-nsf", "neural spline flow of nflows", nflows_spline, NflowsDensity, 1e-2),
    Method("normflows-realnvp", "Real NVP of normflows with ActNorm", normflows_realnvp, NormflowsDensity, 5e-3),
    Method("normflows-glow", "Glow steps of normflows, for vectors", normflows_glow, NormflowsDensity, 1e-2),
    Method(
        "normflows-residual",
        "Residual(LipschitzMLP) of normflows with ActNorm",
        normflows_residual,
        NormflowsDensity,
        1e-2,
        after_step=update_lipschitz,
    ),
)

METHODS = ORIGINALS | named(
    Method("ours", "residual blocks alone, in nflows", residual, NflowsDensity, RESIDUAL_RATE),
    swapped("nflows-realnvp", AffineCouplingTransform),
    swapped("nflows-maf", MaskedAffineAutoregressiveTransform),
    swapped("normflows-realnvp", normflows.flows.AffineCouplingBlock),
)

TWINS = {name.removesuffix("-swapped"): name for name in METHODS if name.endswith("-swapped")}  # original -> swapped


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def widest(stack: Stack, features: int, parameters: int) -> int:
    """The largest hidden width with which the stack has at most so many parameters."""

    def fits(width: int) -> bool:
        with torch.random.fork_rng(devices=[]):  # trial flows must not shift the seed of the real one
            return parameter_count(stack(features, width)) <= parameters

    if not fits(1):
        raise ValueError(f"no width brings {stack.__name__} with {features} features down to {parameters} parameters")
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def build(method: Method, features: int, parameters: int) -> Density:
    """The method's flow for so many features, as large as the parameters allow."""
    flow = method.stack(features, widest(method.stack, features, parameters))
    if method.swapped is None:
        return method.host(flow)
    return method.host(flow, str(swap_transforms(flow, method.swapped)))
