"""Is `Solution.error_bound` never below the true error, and not far above it? `python -m comparisons.rounding`

Solves of many kinds, random and adversarial, are judged by solutions in numpy's longdouble, which on x86 has 64 binary
digits. (For float32, float64 would not do: where large numbers cancel inside g, its errors are those of a bound.)

The reference shares no code with the package. It takes the numbers that the package calculates with: weights and biases
as the layers show them, frequencies and shares as they come out in the dtype of the branch, a `Scale`'s factor as it is
stored. These numbers define a function, and y an exact solution x* of x + g(x) = y.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.utils import parametrize

from comparisons.provenance import provenance
from comparisons.tables import PROGRESS_COLUMNS, Columns, print_lines, print_wide, rich_table
from iresflow_plugin import ResidualBlock
from iresflow_plugin.inverse import Anderson
from iresflow_plugin.lipschitz import (
    AlmostOrthogonal,
    Chain,
    Concatenate,
    Constraint,
    Frobenius,
    LearnableConcatenate,
    LipSwish,
    Scale,
    SinCos,
    Sine,
    Spectral,
    Sum,
    constrain,
)
from iresflow_plugin.nets import LipschitzConvNet, LipschitzDenseNet, LipschitzMLP

Array = np.ndarray
Function = Callable[[Array], Array]
Kind = type[np.floating]

DTYPES = {"float32": torch.float32, "float64": torch.float64}
LIPSCHITZ = (0.5, 0.8, 0.9, 0.97, 0.99)

# the function in wider arithmetic ---------------------------------------------------------------------

ROUGH, FINE = np.float64, np.longdouble
IS_FINE = np.finfo(FINE).nmant >= 63  # on some machines it is float64 once more
CHUNK = 2**20  # products held at once


def numbers(tensor: Tensor, kind: Kind) -> Array:
    """The same numbers, held with more digits."""
    return tensor.detach().double().numpy().astype(kind)


def product(x: Array, weight: Array) -> Array:
    """x W' on the last dimension.

    In longdouble the sums are taken in pairs, as numpy's `sum` does: its `@` adds up one by one, and sums of 4096
    equal terms are then off by 500 units of the last place, a quarter of float64's.
    """
    rows = np.ascontiguousarray(x.reshape(-1, x.shape[-1]))
    if x.dtype == ROUGH:
        value = (torch.from_numpy(rows) @ torch.from_numpy(weight).T).numpy()
    else:
        step = max(1, CHUNK // rows.size)
        parts = [(weight[i : i + step, None] * rows).sum(-1) for i in range(0, len(weight), step)]
        value = np.concatenate(parts).T
    return value.reshape(*x.shape[:-1], len(weight))


def linear(module: nn.Linear, kind: Kind) -> Function:
    weight = numbers(module.weight, kind)
    bias = kind(0) if module.bias is None else numbers(module.bias, kind)
    return lambda x: product(x, weight) + bias


def convolution(module: nn.Conv2d, kind: Kind) -> Function:
    """As a product of unfolded images."""
    if module.stride != (1, 1) or module.dilation != (1, 1) or module.groups != 1 or isinstance(module.padding, str):
        raise NotImplementedError("The reference knows convolutions without stride, dilation and groups.")
    weight = numbers(module.weight, kind)
    bias = kind(0) if module.bias is None else numbers(module.bias, kind)
    around = [(0, 0), (0, 0), *[(p, p) for p in module.padding]]
    mode: Any = "wrap" if module.padding_mode == "circular" else "constant"

    def function(x: Array) -> Array:
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, around, mode), weight.shape[2:], (2, 3))
        patches = windows.transpose(0, 2, 3, 1, 4, 5)
        value = product(patches.reshape(*patches.shape[:3], -1), weight.reshape(len(weight), -1)) + bias
        return value.transpose(0, 3, 1, 2)

    return function


def sine(module: Sine, kind: Kind) -> Function:
    w = numbers(module.frequency, kind)
    return lambda x: np.sin(w * x) / w


def sine_and_cosine(module: SinCos, kind: Kind) -> Function:
    w = numbers(module.frequency, kind)
    return lambda x: np.concatenate([np.sin(w * x) / w, np.cos(w * x) / w], module.dim)


def swish(module: LipSwish, kind: Kind) -> Function:
    s = numbers(F.softplus(module.b), kind)

    def function(x: Array) -> Array:
        with np.errstate(over="ignore"):  # 1 / inf is the right zero
            return x / (1 + np.exp(-s * x)) / kind(1.1)

    return function


def elu(module: nn.ELU, kind: Kind) -> Function:
    return lambda x: np.where(x > 0, x, kind(module.alpha) * np.expm1(np.minimum(x, 0)))


def softplus(module: nn.Softplus, kind: Kind) -> Function:
    """log(1 + exp(beta x)) / beta, everywhere."""
    beta = kind(module.beta)
    return lambda x: np.maximum(x, 0) + np.log1p(np.exp(-abs(beta * x))) / beta


def chain(module: nn.Sequential, kind: Kind) -> Function:
    parts = [function_of(part, kind) for part in module]
    return lambda x: reduce(lambda value, part: part(value), parts, x)


def total(module: Sum, kind: Kind) -> Function:
    parts = [function_of(part, kind) for part in module]
    return lambda x: np.stack([part(x) for part in parts]).sum(0)


def concatenation(module: Concatenate, kind: Kind) -> Function:
    parts = [function_of(part, kind) for part in module]
    shares = numbers(module.eta, kind) if isinstance(module, LearnableConcatenate) else np.ones(len(parts), kind)
    return lambda x: np.concatenate([s * part(x) for s, part in zip(shares, parts, strict=True)], module.dim)


def scaling(module: Scale, kind: Kind) -> Function:
    return lambda x: kind(module.factor) * x


RULES: dict[type[nn.Module], Callable[[Any, Kind], Function]] = {
    nn.Linear: linear,
    nn.Conv2d: convolution,
    nn.Sequential: chain,
    nn.Tanh: lambda module, kind: np.tanh,
    nn.ELU: elu,
    nn.Softplus: softplus,
    Sine: sine,
    SinCos: sine_and_cosine,
    LipSwish: swish,
    Sum: total,
    Concatenate: concatenation,
    Scale: scaling,
}


@torch.no_grad()  # a constraint may round its weight in another way where gradients are wanted
def function_of(module: nn.Module, kind: Kind) -> Function:
    """The module in this arithmetic, with the numbers that it has now."""
    for known, rule in RULES.items():
        if isinstance(module, known):
            return rule(module, kind)
    raise NotImplementedError(f"The reference does not know {type(module).__name__}.")


# the solution in wider arithmetic ---------------------------------------------------------------------

MEMORY = 5
PATIENCE = 4
MOST_EVALUATIONS = 3000


@dataclass(frozen=True)
class Reference:
    """x*, and per row how far from it this x may be."""

    x: Array
    doubt: Array


def norms(x: Array) -> Array:
    return np.sqrt((flat(x) ** 2).sum(-1))


def exact_solution(branch: nn.Module, y: Tensor, start: Tensor, lipschitz: float) -> Reference:
    """x with x + g(x) = y, from an x that is near: first in float64, as far as that goes.

    The doubt is |y - x - g(x)| / (1 - L), with what rounding does to g(x): in float64 one sees it, and longdouble has
    11 digits more, of which two are left as a margin.
    """
    rough, fine = function_of(branch, ROUGH), function_of(branch, FINE)
    goal = torch.finfo(y.dtype).eps / 2**20 * (1 - lipschitz)
    x, _ = fixed_point(rough, numbers(y, ROUGH), numbers(start, ROUGH), goal)
    x, residual = fixed_point(fine, numbers(y, FINE), x.astype(FINE), goal)
    rounding = norms(fine(x) - rough(x.astype(ROUGH))) / 2**9
    return Reference(x, (norms(residual) + rounding) / (1 - lipschitz))


def fixed_point(g: Function, y: Array, start: Array, goal: float) -> tuple[Array, Array]:
    """x, and the residual y - x - g(x), until that is `goal` |x| in every row, or the arithmetic ends.

    Whatever the steps are, the residual says how good they were: plain ones, which always help, or Anderson's.
    """
    x, best, residual, least = start, start, np.zeros_like(y), np.full(len(y), np.inf)
    tried: list[tuple[Array, Array]] = []
    idle = 0
    for _ in range(MOST_EVALUATIONS):
        new = y - x - g(x)
        size = norms(new)
        better, helped = (np.reshape(size < limit, (-1, *[1] * (y.ndim - 1))) for limit in (least, 0.99 * least))
        best, residual, least = np.where(better, x, best), np.where(better, new, residual), np.minimum(size, least)
        unfinished = least > goal * norms(best)
        idle = 0 if helped[unfinished].any() else idle + 1
        if idle >= PATIENCE or not unfinished.any():
            break
        tried = [*tried, (x, new)][-MEMORY:]
        mixed = mixture(flat(best), flat(residual), [(flat(a), flat(b)) for a, b in tried])
        x = np.where(better, mixed.reshape(y.shape), best + residual)  # a plain step where the last one was no good
    return best, residual


def flat(x: Array) -> Array:
    return x.reshape(len(x), -1)


def mixture(x: Array, residual: Array, tried: Sequence[tuple[Array, Array]]) -> Array:
    """Anderson's step; its coefficients need few digits, and what they are does no harm to the solution."""
    steps = np.stack([a - x for a, _ in tried], -1)
    changes = np.stack([b - residual for _, b in tried], -1)
    inverse = np.linalg.pinv(changes.astype(ROUGH), rcond=1e-6)
    share = (inverse @ residual.astype(ROUGH)[..., None]).astype(x.dtype)
    return x + residual - ((steps + changes) * share.swapaxes(1, 2)).sum(-1)


