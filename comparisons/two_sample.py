"""How far samples lie from data: distances between two sets of points, for flows whose likelihoods cannot be compared.

Each is a function (samples, data) -> float of tensors (n, D) and (m, D), computed in double precision. None of them is
zero for a perfect model and finitely many points: read each beside its floor, the distance of fresh data to the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ENTRIES = 2**22  # distances held at a time
MEDIAN_POINTS = 2000
DIRECTIONS = 500

Distance = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class WithFloor:
    """The distance of samples to data, and what fresh data would score in their place."""

    distance: float
    floor: float


def with_floor(distance: Distance, samples: Tensor, data: Tensor, other_data: Tensor) -> WithFloor:
    """distance(samples, data) beside distance(other_data, data): the second is finite data alone.

    Take as many rows of other data as samples, else the floor belongs to another number of points.
    """
    if len(samples) != len(other_data):
        raise ValueError(
            f"A floor needs as many points as there are samples: got {len(samples)} samples and {len(other_data)} rows "
            f"of other data; take the first {min(len(samples), len(other_data))} of both."
        )
    return WithFloor(distance(samples, data), distance(other_data, data))


def energy_distance(samples: Tensor, data: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely and Rizzo 2013), unbiased; zero only for equal laws.

    The means leave out pairs of a point with itself, so for equal laws the value scatters around 0 and may be negative.
    """
    x, y = checked(samples, data)
    return 2 * mean_over_pairs(torch.cdist, x, y) - within(torch.cdist, x) - within(torch.cdist, y)


def maximum_mean_discrepancy(samples: Tensor, data: Tensor, bandwidth: float | None = None) -> float:
    """MMD^2 = E k(X, X') + E k(Y, Y') - 2 E k(X, Y), k = exp(-|x - y|^2 / 2h^2) (Gretton et al. 2012), unbiased.

    Args:
        samples, data: shapes (n, D) and (m, D).
        bandwidth: h; None is the median distance in the data alone, so that it is the same for every model.
    """
    x, y = checked(samples, data)
    h = median_distance(y) if bandwidth is None else bandwidth

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(a, b).div_(h).square_().mul_(-0.5).exp_()

    return within(kernel, x, itself=1.0) + within(kernel, y, itself=1.0) - 2 * mean_over_pairs(kernel, x, y)


def sliced_wasserstein(samples: Tensor, data: Tensor, p: int = 2, directions: int = DIRECTIONS, seed: int = 0) -> float:
    """(E_u W_p(u.X, u.Y)^p)^(1/p) over directions u uniform on the sphere (Bonneel et al. 2015), p = 1 or 2.

    The directions depend on the seed and D alone, so that all models are seen from the same sides.
    """
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}.")
    x, y = checked(samples, data)
    u = torch.randn(x.shape[1], directions, generator=torch.Generator().manual_seed(seed), dtype=x.dtype).to(x.device)
    u = u / u.norm(dim=0)
    n, m = len(x), len(y)
    # Both quantile functions are steps, at i/n and j/m; in units of 1/(nm) all steps are whole numbers.
    ends = torch.cat([m * torch.arange(1, n + 1), n * torch.arange(1, m + 1)]).unique().to(x.device)
    share = torch.diff(ends, prepend=ends.new_zeros(1)).to(x.dtype) / (n * m)
    gaps = (x @ u).sort(dim=0).values[(ends - 1) // m] - (y @ u).sort(dim=0).values[(ends - 1) // n]
    return (share @ gaps.abs() ** p).mean().item() ** (1 / p)


DISTANCES: dict[str, Distance] = {
    "energy distance": energy_distance,
    "sliced Wasserstein": sliced_wasserstein,
    "MMD²": maximum_mean_discrepancy,
}


def median_distance(data: Tensor) -> float:
    """The median distance between two points, among the first `MEDIAN_POINTS`."""
    median = torch.pdist(data[:MEDIAN_POINTS].double()).median().item()
    if not median > 0:
        raise ValueError("Half of the data's distances are 0, so their median is no bandwidth: give one.")
    return median


def mean_over_pairs(of: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Mean of `of`(x_i, y_j) over all pairs, some rows at a time."""
    rows = max(1, CHUNK_ENTRIES // len(y))
    return sum(of(part, y).sum().item() for part in x.split(rows)) / (len(x) * len(y))


def within(of: Callable[[Tensor, Tensor], Tensor], x: Tensor, itself: float = 0.0) -> float:
    """Mean over pairs of different points, when a point with itself gives `itself`."""
    n = len(x)
    return (mean_over_pairs(of, x, x) * n - itself) / (n - 1)


def checked(samples: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    """Both in double precision, if they are two sets of finite points of one dimension."""
    for name, x in (("samples", samples), ("data", data)):
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"{name} must have shape (n, D) with n >= 2, got {tuple(x.shape)}; flatten the events.")
        broken = int((~torch.isfinite(x)).any(1).sum())
        if broken:
            raise ValueError(f"{broken} of {len(x)} {name} are not finite; a distance would hide them: report them.")
    if samples.shape[1] != data.shape[1]:
        raise ValueError(f"samples have {samples.shape[1]} dimensions and data {data.shape[1]}; they must be equal.")
    return samples.double(), data.double()
