"""Bounds of the largest singular value |W|_2 of a dense matrix.

| name              | certified | cost             | tight when            |
|-------------------|-----------|------------------|-----------------------|
| `spectral_norm`   | yes       | a full SVD       | always                |
| `schatten_norm`   | yes       | about 7 products | within 4 % always     |
| `frobenius_norm`  | yes       | one pass         | W has rank one        |
| `row_column_norm` | yes       | one pass         | W is a permutation    |
| `power_iteration` | no        | 2n matrix-vector | only as an estimate   |

Certified values are raised by a margin for the rounding of the dtype they are computed in, so that they hold for the
real matrix and not only for exact arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from iresflow_plugin.maps import autocast_dtype, full_precision, is_plain

LOOSENESS = 1.04


def rounding_margin(weight: Tensor, stored: torch.dtype | None = None, taps: int = 1) -> float:
    """Factor that covers the rounding of products, sums and roots over a matrix of this size and dtype.

    With `stored`, also that of a scaled matrix kept in half precision: |fl(W) - W|_F <= eps / 2 |W|_F. The same where
    autocast will round a matrix in single precision before each product. With `taps`, of a convolution with so many
    such matrices. TF32 rounds operands to eleven bits, independently of each other, and sums in single precision.
    """
    rounding = 4 * max(weight.shape) * taps * torch.finfo(weight.dtype).eps
    if uses_tf32(weight):
        rounding = max(rounding, 4 * 2.0**-10 * math.sqrt(max(weight.shape) * taps))
    margin = 1.0 + rounding
    in_products = autocast_dtype(weight) if weight.dtype == torch.float32 else None
    for dtype in (torch.float16, torch.bfloat16):
        if dtype in (stored, in_products):
            margin *= 1.0 + 0.51 * torch.finfo(dtype).eps * math.sqrt(min(weight.shape) * taps)
    return margin


def uses_tf32(weight: Tensor) -> bool:
    """Whether products with this matrix are taken in TF32, as a GPU does when it was told that it may."""
    if weight.device.type != "cuda" or weight.dtype != torch.float32:
        return False
    flags = torch.backends.cuda.matmul
    if torch.compiler.is_compiling() or not hasattr(flags, "fp32_precision"):
        return bool(flags.allow_tf32)
    return flags.fp32_precision == "tf32"  # the older flag cannot be read once this has been set


def spectral_norm(weight: Tensor) -> Tensor:
    """|W|_2 by a singular value decomposition; exact up to rounding, differentiable."""
    return torch.linalg.matrix_norm(weight, ord=2) * rounding_margin(weight)


def frobenius_norm(weight: Tensor, stored: torch.dtype | None = None, taps: int = 1) -> Tensor:
    """|W|_2 <= |W|_F = (sum W_ij^2)^(1/2); `stored` and `taps` as for `rounding_margin`."""
    size = largest_entry(weight)  # the squares themselves could overflow or underflow
    return torch.linalg.vector_norm(weight / size) * size * rounding_margin(weight, stored, taps)


def row_column_norm(weight: Tensor) -> Tensor:
    """|W|_2 <= (|W|_1 |W|_inf)^(1/2), the geometric mean of the largest column and row sums."""
    rows = torch.linalg.matrix_norm(weight, ord=float("inf"))
    columns = torch.linalg.matrix_norm(weight, ord=1)
    return rows.sqrt() * columns.sqrt() * rounding_margin(weight)  # the product itself could overflow or underflow


def schatten_norm(weight: Tensor, looseness: float = LOOSENESS) -> Tensor:
    """|W|_2 <= (sum_i sigma_i^p)^(1/p), by squaring the Gram matrix (Delattre et al. 2023, arXiv 2305.16173).

    p is the smallest 2^(t+1) + 2 with n^(1/p) <= `looseness`, n = min(W.shape): the bound exceeds |W|_2 by at most that
    factor, and by far less unless all singular values are equal. Its gradient with respect to W is exact.

    >>> schatten_norm(torch.tensor([[3.0, 0.0], [0.0, 0.0]])).item()
    3.000...
    """
    return (schatten_gradient(weight.detach(), looseness) * weight).sum() * rounding_margin(weight)


@torch.no_grad()
def schatten_gradient(weight: Tensor, looseness: float = LOOSENESS, margin: float = 1.0) -> Tensor:
    """The gradient D of the Schatten-p norm at W, times `margin`; |W|_p = <D, W> since a norm is homogeneous.

    With A = W^T W (or W W^T if that is smaller), q = 2^t and p = 2q + 2, tr(A A^q) = sum sigma^p and the gradient is
    |W|_p^(1-p) W A^q: one product more than the norm alone, and no graph.
    """
    wide = weight.shape[0] < weight.shape[1]
    tiny = torch.finfo(weight.dtype).tiny
    with full_precision(weight):
        unit = weight / torch.linalg.vector_norm(weight, math.inf).clamp_min_(tiny)  # its squares cannot overflow
        unit.div_(torch.linalg.vector_norm(unit).clamp_min_(tiny))
        # power = exp(-log_scale) gram^exponent, and the trace of the Gram matrix is one
        power, log_scale, exponent = unit @ unit.mH if wide else unit.mH @ unit, 0.0, 1
        for step in range(_squarings(power.shape[0], looseness)):
            if step and step % 3 == 0:  # an eigenvalue is at least trace/n: three squarings cannot underflow it
                trace = _trace(power)
                power, log_scale = power.div_(trace), log_scale + trace.log()
            power, log_scale, exponent = power @ power, 2 * log_scale, 2 * exponent
        direction = power @ unit if wide else unit @ power
        moment = torch.vdot(direction.flatten(), unit.flatten()).real.clamp_min_(tiny)
        norm = ((moment.log() + log_scale) / (2 * exponent + 2)).exp()
        return direction.mul_(norm / moment * margin)


@torch.no_grad()
def largest_schatten_norm(gram: Tensor, looseness: float = LOOSENESS) -> Tensor:
    """Which of many matrices, given as their Gram matrices (m, n, n), has the largest of those norms; shape (1,).

    The matrices are to be scaled so that their largest trace is of order one. On the CPU losers drop out before each
    squaring: (sum sigma^p)^(1/p) falls with p, and no norm is below the largest singular value, known of some leaders.
    """
    tiny = torch.finfo(gram.dtype).tiny
    alive = torch.arange(len(gram), device=gram.device)
    drops = gram.device.type == "cpu" and not torch.compiler.is_compiling() and is_plain(gram)
    floor = gram.new_tensor(-math.inf, dtype=torch.float64)
    with full_precision(gram):
        # power = exp(-log_scale) gram^exponent
        power, log_scale, exponent = gram, torch.zeros_like(alive, dtype=torch.float64), 1
        for step in range(_squarings(gram.shape[-1], looseness)):
            if drops and len(alive) > 1:
                norm = torch.linalg.vector_norm(_reals(power), dim=1).clamp_min(tiny)  # tr(A^2q) is its square
                upper = (norm.log() + log_scale) / exponent
                leader = upper.argmax()
                floor = torch.maximum(floor, _reached(gram[leader], power[leader], squarings=0 if step else 4).log())
                limit = torch.minimum(floor - 1e-4, upper[leader])  # it stays, however its products were rounded
                keep = (~(upper < limit)).nonzero()[:, 0]  # NaN stays
                if len(keep) < 0.9 * len(alive):
                    alive, gram, power, log_scale = (t[keep] for t in (alive, gram, power, log_scale))
            if step and step % 2 == 0:
                trace = _trace(power)
                power, log_scale = _scaled(power, 1 / trace), log_scale + trace.log()
            power, log_scale, exponent = power @ power, 2 * log_scale, 2 * exponent
        moment = (_reals(power) * _reals(gram)).sum(1).clamp_min(tiny)
        return alive.index_select(0, (moment.log() + log_scale).argmax().view(1))


def _reached(gram: Tensor, power: Tensor, squarings: int) -> Tensor:
    """A value below the largest eigenvalue of A, and close to it: that of the longest column of A^q, squared."""
    for _ in range(squarings):
        power = power @ power
        power = power / _trace(power)
    v = power[:, power.diagonal().real.argmax()]
    v = v / torch.linalg.vector_norm(v)
    return torch.vdot(v, gram @ v).real.clamp_min(torch.finfo(gram.dtype).tiny)


def _trace(matrices: Tensor) -> Tensor:
    """Of each, real, and never zero."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1).real.clamp_min(torch.finfo(matrices.dtype).tiny)


