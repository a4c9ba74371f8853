"""The methods on images: what one step of each is, channels in, channels out. The scales are in `multiscale.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import normflows
from nflows.nn.nets import ConvResidualNet
from nflows.transforms import (
    ActNorm,
    AffineCouplingTransform,
    OneByOneConvolution,
    Transform,
)
from nflows.utils.torchutils import create_alternating_binary_mask, create_mid_split_binary_mask
from torch import Tensor, nn

from comparisons.methods.density import Images, Shape
from comparisons.methods.hosts import NflowsDensity
from comparisons.methods.multiscale import Block, MultiscaleDensity, nflows_images, normflows_images
from iresflow_plugin.adapters.nflows import ResidualTransform
from iresflow_plugin.lipschitz import CLipSwish, LipSwish
from iresflow_plugin.log_det import Geometric, PowerSeries, RussianRoulette
from iresflow_plugin.nets import LipschitzConvNet, LipschitzDenseNet

KERNELS = (3, 1, 3)
ROULETTE = RussianRoulette(Geometric(), exact_terms=2)  # of Residual Flow and i-DenseNet, not our default
Steps = Callable[[int, int, int, int | None], list[Any]]  # (channels, number, width, context_features)


@dataclass(frozen=True)
class NflowsImages:
    """A stack of images in nflows, step after step. A value, so that it pickles."""

    steps: Steps

    def __call__(self, shape: Shape, width: int, context_features: int | None) -> nn.Module:
        return nflows_images(shape, lambda channels, number: self.steps(channels, number, width, context_features))


@dataclass(frozen=True)
class NormflowsImages:
    """The same in normflows, whose multi-scale flow knows no context."""

    steps: Steps

    def __call__(self, shape: Shape, width: int, context_features: int | None) -> nn.Module:
        return normflows_images(shape, lambda channels, number: self.steps(channels, number, width, None))


# residual blocks -------------------------------------------------------------------------------------


def branch(channels: int, width: int, context_features: int | None) -> LipschitzConvNet:
    return LipschitzConvNet([channels, width, width, channels], KERNELS, context_features)


def ours(channels: int, number: int, width: int, context_features: int | None) -> list[Transform]:
    """Today's defaults in Glow's step: pixels spread by a logit need scales that no contraction has."""
    block = ResidualTransform(branch(channels, width, context_features))
    return [ActNorm(channels), OneByOneConvolution(channels), block]


def i_resnet(channels: int, number: int, width: int, context_features: int | None) -> list[Transform]:
    sizes = [channels, width, width, channels]
    net = LipschitzConvNet(sizes, KERNELS, context_features, activation=nn.ELU, lipschitz=0.9**3)
    return [ActNorm(channels), ResidualTransform(net, log_det=PowerSeries(terms=10))]


def residual_flow(channels: int, number: int, width: int, context_features: int | None) -> list[Transform]:
    sizes = [channels, width, width, channels]
    net = LipschitzConvNet(sizes, KERNELS, context_features, activation=LipSwish, lipschitz=0.98**3)
    return [ActNorm(channels), ResidualTransform(net, log_det=ROULETTE)]


def i_densenet(channels: int, number: int, width: int, context_features: int | None) -> list[Transform]:
    net = LipschitzDenseNet(
        channels, [width] * 3, kernel=3, context_features=context_features, activation=CLipSwish, lipschitz=0.98**4
    )
    return [ActNorm(channels), ResidualTransform(net, log_det=ROULETTE)]


# couplings -------------------------------------------------------------------------------------------


class Conditioner(ConvResidualNet):
    """That of nflows, whose context is a map of features: here a row for each image, the same at every pixel."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            context = context[:, :, None, None].expand(-1, -1, *inputs.shape[2:])
        return super().forward(inputs, context)


def conditioner(width: int, context_features: int | None) -> Callable[[int, int], nn.Module]:
    return lambda inputs, outputs: Conditioner(inputs, outputs, width, context_features, num_blocks=1)


def nflows_realnvp(channels: int, number: int, width: int, context_features: int | None) -> list[Transform]:
    mask = create_alternating_binary_mask(channels, even=number % 2 == 0)
    return [ActNorm(channels), AffineCouplingTransform(mask, conditioner(width, context_features))]


def nflows_glow(channels: int, number: int, width: int, context_features: int | None) -> list[Transform]:
    mask = create_mid_split_binary_mask(channels)
    coupling = AffineCouplingTransform(mask, conditioner(width, context_features))
    return [ActNorm(channels), OneByOneConvolution(channels), coupling]


def alternating(channels: int, number: int, width: int, context_features: int | None) -> list[Transform]:
    step = ours if number % 2 == 0 else nflows_glow
    return step(channels, number, width, context_features)


def normflows_realnvp(channels: int, number: int, width: int, context_features: int | None) -> list[nn.Module]:
    half = channels // 2
    net = normflows.nets.ConvNet2d([half, width, width, 2 * half], KERNELS)
    coupling = normflows.flows.AffineCouplingBlock(net)
    swap = normflows.flows.Permute(channels, mode="swap")
    return [Block([coupling, swap, normflows.flows.ActNorm((channels, 1, 1))])]


def normflows_glow(channels: int, number: int, width: int, context_features: int | None) -> list[nn.Module]:
    return [normflows.flows.GlowBlock(channels, width)]


# by the names of the methods
IMAGES: dict[str, Images] = {
    "ours": Images(NflowsImages(ours), NflowsDensity, conditional=True),
    "i-resnet": Images(NflowsImages(i_resnet), NflowsDensity, conditional=True),
    "residual-flow": Images(NflowsImages(residual_flow), NflowsDensity, conditional=True),
    "i-densenet": Images(NflowsImages(i_densenet), NflowsDensity, conditional=True),
    "alternating": Images(NflowsImages(alternating), NflowsDensity, conditional=True),
    "nflows-realnvp": Images(NflowsImages(nflows_realnvp), NflowsDensity, conditional=True),
    "nflows-glow": Images(NflowsImages(nflows_glow), NflowsDensity, conditional=True),
    "normflows-realnvp": Images(NormflowsImages(normflows_realnvp), MultiscaleDensity),
    "normflows-glow": Images(NormflowsImages(normflows_glow), MultiscaleDensity),
}
