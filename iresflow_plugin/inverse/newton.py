"""Newton's method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iresflow_plugin.inverse.solve import Solver
from iresflow_plugin.maps import Linearised, Map


@dataclass(frozen=True)
class Newton(Solver):
    """x <- x + (I + J)^-1 r: exact Jacobian for small events, GMRES (Saad and Schultz 1986) for large ones.

    Args:
        tolerance, max_evaluations, on_failure: as for `FixedPoint`.
        dense: largest D for which the Jacobian is formed.
        krylov: Jacobian products per step beyond that.
    """

    dense: int = 32
    krylov: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dense < 0 or self.krylov < 1:
            raise ValueError(f"Newton needs dense >= 0 and krylov >= 1, got {self.dense} and {self.krylov}.")

    def propose(
        self, g: Map, x: Tensor, residual: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, tuple[Tensor, ...], int]:
        at_x = g.linearise(x)
        size = x.shape[1:].numel()
        if size <= self.dense:
            return x + _dense_step(at_x, residual), memory, 1 + size
        steps = min(self.krylov, size)
        return x + gmres(at_x, residual, steps), memory, 1 + steps


def _dense_step(at_x: Linearised, residual: Tensor) -> Tensor:
    event = residual.shape[1:]
    size = event.numel()
    basis = torch.eye(size, dtype=residual.dtype, device=residual.device)
    columns = at_x.jvp(basis.view(size, 1, *event)).expand(size, *residual.shape)
    matrix = basis + columns.reshape(size, -1, size).permute(1, 2, 0)
    right = residual.flatten(1)[..., None]
    return torch.linalg.solve_ex(_single(matrix), _single(right))[0].to(residual.dtype).view_as(residual)


def gmres(at_x: Linearised, right: Tensor, steps: int) -> Tensor:
    """The d in the Krylov space of I + J and `right` that makes |right - (I + J) d| least, per sample."""
    flat = _single(right.flatten(1))
    tiny = torch.finfo(flat.dtype).tiny
    basis = [flat / flat.norm(dim=1, keepdim=True).clamp_min(tiny)]
    images = []
    for _ in range(steps):
        image = basis[-1] + at_x.jvp(basis[-1].to(right.dtype).view_as(right)).flatten(1)
        images.append(image)
        next_vector = image
        for vector in basis:  # modified Gram-Schmidt
            next_vector = next_vector - (next_vector * vector).sum(1, keepdim=True) * vector
        basis.append(next_vector / next_vector.norm(dim=1, keepdim=True).clamp_min(tiny))
    span, mapped = torch.stack(basis[:-1], 2), torch.stack(images, 2)
    q, r = torch.linalg.qr(mapped)
    # A breakdown leaves a zero pivot; its column is then already spanned by the others.
    pivots = r.diagonal(dim1=1, dim2=2)
    fixed = torch.where(pivots.abs() > 1e3 * tiny, pivots, 1.0)
    r = r - torch.diag_embed(pivots) + torch.diag_embed(fixed)
    coefficients = torch.linalg.solve_triangular(r, (q.mT @ flat[..., None]), upper=True)
    return (span @ coefficients)[..., 0].to(right.dtype).view_as(right)


def _single(x: Tensor) -> Tensor:
    """Factorisations need at least single precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
