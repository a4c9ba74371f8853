"""What goes on inside a flow of residual blocks: how much of its bound a block uses, what log-dets and inverses cost.

    visits = visit_blocks(flow, x)            every residual block, with the inputs it meets when the flow sees x
    block_rows(visits)                        certified bound, measured norm of the Jacobian, cost of the inverse
    log_det_error(density, visits, points, n) what the log-dets may add to the error of a likelihood
    log_det_work(visits)                      error against cost for every estimator
    inverse_work(visits)                      error against cost for every solver
    round_trip(density, x)                    what data -> noise -> data loses, for any flow
    training_memory(density, method, x)       peak memory of one training step, for any flow

An evaluation is g itself, or one product of its Jacobian with a vector, at one point. They are counted, not estimated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from comparisons.methods import Density, Method
from comparisons.metrics import median_seconds
from comparisons.speed import peak_megabytes, training_step
from comparisons.tasks import Points
from comparisons.training import BEYOND, EXACT_UP_TO, evaluating
from iresflow_plugin import ResidualBlock, using
from iresflow_plugin.inverse import Anderson, FixedPoint, Newton, Solution, Solver
from iresflow_plugin.log_det import Estimate, Exact, LogDet, Omitted, Orthogonal, PowerSeries, RussianRoulette
from iresflow_plugin.maps import Around, Linearised, Map, jacobian_columns, transposed_jacobian
from iresflow_plugin.torch_state import norms, per_sample

DENSE_UP_TO = 64  # dimensions: beyond this the Jacobian's norm comes from power iteration
POWER_STEPS = 100
TOLERANCES = tuple(10.0**-k for k in range(1, 11))

TERMS = (1, 2, 4, 8, 16, 32)
SOLVERS: dict[str, Solver] = {"fixed point": FixedPoint(), "Anderson": Anderson(), "Newton": Newton()}


# the blocks and what they meet -----------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """One residual block during one pass of its flow: g as it was then, and the points x it was evaluated at."""

    block: ResidualBlock
    g: Map
    x: Tensor


@torch.no_grad()
def visit_blocks(model: nn.Module, x: Tensor, context: Tensor | None = None) -> list[Visit]:
    """Pass x through the model's `log_prob`, or the model itself, and note what each residual block meets, in order.

    `in_double` makes a model whose rounding is far below every error of interest.
    """
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} holds no ResidualBlock, so there is nothing to visit.")
    visits: list[Visit] = []
    training = model.training
    try:
        with ExitStack() as noting:
            for block in blocks:
                noting.enter_context(using(block, log_det=partial(_note, visits, block)))
            run = getattr(model.eval(), "log_prob", model)
            run(x) if context is None else run(x, context)
    finally:
        model.train(training)
    return visits


def _note(visits: list[Visit], block: ResidualBlock, g: Map, x: Tensor) -> Estimate:
    """Stands in for a log-det estimator, the one place that sees a block's g and x in both directions."""
    visits.append(Visit(block, g, x.clone()))
    return Omitted()(g, x)


# how much of the bound is used -----------------------------------------------------------------------


@dataclass(frozen=True)
class BlockRow:
    """One block: the certified bound of Lip(g), the largest singular value of its Jacobian at the points, and the
    evaluations of g that its own solver takes for a point."""

    block: int
    bound: float
    measured: float  # largest
    median: float
    evaluations: float  # mean


@torch.no_grad()
def block_rows(visits: Sequence[Visit]) -> list[BlockRow]:
    """The slack between bound and measured norm is room that the block cannot use."""
    rows = []
    for number, visit in enumerate(visits, start=1):
        measured = jacobian_norms(visit.g, visit.x)
        solver = replace(visit.block.solver, on_failure="return")  # a failure is a finding here
        evaluations = solver.solve(visit.g, visit.x + visit.g(visit.x)).evaluations.double().mean().item()
        rows.append(BlockRow(number, visit.g.bound, measured.max().item(), measured.median().item(), evaluations))
    return rows


@torch.no_grad()
def jacobian_norms(g: Map, x: Tensor, dense_up_to: int = DENSE_UP_TO, steps: int = POWER_STEPS) -> Tensor:
    """|dg/dx|_2 per sample, shape (B,): by singular values up to `dense_up_to` dimensions, by power iteration beyond.

    Power iteration comes from below: after 100 steps it has lost less than 1 % unless in an unlucky direction.
    """
    at_x = g.linearise(x)
    if x.shape[1:].numel() <= dense_up_to:
        columns = jacobian_columns(at_x, x, range(x.shape[1:].numel()))
        return torch.linalg.matrix_norm(transposed_jacobian(columns), ord=2)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)
    for _ in range(steps):
        v = at_x.vjp(at_x.jvp(unit(v)))
    return norms(at_x.jvp(unit(v)))


