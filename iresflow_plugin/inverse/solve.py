"""The one loop behind every inverse: find x with x + g(x) = y, to a certified error.

For ANY candidate x the residual r = y - x - g(x) proves |x - x*| <= |r| / (1 - L). So a method may propose what it
likes; the loop measures the residual and keeps the best candidate. A plain step x + r = y - g(x) shrinks the residual
by L, always, and is what the loop takes whenever a proposal did worse than that.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import Literal, Protocol

import torch
from torch import Tensor

from iresflow_plugin.errors import NotContractiveError, NotConvergedError
from iresflow_plugin.maps import Map, norms

OnFailure = Literal["raise", "warn", "return"]
MOST_STEPS = 100_000
PATIENCE = 8


@dataclass(frozen=True)
class Solution:
    """How a solve went.

    Attributes:
        x: the solution, shape (B, *event).
        error_bound: per sample, shape (B,): |x - x*| is at most this, rounding included.
        evaluations: per sample, shape (B,): how often g, or its derivative in one direction, was evaluated.
        converged: per sample, shape (B,): whether the bound is within the tolerance, or at what the dtype can hold.
    """

    x: Tensor
    error_bound: Tensor
    evaluations: Tensor
    converged: Tensor


class Method(Protocol):
    """Proposes the next candidate from the residual; its memory is a tuple of tensors with the batch in front."""

    def start(self, y: Tensor) -> tuple[Tensor, ...]: ...

    def propose(
        self, g: Map, x: Tensor, residual: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, tuple[Tensor, ...], int]:
        """The next candidate (None: the plain step), the new memory, and the evaluations of g or dg it took."""
        ...


@dataclass(frozen=True)
class Solver:
    """What all solvers share.

    Args:
        tolerance: largest |x - x*| (2-norm, per sample); None is what the dtype can hold,
            about 5 eps max(|x|, |y|) / (1 - L), or more where larger numbers are rounded inside g.
        max_evaluations: limit per sample; None is what the bound L proves to suffice.
        on_failure: "raise" NotConvergedError, "warn", or "return" and leave it to `Solution.converged`.
    """

    tolerance: float | None = None
    max_evaluations: int | None = None
    on_failure: OnFailure = "raise"

    def __post_init__(self) -> None:
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"tolerance must be a positive distance, got {self.tolerance}.")
        if self.max_evaluations is not None and self.max_evaluations < 1:
            raise ValueError(f"max_evaluations must be at least 1, got {self.max_evaluations}.")
        if self.on_failure not in ("raise", "warn", "return"):
            raise ValueError(f"on_failure must be 'raise', 'warn' or 'return', got {self.on_failure!r}.")

    def start(self, y: Tensor) -> tuple[Tensor, ...]:
        return ()

    def propose(
        self, g: Map, x: Tensor, residual: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, tuple[Tensor, ...], int]:
        raise NotImplementedError

    def solve(self, g: Map, y: Tensor) -> Solution:
        """The x with x + g(x) = y."""
        solution = iterate(self, g, y, self.tolerance, self.max_evaluations)
        if not bool(solution.converged.all()):
            _report_failure(solution, self)
        return solution


@torch.no_grad()
def iterate(method: Method, g: Map, y: Tensor, tolerance: float | None, max_evaluations: int | None) -> Solution:
    """The loop. Samples that are done leave the batch, and cost nothing more."""
    bound = g.bound
    if not bound < 1:
        raise NotContractiveError(f"A solve needs a Lipschitz bound below 1, and this one is {bound:.6g}.")
    result = _unsolved(y)
    work = _begin(y.detach())
    g = g if len(work.row) == len(y) else g.rows(work.row)
    memory = method.start(work.y)
    spent, limit = 0, enough_steps(bound, y.dtype)
    for step in range(1, limit + 1):
        if len(work.row) == 0:
            break
        steady = _measure(work, g, bound, first=step == 1)
        spent += 1
        out_of_budget = step == limit or (max_evaluations is not None and spent >= max_evaluations)
        converged = work.norm <= (0.25 * work.floor if tolerance is None else tolerance * (1 - bound) - work.floor)
        if out_of_budget or not steady or bool(converged.any()):
            finished = _retire(work, result, converged, bound, spent, tolerance is None, out_of_budget)
            if bool(finished.all()):
                break
            if bool(finished.any()):
                keep = (~finished).nonzero()[:, 0]
                work, g, memory = work.only(keep), g.rows(keep), tuple(m[keep] for m in memory)
        proposal, memory, cost = method.propose(g, work.best, work.residual, memory)
        spent += cost
        work.candidate = work.best + work.residual
        if proposal is not None:
            usable = work.as_promised & torch.isfinite(proposal.flatten(1)).all(1)
            work.candidate = torch.where(_like(usable, proposal), proposal, work.candidate)
    return result


@dataclass
class _Work:
    """The rows that are not done: their index in the batch, and how far they have come."""

    row: Tensor
    y: Tensor
    candidate: Tensor
    best: Tensor
    residual: Tensor  # of the best candidate, and its norm
    norm: Tensor
    floor: Tensor  # what rounding alone may leave of that residual
    size: Tensor  # of y, and of the numbers inside g at the first candidate
    idle: Tensor  # evaluations since the last progress
    as_promised: Tensor  # whether the last candidate was no worse than a plain step would have been

    def only(self, keep: Tensor) -> _Work:
        return _Work(*[getattr(self, field.name)[keep] for field in fields(self)])


def _unsolved(y: Tensor) -> Solution:
    batch = y.shape[0]
    return Solution(
        x=y.clone(),
        error_bound=y.new_full((batch,), math.inf, dtype=_accumulate(y.dtype)),
        evaluations=torch.zeros(batch, dtype=torch.int64, device=y.device),
        converged=torch.zeros(batch, dtype=torch.bool, device=y.device),
    )


def _begin(y: Tensor) -> _Work:
    """Rows that are not finite have no solution and never enter."""
    row = torch.isfinite(y.flatten(1)).all(1).nonzero()[:, 0]
    y = y if len(row) == len(y) else y[row]
    far = y.new_full((len(row),), math.inf, dtype=_accumulate(y.dtype))
    at_start = torch.zeros_like(far), norms(y), torch.zeros_like(row), torch.ones_like(row, dtype=torch.bool)
    return _Work(row, y, y, y, y, far, *at_start)  # a floor of zero: nothing infinite or NaN may look converged


def _measure(work: _Work, g: Map, bound: float, first: bool) -> bool:
    """Evaluate g at the candidate and keep it where its residual is the smallest so far: True if that is everywhere."""
    if first:
        value, inside = g.magnitude(work.candidate)
        work.size = torch.maximum(work.size, inside)
    else:
        value = g(work.candidate)
    residual = work.y - work.candidate - value
    norm = norms(residual)
    floor = round_off(torch.maximum(work.size, norms(work.candidate)), residual.dtype)
    better = norm < work.norm
    steady = bool(better.all())
    work.as_promised = norm <= bound * work.norm + floor
    work.idle = torch.zeros_like(work.idle) if steady else torch.where(norm < 0.999 * work.norm, 0, work.idle + 1)
    if steady:
        work.best, work.residual, work.norm, work.floor = work.candidate, residual, norm, floor
        return True
    wide = _like(better, residual)
    work.best = torch.where(wide, work.candidate, work.best)
    work.residual = torch.where(wide, residual, work.residual)
    work.norm = torch.where(better, norm, work.norm)
    work.floor = torch.where(better, floor, work.floor)
    return False


def _retire(
    work: _Work, result: Solution, converged: Tensor, bound: float, spent: int, stall_is_fine: bool, out_of_budget: bool
) -> Tensor:
    """Write out the rows that have converged, or can get no further; True where a row is finished."""
    # No progress for long, near round-off: as far as the dtype goes, a success if no more was asked for.
    stalled = (work.idle >= PATIENCE) & (work.norm <= 64 * work.floor)
    if stall_is_fine:
        converged = converged | stalled
    broken = ~torch.isfinite(work.norm + work.floor)
    converged = converged & ~broken
    finished = converged | stalled | broken | out_of_budget
    out = work.row[finished]
    result.x[out] = (work.best + work.residual)[finished]  # one plain step more, already paid for
    result.error_bound[out] = ((work.norm + work.floor) / (1 - bound))[finished]
    result.evaluations[out] = spent
    result.converged[out] = converged[finished]
    return finished


def enough_steps(bound: float, dtype: torch.dtype) -> int:
    """Steps after which the residual must be at round-off: every second one shrinks it by L at least."""
    if bound == 0:
        return 2 * PATIENCE
    return min(MOST_STEPS, 2 * PATIENCE + 2 * math.ceil(math.log(torch.finfo(dtype).eps / 8) / math.log(bound)))


def round_off(size: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding alone may leave of y - x - g(x), per sample, when the numbers in it are of this size."""
    return 4 * torch.finfo(dtype).eps * size


def _report_failure(solution: Solution, solver: Solver) -> None:
    if solver.on_failure == "return":
        return
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


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (x.ndim - 1))
