"""Speed and memory: our block beside normflows' `Residual`, beside Real NVP and Glow, and what the certificate costs.

All sides of a row run in turn within one process, A B A B, and the medians are compared, so a machine that slows down
slows all of them down. Weights are scaled up until the Lipschitz constraint binds: a fresh net is nearly linear and
flatters everyone.
"""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import normflows
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile

from comparisons.methods import BLOCKS, METHODS, Density, NormflowsDensity, build, normflows_flow, parameter_count
from comparisons.metrics import timed
from iresflow_plugin import using
from iresflow_plugin.adapters.normflows import ResidualFlow
from iresflow_plugin.lipschitz import Constraint
from iresflow_plugin.log_det import Omitted
from iresflow_plugin.nets import LipschitzMLP
from iresflow_plugin.testing import scale_weights

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler announces every start and stop

LIPSCHITZ = 0.97  # of a whole branch, on both sides
SCALE = 5.0  # factor on every weight matrix
TARGET_ERROR = 1e-5
CPU = torch.device("cpu")
TOLERANCES = [10 ** (-half / 2) for half in range(27)]  # 1 ... 1e-13: the loosest that reaches the target is used

Call = Callable[[], object]


@dataclass(frozen=True)
class ImageSize:
    """Images, and the branches on them: channels -> hidden -> hidden -> channels by kernels of 3, 1 and 3."""

    channels: int
    side: int
    hidden: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.side, self.side

    def __str__(self) -> str:
        return f"{self.channels}x{self.side}x{self.side}, {self.hidden} hidden"


@dataclass(frozen=True)
class ClassifierSize:
    """An i-ResNet classifier by the name of its size, the images it sees, and whether to try torch.compile on it."""

    name: str
    shape: tuple[int, int, int]
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.name}, {'x'.join(map(str, self.shape))}"


CLASSIFIERS = (ClassifierSize("small", (1, 28, 28), compiled=True), ClassifierSize("paper", (3, 32, 32)))
USUAL_IMAGES = (ImageSize(1, 28, 32), ImageSize(12, 16, 64), ImageSize(48, 16, 64), ImageSize(3, 32, 64))
WIDE_IMAGES = (ImageSize(12, 16, 512), ImageSize(48, 8, 512))


@dataclass(frozen=True)
class Settings:
    """How large the run is."""

    features: tuple[int, ...]
    repeats: int
    width: int = 128
    batch: int = 256
    images: tuple[ImageSize, ...] = USUAL_IMAGES
    wide_images: tuple[ImageSize, ...] = WIDE_IMAGES  # for the certificate alone
    image_batch: int = 32
    classifiers: tuple[ClassifierSize, ...] = CLASSIFIERS
    classifier_batch: int = 128
    device: torch.device = CPU

    def smaller(self) -> Settings:
        """A smoke test: its numbers mean nothing."""
        tiny = ImageSize(2, 4, 4)
        return replace(
            self,
            features=(3,),
            repeats=1,
            width=16,
            batch=16,
            images=(tiny,),
            wide_images=(tiny,),
            image_batch=4,
            classifiers=(ClassifierSize("smoke", (1, 8, 8)),),
            classifier_batch=4,
        )


FULL = Settings((2, 6, 21, 63), repeats=15)


# rows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Versus:
    """One quantity on both sides; `allowed` is the largest ratio that was promised, None where nothing was."""

    size: str
    quantity: str
    unit: str
    ours: float
    theirs: float
    allowed: float | None

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


@dataclass(frozen=True)
class Throughput:
    """One flow at the common number of parameters: points a second and peak memory of a training step."""

    features: int
    method: str
    parameters: int
    training: float
    density: float
    sampling: float
    megabytes: float


@dataclass(frozen=True)
class CertificateCost:
    """A training step with the constraint and with the same weights left free."""

    size: str
    constrained: float
    free: float

    @property
    def percent(self) -> float:
        return 100 * (self.constrained / self.free - 1)


# the two sides ---------------------------------------------------------------------------------------


def our_flow(features: int, width: int) -> Density:
    blocks = [
        ResidualFlow(LipschitzMLP([features, width, width, features], lipschitz=LIPSCHITZ)) for _ in range(BLOCKS)
    ]
    density = NormflowsDensity(normflows_flow(features, blocks))
    return scale_weights(density, SCALE)


