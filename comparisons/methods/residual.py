"""Residual flows: x + g(x) with Lip(g) < 1. Ours, the published recipes in our blocks, and that of normflows."""

from __future__ import annotations

import normflows
from nflows.transforms import ActNorm, AffineCouplingTransform, InverseTransform, LULinear, Transform
from nflows.utils.torchutils import create_alternating_binary_mask
from torch import nn

from comparisons.methods.coupling import conditioner, permutation
from comparisons.methods.density import BLOCKS, Density, Method
from comparisons.methods.hosts import NflowsDensity, NormflowsDensity, nflows_flow, normflows_flow
from comparisons.methods.images import IMAGES, ROULETTE
from iresflow_plugin.adapters.nflows import ResidualTransform
from iresflow_plugin.lipschitz import CLipSwish, LipSwish
from iresflow_plugin.log_det import PowerSeries
from iresflow_plugin.nets import LipschitzDenseNet, LipschitzMLP


def branch(features: int, width: int, context_features: int | None) -> LipschitzMLP:
    return LipschitzMLP([features, width, width, features], context_features)


def ours(features: int, width: int, context_features: int | None) -> nn.Module:
    """Today's defaults and nothing else."""
    return nflows_flow(features, [ResidualTransform(branch(features, width, context_features)) for _ in range(BLOCKS)])


def i_resnet(features: int, width: int, context_features: int | None) -> nn.Module:
    """ELU, ActNorm, 0.9 per layer, ten terms of the power series, as for MNIST. Evaluation is exact."""
    sizes = [features, width, width, width, features]
    transforms: list[Transform] = []
    for _ in range(BLOCKS):
        net = LipschitzMLP(sizes, context_features, activation=nn.ELU, lipschitz=0.9 ** (len(sizes) - 1))
        transforms += [ActNorm(features), ResidualTransform(net, log_det=PowerSeries(terms=10))]
    return nflows_flow(features, transforms)


def residual_flow(features: int, width: int, context_features: int | None) -> nn.Module:
    """LipSwish, ActNorm, 0.98 per layer, Russian roulette after two terms. Evaluation is exact.

    N is geometric with p = 1 - L. The published p = 0.5 has no finite worst-case variance at this L, and is refused.
    """
    sizes = [features, width, width, width, features]
    transforms: list[Transform] = []
    for _ in range(BLOCKS):
        net = LipschitzMLP(sizes, context_features, activation=LipSwish, lipschitz=0.98 ** (len(sizes) - 1))
        transforms += [ActNorm(features), ResidualTransform(net, log_det=ROULETTE)]
    return nflows_flow(features, transforms)


def i_densenet(features: int, width: int, context_features: int | None) -> nn.Module:
    """CLipSwish, three densely connected layers, else as Residual Flow. The bound is shared out by the net itself."""
    transforms: list[Transform] = []
    for _ in range(BLOCKS):
        growth = [width] * 3
        net = LipschitzDenseNet(
            features,
            growth,
            context_features=context_features,
            activation=CLipSwish,
            lipschitz=0.98 ** (len(growth) + 1),
        )
        transforms += [ActNorm(features), ResidualTransform(net, log_det=ROULETTE)]
    return nflows_flow(features, transforms)


def alternating(features: int, width: int, context_features: int | None) -> nn.Module:
    """Our blocks and steps of Glow in turn: what a block cannot stretch, a coupling can."""
    mask = create_alternating_binary_mask(features)
    transforms: list[Transform] = []
    for _ in range(BLOCKS // 2):
        coupling = AffineCouplingTransform(mask, conditioner(width, context_features))
        transforms += [ResidualTransform(branch(features, width, context_features))]
        transforms += [ActNorm(features), permutation(features), LULinear(features), coupling]
    return nflows_flow(features, transforms)


def impflow(features: int, width: int, context_features: int | None) -> nn.Module:
    """z + g_z(z) = x + g_x(x): each of our blocks is followed by one that is turned round."""
    transforms: list[Transform] = []
    for _ in range(BLOCKS // 2):
        there, back = (ResidualTransform(branch(features, width, context_features)) for _ in range(2))
        transforms += [there, InverseTransform(back)]
    return nflows_flow(features, transforms)


def normflows_residual(features: int, width: int, context_features: int | None) -> nn.Module:
    """As in the normflows example of a residual flow. It knows no context."""
    flows: list[nn.Module] = []
    for _ in range(BLOCKS):
        net = normflows.nets.LipschitzMLP([features, width, width, features], lipschitz_const=0.9, init_zeros=True)
        flows += [normflows.flows.Residual(net), normflows.flows.ActNorm(features)]
    return normflows_flow(features, flows)


def update_lipschitz(density: Density) -> None:
    """normflows leaves its contraction to the trainer: call this after every step."""
    normflows.utils.update_lipschitz(density.flow, 5)


METHODS = (
    Method(
        "ours",
        "Residual blocks of this package with its defaults, in nflows; alone, and for images in Glow's step",
        "residual",
        "this package, after Behrmann et al. 2019, arXiv 1811.00995",
        ours,
        NflowsDensity,
        learning_rate=1e-2,
        images=IMAGES["ours"],
    ),
    Method(
        "i-resnet",
        "i-ResNet: the published recipe in our blocks, with ELU, ActNorm and a truncated series",
        "residual",
        "Behrmann, Grathwohl, Chen, Duvenaud and Jacobsen 2019, arXiv 1811.00995",
        i_resnet,
        NflowsDensity,
        learning_rate=3e-3,
        images=IMAGES["i-resnet"],
    ),
    Method(
        "residual-flow",
        "Residual Flow: the published recipe in our blocks, with LipSwish, ActNorm and Russian roulette",
        "residual",
        "Chen, Behrmann, Duvenaud and Jacobsen 2019, arXiv 1906.02735",
        residual_flow,
        NflowsDensity,
        learning_rate=3e-3,
        images=IMAGES["residual-flow"],
    ),
    Method(
        "i-densenet",
        "i-DenseNet: the published recipe in our blocks, with CLipSwish, dense connections and ActNorm",
        "residual",
        "Perugachi-Diaz, Tomczak and Bhulai 2021, arXiv 2102.02694",
        i_densenet,
        NflowsDensity,
        learning_rate=3e-3,
        images=IMAGES["i-densenet"],
    ),
    Method(
        "alternating",
        "Residual blocks of this package and affine couplings in turn, in nflows",
        "residual",
        "this package, after Kingma and Dhariwal 2018, arXiv 1807.03039",
        alternating,
        NflowsDensity,
        learning_rate=1e-2,
        images=IMAGES["alternating"],
    ),
    Method(
        "impflow",
        "ImpFlow: our blocks with their defaults, every second one turned round",
        "residual",
        "Lu, Chen, Li, Wang and Zhu 2021, arXiv 2103.09527",
        impflow,
        NflowsDensity,
        learning_rate=1e-2,
    ),
    Method(
        "normflows-residual",
        "Residual Flow of normflows, Residual(LipschitzMLP) with ActNorm",
        "residual",
        "Chen, Behrmann, Duvenaud and Jacobsen 2019, arXiv 1906.02735",
        normflows_residual,
        NormflowsDensity,
        learning_rate=1e-2,
        conditional=False,
        after_step=update_lipschitz,
    ),
)
