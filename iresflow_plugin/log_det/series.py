"""log det(I + J) = sum_{k >= 1} (-1)^(k+1) tr(J^k) / k, truncated, with random probes for the trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iresflow_plugin.errors import check_whole
from iresflow_plugin.log_det.estimate import Estimate, held_still, with_gradient_of
from iresflow_plugin.log_det.probes import Probes, as_probes
from iresflow_plugin.maps import Linearised, Map, recomputed
from iresflow_plugin.torch_state import inside_functorch, is_readable, single

Weights = Sequence[float] | Tensor  # of one term: for all probes, or for each
Weigh = Callable[[int, Tensor], Weights | None]  # (k, (J^T)^(k-1) v) -> weights of the k-th term; None ends the series
Tails = Callable[[int], float]  # a bound of what follows k terms, per |v| |(J^T)^k v|


@dataclass(frozen=True)
class PowerSeries:
    """sum_{k=1}^n (-1)^(k+1) E[v^T J^k v] / k (Behrmann et al. 2019, arXiv 1811.00995).

    After k terms the rest is at most |v| |(J^T)^k v| L / ((k + 1)(1 - L)) by the block's certified bound L. What the
    vectors have in fact shrunk to is never more than the a-priori L^k |v|, so this is the smaller of the two bounds;
    with a `tolerance` the series stops by it. First derivatives only; `Exact` may be differentiated to any order.

    Args:
        terms: fixed number of terms; or
        tolerance: stop when the remainder of every sample is below this many nats.
        probes: how many Rademacher probes, or `Rademacher(n)`, `Gaussian(n)`, `Orthogonal(n)`.
        generator: source of randomness; None is torch's global one.
    """

    terms: int | None = None
    tolerance: float | None = None
    probes: int | Probes = 1
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if (self.terms is None) == (self.tolerance is None):
            raise ValueError(f"Give either terms or tolerance, got terms={self.terms} and tolerance={self.tolerance}.")
        if self.terms is not None:
            check_whole("terms", self.terms)
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"tolerance must be a positive number of nats, got {self.tolerance}.")
        as_probes(self.probes)

    def __call__(self, g: Map, x: Tensor) -> Estimate:
        bound = g.bound
        v = as_probes(self.probes).draw(x, self.generator)
        most = self.terms or terms_needed(bound, max(1, x.shape[1:].numel()), self.tolerance or 0.0)

        def weigh(k: int, vector: Tensor) -> Weights | None:
            stops = self.tolerance is not None and is_readable(vector)  # where the remainder can be read, it ends it
            return [1.0] if k <= most or stops else None

        return estimate_series(g, x, v, weigh, lambda k: bound / ((k + 1) * (1 - bound)), self.tolerance)


def terms_needed(bound: float, size: float, tolerance: float) -> int:
    """The terms after which D L^(n+1) / ((n + 1)(1 - L)) <= tolerance, whatever the Jacobian.

    >>> terms_needed(0.9, size=1, tolerance=1e-3)
    50
    """
    if bound == 0:
        return 1
    high = 1
    while size * bound ** (high + 1) / ((high + 1) * (1 - bound)) > tolerance:
        high *= 2
    low = high // 2  # too few, or none
    while high - low > 1:
        n = (low + high) // 2
        low, high = (n, high) if size * bound ** (n + 1) / ((n + 1) * (1 - bound)) > tolerance else (low, n)
    return high


def estimate_series(
    g: Map, x: Tensor, v: Tensor, weigh: Weigh, tails: Tails | None = None, tolerance: float | None = None
) -> Estimate:
    """sum_k (-1)^(k+1) c_k v^T J^k v / k with weights c_k, and the gradient of its expectation.

    Its gradient is tr(sum_k (-1)^(k-1) c_k J^(k-1) dJ) (the Neumann gradient, Chen et al. 2019, arXiv 1906.02735): the
    sum w = sum_k (-1)^(k-1) c_k (J^T)^(k-1) v is built without a graph and meets dJ in one product with a graph, so
    memory does not grow with the number of terms. First derivatives only: w holds still.
    For images, whose hidden layers are large, the backward pass evaluates g and that product once more instead of
    keeping what lies in between: a block then holds x, v and w.

    Args:
        v: probes, shape (K, B, *event).
        weigh: c_k, one number or one per probe.
        tails: bounds what was left out; None if `weigh` alone ends the series.
        tolerance: stop as soon as what follows is below this for all samples; None stops at round-off.
    """
    sums: list[tuple[Tensor, Tensor, Tensor, int]] = []

    def evaluate(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """g(x) and v^T (dJ) w; the series itself is summed the first time alone."""
        at_x = g.holding(tensors).linearise(x)
        if not sums:
            sums.append(_sum_series(at_x, v, weigh, tails, tolerance))
        return at_x.value, _dot(at_x.jvp(v), held_still(sums[0][1])).mean(0)

    if not torch.is_grad_enabled() and not inside_functorch():
        at_x = g.linearise(x)
        return _estimate(at_x.value, *_sum_series(at_x, v, weigh, tails, tolerance), v.dtype)
    pays = x.ndim > 2 and not torch.compiler.is_compiling() and not inside_functorch()
    image, surrogate = recomputed(evaluate, x, *g.tensors()) if pays else evaluate(x, *g.tensors())
    estimate = _estimate(image, *sums[0], v.dtype)
    return replace(estimate, log_det=with_gradient_of(surrogate.to(v.dtype), estimate.log_det, g, x))


def _estimate(image: Tensor, value: Tensor, w: Tensor, remainder: Tensor, terms: int, dtype: torch.dtype) -> Estimate:
    count = len(value)
    known = count > 1 and len(image)
    error = value.std(0) / count**0.5 if known else torch.full_like(value[0], math.nan)
    return Estimate(image, value.mean(0).to(dtype), error, remainder.mean(0), terms)


@torch.no_grad()
def _sum_series(
    at_x: Linearised, v: Tensor, weigh: Weigh, tails: Tails | None, tolerance: float | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The series per probe and sample, the Neumann vector w, the bound of what was left out, the terms used."""
    length = _dot(v, v).sqrt()
    round_off = (torch.finfo(length.dtype).eps * length**2).mean(0)
    enough = round_off if tolerance is None else torch.full_like(round_off, tolerance)
    w = torch.zeros_like(v)
    value, vector, remainder = _dot(w, w), v, length**2 * (tails(0) if tails else 0.0)
    k = 0
    look_every = 1 if v.device.type == "cpu" else 4  # a look makes the host wait for the device
    while (weight := weigh(k + 1, vector)) is not None:
        k += 1
        sign = 1.0 if k % 2 else -1.0
        w = w + _weighted(vector, weight, sign)
        vector = at_x.vjp(vector)
        value = value + _weighted(_dot(vector, v), weight, sign / k)
        if tails is None:
            continue
        remainder = length * _dot(vector, vector).sqrt() * tails(k)
        if k % look_every == 0 and is_readable(remainder) and not bool(_too_large(remainder.mean(0), enough).any()):
            break
    return value, w, remainder, k


def _too_large(remainder: Tensor, enough: Tensor) -> Tensor:
    """Where more terms are needed: not for rows that are NaN or infinite, which they cannot help."""
    return (remainder > enough) & torch.isfinite(remainder)


def _weighted(term: Tensor, weight: Weights, factor: float) -> Tensor:
    """factor weight term, with a weight of its own for every probe if there are several."""
    if not isinstance(weight, Tensor) and len(weight) == 1:
        return term * (factor * weight[0])
    each = torch.as_tensor(weight, dtype=term.dtype, device=term.device)
    return term * (factor * each.view(-1, *[1] * (term.ndim - 1)))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the event, shape (K, B), accumulated in at least single precision."""
    return (single(a) * single(b)).flatten(2).sum(2)