def _scaled(matrices: Tensor, factors: Tensor) -> Tensor:
    """Each times its real factor."""
    if not matrices.is_complex():
        return matrices * factors[:, None, None]
    return torch.view_as_complex(torch.view_as_real(matrices) * factors[:, None, None, None])


def _reals(matrices: Tensor) -> Tensor:
    """Real and imaginary parts in one row each: torch is slow at complex norms and products with real numbers."""
    return (torch.view_as_real(matrices) if matrices.is_complex() else matrices).flatten(1)


def power_iteration(weight: Tensor, steps: int = 20, generator: torch.Generator | None = None) -> Tensor:
    """An ESTIMATE of |W|_2 from below, |W v| after `steps` products with W^T W. Never a certificate."""
    with torch.no_grad():
        unit = weight / largest_entry(weight)
        v = torch.randn(weight.shape[1], generator=generator, dtype=weight.dtype, device=weight.device)
        for _ in range(steps):
            v = torch.nn.functional.normalize(unit.mT @ (unit @ v), dim=0)
        u = torch.nn.functional.normalize(unit @ v, dim=0)
    return u @ weight @ v


def largest_entry(weight: Tensor) -> Tensor:
    """max |W_ij|, at least the smallest normal number, so that one may divide by it."""
    return weight.detach().abs().amax().clamp_min(torch.finfo(weight.dtype).tiny)


def _squarings(n: int, looseness: float) -> int:
    """The smallest t with n^(1/p) <= looseness for p = 2^(t+1) + 2."""
    needed = math.log(max(n, 2)) / math.log(looseness)
    return max(0, math.ceil(math.log2(max(needed - 2, 1)) - 1))
