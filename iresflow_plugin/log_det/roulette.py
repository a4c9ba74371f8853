"""The power series with a random number of terms, reweighted to be unbiased."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iresflow_plugin.errors import check_whole
from iresflow_plugin.log_det.estimate import Estimate
from iresflow_plugin.log_det.probes import Probes, as_probes
from iresflow_plugin.log_det.series import Tails, Weigh, Weights, estimate_series
from iresflow_plugin.maps import Map
from iresflow_plugin.torch_state import draw_number, draw_options, is_readable, norms


@dataclass(frozen=True)
class Decay:
    """P(N >= j) = |(J^T)^(m+j-1) v| / |(J^T)^(m-1) v|, each norm the largest of the batch: a term is computed as
    likely as the vector that it is made of is long.

    Every product with J^T shortens by L at least. So P(N >= j) <= L^j, and a reweighted term (J^T)^(m+j) v / P(N >= j)
    is no longer than L |(J^T)^(m-1) v| <= L^m |v|: the worst case is that of `Geometric()`, without a condition, and
    where J is smaller than its bound most of the terms are saved. Where the lengths cannot be read, as in
    torch.func.vmap, the value is the same and nothing is saved.
    """


@dataclass(frozen=True)
class Geometric:
    """P(N >= j) = (1 - p)^j, j = 0, 1, ...

    With p None, 1 - p = L, the block's bound: the probability then falls off as the terms can at worst, and the
    variance is finite, which needs L^2 < 1 - p.
    """

    p: float | None = None

    def __post_init__(self) -> None:
        if self.p is not None and not 0 < self.p < 1:
            raise ValueError(f"p must lie in (0, 1), got {self.p}.")

    def survival(self, j: int, bound: float) -> float:
        """P(N >= j)."""
        return self._stay(bound) ** j

    def sample(self, bound: float, generator: torch.Generator | None = None) -> int:
        """One draw of N."""
        stay = self._stay(bound)
        return 0 if stay == 0 else int(math.log1p(-_uniform(generator)) / math.log(stay))

    def _stay(self, bound: float) -> float:
        if self.p is None:
            return bound
        if bound**2 >= 1 - self.p:
            raise ValueError(
                f"With p = {self.p} and the block's bound L = {bound:.4g} the variance of the log-det may be infinite; "
                f"it needs L^2 < 1 - p, so take p < {1 - bound**2:.4g}, or None for p = 1 - L."
            )
        return 1 - self.p


@dataclass(frozen=True)
class Poisson:
    """P(N >= j) of a Poisson variable; its worst-case variance is infinite for every rate, but beyond the round-off.

    So a rate is refused if a term that counts, L^j > 1e-7, may be reweighted to more than its size: where
    L^(2 j) > P(N >= j).
    """

    rate: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be positive, got {self.rate}.")

    def survival(self, j: int, bound: float) -> float:
        """P(N >= j)."""
        return 1.0 if j == 0 else torch.special.gammainc(_double(j), _double(self.rate)).item()

    def sample(self, bound: float, generator: torch.Generator | None = None) -> int:
        """One draw of N."""
        count = 0 if bound == 0 else math.floor(math.log(1e-7) / math.log(bound))
        j = torch.arange(1, count + 1, dtype=torch.float64)
        heavy = bound ** (2 * j) > torch.special.gammainc(j, _double(self.rate))
        if bool(heavy.any()):
            raise ValueError(
                f"With rate = {self.rate} and the block's bound L = {bound:.4g} the variance of the log-det may be "
                f"huge: from its random term {int(heavy.nonzero()[0, 0]) + 1} on L^(2 j) exceeds P(N >= j). Take "
                f"Decay() or Geometric(), or a rate near {count}."
            )
        rate = _double(self.rate, generator)
        return int(draw_number(lambda: torch.poisson(rate, **draw_options(generator))))


@dataclass(frozen=True)
class RussianRoulette:
    """sum_k (-1)^(k+1) c_k E[v^T J^k v] / k, unbiased (Chen et al. 2019, arXiv 1906.02735).

    Draws N for every probe; c_k = 1 for k <= m and 1[N >= k - m] / P(N >= k - m) beyond. The value and the gradient are
    unbiased for log det(I + J); a distribution fixed beforehand is cut short only when all that follows is below the
    round-off of the sum. First derivatives only; `Exact` may be differentiated to any order.

    Args:
        distribution: of N: `Decay()`, which spends least, `Geometric()` or `Poisson(rate)`.
        exact_terms: m, the terms that are always there.
        probes: how many Rademacher probes, or `Rademacher(n)`, `Gaussian(n)`, `Orthogonal(n)`.
        generator: source of randomness; None is torch's global one.
    """

    distribution: Decay | Geometric | Poisson = Decay()
    exact_terms: int = 2
    probes: int | Probes = 1
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_whole("exact_terms", self.exact_terms)
        if not isinstance(self.distribution, (Decay, Geometric, Poisson)):
            raise TypeError(f"distribution must be Decay(), Geometric(p) or Poisson(rate), got {self.distribution!r}.")
        as_probes(self.probes)

    def __call__(self, g: Map, x: Tensor) -> Estimate:
        bound = g.ceiling  # not g.bound: reading that would make the host wait for the device
        v = as_probes(self.probes).draw(x, self.generator)
        if isinstance(self.distribution, Decay):
            draws = [_uniform(self.generator) for _ in range(v.shape[0])]
            estimate = estimate_series(g, x, v, _by_length(draws, self.exact_terms, bound))
        else:
            weights = self._weights(self.distribution, v.shape[0], bound)
            tails = _tails(weights, bound)
            estimate = estimate_series(g, x, v, lambda k, _: weights[k - 1] if k <= len(weights) else None, tails)
        return replace(estimate, remainder=torch.zeros_like(estimate.remainder))

    def _weights(self, distribution: Geometric | Poisson, probes: int, bound: float) -> list[list[float]]:
        """Of all terms up to the largest N drawn."""
        draws = [distribution.sample(bound, self.generator) for _ in range(probes)]
        heavier = [1 / distribution.survival(j, bound) for j in range(1, max(draws) + 1)]
        beyond = [[weight * (j <= n) for n in draws] for j, weight in enumerate(heavier, start=1)]
        return [*[[1.0]] * self.exact_terms, *beyond]


def _tails(weights: Sequence[Sequence[float]], bound: float) -> Tails:
    """sum_{j > k} weights[j-1] L^(j-k) / j for the heaviest probe."""
    tails = [0.0]
    for j in range(len(weights), 0, -1):
        tails.append(bound * (max(weights[j - 1]) / j + tails[-1]))
    return tails[::-1].__getitem__


def _by_length(draws: Sequence[float], exact_terms: int, bound: float) -> Weigh:
    """`Decay`: N >= j where a uniform number, one for each probe, lies below P(N >= j), which falls with j."""
    first: list[Tensor] = []

    def weigh(k: int, vector: Tensor) -> Weights | None:
        j = k - exact_terms
        if j < 0 or vector.numel() == 0:
            return [1.0] if j <= 0 else None
        longest = _longest(vector)
        if j == 0:
            first.append(longest)
            return [1.0]
        survival = longest / first[0]
        alive = longest.new_tensor(draws) < survival
        more = bool(alive.any()) if is_readable(alive) else min(draws) < bound**j
        return torch.where(alive, 1 / survival, 0.0) if more else None

    return weigh


def _longest(vector: Tensor) -> Tensor:
    """Of every probe, shape (K,), over the rows that are finite: what is NaN or infinite decides for nobody."""
    lengths = norms(vector.flatten(0, 1)).view(vector.shape[:2])
    return torch.where(torch.isfinite(lengths), lengths, 0.0).amax(1)


def _uniform(generator: torch.Generator | None) -> float:
    """One number in [0, 1), drawn where the generator lives; torch's global one is on the CPU."""
    device = "cpu" if generator is None else generator.device
    return draw_number(lambda: torch.rand((), dtype=torch.float64, device=device, **draw_options(generator)))


def _double(number: float, generator: torch.Generator | None = None) -> Tensor:
    return torch.tensor(number, dtype=torch.float64, device="cpu" if generator is None else generator.device)