def unit(v: Tensor) -> Tensor:
    """Rows of length one; zero stays zero."""
    return v / per_sample(norms(v).to(v.dtype).clamp_min(torch.finfo(v.dtype).tiny), v)


# counting --------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """Evaluations of all points together; one that a map shares with its rows."""

    total: int = 0

    def add(self, x: Tensor, vectors: int = 1) -> None:
        self.total += vectors * len(x)


@dataclass(eq=False)
class _Counted(Around):
    """g with a count of its evaluations and Jacobian products."""

    tally: _Tally = field(default_factory=_Tally)

    def __call__(self, x: Tensor) -> Tensor:
        self.tally.add(x)
        return self.g(x)

    def linearise(self, x: Tensor) -> Linearised:
        self.tally.add(x)
        at_x = self.g.linearise(x)

        def jvp(tangent: Tensor) -> Tensor:
            self.tally.add(x, _vectors(tangent, x))
            return at_x.jvp(tangent)

        def vjp(cotangent: Tensor) -> Tensor:
            self.tally.add(x, _vectors(cotangent, x))
            return at_x.vjp(cotangent)

        return Linearised(at_x.value, jvp, vjp)


def _vectors(vector: Tensor, x: Tensor) -> int:
    """For every point."""
    return vector.shape[0] if vector.ndim > x.ndim else 1


# log-dets --------------------------------------------------------------------------------------------


def log_det_error(density: Density, visits: Sequence[Visit], points: Points, scored: int) -> float:
    """What log-dets may add to the error of a mean over `scored` points like these; 0: exact.

    Two standard errors of what is random, which shows when a density is asked twice, and a bound of what the series of
    `evaluating` leaves out in the blocks that were visited.
    """
    features = points.x[0].numel()
    truncated = visits if features > EXACT_UP_TO else ()
    with evaluating(density, features):
        first, second = (density.log_prob(points.x, points.context).double() for _ in range(2))
        left_out = sum(BEYOND(visit.g, visit.x).remainder.double().mean().item() for visit in truncated)
    return 2 * math.sqrt((first - second).square().mean().item() / 2 / scored) + left_out


@dataclass(frozen=True)
class LogDetWork:
    """One estimator on the whole flow: the error of the sum of its blocks' log-dets, in nats per point, and its cost.

    bias and its standard error are over repeats; `deviation` is the root mean square over points of the scatter
    between repeats, and `rms` that of the whole error. Evaluations, terms and seconds are for all blocks together.
    """

    family: str
    estimator: LogDet
    bias: float
    bias_error: float
    deviation: float
    rms: float
    terms: float
    evaluations: float
    seconds: float  # per point, within a batch


def log_dets(features: int) -> dict[str, list[LogDet]]:
    """The estimators to compare, each in several settings. All D orthogonal probes leave no scatter, only bias."""
    families: dict[str, list[LogDet]] = {
        "exact": [Exact()],
        "series, 1 probe": [PowerSeries(terms=n) for n in TERMS],
        "series, 4 probes": [PowerSeries(terms=n, probes=4) for n in TERMS],
        "roulette, 1 probe": [RussianRoulette(exact_terms=n) for n in TERMS[:5]],
        "roulette, 4 probes": [RussianRoulette(exact_terms=n, probes=4) for n in TERMS[:5]],
    }
    if features <= DENSE_UP_TO:
        families[f"series, all {features} probes"] = [PowerSeries(terms=n, probes=Orthogonal(features)) for n in TERMS]
    return families


