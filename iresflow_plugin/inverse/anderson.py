"""Anderson acceleration of the fixed point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iresflow_plugin.errors import check_whole
from iresflow_plugin.inverse.loop import Memory
from iresflow_plugin.inverse.solve import Solver
from iresflow_plugin.maps import Map
from iresflow_plugin.torch_state import most_precise

PLAIN_IS_FAST = 0.25


@dataclass(frozen=True)
class Anderson(Solver):
    """x <- sum_i a_i (x_i + r_i) with the a, sum a = 1, that make |sum_i a_i r_i| least (Walker and Ni 2011).

    The least squares are regularised relative to the size of the residuals, so that the method works at every scale.
    Where a plain step shrinks the residual as fast as acceleration would, it is taken, and the loop falls back to one
    whenever a proposal was worse.

    Args:
        tolerance, max_evaluations, on_failure: as for `FixedPoint`.
        history: number of past iterates to combine.
        regularisation: added to the normal equations, relative to their trace.
    """

    history: int = 4
    regularisation: float = 1e-7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("history", self.history, least=2)
        if not self.regularisation >= 0:
            raise ValueError(f"regularisation must not be negative, got {self.regularisation}.")

    def propose(self, g: Map, x: Tensor, residual: Tensor, memory: Memory) -> tuple[Tensor | None, Memory, int]:
        new_x, new_r = x.flatten(1)[:, None], residual.flatten(1)[:, None]
        if not memory:  # the slots start as copies, whose differences weigh nothing
            return None, (new_x.repeat(1, self.history, 1), new_r.repeat(1, self.history, 1)), 0
        xs = torch.cat([new_x, memory[0][:, :-1]], 1)
        rs = torch.cat([new_r, memory[1][:, :-1]], 1)
        now, before = torch.linalg.vector_norm(rs[:, :2], dim=2, dtype=most_precise(rs.device)).unbind(1)
        plain_is_fast = (now <= PLAIN_IS_FAST * before)[:, None, None]
        if bool(plain_is_fast.all()):
            return None, (xs, rs), 0
        mixed = torch.where(plain_is_fast, new_x + new_r, self._weights(rs, now)[:, None] @ (xs + rs))
        return mixed.view_as(x), (xs, rs), 0

    def _weights(self, rs: Tensor, newest_norm: Tensor) -> Tensor:
        """Normal equations in the differences to the newest residual, scaled to it."""
        tiny = torch.finfo(rs.dtype).tiny
        scaled = rs / newest_norm.to(rs.dtype).clamp_min(tiny)[:, None, None]
        newest, differences = scaled[:, :1], scaled[:, 1:] - scaled[:, :1]
        gram = differences @ differences.mT
        ridge = self.regularisation * gram.diagonal(dim1=1, dim2=2).sum(1) + tiny
        gram = gram + ridge[:, None, None] * torch.eye(self.history - 1, dtype=rs.dtype, device=rs.device)
        others = -torch.linalg.solve_ex(gram, differences @ newest.mT)[0][..., 0]
        return torch.cat([1 - others.sum(1, keepdim=True), others], 1)
