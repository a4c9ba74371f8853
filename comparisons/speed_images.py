"""Speed and memory on images: our block beside normflows' `Residual(LipschitzCNN)`, and what the certificate costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import normflows
import torch
from torch import Tensor, nn

from comparisons.methods import Density, NormflowsDensity, normflows_flow
from comparisons.speed import (
    LIPSCHITZ,
    SCALE,
    CertificateCost,
    ImageSize,
    Settings,
    Versus,
    cost_of_certificate,
    interleaved,
    peak_megabytes,
    training_step,
)
from iresflow_plugin.adapters.normflows import ResidualFlow
from iresflow_plugin.lipschitz import LipSwish
from iresflow_plugin.nets import LipschitzConvNet
from iresflow_plugin.testing import scale_weights

BLOCKS = 4
KERNELS = [3, 1, 3]
ALLOWED_TIME, ALLOWED_MEMORY = 1.0, 0.8


def layers(size: ImageSize) -> list[int]:
    return [size.channels, size.hidden, size.hidden, size.channels]


def stack(size: ImageSize, flow: Callable[[], nn.Module]) -> Density:
    return NormflowsDensity(normflows_flow(size.shape, [flow() for _ in range(BLOCKS)]))


def our_flow(size: ImageSize, activation: type[nn.Module] | None = None) -> Density:
    """With the default activation, or another."""

    def flow() -> nn.Module:
        return ResidualFlow(LipschitzConvNet(layers(size), KERNELS, activation=activation, lipschitz=LIPSCHITZ))

    return scale_weights(stack(size, flow), SCALE)


def their_flow(size: ImageSize, data: Tensor) -> Density:
    """Its layers take their sizes from the first images they see."""

    def flow() -> nn.Module:
        bound = LIPSCHITZ ** (1 / len(KERNELS))
        net = normflows.nets.LipschitzCNN(layers(size), KERNELS, lipschitz_const=bound, init_zeros=False)
        return normflows.flows.Residual(net)

    density = stack(size, flow).to(data)
    density(data)
    scale_weights(density, SCALE)
    normflows.utils.update_lipschitz(density, 50)
    return density


def images(size: ImageSize, settings: Settings) -> Tensor:
    return torch.randn(settings.image_batch, *size.shape, device=settings.device)


def side_by_side(size: ImageSize, settings: Settings) -> list[Versus]:
    """Time and memory of a training step: our defaults, and ours with theirs' activation, beside theirs."""
    data = images(size, settings)
    ours, same = (our_flow(size, activation).to(data) for activation in (None, LipSwish))
    theirs = their_flow(size, data)
    our_step, same_step, their_step = (training_step(side, data) for side in (ours, same, theirs))

    def their_whole_step() -> None:
        their_step()
        normflows.utils.update_lipschitz(theirs, 5)

    memory = [peak_megabytes(step, settings.device) for step in (our_step, same_step, their_step)]
    steps = [our_step, same_step, their_step, their_whole_step]
    times = [1e3 * s for s in interleaved(steps, repeats=settings.repeats, device=settings.device)]

    def row(quantity: str, unit: str, sides: Sequence[float], allowed: float | None) -> Versus:
        return Versus(str(size), quantity, unit, sides[0], sides[1], allowed)

    return [
        row("training step", "ms", (times[0], times[2]), ALLOWED_TIME),
        row("training step, theirs with its update_lipschitz", "ms", (times[0], times[3]), ALLOWED_TIME),
        row("training step, ours with LipSwish", "ms", (times[1], times[2]), None),
        row("memory of a training step", "MB", (memory[0], memory[2]), ALLOWED_MEMORY),
        row("memory of a training step, ours with LipSwish", "MB", (memory[1], memory[2]), None),
    ]


def certificate_cost(size: ImageSize, settings: Settings) -> list[CertificateCost]:
    data = images(size, settings)
    return [cost_of_certificate(str(size), our_flow(size).to(data), data, settings)]
