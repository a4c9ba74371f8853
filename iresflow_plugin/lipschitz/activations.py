"""Activations with known Lipschitz constants: one class each, and a table for torch's own.

| activation  | f(x)                                      | constant    | reference                               |
|-------------|-------------------------------------------|-------------|-----------------------------------------|
| `Sine`      | sin(w x) / w, w > 0 learnable per feature | 1           | Sitzmann et al. 2020, 2006.09661        |
| `SinCos`    | [sin(w x); cos(w x)] / w, w > 0 learnable | 1           | Tancik et al. 2020, 2006.10739          |
| `LipSwish`  | x sigmoid(s x) / 1.1, s > 0 learnable     | 1.09984/1.1 | Chen et al. 2019, 1906.02735            |
| `CLipSwish` | [LipSwish(x); LipSwish(-x)] / 1.004       | 1           | Perugachi-Diaz et al. 2021, 2102.02694  |
| `CPila`     | [Pila(x - 0.2); Pila(-x - 0.2)] / 1.06    | 1           | Ahn et al. 2022, 2210.08176             |
| `MaxMin`    | larger and smaller of pairs of features   | 1           | Anil, Lucas and Grosse 2019, 1811.05381 |
| torch's own | ELU, Softplus, Tanh, Sigmoid, SiLU, ...   | `CONSTANTS` |                                         |

Training a density needs a second derivative that is not zero: with a piecewise linear activation the log-det has no
gradient with respect to biases and inputs. Such activations are marked `smooth = False`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iresflow_plugin.errors import NotContractiveError
from iresflow_plugin.maps import Concatenation, Elementwise, Linearised, Map


class Activation(nn.Module):
    """Base class: `constant` bounds the slope, `expansion` is how many features come out for one that goes in."""

    constant: float = 1.0
    smooth: bool = True
    expansion: int = 1

    def __init__(self, features: int = 1, spatial_dims: int = 0) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}.")
        self.shape = (features,) + (1,) * spatial_dims
        self.dim = -1 - spatial_dims

    def slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) and f'(x), both differentiable."""
        raise NotImplementedError

    def as_map(self) -> Map:
        """The activation as a `Map`; elementwise unless a subclass says otherwise."""
        return Elementwise(self.forward, self.slope, self.constant)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _Periodic(Activation):
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
        """w, in radians per unit of x, shape (features, 1, ...)."""
        return self.log_frequency.exp()

    def angle(self, x: Tensor, w: Tensor) -> Tensor:
        """w x, entry by entry: an input that frequencies would copy is longer than before, and refused."""
        angle = w * x
        if angle.shape != x.shape:
            raise ValueError(
                f"{type(self).__name__} has {self.shape[0]} frequencies along dimension {self.dim}, and its inputs "
                f"have shape {tuple(x.shape)}: build it with their features and spatial_dims."
            )
        return angle


