"""log det(I + J) = sum_{k >= 1} (-1)^(k+1) tr(J^k) / k, truncated, with random probes for the trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from iresflow_plugin.log_det.estimate import Estimate
from iresflow_plugin.log_det.probes import Probes, as_probes
from iresflow_plugin.maps import Linearised, Map, inside_functorch, is_readable

Weights = Sequence[float] | Tensor  # of one term: for all probes, or for each
Weigh = Callable[[int, Tensor], Weights | None]  # (k, (J^T)^(k-1) v) -> weights of the k-th term; None ends the series


@dataclass(frozen=True)
class PowerSeries:
    """sum_{k=1}^n (-1)^(k+1) E[v^T J^k v] / k (Behrmann et al. 2019, arXiv 1811.00995).

    After k terms the rest is at most |v| |(J^T)^k v| L / ((k + 1)(1 - L)) by the block's certified bound L. What the
    vectors have in fact shrunk to is never more than the a-priori L^k |v|, so this is the smaller of the two bounds;
    with a `tolerance` the series stops by it. First derivatives only; `Exact` may be differentiated twice with respect
    to x.

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
        if self.terms is not None and self.terms < 1:
            raise ValueError(f"terms must be at least 1, got {self.terms}.")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"tolerance must be a positive number of nats, got {self.tolerance}.")
        as_probes(self.probes)

    def __call__(self, g: Map, x: Tensor) -> Estimate:
        bound = g.bound
        v = as_probes(self.probes).draw(x, self.generator)
        terms = self.terms or terms_needed(bound, _longest(v), self.tolerance or 0.0)
        weights = [[1.0]] * terms
        tails = tails_of(weights, bound, rest=bound / ((terms + 1) * (1 - bound)))
        return estimate_series(g, x, v, listed(weights), tails, self.tolerance)


def terms_needed(bound: float, size: float, tolerance: float) -> int:
    """The terms after which D L^(n+1) / ((n + 1)(1 - L)) <= tolerance, whatever the Jacobian.

    >>> terms_needed(0.9, size=1, tolerance=1e-3)
    50
    """
    if bound == 0:
        return 1
    n = 1
    while size * bound ** (n + 1) / ((n + 1) * (1 - bound)) > tolerance:
        n += 1
    return n


def listed(weights: Sequence[Sequence[float]]) -> Weigh:
    """Weights that are known before the series begins."""
    return lambda k, vector: weights[k - 1] if k <= len(weights) else None


def tails_of(weights: Sequence[Sequence[float]], bound: float, rest: float) -> list[float]:
    """tails[k] = sum_{j > k} weights[j-1] L^(j-k) / j for the heaviest probe, ending in `rest`."""
    tails = [rest]
    for j in range(len(weights), 0, -1):
        tails.append(bound * (max(weights[j - 1]) / j + tails[-1]))
    return tails[::-1]


def estimate_series(
    g: Map, x: Tensor, v: Tensor, weigh: Weigh, tails: Sequence[float] | None = None, tolerance: float | None = None
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
        tails: bounds of what follows k = 0, 1, ... terms, per |v| |(J^T)^k v|; None if `weigh` alone ends the series.
        tolerance: stop as soon as what follows is below this for all samples; None stops at round-off.
    """
    sums: list[tuple[Tensor, Tensor, Tensor, int]] = []

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor | None]:
        """g(x) and v^T (dJ) w, with a graph; the series itself is summed the first time alone."""
        at_x = g.linearise(x)
        if not sums:
            sums.append(_sum_series(at_x, v, weigh, tails, tolerance))
        return at_x.value, _dot(at_x.jvp(v), sums[0][1]).mean(0) if torch.is_grad_enabled() else None

    pays = x.ndim > 2 and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if pays and not g.uses_functorch and not inside_functorch():
        image, surrogate = checkpoint(evaluate, x, use_reentrant=False, preserve_rng_state=False)
    else:
        image, surrogate = evaluate(x)
    value, _, remainder, terms = sums[0]
    count = v.shape[0]
    error = value.std(0) / count**0.5 if count > 1 else torch.full_like(value[0], math.nan)
    log_det = value.mean(0)
    if surrogate is not None:
        log_det = log_det + (surrogate - surrogate.detach())
    return Estimate(image, log_det.to(v.dtype), error, remainder.mean(0), terms)


@torch.no_grad()
def _sum_series(
    at_x: Linearised, v: Tensor, weigh: Weigh, tails: Sequence[float] | None, tolerance: float | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The series per probe and sample, the Neumann vector w, the bound of what was left out, the terms used."""
    length = _dot(v, v).sqrt()
    round_off = (torch.finfo(length.dtype).eps * length**2).mean(0)
    enough = round_off if tolerance is None else torch.full_like(round_off, tolerance)
    w = torch.zeros_like(at_x.value, dtype=v.dtype).expand_as(v).clone()  # under vmap many, as g is, where v is one
    value, vector, remainder = _dot(w, w), v, length**2 * (tails[0] if tails else 0.0)
    k = 0
    look_every = 1 if v.device.type == "cpu" else 4  # a look makes the host wait for the device
    while (weight := weigh(k + 1, vector)) is not None:
        k += 1
        sign = 1.0 if k % 2 else -1.0
        _add(w, vector, weight, sign)
        vector = at_x.vjp(vector)
        _add(value, _dot(vector, v), weight, sign / k)
        if tails is None:
            continue
        remainder = length * _dot(vector, vector).sqrt() * tails[k]
        if k % look_every == 0 and is_readable(remainder) and bool((remainder.mean(0) <= enough).all()):
            break
    return value, w, remainder, k


def _add(total: Tensor, term: Tensor, weight: Weights, factor: float) -> None:
    """total += factor weight term, in place, with a weight of its own for every probe if there are several."""
    if not isinstance(weight, Tensor) and len(weight) == 1:
        total.add_(term, alpha=factor * weight[0])
    else:
        each = torch.as_tensor(weight, dtype=term.dtype, device=term.device)
        total.add_(term * each.view(-1, *[1] * (term.ndim - 1)), alpha=factor)  # addcmul_ has no rule for vmap


def _longest(v: Tensor) -> float:
    """The largest |v|^2 of a sample, averaged over its probes: D unless they are Gaussian."""
    return max(1.0, float(_dot(v, v).mean(0).max())) if v.numel() else 1.0


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the event, shape (K, B), accumulated in at least single precision."""
    dtype = torch.float32 if a.dtype in (torch.float16, torch.bfloat16) else a.dtype
    return (a.to(dtype) * b.to(dtype)).flatten(2).sum(2)
