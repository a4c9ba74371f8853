"""Couplings: half of the features move by what the other half says. NICE, Real NVP, Glow, neural spline flow."""

from __future__ import annotations

from collections.abc import Callable

import normflows
from nflows.nn.nets import ResidualNet
from nflows.transforms import (
    ActNorm,
    AdditiveCouplingTransform,
    AffineCouplingTransform,
    LULinear,
    Permutation,
    PiecewiseRationalQuadraticCouplingTransform,
    RandomPermutation,
    ReversePermutation,
    Transform,
)
from nflows.utils.torchutils import create_alternating_binary_mask, create_mid_split_binary_mask
from torch import nn

from comparisons.methods.density import BLOCKS, Images, Method
from comparisons.methods.hosts import NflowsDensity, NormflowsDensity, nflows_flow, normflows_flow
from comparisons.methods.images import IMAGES
from comparisons.methods.multiscale import Flattened

SPLINE = {"num_bins": 8, "tails": "linear", "tail_bound": 5.0}  # both hosts: beyond 5 standard deviations the identity


# nflows ----------------------------------------------------------------------------------------------


def permutation(features: int) -> Permutation:
    """A random one, except in the plane, where every second draw would leave a coupling its old half."""
    return ReversePermutation(features) if features == 2 else RandomPermutation(features)


def conditioner(width: int, context_features: int | None) -> Callable[[int, int], nn.Module]:
    return lambda inputs, outputs: ResidualNet(inputs, outputs, width, context_features, num_blocks=2)


def nice(features: int, width: int, context_features: int | None) -> nn.Module:
    """Additive couplings, and a scale of each feature at the end: the volume changes there alone."""
    mask = create_alternating_binary_mask(features)
    transforms: list[Transform] = []
    for _ in range(BLOCKS):
        net = conditioner(width, context_features)
        transforms += [AdditiveCouplingTransform(mask, net), permutation(features)]
    return nflows_flow(features, [*transforms, ActNorm(features)])


def nflows_realnvp(features: int, width: int, context_features: int | None) -> nn.Module:
    """Affine couplings. ActNorm between them, because nflows bounds their scales by 1: alone they cannot stretch."""
    mask = create_alternating_binary_mask(features)
    transforms: list[Transform] = []
    for _ in range(BLOCKS):
        net = conditioner(width, context_features)
        transforms += [ActNorm(features), AffineCouplingTransform(mask, net), permutation(features)]
    return nflows_flow(features, transforms)


def nflows_glow(features: int, width: int, context_features: int | None) -> nn.Module:
    """Glow's step for vectors: ActNorm, permutation and linear map for the 1x1 convolution, coupling."""
    mask = create_mid_split_binary_mask(features)
    transforms: list[Transform] = []
    for _ in range(BLOCKS):
        coupling = AffineCouplingTransform(mask, conditioner(width, context_features))
        transforms += [ActNorm(features), permutation(features), LULinear(features), coupling]
    return nflows_flow(features, transforms)


def nflows_spline(features: int, width: int, context_features: int | None) -> nn.Module:
    mask = create_alternating_binary_mask(features)
    transforms: list[Transform] = []
    for _ in range(BLOCKS):
        net = conditioner(width, context_features)
        transforms += [PiecewiseRationalQuadraticCouplingTransform(mask, net, **SPLINE), permutation(features)]
    return nflows_flow(features, transforms)


# normflows: its affine couplings, its ActNorm and so Real NVP and Glow know no context -----------------


def normflows_realnvp(features: int, width: int, context_features: int | None) -> nn.Module:
    kept = (features + 1) // 2
    flows: list[nn.Module] = []
    for _ in range(BLOCKS):
        net = normflows.nets.MLP([kept, width, width, 2 * (features - kept)], init_zeros=True)
        permute = normflows.flows.Permute(features, mode="swap" if features == 2 else "shuffle")
        flows += [normflows.flows.AffineCouplingBlock(net), permute, normflows.flows.ActNorm(features)]
    return normflows_flow(features, flows)


def normflows_glow(features: int, width: int, context_features: int | None) -> nn.Module:
    """Glow's step for vectors: coupling with sigmoid scale, invertible linear map for the 1x1 convolution, ActNorm."""
    kept = (features + 1) // 2
    flows: list[nn.Module] = []
    for _ in range(BLOCKS):
        net = normflows.nets.MLP([kept, width, width, 2 * (features - kept)], init_zeros=True)
        coupling = normflows.flows.AffineCouplingBlock(net, scale_map="sigmoid")
        flows += [coupling, normflows.flows.InvertibleAffine(features), normflows.flows.ActNorm(features)]
    return normflows_flow(features, flows)


def normflows_spline(features: int, width: int, context_features: int | None) -> nn.Module:
    """As in the normflows example: an invertible linear map after each coupling. Halves take turns, for the plane."""
    flows: list[nn.Module] = []
    for block in range(BLOCKS):
        flows += [
            normflows.flows.CoupledRationalQuadraticSpline(
                features, 2, width, context_features, reverse_mask=block % 2 == 1, **SPLINE
            ),
            normflows.flows.LULinearPermute(features),
        ]
    return normflows_flow(features, flows, context_features)


METHODS = (
    Method(
        "nice",
        "NICE: additive couplings of nflows and a scale at the end",
        "coupling",
        "Dinh, Krueger and Bengio 2014, arXiv 1410.8516",
        nice,
        NflowsDensity,
        learning_rate=1e-2,
        images=Images(Flattened(nice), NflowsDensity, conditional=True),
    ),
    Method(
        "nflows-realnvp",
        "Real NVP of nflows with ActNorm",
        "coupling",
        "Dinh, Sohl-Dickstein and Bengio 2016, arXiv 1605.08803",
        nflows_realnvp,
        NflowsDensity,
        learning_rate=1e-2,
        images=IMAGES["nflows-realnvp"],
    ),
    Method(
        "normflows-realnvp",
        "Real NVP of normflows with ActNorm",
        "coupling",
        "Dinh, Sohl-Dickstein and Bengio 2016, arXiv 1605.08803",
        normflows_realnvp,
        NormflowsDensity,
        learning_rate=3e-3,
        conditional=False,
        images=IMAGES["normflows-realnvp"],
    ),
    Method(
        "nflows-glow",
        "Glow: its steps in nflows",
        "coupling",
        "Kingma and Dhariwal 2018, arXiv 1807.03039",
        nflows_glow,
        NflowsDensity,
        learning_rate=1e-2,
        images=IMAGES["nflows-glow"],
    ),
    Method(
        "normflows-glow",
        "Glow: its steps in normflows",
        "coupling",
        "Kingma and Dhariwal 2018, arXiv 1807.03039",
        normflows_glow,
        NormflowsDensity,
        learning_rate=1e-2,
        conditional=False,
        images=IMAGES["normflows-glow"],
    ),
    Method(
        "nflows-nsf",
        "Neural spline flow: rational-quadratic couplings of nflows",
        "coupling",
        "Durkan, Bekasov, Murray and Papamakarios 2019, arXiv 1906.04032",
        nflows_spline,
        NflowsDensity,
        learning_rate=1e-2,
    ),
    Method(
        "normflows-nsf",
        "Neural spline flow: rational-quadratic couplings and linear maps of normflows",
        "coupling",
        "Durkan, Bekasov, Murray and Papamakarios 2019, arXiv 1906.04032",
        normflows_spline,
        NormflowsDensity,
        learning_rate=1e-2,
    ),
)
