"""Newton's method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iresflow_plugin.errors import check_whole
from iresflow_plugin.inverse.loop import Memory
from iresflow_plugin.inverse.solve import Solver
from iresflow_plugin.maps import Linearised, Map, jacobian_columns, transposed_jacobian
from iresflow_plugin.torch_state import norms


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
        check_whole("dense", self.dense, least=0)
        check_whole("krylov", self.krylov)

    def propose(self, g: Map, x: Tensor, residual: Tensor, memory: Memory) -> tuple[Tensor | None, Memory, int]:
        at_x = g.linearise(x)
        size = x.shape[1:].numel()
        if size <= self.dense:
            return x + _dense_step(at_x, residual), memory, 1 + size
        steps = min(self.krylov, size)
        return x + gmres(at_x, residual, steps), memory, 1 + steps


def _dense_step(at_x: Linearised, residual: Tensor) -> Tensor:
    size = residual.shape[1:].numel()
    jacobian = transposed_jacobian(jacobian_columns(at_x, residual, range(size))).mT
    identity = torch.eye(size, dtype=residual.dtype, device=residual.device)
    return torch.linalg.solve_ex(identity + jacobian, residual.flatten(1)[..., None])[0].view_as(residual)


def gmres(at_x: Linearised, right: Tensor, steps: int) -> Tensor:
    """The d in the Krylov space of I + J and `right` that makes |right - (I + J) d| least, per sample."""
    flat, tiny = right.flatten(1), torch.finfo(right.dtype).tiny
    size = norms(right).to(right.dtype).clamp_min(tiny)[:, None]
    basis = [flat / size]
    images = []
    for _ in range(steps):
        image = basis[-1] + at_x.jvp(basis[-1].view_as(right)).flatten(1)
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
    coefficients = torch.linalg.solve_triangular(r, (q.mT @ (flat / size)[..., None]), upper=True)
    return ((span @ coefficients)[..., 0] * size).view_as(right)
