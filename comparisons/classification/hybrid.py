"""One network, both uses: log p(x) + weight * log p(y | x) (Behrmann et al. 2019, arXiv 1811.00995).

The flow keeps all dimensions, so its noise is also what the head classifies. Pixels are prepared as in the comparison
of densities, and a step is ours there: ActNorm, a 1x1 convolution and a block.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import (
    ActNorm,
    CompositeTransform,
    OneByOneConvolution,
    PointwiseAffineTransform,
    SqueezeTransform,
    Transform,
)
from torch import Tensor, nn

from comparisons.classification.model import ACTIVATIONS, Size, branch_bound, check_shape, labels
from comparisons.methods import Density
from comparisons.methods.hosts import NflowsDensity
from comparisons.methods.multiscale import nflows_preparation
from iresflow_plugin.adapters.nflows import ResidualTransform
from iresflow_plugin.nets import LipschitzConvNet

HYBRID_SIZES = {
    "smoke": Size(0, ((2, 16), (2, 16)), squeeze_first=True),
    "small": Size(0, ((4, 32), (4, 32)), squeeze_first=True),
    "paper": Size(0, ((16, 32), (16, 32)), squeeze_first=True),
}
HIDDEN = 64  # channels of the head


class HybridNet(nn.Module):
    """A flow of residual blocks on images, and a head on its noise, which is no part of the flow and is free.

    Args:
        shape: (channels, height, width) of images from -0.5 to 0.5.
        size: blocks and widths; nothing is padded, since a density has no room for dimensions without volume.
        c: bound of every layer of a branch.
        weight: of log p(y | x) beside log p(x) / D.
        activation: "elu", or "waves", the default of our nets.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        size: Size,
        c: float,
        weight: float = 1.0,
        activation: str = "waves",
    ) -> None:
        super().__init__()
        check_shape(shape, size)
        self.weight = weight
        channels, height, width = shape
        transforms: list[Transform] = [PointwiseAffineTransform(0.5), *nflows_preparation(shape)]
        for stage, (blocks, hidden) in enumerate(size.stages):
            if stage or size.squeeze_first:
                transforms.append(SqueezeTransform())
                channels, height, width = channels * 4, height // 2, width // 2
            for _ in range(blocks):
                sizes = [channels, hidden, hidden, channels]
                branch = LipschitzConvNet(sizes, activation=ACTIVATIONS[activation], lipschitz=branch_bound(c))
                transforms += [ActNorm(channels), OneByOneConvolution(channels), ResidualTransform(branch)]
        self.flow: Any = Flow(CompositeTransform(transforms), StandardNormal([channels, height, width]))
        self.head = nn.Sequential(
            nn.Conv2d(channels, HIDDEN, 3, padding=1),
            nn.ELU(),
            nn.Conv2d(HIDDEN, HIDDEN, 3, stride=2, padding=1),
            nn.ELU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * HIDDEN, classes),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x) in nats, shape (B,), and logits, shape (B, classes): the network runs once for both."""
        noise, log_det = self.flow._transform(x)
        return self.flow._distribution.log_prob(noise) + log_det, self.head(noise)


class Hybrid(Density):
    """Trains on -(log p(x) / D + weight * log p(y | x)), in nats; the context is the class, as for `Classifier`."""

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The objective of every point."""
        density, classes = self.both(x, context)
        return density / x[0].numel() + self.flow.weight * classes

    def both(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log p(x) and log p(y | x), shape (B,) each, in nats."""
        density, logits = self.flow(x)
        return density, -F.cross_entropy(logits, labels(context), reduction="none")

    def density_alone(self) -> Density:
        """log p(x) without the class."""
        return NflowsDensity(self.flow.flow)

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        return self.flow.flow.sample(n)

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow.flow.transform_to_noise(x)

    def to_data(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow.flow._transform.inverse(z)[0]
