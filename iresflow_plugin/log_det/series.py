"""log det(I + J) = sum_{k >= 1} (-1)^(k+1) tr(J^k) / k, truncated, with random probes for the trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from iresflow_plugin.log_det.estimate import Estimate
from iresflow_plugin.log_det.probes import Probes, as_probes
from iresflow_plugin.maps import Linearised, Map, inside_functorch, is_readable

Weights = Sequence[float]  # of one term: for all probes, or for each


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
        rest = bound / ((terms + 1) * (1 - bound))
        return estimate_series(g, x, v, [[1.0]] * terms, bound, rest, self.tolerance)


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


def estimate_series(
    g: Map,
    x: Tensor,
    v: Tensor,
    weights: Sequence[Weights],
    bound: float,
    rest: float,
    tolerance: float | None = None,
) -> Estimate:
    """sum_k (-1)^(k+1) weights[k-1] v^T J^k v / k, with the gradient of its expectation.

    Its gradient is tr(sum_k (-1)^(k-1) weights[k-1] J^(k-1) dJ) (the Neumann gradient, Chen et al. 2019, arXiv
    1906.02735): the sum w = sum_k (-1)^(k-1) weights[k-1] (J^T)^(k-1) v is built without a graph and meets dJ in one
    product with a graph, so memory does not grow with the number of terms. First derivatives only: w holds still.
    For images, whose hidden layers are large, the backward pass evaluates g and that product once more instead of
    keeping what lies in between: a block then holds x, v and w.

    Args:
        v: probes, shape (K, B, *event).
        weights: for every term one number, or one per probe.
        rest: bounds sum_{k > n} L^(k-n) weights[k-1] / k, what follows the last term, per |v| |(J^T)^n v|.
        tolerance: stop as soon as what follows is below this for all samples; None stops at round-off.
    """
    sums: list[tuple[Tensor, Tensor, Tensor, int]] = []

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor | None]:
        """g(x) and v^T (dJ) w, with a graph; the series itself is summed the first time alone."""
        at_x = g.linearise(x)
        if not sums:
            sums.append(_sum_series(at_x, v, _tails(weights, bound, rest), weights, tolerance))
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
    at_x: Linearised, v: Tensor, tails: Sequence[float], weights: Sequence[Weights], tolerance: float | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The series per probe and sample, the Neumann vector w, the bound of what was left out, the terms used."""
    length = _dot(v, v).sqrt()
    round_off = (torch.finfo(length.dtype).eps * length**2).mean(0)
    enough = round_off if tolerance is None else torch.full_like(round_off, tolerance)
    w = torch.zeros_like(at_x.value, dtype=v.dtype).expand_as(v).clone()  # under vmap many, as g is, where v is one
    value, vector, remainder = _dot(w, w), v, length**2 * tails[0]
    k = 0
    look_every = 1 if v.device.type == "cpu" else 4  # a look makes the host wait for the device
    for k, weight in enumerate(weights, start=1):
        sign = 1.0 if k % 2 else -1.0
        _add(w, vector, weight, sign)
        vector = at_x.vjp(vector)
        _add(value, _dot(vector, v), weight, sign / k)
        remainder = length * _dot(vector, vector).sqrt() * tails[k]
        if k % look_every == 0 and is_readable(remainder) and bool((remainder.mean(0) <= enough).all()):
            break
    return value, w, remainder, k


def _add(total: Tensor, term: Tensor, weight: Weights, factor: float) -> None:
    """total += factor weight term, in place, with a weight of its own for every probe if there are several."""
    if len(weight) == 1:
        total.add_(term, alpha=factor * weight[0])
    else:
        total.addcmul_(term, term.new_tensor(weight).view(-1, *[1] * (term.ndim - 1)), value=factor)


def _tails(weights: Sequence[Weights], bound: float, rest: float) -> list[float]:
    """tails[k] = sum_{j > k} weights[j-1] L^(j-k) / j for the heaviest probe, ending in `rest`."""
    tails = [rest]
    for j in range(len(weights), 0, -1):
        tails.append(bound * (max(weights[j - 1]) / j + tails[-1]))
    return tails[::-1]


def _longest(v: Tensor) -> float:
    """The largest |v|^2 of a sample, averaged over its probes: D unless they are Gaussian."""
    return max(1.0, float(_dot(v, v).mean(0).max())) if v.numel() else 1.0


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the event, shape (K, B), accumulated in at least single precision."""
    dtype = torch.float32 if a.dtype in (torch.float16, torch.bfloat16) else a.dtype
    return (a.to(dtype) * b.to(dtype)).flatten(2).sum(2)