class Sine(_Periodic):
    """sin(w x) / w with a learnable frequency w > 0 per feature (Sitzmann et al. 2020, arXiv 2006.09661).

    Args:
        features: number of features, the size of dimension -1 (or of the channels, with `spatial_dims` behind them).
        spatial_dims: how many dimensions follow the features; 0 for vectors, 2 for images.
        low, high: the frequencies start spread evenly in log w between these, in radians per unit of x.

    >>> [round(w, 4) for w in Sine(2, low=1.0, high=4.0).frequency.tolist()]
    [1.0, 4.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        w = self.frequency
        return torch.sin(self.angle(x, w)) / w

    def slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w = self.frequency
        angle = self.angle(x, w)
        return torch.sin(angle) / w, torch.cos(angle)


class SinCos(_Periodic):
    """[sin(w x); cos(w x)] / w, doubling the features, with a learnable frequency w > 0 per feature.

    The Fourier features of Tancik et al. 2020 (arXiv 2006.10739) as an activation. Its slopes (cos, -sin) have length
    one everywhere: where the sine is flat the cosine is not, so a branch need not give away any of its bound.

    Args:
        features, spatial_dims, low, high: as for `Sine`.
    """

    expansion = 2

    def forward(self, x: Tensor) -> Tensor:
        w = self.frequency
        angle = self.angle(x, w)
        return torch.cat([torch.sin(angle) / w, torch.cos(angle) / w], self.dim)

    def as_map(self) -> Map:
        return _Circle(self)


class _Circle(Map):
    """`SinCos`, with one sine and one cosine for both value and slopes."""

    ceiling = 1.0

    def __init__(self, module: SinCos) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)

    def linearise(self, x: Tensor) -> Linearised:
        dim, w = self.module.dim, self.module.frequency
        angle = self.module.angle(x, w)
        sin, cos = torch.sin(angle), torch.cos(angle)

        def jvp(tangent: Tensor) -> Tensor:
            return torch.cat([tangent * cos, tangent * -sin], dim)

        def vjp(cotangent: Tensor) -> Tensor:
            first, second = cotangent.chunk(2, dim)
            return first * cos - second * sin

        return Linearised(torch.cat([sin / w, cos / w], dim), jvp, vjp)


class LipSwish(Activation):
    """x sigmoid(s x) / 1.1 with s = softplus(b) learnable (Chen et al. 2019, arXiv 1906.02735).

    The slope of x sigmoid(s x) is at most 1.09984 for every s.
    """

    constant = 1.09984 / 1.1

    def __init__(self, features: int = 1, spatial_dims: int = 0) -> None:
        super().__init__(features, spatial_dims)
        self.b = nn.Parameter(torch.full((1,) * len(self.shape), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(F.softplus(self.b) * x) / 1.1

    def slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = F.softplus(self.b) * x
        gate = torch.sigmoid(z)
        return x * gate / 1.1, gate * (1 + z * (1 - gate)) / 1.1


class _Concatenated(Activation):
    """[f(x); f(-x)] / c, whose slopes (f'(x), f'(-x)) / c have length at most `constant`."""

    expansion = 2

    def piece(self, x: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        """f(sign x) / c and its derivative with respect to x."""
        raise NotImplementedError

    def as_map(self) -> Map:
        halves = [
            Elementwise(lambda x, s=s: self.piece(x, s)[0], lambda x, s=s: self.piece(x, s), self.constant)
            for s in (1, -1)
        ]
        return Concatenation(halves, self.dim, self.constant)

    def forward(self, x: Tensor) -> Tensor:
        return self.as_map()(x)


class CLipSwish(_Concatenated):
    """[LipSwish(x); LipSwish(-x)] / 1.004, doubling the features (Perugachi-Diaz et al. 2021, arXiv 2102.02694)."""

    def __init__(self, features: int = 1, spatial_dims: int = 0) -> None:
        super().__init__(features, spatial_dims)
        self.swish = LipSwish(features, spatial_dims)

    def piece(self, x: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        value, slope = self.swish.slope(sign * x)
        return value / 1.004, slope * (sign / 1.004)


class CPila(_Concatenated):
    """[Pila(x - 0.2); Pila(-x - 0.2)] / 1.06 (Ahn et al. 2022, arXiv 2210.08176).

    Pila(x) = x for x >= 0 and (k^2 x^3 / 2 - k x^2 + x) exp(k x) below, k = 5: an identity that fades out smoothly.
    """

    k = 5.0

    def piece(self, x: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        u = sign * x - 0.2
        z = self.k * u.clamp(max=0.0)  # clamped before exp, so that the unused side cannot overflow
        fade = z.exp()
        value = torch.where(u >= 0, u, (z * z * z / 2 - z * z + z) / self.k * fade)
        slope = torch.where(u >= 0, torch.ones_like(u), (z * z * z / 2 + z * z / 2 - z + 1) * fade)
        return value / 1.06, slope * (sign / 1.06)


class MaxMin(Activation):
    """Sorts pairs of features, (a, b) -> (max, min); keeps every norm, but has no second derivative."""

    smooth = False

    def __init__(self, features: int = 2, spatial_dims: int = 0) -> None:
        super().__init__(features, spatial_dims)
        if features % 2:
            raise ValueError(f"MaxMin sorts pairs and needs an even number of features, got {features}.")

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.halves(x)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], self.dim)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the second of every pair; of unequal halves one would be copied to meet the other."""
        if x.shape[self.dim] % 2:
            raise ValueError(
                f"MaxMin sorts pairs along dimension {self.dim} and needs an even number of features there, got inputs "
                f"of shape {tuple(x.shape)}: make the layer in front of it one feature wider."
            )
        a, b = x.chunk(2, self.dim)
        return a, b

    def as_map(self) -> Map:
        return _Sort(self)


class _Sort(Map):
    """The swap that sorts pairs; a swap is its own transpose up to which side it acts on."""

    ceiling = 1.0

    def __init__(self, module: MaxMin) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)

    def linearise(self, x: Tensor) -> Linearised:
        dim = self.module.dim
        a, b = self.module.halves(x)
        keep = a >= b

        def swap(t: Tensor) -> Tensor:
            first, second = t.chunk(2, dim)
            return torch.cat([torch.where(keep, first, second), torch.where(keep, second, first)], dim)

        return Linearised(self(x), swap, swap)


# Ours: what `LipschitzMLP(activation=...)` takes.
ACTIVATIONS: dict[str, type[Activation]] = {
    kind.__name__: kind for kind in (Sine, SinCos, LipSwish, CLipSwish, CPila, MaxMin)
}

# torch's own elementwise activations: (constant, smooth). Constants above 1 are divided out by `constrain`.
CONSTANTS: dict[type[nn.Module], tuple[float, bool]] = {
    nn.Identity: (1.0, True),
    nn.ELU: (1.0, True),
    nn.Softplus: (1.0, True),
    nn.Tanh: (1.0, True),
    nn.Sigmoid: (0.25, True),
    nn.Softsign: (1.0, True),
    nn.LogSigmoid: (1.0, True),
    nn.SiLU: (1.09984, True),
    nn.GELU: (1.12905, True),
    nn.Mish: (1.0885, True),
    nn.ReLU: (1.0, False),
    nn.LeakyReLU: (1.0, False),
    nn.Hardtanh: (1.0, False),
}


def elementwise_map(module: nn.Module) -> Map:
    """A torch activation of `CONSTANTS` as a `Map`, its slope by forward differentiation."""
    constant = CONSTANTS[type(module)][0]
    if getattr(module, "inplace", False):  # would change the caller's tensor
        module = copy.copy(module)
        module.inplace = False  # type: ignore[assignment]
    if isinstance(module, nn.Softplus) and module.threshold < 20:
        raise NotContractiveError(
            f"torch's Softplus jumps to the identity at its threshold, here {module.threshold}, and no constant "
            "bounds a jump; leave the threshold at 20.",
            module,
        )
    if isinstance(module, nn.ELU):
        constant = max(1.0, abs(float(module.alpha)))
    if isinstance(module, nn.LeakyReLU):
        constant = max(1.0, abs(float(module.negative_slope)))

    def with_slope(x: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = torch.func.jvp(module, (x,), (torch.ones_like(x),))[:2]
        return value, slope

    return Elementwise(module, with_slope, constant)


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
