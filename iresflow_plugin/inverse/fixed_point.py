"""x <- y - g(x)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from iresflow_plugin.inverse.loop import Memory
from iresflow_plugin.inverse.solve import Solver
from iresflow_plugin.maps import Map


@dataclass(frozen=True)
class FixedPoint(Solver):
    """x <- y - g(x), whose residual shrinks by L at every step (Banach; Behrmann et al. 2019, arXiv 1811.00995).

    Args:
        tolerance: largest |x - x*| (2-norm, per sample); None is what the dtype can hold.
        max_evaluations: limit per sample; None is what the bound L proves to suffice.
        on_failure: "raise" NotConvergedError, "warn", or "return" and leave it to `Solution.converged`.
    """

    def propose(self, g: Map, x: Tensor, residual: Tensor, memory: Memory) -> tuple[Tensor | None, Memory, int]:
        return None, memory, 0
