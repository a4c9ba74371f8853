"""Floors of sanity, fitted once without an optimiser.

What is worse than the Gaussian has learnt nothing. In the plane, with many points, the kernels are hard to beat.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from sklearn.neighbors import KernelDensity
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from comparisons.methods.density import Density, Images, Method, Shape

JITTER = 1e-6  # on the diagonal of the covariance, as in scikit-learn's GaussianMixture
BANDWIDTHS = np.geomspace(0.02, 1.0, 12)  # in the units of the data, which are near standard deviations


class Gaussian(nn.Module):
    """Mean and Cholesky factor of the covariance; a standard normal until it is fitted."""

    mean: Tensor
    factor: Tensor

    def __init__(self, features: int, width: int, context_features: int | None) -> None:
        super().__init__()
        self.shape: Shape = (features,)  # of a point
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("factor", torch.eye(features))

    def distribution(self) -> MultivariateNormal:
        return MultivariateNormal(self.mean, scale_tril=self.factor)


def gaussian_of_images(shape: Shape, width: int, context_features: int | None) -> Gaussian:
    """Of pixels in a row, as they are: a Gaussian has no use for a logit."""
    gaussian = Gaussian(math.prod(shape), width, context_features)
    gaussian.shape = shape
    return gaussian


class GaussianDensity(Density):
    """A normal distribution with full covariance: x = mean + factor z."""

    def fit(self, train: Tensor, validation: Tensor) -> None:
        train = train.flatten(1)
        self.flow.mean.copy_(train.mean(0))
        self.flow.factor.copy_(torch.linalg.cholesky(train.T.cov() + JITTER * torch.eye(train.shape[1]).to(train)))

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.given(len(x), context)
        return self.flow.distribution().log_prob(x.flatten(1))

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        self.given(n, context)
        return self.flow.distribution().sample((n,)).unflatten(1, self.flow.shape)

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.given(len(x), context)
        return torch.linalg.solve_triangular(self.flow.factor, (x.flatten(1) - self.flow.mean).T, upper=False).T

    def to_data(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.given(len(z), context)
        return (self.flow.mean + z @ self.flow.factor.T).unflatten(1, self.flow.shape)


class Kernels(nn.Module):
    """scikit-learn's estimate, None until it is fitted. It is no tensor, so a state_dict does not carry it."""

    def __init__(self, features: int, width: int, context_features: int | None) -> None:
        super().__init__()
        self.estimate: KernelDensity | None = None


class KernelsDensity(Density):
    """A Gaussian kernel on every train point, with the bandwidth that validation likes best."""

    invertible: ClassVar[bool] = False

    def fit(self, train: Tensor, validation: Tensor) -> None:
        points, held_out = train.cpu().numpy(), validation.cpu().numpy()
        estimates = [KernelDensity(bandwidth=bandwidth).fit(points) for bandwidth in BANDWIDTHS]
        self.flow.estimate = max(estimates, key=lambda estimate: estimate.score(held_out))

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.given(len(x), context)
        return torch.from_numpy(self.fitted().score_samples(x.detach().cpu().numpy())).to(x)

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        self.given(n, context)
        seed = int(torch.randint(2**31, ()))  # so that torch's seed suffices
        return torch.from_numpy(self.fitted().sample(n, random_state=seed)).to(torch.get_default_dtype())

    def fitted(self) -> KernelDensity:
        if self.flow.estimate is None:
            raise RuntimeError("The kernel density has no train points yet; call fit(train, validation) first.")
        return self.flow.estimate


METHODS = (
    Method(
        "gaussian",
        "Gaussian with full covariance: a floor, fitted in closed form",
        "floor",
        "Gauss 1809",
        Gaussian,
        GaussianDensity,
        learning_rate=0.0,
        grid=(),
        conditional=False,
        largest=1,
        fit=GaussianDensity.fit,
        images=Images(gaussian_of_images, GaussianDensity),
    ),
    Method(
        "kde",
        "Kernel density of scikit-learn: a floor, its bandwidth chosen on validation",
        "floor",
        "Parzen 1962",
        Kernels,
        KernelsDensity,
        learning_rate=0.0,
        grid=(),
        conditional=False,
        largest=1,
        fit=KernelsDensity.fit,
    ),
)
