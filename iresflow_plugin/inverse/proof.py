"""What is proven of a solution, rounding included.

The last residual is evaluated where rounding does not reach it: in double precision, or, where that is the precision
of the branch itself, by products whose leading digits are exact. One plain step with it gives the result. An exact step
by an exact residual r would be off by L |r| / (1 - L); with rho a bound of what rounding did to r,

    |x - x*| <= L (|r| + rho) / (1 - L) + rho + |rounding of x|.

It costs one evaluation of g in that precision, of the twenty or so that a solve takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from iresflow_plugin.inverse.loop import Found
from iresflow_plugin.maps import Around, Map, Products, Rounded, products_for
from iresflow_plugin.torch_state import most_precise, norms, per_sample, unit_roundoff


@dataclass(frozen=True)
class Solution:
    """How a solve went.

    Attributes:
        x: the solution, shape (B, *event).
        error_bound: per sample, shape (B,): |x - x*| is at most this, rounding included.
        evaluations: per sample, shape (B,): how often g, or its derivative in one direction, was evaluated.
        converged: per sample, shape (B,): whether the bound is within the tolerance, or at what the dtype can hold.
        certified: whether the bound is proven; False where a module of the branch states its own Lipschitz bound.
    """

    x: Tensor
    error_bound: Tensor
    evaluations: Tensor
    converged: Tensor
    certified: bool = True

    def replaced(self, rows: Tensor, other: Solution) -> Solution:
        """With these rows by another solve, whose evaluations come on top."""
        mine = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "certified"}
        new = {name: value.index_copy(0, rows, getattr(other, name)) for name, value in mine.items()}
        new["evaluations"] = self.evaluations.index_add(0, rows, other.evaluations)
        return Solution(**new, certified=self.certified)


class Careful(Around):
    """g with the values that proofs rely on: for rows whose own rounding keeps them from the last digits."""

    def __call__(self, x: Tensor) -> Tensor:
        products = products_for(x, x.dtype)
        return self.g.rounded(_given(x, products), products).value


def _given(x: Tensor, products: Products) -> Rounded:
    """Numbers that are what they are."""
    size = products.norms(x)
    return Rounded(x, torch.zeros_like(size), size)


def prove(g: Map, y: Tensor, found: Found, tolerance: float | None) -> Solution:
    """One more plain step from x, and what is known of where it leads."""
    wide = most_precise(y.device)
    u, bound = unit_roundoff(wide), g.bound
    g, x, target = g.to(wide), found.x.to(wide), y.to(wide)
    products = products_for(x, y.dtype)
    value, off, _ = g.rounded(_given(x, products), products)
    gap = target - x
    residual = gap - value
    length = products.norms(residual)
    rho = off + u * (products.norms(gap) + length)
    exact = x + residual
    result = exact.to(y.dtype)
    size = products.norms(exact)
    rounding = u * size + products.norms(result.to(wide) - exact)
    error = (bound * (length + rho) / (1 - bound) + rho + rounding) * (1 + 64 * u)  # and of this line
    if tolerance is not None:
        converged = error <= tolerance
    else:
        size = torch.maximum(size, products.norms(target))
        converged = error <= 4 * (unit_roundoff(y.dtype) * size + rho) / (1 - bound)
        if y.dtype == wide:  # nothing wider can help, so rounding is forgiven that might have stalled the loop
            converged |= found.stalled & (length <= u**0.5 * size)
    return _solution(y, result, error, found.evaluations + torch.isfinite(target.flatten(1)).all(1), converged, g)


def believe(g: Map, y: Tensor, found: Found, tolerance: float | None) -> Solution:
    """What the loop has seen, without proof: for the solves of derivatives, of which nobody is told a bound."""
    x, eps = found.x, torch.finfo(found.x.dtype).eps
    size = torch.maximum(norms(x), norms(y.to(x.dtype)))
    error = g.bound * found.length / (1 - g.bound) + eps * size
    enough = torch.where(found.stalled, eps**0.5, 4 * eps) * size
    converged = found.length <= (enough if tolerance is None else enough.clamp_min(tolerance * (1 - g.bound)))
    return _solution(y, x.to(y.dtype), error, found.evaluations, converged, g)


def _solution(y: Tensor, x: Tensor, error: Tensor, evaluations: Tensor, converged: Tensor, g: Map) -> Solution:
    finite = torch.isfinite(error)
    x, error = torch.where(per_sample(finite, y), x, y), torch.where(finite, error, math.inf)
    return Solution(x, error, evaluations, converged & finite, g.certified)