# solves -----------------------------------------------------------------------------------------------

WIDTHS = {16: 3, 64: 3, 256: 3, 784: 3, 1536: 2, 3072: 1, 4096: 1}  # of one dense layer, and how often
SIDE = 8  # of images
CHANNELS = 64
ACTIVATIONS: tuple[type[nn.Module], ...] = (SinCos, Sine, nn.Tanh, nn.ELU, LipSwish, nn.Softplus)


@dataclass(frozen=True)
class Draw:
    """What a case is made from: everything random, and how large it may be."""

    rng: Random
    dtype: torch.dtype
    lipschitz: float
    rows: int
    largest: int

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def width(self) -> int:
        widths = [width for width in WIDTHS if width <= self.largest]
        return self.rng.choices(widths, [WIDTHS[width] for width in widths])[0]

    def inputs(self, *event: int) -> Tensor:
        """Of order one, or anything from tiny to huge."""
        rows = self.rows if math.prod(event) < 1024 else max(1, self.rows // 2)
        return torch.randn(rows, *event) * self.pick(1.0, 10 ** self.rng.uniform(-6, 6))


@dataclass(frozen=True)
class Case:
    """A branch, what it maps to, and the bound it was built for."""

    branch: nn.Module
    y: Tensor
    lipschitz: float


def one_layer(draw: Draw, weight: Tensor, bias: Tensor | None, constraint: type[Constraint]) -> nn.Module:
    """A dense layer whose constraint is put there by hand: `constrain` measures a norm first, which takes minutes."""
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    parametrize.register_parametrization(layer, "weight", constraint(draw.lipschitz))
    return Chain(layer)


def averaging(draw: Draw) -> Case:
    """All weights are equal, so that sums are as long as they are large, and have the direction that is stretched."""
    width = draw.width()
    sign, bias = draw.pick(-1.0, 1.0), draw.pick(None, None, torch.rand(width))
    y = draw.inputs(width)
    y = draw.pick(0.7 * torch.linspace(1, 2, len(y))[:, None].expand_as(y).contiguous(), y.abs(), y)
    branch = one_layer(draw, torch.full((width, width), sign), bias, Spectral if width < 1024 else Frobenius)
    return Case(branch, y, draw.lipschitz)


def one_row(draw: Draw) -> Case:
    """One output gets everything: equal terms, or a large one beside many that are lost when they are added to it."""
    width = draw.width()
    weight, y = torch.zeros(width, width), draw.inputs(width)
    if draw.pick(True, False):
        weight[0] = draw.pick(-1.0, 1.0)
        y = draw.pick(torch.full_like(y, 0.7), y.abs())
    else:
        weight[0], weight[0, 0] = 1e-4, 1.0
        y = torch.full_like(y, 0.3e4 * torch.finfo(y.dtype).eps / draw.lipschitz)
        y[:, 0] = torch.linspace(1, 2, len(y))
    return Case(one_layer(draw, weight, None, Frobenius), y, draw.lipschitz)


def dense(draw: Draw) -> Case:
    """Random weights, a rotation, or the map -L x, whose inverse stretches everything by 1 / (1 - L)."""
    width = draw.width()
    weight = torch.randn(width, width)
    if width < 512:
        rotation = torch.linalg.qr(weight)[0]
        weight = draw.pick(weight, 10 * rotation, -10 * torch.eye(width))
    constraint = Spectral if width < 512 else AlmostOrthogonal if width < 2048 else Frobenius
    bias = draw.pick(None, torch.randn(width))
    return Case(one_layer(draw, weight, bias, constraint), draw.inputs(width), draw.lipschitz)


@torch.no_grad()
def stirred(draw: Draw, branch: nn.Module) -> nn.Module:
    """Weights up to their bound, or far beyond what it allows, and biases of any size."""
    strength, shift = draw.pick(1.0, 5.0, 50.0), draw.pick(0.1, 1.0, 10.0)
    for label, parameter in branch.named_parameters():
        if label.endswith("original"):
            parameter.mul_(strength)
        elif label.endswith("bias"):
            parameter.copy_(shift * torch.randn_like(parameter))
    return branch


@torch.no_grad()
def aligned(branch: nn.Module) -> nn.Module:
    """All layers stretch the same directions, and the last one turns them: slopes near -L."""
    weights = [p for label, p in branch.named_parameters() if label.endswith("original")]
    for weight in weights:
        weight.copy_(10 * torch.eye(*weight.shape) + torch.randn(weight.shape) / weight.shape[1])
    weights[-1].mul_(-1)
    return branch


def mlp(draw: Draw) -> Case:
    size, width, layers = draw.pick(2, 8, 32, 128), draw.pick(16, 64, 128, 512), draw.rng.randint(2, 6)
    hidden = [min(width, draw.largest)] * (layers - 1)
    branch = LipschitzMLP([size, *hidden, size], activation=draw.pick(*ACTIVATIONS), lipschitz=draw.lipschitz)
    branch = stirred(draw, branch)
    return Case(aligned(branch) if draw.pick(True, False) else branch, draw.inputs(size), draw.lipschitz)


def conv(draw: Draw) -> Case:
    """A single layer, random or averaging, or a net of three."""
    what, padding = draw.pick("random", "averaging", "net"), draw.pick("zeros", "circular")
    if what == "net":
        channels = [3, CHANNELS, CHANNELS, 3]
        options = {"activation": draw.pick(*ACTIVATIONS), "padding_mode": padding}
        branch = stirred(draw, LipschitzConvNet(channels, lipschitz=draw.lipschitz, **options))
        return Case(branch, draw.inputs(3, SIDE, SIDE), draw.lipschitz)
    layer = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode=padding)
    layer.weight.data.mul_(10)
    y = draw.inputs(CHANNELS, SIDE, SIDE)
    if what == "averaging":
        layer.weight.data.fill_(draw.pick(-1.0, 1.0))
        y = draw.pick(torch.full_like(y, 0.7), y.abs())
    return Case(constrain(Chain(layer), draw.lipschitz), y, draw.lipschitz)


