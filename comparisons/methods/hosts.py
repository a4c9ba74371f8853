"""The host libraries' models under the names of `Density`. All of them end in a standard normal."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import normflows
from nflows.distributions.normal import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, Transform
from torch import Tensor, nn

from comparisons.methods.density import Density

warnings.filterwarnings("ignore", message="torch.lu is deprecated")  # normflows still calls it
warnings.filterwarnings("ignore", message="torch.triangular_solve is deprecated")  # and nflows this


def nflows_flow(features: int, transforms: Sequence[Transform]) -> Flow:
    return Flow(CompositeTransform(transforms), StandardNormal([features]))


class NflowsDensity(Density):
    """An `nflows.flows.Flow`."""

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow.log_prob(x, *self.given(len(x), context))

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        rows = self.given(n, context)
        return self.flow.sample(1, *rows).squeeze(1) if rows else self.flow.sample(n)  # nflows: so many for each row

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow.transform_to_noise(x, *self.given(len(x), context))

    def to_data(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow._transform.inverse(z, *self.given(len(z), context))[0]  # nflows has no public name for it


def normflows_flow(
    features: int | tuple[int, ...], flows: Sequence[nn.Module], context_features: int | None = None
) -> nn.Module:
    """`flows[0]` is the one next to the noise."""
    model = normflows.NormalizingFlow if context_features is None else normflows.ConditionalNormalizingFlow
    return model(normflows.distributions.DiagGaussian(features, trainable=False), flows)


class NormflowsDensity(Density):
    """A `normflows.NormalizingFlow`, or a `ConditionalNormalizingFlow`."""

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow.log_prob(x, *self.given(len(x), context))

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        return self.flow.sample(n, *self.given(n, context))[0]

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow.inverse(x, *self.given(len(x), context))

    def to_data(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow.forward(z, *self.given(len(z), context))


class ZukoDensity(Density):
    """A `zuko.flows.Flow`, whose distribution and transform are made anew for every context."""

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow(*self.given(len(x), context)).log_prob(x)

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        rows = self.given(n, context)
        return self.flow(*rows).sample(() if rows else (n,))

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow(*self.given(len(x), context)).transform(x)

    def to_data(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow(*self.given(len(z), context)).transform.inv(z)