def their_flow(features: int, width: int) -> Density:
    layers = [features, width, width, features]
    nets = [
        normflows.nets.LipschitzMLP(layers, lipschitz_const=LIPSCHITZ ** (1 / 3), init_zeros=False)
        for _ in range(BLOCKS)
    ]
    density = NormflowsDensity(normflows_flow(features, [normflows.flows.Residual(net) for net in nets]))
    scale_weights(density, SCALE)
    normflows.utils.update_lipschitz(density, 50)
    return density


def side_by_side(features: int, settings: Settings) -> list[Versus]:
    """All quantities of both sides for events of one size."""
    data = torch.randn(settings.batch, features, device=settings.device)
    ours, theirs = (side(features, settings.width).to(settings.device) for side in (our_flow, their_flow))
    measure = partial(interleaved, repeats=settings.repeats, device=settings.device)
    rows = []

    def add(
        quantity: str, sides: Sequence[float], allowed: float | None = None, unit: str = "ms", factor: float = 1e3
    ) -> None:
        rows.append(Versus(str(features), quantity, unit, sides[0] * factor, sides[1] * factor, allowed))

    our_step, their_step = training_step(ours, data), training_step(theirs, data)

    def their_whole_step() -> None:
        their_step()
        normflows.utils.update_lipschitz(theirs, 5)

    memory = [peak_megabytes(step, settings.device) for step in (our_step, their_step)]
    step, plain, whole = measure([our_step, their_step, their_whole_step])
    add("training step", (step, plain), 1.3)
    add("training step, theirs with its update_lipschitz", (step, whole), 1.3)
    add("memory of a training step", memory, unit="MB", factor=1)
    for side in (ours, theirs):
        side.eval()
    with torch.no_grad():
        add(
            "log_prob",
            measure([partial(side.log_prob, data) for side in (ours, theirs)]),
            ALLOWED_LOG_PROB.get(features),
        )
        noise = torch.randn(settings.batch, features, device=settings.device)
        samplers = [tuned_sampler(side, noise) for side in (ours, theirs)]
        add(f"sampling to a measured error of {TARGET_ERROR:g}", measure([sampler.call for sampler in samplers]), 0.5)
        with using(ours, log_det=Omitted()):
            add("the same, ours without the log-det", measure([sampler.call for sampler in samplers]))
        add("error measured at that tolerance", [sampler.error for sampler in samplers], unit="1e-6", factor=1e6)
    return rows


ALLOWED_LOG_PROB = {2: 0.5, 6: 0.5, 21: 1.0}


# sampling at equal error -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Solve:
    """One block's part in sampling: the flow, what it is given, and what it should return."""

    flow: Any
    y: Tensor
    truth: Tensor


@dataclass(frozen=True)
class Sampler:
    """Noise to data at the loosest tolerance whose measured error is within the target."""

    call: Call
    error: float


def tuned_sampler(density: Density, noise: Tensor) -> Sampler:
    """The loosest tolerance at which every block's x is within `TARGET_ERROR` of the truth, or the most exact one.

    The error is that of each block's own solve: what float32 rounding in one block becomes in the next is the flow's
    condition number and no merit or fault of a solver.
    """
    solves = exact_solves(density, noise)
    samplers = []
    for tolerance in TOLERANCES:
        stop_at(density, tolerance)
        error = max((solve.flow(solve.y)[0].double() - solve.truth).abs().max().item() for solve in solves)
        samplers.append(Sampler(partial(sample_at, density, noise, tolerance), error))
        if error <= TARGET_ERROR:
            break
    return min(samplers, key=lambda sampler: sampler.error)


def sample_at(density: Density, noise: Tensor, tolerance: float) -> Tensor:
    stop_at(density, tolerance)
    return density.to_data(noise)


def stop_at(density: Density, tolerance: float) -> None:
    """Let every block's solver stop at this tolerance, in its side's own sense of the word."""
    for flow in density.flow.flows:
        if isinstance(flow, ResidualFlow):
            flow.block.solver = replace(flow.block.solver, tolerance=tolerance, on_failure="return")
        else:
            block = flow.iresblock
            block._inverse_fixed_point = partial(
                type(block)._inverse_fixed_point, block, atol=tolerance, rtol=tolerance
            )


def exact_solves(density: Density, noise: Tensor) -> list[Solve]:
    """The blocks' solves from `noise` to data; the truth by x <- y - g(x) in double, with the weights in use."""
    solves, y = [], noise
    for flow, double in zip(density.flow.flows, freed(density).double().flow.flows, strict=True):
        branch, x = branch_of(double), y.double()
        for _ in range(10_000):
            previous, x = x, y.double() - branch(x)
            if (x - previous).abs().max() < 1e-13:
                break
        solves.append(Solve(flow, y, x))
        y = x.to(y.dtype)
    return solves


