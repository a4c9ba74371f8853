"""Flows of images in nflows and normflows: preparation, scales, and what turns an image into a vector.

A flow of images prepares pixels, x in [0, 1), by a fixed map whose log-det is part of the flow. Then come `scales`: a
2 x 2 squeeze, `STEPS` steps of the method, and half of the channels are done (Dinh et al. 2016, arXiv 1605.08803). All
noise together is a vector, in both hosts.

A padding with channels of zeros has no place here: the padded image lies on a surface of measure zero, where no flow
has a density. To fill the channels with noise instead bounds the likelihood from below by another amount than
dequantisation does, and no number would compare. It belongs to classifiers (Behrmann et al. 2019), which need none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import normflows
import torch
from nflows.distributions.normal import StandardNormal
from nflows.flows import Flow
from nflows.transforms import (
    CompositeTransform,
    MultiscaleCompositeTransform,
    PointwiseAffineTransform,
    SqueezeTransform,
    Transform,
)
from nflows.transforms.nonlinearities import Logit
from torch import Tensor, nn

from comparisons.methods.density import Shape, Stack
from comparisons.methods.hosts import NormflowsDensity

ALPHA = 0.05  # logit(ALPHA + (1 - 2 ALPHA) x), as in Real NVP
CENTRE, SPREAD = 0.5, 0.25  # of photographs, nearly: (x - CENTRE) / SPREAD
LEVELS = 3  # scales at most
STEPS = 4  # of each scale
SMALLEST = 2  # pixels a side that a squeeze may leave

Step = Callable[[int, int], Sequence[Any]]  # (channels, number) -> transforms of the host, from data to noise


def is_grey(shape: Shape) -> bool:
    """Grey values crowd at both ends and are spread by a logit; colours are shifted and scaled."""
    return shape[0] == 1


def scales(shape: Shape) -> list[Shape]:
    """The shapes after each squeeze; between them half of the channels is factored out.

    >>> scales((1, 28, 28))
    [(4, 14, 14), (8, 7, 7)]
    >>> scales((3, 32, 32))
    [(12, 16, 16), (24, 8, 8), (48, 4, 4)]
    """
    channels, height, width = shape
    found: list[Shape] = []
    while len(found) < LEVELS and height % 2 == width % 2 == 0 and min(height, width) >= 2 * SMALLEST:
        height, width = height // 2, width // 2
        found.append((4 * channels, height, width))
        channels *= 2
    if not found:
        raise ValueError(
            f"images of {shape[1]} x {shape[2]} pixels cannot be squeezed; height and width must be even and at least "
            f"{2 * SMALLEST}."
        )
    return found


# nflows ----------------------------------------------------------------------------------------------


def logit() -> Transform:
    """That of nflows, which keeps its temperature in no buffer, so that it would stay behind on the CPU."""
    transform = Logit()
    del transform._transform.temperature
    transform._transform.register_buffer("temperature", torch.ones(1))
    return transform


def nflows_preparation(shape: Shape) -> list[Transform]:
    if is_grey(shape):
        return [PointwiseAffineTransform(ALPHA, 1 - 2 * ALPHA), logit()]
    return [PointwiseAffineTransform(-CENTRE / SPREAD, 1 / SPREAD)]


def nflows_images(shape: Shape, step: Step) -> Flow:
    levels = scales(shape)
    multiscale = MultiscaleCompositeTransform(len(levels))
    for level in levels:
        steps = [transform for number in range(STEPS) for transform in step(level[0], number)]
        multiscale.add_transform(CompositeTransform([SqueezeTransform(), *steps]), level)
    return nflows_on(shape, [multiscale])


def nflows_on(shape: Shape, transforms: Sequence[Transform]) -> Flow:
    """Transforms from prepared images to vectors, behind the preparation."""
    return Flow(CompositeTransform([*nflows_preparation(shape), *transforms]), StandardNormal([math.prod(shape)]))


class Flatten(Transform):
    """Images to vectors of pixels, for transforms of vectors. nflows has none."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return inputs.flatten(1), inputs.new_zeros(len(inputs))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return inputs.unflatten(1, self.shape), inputs.new_zeros(len(inputs))


@dataclass(frozen=True)
class Flattened:
    """A stack of images from one of vectors in nflows: the same on pixels in a row. A value, so that it pickles."""

    stack: Stack

    def __call__(self, shape: Shape, width: int, context_features: int | None) -> nn.Module:
        vectors: Any = self.stack(math.prod(shape), width, context_features)
        return nflows_on(shape, [Flatten(shape), vectors._transform])


# normflows -------------------------------------------------------------------------------------------


class Block(normflows.flows.Flow):
    """Several flows as one, as GlowBlock is, with a log-det for each image, which `MultiscaleFlow` needs.

    `Composite` of normflows starts its log-det on the CPU.
    """

    def __init__(self, flows: Sequence[nn.Module]) -> None:
        super().__init__()
        self.flows = nn.ModuleList(flows)  # `flows[0]` is the one next to the noise

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_det = z.new_zeros(len(z))
        for flow in self.flows:
            z, part = flow(z)
            log_det = log_det + part
        return z, log_det

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_det = z.new_zeros(len(z))
        for flow in reversed(self.flows):
            z, part = flow.inverse(z)  # pyright: ignore[reportCallIssue]
            log_det = log_det + part
        return z, log_det


def normflows_preparation(shape: Shape) -> nn.Module:
    """From noise to data, like all of normflows. Its `Shift` would change the caller's images in place."""
    if is_grey(shape):
        return normflows.transforms.Logit(ALPHA)
    affine = normflows.flows.AffineConstFlow((1, 1, 1)).requires_grad_(False)
    affine.s.fill_(math.log(SPREAD))
    affine.t.fill_(CENTRE)
    return Block([affine])


def normflows_images(shape: Shape, step: Step) -> nn.Module:
    """The coarsest scale comes first, as everything next to the noise."""
    flows, noises = [], []
    levels = scales(shape)
    for number, (channels, height, width) in enumerate(levels):
        steps = [flow for number in range(STEPS) for flow in step(channels, number)]
        flows.append([*reversed(steps), normflows.flows.Squeeze()])
        last = number == len(levels) - 1
        noises.append(normflows.distributions.DiagGaussian((channels if last else channels // 2, height, width), False))
    merges = [normflows.flows.Merge() for _ in levels[1:]]
    preparation = normflows_preparation(shape)
    return normflows.MultiscaleFlow(noises[::-1], flows[::-1], merges, preparation, class_cond=False)


class MultiscaleDensity(NormflowsDensity):
    """A `normflows.MultiscaleFlow` without classes. Its noise is one vector, the coarsest scale first."""

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.given(len(x), context)
        return self.flow.log_prob(x, None)

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.given(len(x), context)
        return torch.cat([z.flatten(1) for z in self.flow.inverse_and_log_det(x)[0]], 1)

    def to_data(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.given(len(z), context)
        shapes = [noise.shape for noise in self.flow.q0]
        parts = z.split([math.prod(shape) for shape in shapes], dim=1)
        images = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
        return self.flow.forward_and_log_det(images)[0]
