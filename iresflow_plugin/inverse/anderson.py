"""Anderson acceleration of the fixed point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iresflow_plugin.inverse.solve import Solver
from iresflow_plugin.maps import Map


@dataclass(frozen=True)
class Anderson(Solver):
    """x <- sum_i a_i (x_i + r_i) with the a, sum a = 1, that make |sum_i a_i r_i| least (Walker and Ni 2011).

    The least squares are regularised relative to the size of the residuals, so that the method works at every scale,
    and the loop falls back to a plain step whenever a proposal is worse than that.

    Args:
        tolerance, max_evaluations, on_failure: as for `FixedPoint`.
        history: number of past iterates to combine.
        regularisation: added to the normal equations, relative to their trace.
    """

    history: int = 4
    regularisation: float = 1e-7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history < 2:
            raise ValueError(f"history must be at least 2, got {self.history}.")
        if not self.regularisation >= 0:
            raise ValueError(f"regularisation must not be negative, got {self.regularisation}.")

    def start(self, y: Tensor) -> tuple[Tensor, ...]:
        """Iterates, residuals (B, history, D), and how many of them are filled (B,)."""
        empty = y.new_zeros(y.shape[0], self.history, y.shape[1:].numel())
        return empty, empty, torch.zeros(y.shape[0], dtype=torch.int64, device=y.device)

    def propose(
        self, g: Map, x: Tensor, residual: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, tuple[Tensor, ...], int]:
        xs, rs, filled = memory
        xs = torch.cat([x.flatten(1)[:, None], xs[:, :-1]], 1)
        rs = torch.cat([residual.flatten(1)[:, None], rs[:, :-1]], 1)
        filled = (filled + 1).clamp(max=self.history)
        weights = self._weights(rs, filled)
        mixed = torch.einsum("bh,bhd->bd", weights, xs + rs)
        return mixed.view_as(x), (xs, rs, filled), 0

    def _weights(self, rs: Tensor, filled: Tensor) -> Tensor:
        """Normal equations in the differences to the newest residual, scaled to it."""
        present = torch.arange(1, self.history, device=rs.device) < filled[:, None]
        size = rs[:, :1].norm(dim=2, keepdim=True).clamp_min(torch.finfo(rs.dtype).tiny)
        differences = torch.where(present[..., None], (rs[:, 1:] - rs[:, :1]) / size, 0)
        gram = differences @ differences.mT
        trace = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None]
        ridge = self.regularisation * trace + torch.finfo(rs.dtype).tiny
        diagonal = torch.where(present, ridge, 1.0)
        right = -(differences @ (rs[:, :1] / size).mT)
        others = torch.linalg.solve_ex(gram + torch.diag_embed(diagonal), right)[0][..., 0]
        return torch.cat([1 - others.sum(1, keepdim=True), others], 1)