def branch_of(flow: Any) -> nn.Module:
    return flow.iresblock.nnet if isinstance(flow, normflows.flows.Residual) else flow.block.branch


# hosts' flows at equal parameters --------------------------------------------------------------------

SYSTEMS = ("ours", "normflows-residual", "nflows-realnvp", "normflows-realnvp", "normflows-glow")


def throughputs(features: int, settings: Settings) -> list[Throughput]:
    """Ours with branches of the settings' width, and the others as wide as its number of parameters allows."""
    data = torch.randn(settings.batch, features, device=settings.device)
    parameters = parameter_count(METHODS["ours"].stack(features, settings.width, None))
    flows = [build(METHODS[name], features, parameters).to(settings.device) for name in SYSTEMS]
    steps = [training_step(flow, data, METHODS[name].after_step) for name, flow in zip(SYSTEMS, flows, strict=True)]
    for step in steps:
        step()  # sets ActNorm from the data

    def per_second(calls: Sequence[Call]) -> list[float]:
        return [settings.batch / s for s in interleaved(calls, repeats=settings.repeats, device=settings.device)]

    memory = [peak_megabytes(step, settings.device) for step in steps]
    training = per_second(steps)
    for flow in flows:
        flow.eval()
    with torch.no_grad():
        density = per_second([partial(flow.log_prob, data) for flow in flows])
        sampling = per_second([partial(flow.sample, settings.batch) for flow in flows])
    counts = [parameter_count(flow) for flow in flows]
    columns = zip(SYSTEMS, counts, training, density, sampling, memory, strict=True)
    return [Throughput(features, *column) for column in columns]


# the certificate -------------------------------------------------------------------------------------


class Free(Constraint):
    """Takes the weight as it is, and claims what the constraint guaranteed: the step without its certificate."""

    def certify(self, weight: Tensor) -> tuple[Tensor, float]:
        return weight, self.lipschitz


def freed(density: Density) -> Density:
    """A copy whose weights are the constrained ones, as plain parameters."""
    density = copy.deepcopy(density)
    layers: list[Any] = [module for module in density.modules() if parametrize.is_parametrized(module, "weight")]
    for layer in layers:
        parametrized = layer.parametrizations.weight
        parametrized.original.data = layer.weight.detach()
        free = Free(parametrized[0].lipschitz)
        free.spec = parametrized[0].spec
        parametrized[0] = free
    return density


def certificate_cost(features: int, settings: Settings) -> list[CertificateCost]:
    data = torch.randn(settings.batch, features, device=settings.device)
    return [cost_of_certificate(str(features), our_flow(features, settings.width).to(data), data, settings)]


def cost_of_certificate(size: str, density: Density, data: Tensor, settings: Settings) -> CertificateCost:
    steps = [training_step(side, data) for side in (density, freed(density))]
    return CertificateCost(size, *interleaved(steps, repeats=settings.repeats, device=settings.device))


# measuring -------------------------------------------------------------------------------------------


def training_step(
    density: Density,
    data: Tensor,
    after_step: Callable[[Density], None] | None = None,
    context: Tensor | None = None,
) -> Call:
    """Loss, backward, Adam."""
    optimizer = torch.optim.Adam(density.parameters(), lr=1e-4)

    def step() -> None:
        density(data, context).backward()
        optimizer.step()
        optimizer.zero_grad()  # here, so that a step's peak of memory counts its gradients
        if after_step is not None:
            after_step(density)

    return step


def interleaved(calls: Sequence[Call], *, repeats: int, device: torch.device) -> list[float]:
    """Median seconds of every call, after a warm-up, run in turn; within a round all draw the same random numbers."""
    for call in calls:
        call()
    rounds = []
    for number in range(repeats):
        rounds.append([])
        for call in calls:
            torch.manual_seed(number)  # as many terms of a random series on all sides
            rounds[-1].append(timed(call, device))
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def peak_megabytes(call: Call, device: torch.device) -> float:
    """The most memory that `call` holds at once beyond what was held before, after one call as warm-up."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    for event in sorted(memory_events(profiler), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 1e6


def memory_events(profiler: Any) -> list[Any]:
    """Allocations and, with negative sizes, releases: of a profile, only the inner one lists them."""
    return [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
