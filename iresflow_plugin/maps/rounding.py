"""How far rounding can take a value from its exact one: a bound carried through a map, part by part.

With u the unit roundoff, a sum of n products is off by at most gamma_n = n u / (1 - n u) times the same sum of absolute
values, in whatever order it is taken (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1). What
is off in front of a part is off behind it by at most the part's Lipschitz bound times as much.

A value is judged in a precision that its own rounding does not reach: in double precision where the branch is in
single or half (`Plain`); where nothing wider is at hand, by products taken from halves of the digits (`Split`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from iresflow_plugin.torch_state import norms, unit_roundoff

Bilinear = Callable[[Tensor, Tensor], Tensor]  # (x, weight) -> product
Size = Callable[[Tensor], Tensor]  # of a weight


class Rounded(NamedTuple):
    """A value, a bound of |value - exact value| and a bound of |value|: 2-norms of every sample, shape (B,)."""

    value: Tensor
    error: Tensor
    size: Tensor

    def plus(self, error: Tensor | float) -> Rounded:
        """The same value, known less well."""
        return self._replace(error=self.error + error)


class Products(Protocol):
    """How long sums are taken, and what is known of their error; `judged` is the dtype whose numbers are judged."""

    @property
    def judged(self) -> torch.dtype: ...

    def norms(self, x: Tensor) -> Tensor:
        """2-norm of every sample."""
        ...

    def multiply(self, apply: Bilinear, x: Rounded, weight: Tensor, length: int, size: Size) -> Rounded:
        """apply(x, weight), sums of `length` products; size(weight) |x| bounds those of absolute values, in 2-norm."""
        ...

    def add(self, terms: Sequence[Rounded]) -> Rounded:
        """The sum of some values."""
        ...


@dataclass(frozen=True)
class Plain:
    """As torch takes them."""

    judged: torch.dtype

    def norms(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x.flatten(1), dim=1)  # of numbers that were narrower: no square overflows

    def multiply(self, apply: Bilinear, x: Rounded, weight: Tensor, length: int, size: Size) -> Rounded:
        value = apply(x.value, weight)
        error = gamma(length, value.dtype) * size(weight) * x.size + _underflow(value, length)
        return Rounded(value, error, self.norms(value))

    def add(self, terms: Sequence[Rounded]) -> Rounded:
        value = reduce(torch.add, [t.value for t in terms])
        error = _total([t.error for t in terms]) + gamma(len(terms), value.dtype) * _total([t.size for t in terms])
        return Rounded(value, error, self.norms(value))


@dataclass(frozen=True)
class Split:
    """With the leading digits apart, whose products and sums are exact (Dekker 1971, Ozaki et al. 2012)."""

    judged: torch.dtype

    def norms(self, x: Tensor) -> Tensor:
        return norms(x)

    def multiply(self, apply: Bilinear, x: Rounded, weight: Tensor, length: int, size: Size) -> Rounded:
        eps = torch.finfo(x.value.dtype).eps
        digits = int(1 - math.log2(eps) - math.ceil(math.log2(length))) // 2
        head, weights = _leading(x.value, digits, dims=tuple(range(1, x.value.ndim))), _leading(weight, digits)
        tail, lighter = x.value - head, weight - weights
        main, rest = apply(head, weights), apply(tail, weights) + apply(x.value, lighter)
        value = main + rest
        lost = gamma(length + 1, value.dtype) * (size(weights) * norms(tail) + size(lighter) * x.size)
        length_of = norms(value)
        error = lost + eps / 2 * (length_of + norms(rest)) + _underflow(value, length)
        return Rounded(value, error, length_of)

    def add(self, terms: Sequence[Rounded]) -> Rounded:
        """Every rounding error is exact in itself and added at the end (Ogita, Rump and Oishi 2005, Sum2)."""
        total, lost = terms[0].value, torch.zeros_like(terms[0].value)
        for term in terms[1:]:
            new = total + term.value
            other = new - total
            lost = lost + ((total - (new - other)) + (term.value - other))
            total = new
        value, size = total + lost, norms(total + lost)
        left = gamma(len(terms), value.dtype) ** 2 * _total([t.size for t in terms])
        return Rounded(value, _total([t.error for t in terms]) + unit_roundoff(value.dtype) * size + left, size)


def products_for(x: Tensor, judged: torch.dtype) -> Products:
    """Those that `x` needs when numbers of the dtype `judged` are judged by it."""
    return Plain(judged) if unit_roundoff(x.dtype) < 1e-6 * unit_roundoff(judged) else Split(judged)


def gamma(n: int, dtype: torch.dtype) -> float:
    """n u / (1 - n u)."""
    nu = n * unit_roundoff(dtype)
    return nu / (1 - nu) if nu < 1 else math.inf


def elementwise(x: Rounded, value: Tensor, steepest: float, products: Products, slack: float = 1.0) -> Rounded:
    """The value of an elementary function at x, within slack u (1.5 |x| + 4 |f(x)|); tests hold them to it."""
    size = products.norms(value)
    lost = _underflow(value, 4) / torch.finfo(value.dtype).eps  # the lowest frequencies magnify it
    rounding = slack * unit_roundoff(value.dtype) * (1.5 * x.size + 4 * size) + lost
    return Rounded(value, steepest * x.error + rounding, size)


def one_operation(value: Tensor, error: Tensor, products: Products) -> Rounded:
    """Of a product or a sum for every entry, off by `error` before it is rounded."""
    size = products.norms(value)
    return Rounded(value, error + unit_roundoff(value.dtype) * size + _underflow(value, 1), size)


def _underflow(x: Tensor, length: int) -> float:
    """What products lose below the smallest normal number, or all of it where denormals are flushed."""
    return length * x[0:1].numel() ** 0.5 * torch.finfo(x.dtype).tiny


def _leading(x: Tensor, digits: int, dims: tuple[int, ...] = ()) -> Tensor:
    """The first binary digits of each number, counted from the largest of them (along `dims`, or of all)."""
    largest = x.abs().amax(dims, keepdim=True) if dims else x.abs().amax()
    exponent = torch.frexp(largest)[1].to(x.dtype)
    shift = 1.5 * torch.exp2(exponent - digits - math.log2(torch.finfo(x.dtype).eps))
    return (x + shift) - shift


def _total(sizes: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, sizes)