def deep_sum(draw: Draw) -> Case:
    """Up to 64 terms whose large biases cancel."""
    size, terms, shift = draw.pick(2, 8, 32), draw.pick(2, 8, 32, 64), draw.pick(1.0, 100.0)
    parts = [nn.Linear(size, size) for _ in range(terms)]
    for number, part in enumerate(parts):
        part.bias.data = shift * (1 + 0.01 * torch.randn(size)) * (1 if number < terms // 2 else -1)
    parts[-1].bias.data -= sum(part.bias.data for part in parts)
    hidden = draw.pick(None, nn.Tanh(), nn.ELU())
    branches = parts if hidden is None else [Chain(nn.Linear(size, size), hidden, part) for part in parts]
    return Case(constrain(Sum(*branches), draw.lipschitz), draw.inputs(size), draw.lipschitz)


def concatenated(draw: Draw) -> Case:
    """Dense nets, for vectors and images, and concatenations of other parts."""
    activation, size = draw.pick(*ACTIVATIONS), draw.pick(2, 8, 32)
    what = draw.pick("vectors", "images", "parts")
    if what == "parts":
        parts = [nn.Linear(size, size), Chain(nn.Linear(size, 16), nn.Tanh()), Scale(-0.5)]
        branch = constrain(Chain(Concatenate(*parts), nn.Linear(2 * size + 16, size)), draw.lipschitz)
        return Case(stirred(draw, branch), draw.inputs(size), draw.lipschitz)
    growth = [draw.pick(16, 32)] * draw.rng.randint(1, 4)
    size, kernel = (size, None) if what == "vectors" else (3, 3)
    branch = LipschitzDenseNet(size, growth, kernel, activation=activation, lipschitz=draw.lipschitz)
    event = (size,) if kernel is None else (size, SIDE, SIDE)
    return Case(stirred(draw, branch), draw.inputs(*event), draw.lipschitz)


@torch.no_grad()
def large_biases(draw: Draw) -> Case:
    """Biases of a thousand that cancel: the numbers inside are large, and x and y are not."""
    size, width = draw.pick(2, 8, 32), draw.pick(16, 64)
    branch: Any = LipschitzMLP([size, width, size], activation=draw.pick(*ACTIVATIONS), lipschitz=draw.lipschitz)
    branch[0].bias.copy_(1e3 * torch.randn(branch[0].bias.shape))
    branch[-1].bias.zero_()
    inside = function_of(branch, ROUGH)(np.zeros((1, size)))
    branch[-1].bias.copy_(-torch.from_numpy(inside[0]))
    return Case(branch, draw.inputs(size), draw.lipschitz)


def scaled(draw: Draw) -> Case:
    """Factors that no binary number is equal to."""
    size, factor = draw.pick(2, 8, 32), draw.pick(0.7, -0.3, 1.3)
    inner = Chain(nn.Linear(size, 16), nn.Tanh(), nn.Linear(16, size), Scale(factor))
    branch = draw.pick(Chain(Scale(3.1), inner), Sum(Scale(-0.3), inner))
    return Case(stirred(draw, constrain(branch, draw.lipschitz)), draw.inputs(size), draw.lipschitz)


KINDS: dict[str, Callable[[Draw], Case]] = {
    "averaging": averaging,
    "one row": one_row,
    "dense": dense,
    "mlp": mlp,
    "conv": conv,
    "deep sum": deep_sum,
    "concatenated": concatenated,
    "large biases": large_biases,
    "scaled": scaled,
}


@contextmanager
def drawing(dtype: torch.dtype, seed: int) -> Iterator[None]:
    """New tensors have this dtype, all of its digits, and come from this seed; the caller's state comes back."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.set_default_dtype(dtype)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def build(kind: str, dtype: str, number: int, seed: int = 0, rows: int = 8, largest: int = 4096) -> Case:
    """The case of this number; the same arguments give the same one."""
    rng = Random(f"{seed} {kind} {dtype} {number}")
    with drawing(DTYPES[dtype], rng.getrandbits(32)):
        return KINDS[kind](Draw(rng, DTYPES[dtype], LIPSCHITZ[number % len(LIPSCHITZ)], rows, largest))


# judgement --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One row of one solve: |x - x*|, the bound that was claimed, |x*|, and how well x* is known."""

    error: float
    bound: float
    size: float
    doubt: float
    eps: float
    converged: bool
    seconds: float  # of the whole batch

    @property
    def violates(self) -> bool:
        """Beyond the doubt; an error that is not a number does."""
        return not (self.error - self.doubt <= self.bound or self.bound == math.inf)

    @property
    def is_close(self) -> bool:
        """Whether the error is as far from the bound as it may be off."""
        return abs(self.error - self.bound) <= self.doubt and self.doubt > 0

    @property
    def ratio(self) -> float:
        """Of bound and error; infinite where x is x* to the last digit."""
        return self.bound / self.error if self.error > 0 else math.inf


def judge(case: Case) -> list[Verdict]:
    """Solve, and solve again in wider arithmetic."""
    block = ResidualBlock(case.branch, inverse=Anderson(on_failure="return"))
    begun = perf_counter()
    solution = block.solve(case.y)
    seconds = perf_counter() - begun
    start = torch.where(torch.isfinite(solution.x), solution.x, case.y)
    reference = exact_solution(case.branch, case.y, start, case.lipschitz)
    error, bound = norms(numbers(solution.x, FINE) - reference.x), numbers(solution.error_bound, FINE)
    eps, converged = torch.finfo(case.y.dtype).eps, solution.converged.tolist()
    columns = zip(error, bound, norms(reference.x), reference.doubt, converged, strict=True)
    return [Verdict(float(e), float(b), float(size), float(d), eps, done, seconds) for e, b, size, d, done in columns]


@dataclass(frozen=True)
class Summary:
    """Many rows in one line."""

    kind: str
    dtype: str
    solves: int
    violations: int  # error > bound
    undecided: int  # as close to it as the reference may be off
    without_bound: int  # an infinite one, which says nothing
    not_converged: int
    median_ratio: float  # bound / error
    largest_ratio: float | None  # where the error is not zero
    median_error: float  # in units of eps |x*|
    largest_doubt: float  # doubt / bound
    median_seconds: float  # of a batch


def summarised(kind: str, dtype: str, verdicts: Sequence[Verdict]) -> Summary:
    bounded = [v for v in verdicts if math.isfinite(v.bound)]
    return Summary(
        kind,
        dtype,
        len(verdicts),
        violations=sum(v.violates for v in verdicts),
        undecided=sum(v.is_close for v in verdicts),
        without_bound=len(verdicts) - len(bounded),
        not_converged=sum(not v.converged for v in verdicts),
        median_ratio=statistics.median(v.ratio for v in verdicts),
        largest_ratio=max((v.ratio for v in bounded if v.error > 0), default=None),
        median_error=statistics.median(v.error / (v.eps * v.size) if v.size > 0 else 0.0 for v in verdicts),
        largest_doubt=max((v.doubt / v.bound for v in bounded if v.bound > 0), default=0.0),
        median_seconds=statistics.median(v.seconds for v in verdicts),
    )


@dataclass(frozen=True)
class Violation:
    """An error above its bound, and what `build` makes its case from."""

    kind: str
    dtype: str
    number: int
    row: int
    error: float
    bound: float


# the command ------------------------------------------------------------------------------------------

COLUMNS: Columns[Summary] = {
    "kind": lambda row: row.kind,
    "dtype": lambda row: row.dtype,
    "solves": lambda row: str(row.solves),
    "error > bound": lambda row: str(row.violations),
    "undecided": lambda row: str(row.undecided),
    "no bound": lambda row: str(row.without_bound),
    "not converged": lambda row: str(row.not_converged),
    "bound / error, median": lambda row: f"{row.median_ratio:.3g}",
    "largest": lambda row: "–" if row.largest_ratio is None else f"{row.largest_ratio:.3g}",
    "error / (eps |x|), median": lambda row: f"{row.median_error:.2g}",
    "doubt / bound, largest": lambda row: f"{row.largest_doubt:.1g}",
    "solve, median (ms)": lambda row: f"{1e3 * row.median_seconds:.3g}",
}


def judge_kind(
    kind: str, dtype: str, solves: int, seed: int, advance: Callable[[int], object]
) -> tuple[list[Verdict], list[Violation]]:
    """Cases of a kind until so many rows are judged."""
    verdicts: list[Verdict] = []
    violations: list[Violation] = []
    number = 0
    while len(verdicts) < solves:
        found = judge(build(kind, dtype, number, seed))[: solves - len(verdicts)]
        violations += [
            Violation(kind, dtype, number, row, v.error, v.bound) for row, v in enumerate(found) if v.violates
        ]
        verdicts += found
        number += 1
        advance(len(found))
    return verdicts, violations


def shares(solves: int, parts: int) -> list[int]:
    """As equal as they can be."""
    return [solves // parts + (number < solves % parts) for number in range(parts)]


def judge_all(solves: int, seed: int, console: Console) -> tuple[list[Summary], list[Violation]]:
    cells = [(kind, dtype) for dtype in DTYPES for kind in KINDS]
    verdicts: dict[tuple[str, str], list[Verdict]] = {}
    violations: list[Violation] = []
    with Progress(*PROGRESS_COLUMNS, console=console) as progress:
        task = progress.add_task("solves", total=solves)
        for cell, share in zip(cells, shares(solves, len(cells)), strict=True):
            verdicts[cell], found = judge_kind(*cell, share, seed, lambda rows: progress.advance(task, rows))
            violations += found
    summaries = [summarised(*cell, rows) for cell, rows in verdicts.items() if rows]
    for dtype in DTYPES:
        everything = [v for cell, rows in verdicts.items() if cell[1] == dtype for v in rows]
        summaries += [summarised("all", dtype, everything)] if everything else []
    everything = [v for rows in verdicts.values() for v in rows]
    return [*summaries, summarised("all", "both", everything)], violations


def finite(value: Any) -> Any:
    """JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def written(path: Path, seed: int, seconds: float, summaries: Sequence[Summary], found: Sequence[Violation]) -> None:
    content = {
        **provenance(),
        "command": " ".join(["python -m comparisons.rounding", *sys.argv[1:]]),
        "seed": seed,
        "seconds": round(seconds, 1),
        "rows": [{name: finite(value) for name, value in asdict(row).items()} for row in summaries],
        "violations": [{name: finite(value) for name, value in asdict(row).items()} for row in found],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def main(
    solves: Annotated[int, typer.Option(min=1, help="Rows to judge, over all kinds and dtypes.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
) -> None:
    """Judge many solves; ends with status 1 if an error was above its bound."""
    if not IS_FINE:
        raise typer.BadParameter("On this machine numpy's longdouble is no wider than float64, so it cannot judge.")
    torch.set_num_threads(1)
    console, begun = Console(), perf_counter()
    summaries, violations = judge_all(solves, seed, console)
    print_wide(console, [rich_table("Proven bounds of |x - x*| beside the errors", COLUMNS, summaries)])
    if out is not None:
        written(out, seed, perf_counter() - begun, summaries, violations)
        print_lines(console, f"Written: {out}")
    if violations:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