@torch.no_grad()
def log_det_work(
    visits: Sequence[Visit],
    families: Mapping[str, Sequence[LogDet]] | None = None,
    repeats: int = 30,
    seed: int = 0,
) -> list[LogDetWork]:
    """Error and cost of every estimator (None: those of `log_dets`), judged at the same points by the exact log-det."""
    if repeats < 2:
        raise ValueError(f"The scatter of an estimator needs at least 2 repeats, got {repeats}.")
    families = log_dets(visits[0].x[0].numel()) if families is None else families
    truth = torch.stack([exact_log_det(visit) for visit in visits]).sum(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [
            _log_det_work(visits, family, estimator, truth, repeats)
            for family, estimators in families.items()
            for estimator in estimators
        ]


def _log_det_work(visits: Sequence[Visit], family: str, estimator: LogDet, truth: Tensor, repeats: int) -> LogDetWork:
    counted = [_Counted(visit.g) for visit in visits]
    totals, terms = [], 0
    for _ in range(repeats):
        estimates = [estimator(g, visit.x) for g, visit in zip(counted, visits, strict=True)]
        totals.append(torch.stack([estimate.log_det.double() for estimate in estimates]).sum(0))
        terms += sum(estimate.terms for estimate in estimates)
    error = torch.stack(totals) - truth  # (repeats, points)
    means = error.mean(1)  # roulette draws its length once for all points: only repeats are independent
    seconds = median_seconds(lambda: [estimator(visit.g, visit.x) for visit in visits], truth.device)
    return LogDetWork(
        family,
        estimator,
        bias=means.mean().item(),
        bias_error=means.std().item() / math.sqrt(repeats),
        deviation=error.var(0).mean().sqrt().item(),
        rms=error.square().mean().sqrt().item(),
        terms=terms / repeats,
        evaluations=sum(g.tally.total for g in counted) / repeats / len(truth),
        seconds=seconds / len(truth),
    )


def exact_log_det(visit: Visit) -> Tensor:
    """log det(I + J) in double precision, with the weights in use at the visit, shape (B,)."""
    return Exact()(visit.g.to(torch.float64), visit.x.double()).log_det


# inverses --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InverseWork:
    """One solver at one tolerance: evaluations per point, the true error |x - x*|, and the certified one."""

    name: str  # of the solver
    tolerance: float | None
    evaluations: float  # mean over points
    most_evaluations: int
    error: float  # largest over points
    certified: float  # largest over points; never below the error
    converged: float  # share of the points
    seconds: float  # per point, within a batch


@torch.no_grad()
def inverse_work(
    visits: Sequence[Visit], solvers: Mapping[str, Solver] = SOLVERS, tolerances: Iterable[float] = TOLERANCES
) -> list[InverseWork]:
    """Every solver at every tolerance, over all blocks: evaluations are means per block, errors the largest."""
    return [
        solve_work(visits, name, replace(solver, tolerance=tolerance))
        for tolerance in tolerances
        for name, solver in solvers.items()
    ]


def solve_work(visits: Sequence[Visit], name: str, solver: Solver) -> InverseWork:
    """Solve x + g(x) = y for the y of every visit, whose x is known."""
    solver = replace(solver, on_failure="return")  # a failure is a finding here
    solves = [(visit.g, visit.x + visit.g(visit.x)) for visit in visits]
    found: list[Solution] = [solver.solve(g, y) for g, y in solves]
    error = max(norms(solution.x - visit.x).max().item() for solution, visit in zip(found, visits, strict=True))
    evaluations = torch.cat([solution.evaluations for solution in found])
    seconds = median_seconds(lambda: [solver.solve(g, y) for g, y in solves], visits[0].x.device)
    return InverseWork(
        name,
        solver.tolerance,
        evaluations=evaluations.double().mean().item(),
        most_evaluations=int(evaluations.max()),
        error=error,
        certified=max(solution.error_bound.max().item() for solution in found),
        converged=torch.cat([solution.converged for solution in found]).double().mean().item(),
        seconds=seconds / len(evaluations),
    )


def in_double(density: Density) -> Density:
    """A copy in which rounding is far below every error of interest."""
    return copy.deepcopy(density).double()


# any flow --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoundTrip:
    """|x - decode(encode(x))| in the 2-norm over points; `failed` counts those that came back NaN or infinite."""

    median: float
    largest: float
    failed: int


def round_trip(density: Density, x: Tensor, context: Tensor | None = None) -> RoundTrip:
    """What data -> noise -> data loses in the precision of x; the median and largest of the points that came back."""
    with evaluating(density, x[0].numel(), Omitted()):
        lost = norms(density.to_data(density.to_noise(x, context), context) - x)
    back = lost[torch.isfinite(lost)]
    if not len(back):
        return RoundTrip(math.nan, math.nan, len(lost))
    return RoundTrip(back.median().item(), back.max().item(), len(lost) - len(back))


def training_memory(density: Density, method: Method, x: Tensor, context: Tensor | None = None) -> float:
    """Peak memory of one training step on the batch x in MB, beyond weights and optimiser state; trains a copy."""
    step: Any = training_step(copy.deepcopy(density).train(), x, method.after_step, context)
    step()  # sets ActNorm from the data, and the optimiser's state
    return peak_megabytes(step, x.device)
