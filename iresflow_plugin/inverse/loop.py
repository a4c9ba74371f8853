"""The one loop behind every inverse: find x with x + g(x) = y.

For ANY candidate x the residual r = y - x - g(x) proves |x - x*| <= |r| / (1 - L). So a method may propose what it
likes; the loop measures the residual and keeps the best candidate. A plain step x + r = y - g(x) shrinks the residual
by L, always, and is what the loop takes whenever a proposal did worse than that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from iresflow_plugin.maps import Map
from iresflow_plugin.torch_state import most_precise, norms, per_sample

MOST_STEPS = 100_000
PATIENCE = 8

Memory = tuple[Tensor, ...]


class Method(Protocol):
    """What the loop needs of a solver."""

    @property
    def tolerance(self) -> float | None: ...

    @property
    def max_evaluations(self) -> int | None: ...

    def propose(self, g: Map, x: Tensor, residual: Tensor, memory: Memory) -> tuple[Tensor | None, Memory, int]: ...


class Found(NamedTuple):
    """Where the loop has come, per sample."""

    x: Tensor
    length: Tensor  # of the residual, one plain step before x
    evaluations: Tensor
    stalled: Tensor  # whether no more could be got


@dataclass
class _Work:
    """The rows that are not done: their index in the batch, and how far they have come."""

    row: Tensor
    y: Tensor
    candidate: Tensor
    best: Tensor
    residual: Tensor  # of the best candidate, and its norm
    norm: Tensor
    floor: Tensor  # what rounding alone usually leaves of a residual
    idle: Tensor  # evaluations since the last progress
    as_promised: Tensor  # whether the last candidate was no worse than a plain step would have been

    def only(self, keep: Tensor) -> _Work:
        return _Work(*[getattr(self, field.name)[keep] for field in fields(self)])

    def enough(self, tolerance: float | None, bound: float) -> Tensor:
        """The residual at which to stop; a proof in wider numbers takes one plain step more, and may begin earlier."""
        floor = self.floor if self.y.dtype == most_precise(self.y.device) else 2 * self.floor
        return floor if tolerance is None else torch.maximum(floor, tolerance * (1 - bound) - 4 * floor)


def iterate(method: Method, g: Map, y: Tensor, start: Tensor, bound: float) -> Found:
    """The loop, without proof. Samples that are done leave it, and cost nothing more."""
    found, work = _nothing(start), _begin(y, start)
    g = g if len(work.row) == len(y) else g.rows(work.row)
    memory: Memory = ()
    spent, steps = 0, 0
    budget = math.inf if method.max_evaluations is None else method.max_evaluations - 1  # one is for the proof
    while len(work.row) and spent < budget:
        _measure(work, g, bound)
        spent, steps = spent + 1, steps + 1
        finished = (work.idle >= PATIENCE) | (work.norm <= work.enough(method.tolerance, bound))
        if spent >= budget or steps == enough_steps(bound, y.dtype):
            finished = torch.ones_like(finished)
        if bool(finished.any()):
            _write(found, work, finished, spent)
            if bool(finished.all()):
                break
            keep = (~finished).nonzero()[:, 0]
            work, g, memory = work.only(keep), g.rows(keep), tuple(m[keep] for m in memory)
        proposal, memory, cost = method.propose(g, work.best, work.residual, memory)
        spent += cost
        work.candidate = work.best + work.residual
        if proposal is not None:
            work.candidate = torch.where(per_sample(work.as_promised, proposal), proposal, work.candidate)
    return found


def _nothing(start: Tensor) -> Found:
    far = torch.full((len(start),), math.inf, dtype=most_precise(start.device), device=start.device)
    zeros = torch.zeros(len(start), dtype=torch.int64, device=start.device)
    return Found(start.clone(), far, zeros, torch.zeros_like(zeros, dtype=torch.bool))


def _begin(y: Tensor, start: Tensor) -> _Work:
    """Rows that are not finite have no solution and never enter."""
    row = torch.isfinite(y.flatten(1)).all(1).nonzero()[:, 0]
    if len(row) < len(y):
        y, start = y[row], start[row]
    floor = torch.finfo(y.dtype).eps * norms(y)
    far, idle = torch.full_like(floor, math.inf), torch.zeros_like(row)
    return _Work(row, y, start, start, start, far, floor, idle, torch.ones_like(row, dtype=torch.bool))


def _measure(work: _Work, g: Map, bound: float) -> None:
    """Evaluate g at the candidate and keep it where its residual is the smallest so far."""
    residual = work.y - work.candidate - g(work.candidate)
    norm = norms(residual)
    work.floor = torch.maximum(work.floor, torch.finfo(residual.dtype).eps * norms(work.candidate))
    work.as_promised = norm <= bound * work.norm + 4 * work.floor
    # Every second step is a plain one at least, which shrinks the residual by L but for rounding.
    work.idle = torch.where(norm < (1 + bound) / 2 * work.norm, 0, work.idle + 1)
    better = norm < work.norm
    if bool(better.all()):
        work.best, work.residual, work.norm = work.candidate, residual, norm
        return
    wide = per_sample(better, residual)
    work.best = torch.where(wide, work.candidate, work.best)
    work.residual = torch.where(wide, residual, work.residual)
    work.norm = torch.where(better, norm, work.norm)


def _write(found: Found, work: _Work, finished: Tensor, spent: int) -> None:
    """One plain step more, which is already paid for, and out."""
    out = work.row[finished]
    found.x[out] = (work.best + work.residual)[finished]
    found.length[out] = work.norm[finished]
    found.evaluations[out] = spent
    found.stalled[out] = work.idle[finished] >= PATIENCE


def enough_steps(bound: float, dtype: torch.dtype) -> int:
    """Steps after which the residual must be at round-off: every second one shrinks it by L at least."""
    if bound == 0:
        return 2 * PATIENCE
    return min(MOST_STEPS, 2 * PATIENCE + 2 * math.ceil(math.log(torch.finfo(dtype).eps / 8) / math.log(bound)))
