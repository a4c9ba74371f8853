"""Activations with known Lipschitz constants, one class each; torch's own are in `torch_activations`.

| activation  | f(x)                                      | constant    | reference                               |
|-------------|-------------------------------------------|-------------|-----------------------------------------|
| `Sine`      | sin(w x) / w, w > 0 learnable per feature | 1           | Sitzmann et al. 2020, 2006.09661        |
| `SinCos`    | [sin(w x); cos(w x)] / w, w > 0 learnable | 1           | Tancik et al. 2020, 2006.10739          |
| `LipSwish`  | x sigmoid(s x) / 1.1, s > 0 learnable     | 1.09984/1.1 | Chen et al. 2019, 1906.02735            |
| `CLipSwish` | [LipSwish(x); LipSwish(-x)] / 1.004       | 1           | Perugachi-Diaz et al. 2021, 2102.02694  |
| `CPila`     | [Pila(x - 0.2); Pila(-x - 0.2)] / 1.06    | 1           | Ahn et al. 2022, 2210.08176             |
| `MaxMin`    | larger and smaller of pairs of features   | 1           | Anil, Lucas and Grosse 2019, 1811.05381 |

Training a density needs a second derivative that is not zero: with a piecewise linear activation the log-det has no
gradient with respect to biases and inputs. Such activations are marked `smooth = False`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iresflow_plugin.lipschitz.part import Part
from iresflow_plugin.maps import Concatenation, Elementwise, Linearised, Map, Products, Rounded, elementwise


class Activation(Part):
    """Base class: `expansion` is how many features come out for one that goes in; `smooth`, see above."""

    smooth: bool = True
    expansion: int = 1

    def __init__(self, features: int = 1, spatial_dims: int = 0) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}.")
        self.shape = (features,) + (1,) * spatial_dims
        self.dim = -1 - spatial_dims


class Periodic(Activation):
    """A learnable frequency w > 0 per feature, spread evenly in log w between `low` and `high` at the start."""

    def __init__(self, features: int = 1, spatial_dims: int = 0, low: float = 2.0, high: float = 40.0) -> None:
        super().__init__(features, spatial_dims)
        if not 0 < low <= high:
            raise ValueError(f"frequencies need 0 < low <= high, got low={low}, high={high}.")
        start = (
            torch.linspace(math.log(low), math.log(high), features)
            if features > 1
            else torch.tensor([math.log(low * high) / 2])
        )
        self.log_frequency = nn.Parameter(start.reshape(self.shape))

    @property
    def frequency(self) -> Tensor:
        """w, in radians per unit of x, shape (features, 1, ...); lower ones than eps would be waves of no curvature."""
        w = self.log_frequency.exp()
        return w.clamp_min(torch.finfo(w.dtype).eps)


class Sine(Periodic):
    """sin(w x) / w with a learnable frequency w > 0 per feature (Sitzmann et al. 2020, arXiv 2006.09661).

    Args:
        features: number of features, the size of dimension -1 (or of the channels, with `spatial_dims` behind them).
        spatial_dims: how many dimensions follow the features; 0 for vectors, 2 for images.
        low, high: the frequencies start spread evenly in log w between these, in radians per unit of x.

    >>> [round(w, 4) for w in Sine(2, low=1.0, high=4.0).frequency.tolist()]
    [1.0, 4.0]
    """

    def as_map(self, context: Tensor | None = None) -> Map:
        return Elementwise(_sine, _sine_with_slope, 1.0, (self.frequency,))


def _sine(x: Tensor, w: Tensor) -> Tensor:
    return torch.sin(w * x) / w


def _sine_with_slope(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    angle = w * x
    return torch.sin(angle) / w, torch.cos(angle)


class SinCos(Periodic):
    """[sin(w x); cos(w x)] / w, doubling the features, with a learnable frequency w > 0 per feature.

    The Fourier features of Tancik et al. 2020 (arXiv 2006.10739) as an activation. Its slopes (cos, -sin) have length
    one everywhere: where the sine is flat the cosine is not, so a branch need not give away any of its bound.

    Args:
        features, spatial_dims, low, high: as for `Sine`.
    """

    expansion = 2

    def as_map(self, context: Tensor | None = None) -> Map:
        return _Circle(self.frequency, self.dim)


@dataclass(eq=False)
class _Circle(Map):
    """`SinCos`, with one sine and one cosine for both value and slopes."""

    w: Tensor
    dim: int

    @property
    def ceiling(self) -> float:
        return 1.0

    def __call__(self, x: Tensor) -> Tensor:
        angle = self._angle(x)
        return torch.cat([torch.sin(angle) / self.w, torch.cos(angle) / self.w], self.dim)

    def linearise(self, x: Tensor) -> Linearised:
        angle, dim = self._angle(x), self.dim
        sin, cos = torch.sin(angle), torch.cos(angle)

        def jvp(tangent: Tensor) -> Tensor:
            return torch.cat([tangent * cos, tangent * -sin], dim)

        def vjp(cotangent: Tensor) -> Tensor:
            first, second = cotangent.chunk(2, dim)
            return first * cos - second * sin

        return Linearised(torch.cat([sin / self.w, cos / self.w], dim), jvp, vjp)

    def rounded(self, x: Rounded, products: Products) -> Rounded:
        return elementwise(x, self(x.value), 1.0, products)

    def _angle(self, x: Tensor) -> Tensor:
        angle = self.w * x
        if angle.shape != x.shape:
            raise ValueError(
                f"SinCos has {self.w.shape[0]} frequencies along dimension {self.dim}, and its inputs "
                f"have shape {tuple(x.shape)}: build it with their features and spatial_dims."
            )
        return angle


class LipSwish(Activation):
    """x sigmoid(s x) / 1.1 with s = softplus(b) learnable (Chen et al. 2019, arXiv 1906.02735).

    The slope of x sigmoid(s x) is at most 1.09984 for every s.
    """

    def __init__(self, features: int = 1, spatial_dims: int = 0) -> None:
        super().__init__(features, spatial_dims)
        self.b = nn.Parameter(torch.full((1,) * len(self.shape), 0.5))

    def as_map(self, context: Tensor | None = None) -> Map:
        return Elementwise(_swish, _swish_with_slope, 1.09984 / 1.1, (F.softplus(self.b),))


def _swish(x: Tensor, s: Tensor) -> Tensor:
    return x * torch.sigmoid(s * x) / 1.1


def _swish_with_slope(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    z = s * x
    gate = torch.sigmoid(z)
    return x * gate / 1.1, gate * (1 + z * (1 - gate)) / 1.1


class CLipSwish(Activation):
    """[LipSwish(x); LipSwish(-x)] / 1.004, doubling the features (Perugachi-Diaz et al. 2021, arXiv 2102.02694)."""

    expansion = 2

    def __init__(self, features: int = 1, spatial_dims: int = 0) -> None:
        super().__init__(features, spatial_dims)
        self.swish = LipSwish(features, spatial_dims)

    def as_map(self, context: Tensor | None = None) -> Map:
        return _mirrored(_swish_with_slope, 1.004, self.dim, F.softplus(self.swish.b), slack=2.0)


class CPila(Activation):
    """[Pila(x - 0.2); Pila(-x - 0.2)] / 1.06 (Ahn et al. 2022, arXiv 2210.08176).

    Pila(x) = x for x >= 0 and (k^2 x^3 / 2 - k x^2 + x) exp(k x) below, k = 5: an identity that fades out smoothly.
    """

    expansion = 2

    def as_map(self, context: Tensor | None = None) -> Map:
        return _mirrored(_pila_with_slope, 1.06, self.dim, slack=4.0)


def _pila_with_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    u = x - 0.2
    z = 5 * u.clamp(max=0.0)  # clamped before exp, so that the unused side cannot overflow
    fade = z.exp()
    value = torch.where(u >= 0, u, (z * z * z / 2 - z * z + z) / 5 * fade)
    return value, torch.where(u >= 0, torch.ones_like(u), (z * z * z / 2 + z * z / 2 - z + 1) * fade)


def _mirrored(
    with_slope: Callable[..., tuple[Tensor, Tensor]], divisor: float, dim: int, *parameters: Tensor, slack: float = 1.0
) -> Concatenation:
    """[f(x); f(-x)] / divisor, whose two slopes together have length at most one."""

    def half(sign: int) -> Elementwise:
        def both(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
            value, slope = with_slope(sign * x, *parameters)
            return value / divisor, slope * (sign / divisor)

        return Elementwise(lambda x, *p: both(x, *p)[0], both, 1.0, parameters, slack)

    return Concatenation((half(1), half(-1)), dim, most=1.0)


class MaxMin(Activation):
    """Sorts pairs of features, (a, b) -> (max, min); keeps every norm, but has no second derivative."""

    smooth = False

    def __init__(self, features: int = 2, spatial_dims: int = 0) -> None:
        super().__init__(features, spatial_dims)
        if features % 2:
            raise ValueError(f"MaxMin sorts pairs and needs an even number of features, got {features}.")

    def as_map(self, context: Tensor | None = None) -> Map:
        return _Sort(self.dim)


@dataclass(eq=False)
class _Sort(Map):
    """The swap that sorts pairs; a swap is its own transpose up to which side it acts on."""

    dim: int

    @property
    def ceiling(self) -> float:
        return 1.0

    def __call__(self, x: Tensor) -> Tensor:
        a, b = self._halves(x)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], self.dim)

    def linearise(self, x: Tensor) -> Linearised:
        a, b = self._halves(x)
        keep = a >= b

        def swap(t: Tensor) -> Tensor:
            first, second = t.chunk(2, self.dim)
            return torch.cat([torch.where(keep, first, second), torch.where(keep, second, first)], self.dim)

        return Linearised(self(x), swap, swap)

    def rounded(self, x: Rounded, products: Products) -> Rounded:
        return x._replace(value=self(x.value))

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the second of every pair; of unequal halves one would be copied to meet the other."""
        if x.shape[self.dim] % 2:
            raise ValueError(
                f"MaxMin sorts pairs along dimension {self.dim} and needs an even number of features there, got inputs "
                f"of shape {tuple(x.shape)}: make the layer in front of it one feature wider."
            )
        a, b = x.chunk(2, self.dim)
        return a, b


# Ours: what `LipschitzMLP(activation=...)` takes.
ACTIVATIONS: dict[str, type[Activation]] = {
    kind.__name__: kind for kind in (Sine, SinCos, LipSwish, CLipSwish, CPila, MaxMin)
}


def build_activation(
    activation: nn.Module | Callable[..., nn.Module], features: int, spatial_dims: int = 0
) -> nn.Module:
    """An activation from a class, a function of (features, spatial_dims), or a module to copy, giving `features` out.

    One that expands its input, such as `SinCos`, is built for the fewer features that go in (rounded up).
    """
    if isinstance(activation, nn.Module):
        return copy.deepcopy(activation)
    if isinstance(activation, type) and issubclass(activation, nn.Module) and not issubclass(activation, Activation):
        return activation()
    dims = (spatial_dims,) if spatial_dims else ()
    try:
        built = activation(features, *dims)
    except TypeError as error:
        built = error
    if not isinstance(built, nn.Module):
        raise TypeError(
            "activation must be a class such as Sine or nn.ELU, a module, or a function of the number of features "
            f"that returns a module, got {activation!r}."
        )
    expansion = getattr(built, "expansion", 1)
    return built if expansion == 1 else activation(math.ceil(features / expansion), *dims)
