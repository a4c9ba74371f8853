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
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from iresflow_plugin.torch_state import (
    HALF,
    apply,
    autocast_dtype,
    draw_options,
    full_precision,
    is_plain,
    single,
    uses_tf32,
)

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
    for dtype in HALF:
        if dtype in (stored, in_products):
            margin *= 1.0 + 0.51 * torch.finfo(dtype).eps * math.sqrt(min(weight.shape) * taps)
    return margin


def spectral_norm(weight: Tensor) -> Tensor:
    """|W|_2 by a singular value decomposition; exact up to rounding, differentiable."""
    wide = single(weight)
    return torch.linalg.matrix_norm(wide, ord=2) * rounding_margin(wide)


def frobenius_norm(weight: Tensor, stored: torch.dtype | None = None, taps: int = 1) -> Tensor:
    """|W|_2 <= |W|_F = (sum W_ij^2)^(1/2); `stored` and `taps` as for `rounding_margin`."""
    wide = single(weight)
    size = largest_entry(wide)  # the squares themselves could overflow or underflow
    return torch.linalg.vector_norm(wide / size) * size * rounding_margin(wide, stored, taps)


def row_column_norm(weight: Tensor) -> Tensor:
    """|W|_2 <= (|W|_1 |W|_inf)^(1/2), the geometric mean of the largest column and row sums."""
    wide = single(weight)
    rows = torch.linalg.matrix_norm(wide, ord=float("inf"))
    columns = torch.linalg.matrix_norm(wide, ord=1)
    return rows.sqrt() * columns.sqrt() * rounding_margin(wide)  # the product itself could overflow or underflow


def schatten_norm(weight: Tensor, looseness: float = LOOSENESS) -> Tensor:
    """|W|_2 <= (sum_i sigma_i^p)^(1/p), by squaring the Gram matrix (Delattre et al. 2023, arXiv 2305.16173).

    p is the smallest 2^(t+1) + 2 with n^(1/p) <= `looseness`, n = min(W.shape): the bound exceeds |W|_2 by at most that
    factor, and by far less unless all singular values are equal. Its gradient with respect to W is exact.

    >>> schatten_norm(torch.tensor([[3.0, 0.0], [0.0, 0.0]])).item()
    3.000...
    """
    wide = single(weight)
    gradient = partial(schatten_gradient, looseness=looseness, margin=rounding_margin(wide))
    return norm_of(wide, gradient(wide.detach()), gradient)


def schatten_gradient(weight: Tensor, looseness: float = LOOSENESS, margin: float = 1.0) -> Tensor:
    """The gradient D of the Schatten-p norm at W, times `margin`; |W|_p = <D, W> since a norm is homogeneous.

    With A = W^T W (or W W^T if that is smaller), q = 2^t and p = 2q + 2, tr(A A^q) = sum sigma^p and the gradient is
    |W|_p^(1-p) W A^q: one product more than the norm alone, and no graph unless one is asked for.
    """
    wide = weight.shape[0] < weight.shape[1]
    tiny = torch.finfo(weight.dtype).tiny
    with full_precision(weight):
        still = weight.detach()  # D does not depend on the scale
        unit = weight / torch.linalg.vector_norm(still, math.inf).clamp_min_(tiny)  # its squares cannot overflow
        unit = unit / torch.linalg.vector_norm(unit.detach()).clamp_min_(tiny)
        # power = exp(-log_scale) gram^exponent, and the trace of the Gram matrix is one
        power, log_scale, exponent = unit @ unit.mH if wide else unit.mH @ unit, 0.0, 1
        for step in range(_squarings(power.shape[0], looseness)):
            if step and step % 3 == 0:  # an eigenvalue is at least trace/n: three squarings cannot underflow it
                trace = _trace(power.detach())
                power, log_scale = power / trace, log_scale + trace.log()
            power, log_scale, exponent = power @ power, 2 * log_scale, 2 * exponent
        direction = power @ unit if wide else unit @ power
        moment = torch.vdot(direction.flatten(), unit.flatten()).real.clamp_min(tiny)
        norm = ((moment.log() + log_scale) / (2 * exponent + 2)).exp()
        return direction * (norm / moment * margin)


def norm_of(weight: Tensor, direction: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
    """<D, W>, the norm whose gradient at W is D = gradient(W): further derivatives compute D anew, with its graph."""
    if torch.compiler.is_compiling():  # compiled code has first derivatives alone
        return (direction * weight).sum()
    return apply(_Norm, weight, direction, gradient)


class _Norm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, direction: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        return (direction * weight).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        weight, direction, ctx.gradient = inputs
        ctx.save_for_backward(weight, direction)
        ctx.save_for_forward(weight)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        weight, direction = ctx.saved_tensors
        return cotangent * (ctx.gradient(weight) if torch.is_grad_enabled() else direction), None, None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        return (ctx.gradient(ctx.saved_tensors[0]) * grad_inputs[0]).sum()


@torch.no_grad()
def largest_schatten_norm(gram: Tensor, looseness: float = LOOSENESS) -> Tensor:
    """Which of many matrices, given as their Gram matrices (m, n, n), has the largest of those norms; shape (1,).

    The matrices are to be scaled so that their largest trace is of order one. On the CPU losers drop out before each
    squaring: (sum sigma^p)^(1/p) falls with p, and no norm is below the largest singular value, known of some leaders.
    """
    tiny = torch.finfo(gram.dtype).tiny
    alive = torch.arange(len(gram), device=gram.device)
    drops = gram.device.type == "cpu" and not torch.compiler.is_compiling() and is_plain(gram)
    floor = gram.real.new_tensor(-math.inf)
    with full_precision(gram):
        # power = exp(-log_scale) gram^exponent
        power, log_scale, exponent = gram, torch.zeros(len(gram), dtype=gram.real.dtype, device=gram.device), 1
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
    weight = single(weight)
    with torch.no_grad():
        unit = weight / largest_entry(weight)
        v = torch.randn(weight.shape[1], dtype=weight.dtype, device=weight.device, **draw_options(generator))
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
