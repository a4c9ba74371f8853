"""What all solvers share: settings, the loop, its proof, and what is said of a failure.

The loop (`iresflow_plugin.inverse.loop`) finds a candidate; what is told of it is proven once, at the end
(`iresflow_plugin.inverse.proof`). Rows that do not pass there are taken up again, with less rounding.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from iresflow_plugin.errors import NotContractiveError, NotConvergedError, check_whole
from iresflow_plugin.inverse.loop import Memory, iterate
from iresflow_plugin.inverse.proof import Careful, Solution, believe, prove
from iresflow_plugin.maps import Map
from iresflow_plugin.torch_state import most_precise, single

OnFailure = Literal["raise", "warn", "return"]
NOT_FINITE = (
    "The branch's weights, or what its context gives, are not finite (NaN or infinite), so there is nothing to solve; "
    "block.certificate() names the first such weight."
)


@dataclass(frozen=True)
class Solver:
    """What all solvers share.

    Args:
        tolerance: largest |x - x*| (2-norm, per sample); None is what the dtype can hold: about eps max(|x|, |y|).
        max_evaluations: limit per sample; None is what the bound L proves to suffice.
        on_failure: "raise" NotConvergedError, "warn", or "return" and leave it to `Solution.converged`.
    """

    tolerance: float | None = None
    max_evaluations: int | None = None
    on_failure: OnFailure = "raise"

    def __post_init__(self) -> None:
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"tolerance must be a positive distance, got {self.tolerance}.")
        if self.max_evaluations is not None:
            check_whole("max_evaluations", self.max_evaluations)
        if self.on_failure not in ("raise", "warn", "return"):
            raise ValueError(f"on_failure must be 'raise', 'warn' or 'return', got {self.on_failure!r}.")

    def propose(self, g: Map, x: Tensor, residual: Tensor, memory: Memory) -> tuple[Tensor | None, Memory, int]:
        """The next candidate (None: the plain step), the new memory, and the evaluations of g or dg it took.

        The memory is a tuple of tensors with the batch in front, at first empty.
        """
        raise NotImplementedError

    def solve(self, g: Map, y: Tensor) -> Solution:
        """The x with x + g(x) = y."""
        with torch.no_grad():
            solution = self._solve(g, y)
            if not bool(solution.converged.all()):
                _report_failure(solution, self, g)
        return solution

    def _solve(self, g: Map, y: Tensor) -> Solution:
        working, wide = single(y), most_precise(y.device)
        solution = self._attempt(g if working is y else g.to(working.dtype), y, working)
        again = ~solution.converged & torch.isfinite(solution.error_bound)
        if self.max_evaluations is not None or not bool(again.any()):
            return solution
        rows = again.nonzero()[:, 0]
        better = g.rows(rows)
        better = Careful(better) if y.dtype == wide else better.to(wide)
        return solution.replaced(rows, self._attempt(better, y[rows], solution.x[rows].to(wide)))

    def _attempt(self, g: Map, y: Tensor, start: Tensor) -> Solution:
        """The loop from `start`, in its dtype, and the proof."""
        found = iterate(self, g, y.to(start.dtype), start, _bound_below_one(g))
        return prove(g, y, found, self.tolerance) if g.needs_proof else believe(g, y, found, self.tolerance)


def _bound_below_one(g: Map) -> float:
    bound = g.bound
    if math.isnan(bound):
        raise NotContractiveError(NOT_FINITE)
    if not bound < 1:
        raise NotContractiveError(f"A solve needs a Lipschitz bound below 1, and this one is {bound:.6g}.")
    return bound


def _report_failure(solution: Solution, solver: Solver, g: Map) -> None:
    if solver.on_failure == "return":
        return
    everywhere = g.needs_proof and not bool(solution.converged.any())  # else it is a row of the context, or of x
    if everywhere and not all(bool(torch.isfinite(t).all()) for t in g.tensors() if t.ndim):
        raise NotContractiveError(NOT_FINITE)
    failed = (~solution.converged).nonzero()[:, 0].tolist()
    rows = ", ".join(map(str, failed[:8])) + (", ..." if len(failed) > 8 else "")
    worst = solution.error_bound[failed].max().item()
    most = int(solution.evaluations[failed].max())
    asked = "round-off" if solver.tolerance is None else f"{solver.tolerance:.3g}"
    reason = (
        "their y is not finite, or g is not: look for NaN and infinity in the input and in the weights"
        if not math.isfinite(worst)
        else "raise max_evaluations or the tolerance, use float64, or give the branch a smaller Lipschitz bound"
    )
    message = (
        f"The inverse did not converge for {len(failed)} of {len(solution.converged)} samples (rows {rows}): "
        f"the error is only known to be at most {worst:.3g} after {most} evaluations, asked for was {asked}. "
        f"Remedy: {reason}."
    )
    if solver.on_failure == "warn":
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    else:
        raise NotConvergedError(message, solution)
