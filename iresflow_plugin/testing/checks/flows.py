"""Densities, training and deployment."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from iresflow_plugin.testing.case import Case, Live, Measurement, NotApplicableError, copied_inverses
from iresflow_plugin.testing.checks.measure import close
from iresflow_plugin.testing.checks.registry import check

HALF_WIDTH = {1: 12.0, 2: 9.0}
POINTS = {1: 4001, 2: 361}


def negative_log_likelihood(live: Live, x: Tensor, context: Tensor | None) -> Tensor:
    """Per sample, under the standard normal as the noise (constants left out)."""
    noise, log_det = live.call(live.door.to_noise, x, context)
    return noise.flatten(1).square().sum(1) / 2 - log_det


@check()
def density_integrates_to_one(case: Case) -> Iterator[Measurement]:
    """In one and two dimensions the density, the transform's or the flow's, integrates to one over a fine grid.

    Catches every wrong log-det that other checks would have to know the truth for.
    """
    if case.size > 2 or case.inputs is not None:
        raise NotApplicableError("quadrature is for events of one or two numbers, over all reals")
    live, half, points = case.live(), HALF_WIDTH[case.size], POINTS[case.size]
    axis = torch.linspace(-half, half, points, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * case.size).view(-1, *case.event_shape)
    context = case.context(1)
    context = None if context is None else context.expand(len(grid), *context.shape[1:])
    with torch.no_grad():
        if live.door.log_prob is not None:
            log_density = live.door.log_prob(live.obj, grid, context)
        else:
            constant = case.size * math.log(2 * math.pi) / 2
            log_density = -negative_log_likelihood(live, grid, context) - constant
    mass = log_density.exp().sum().item() * (2 * half / (points - 1)) ** case.size
    allowed = 0.15 if case.varies else 0.01
    yield Measurement(abs(mass - 1), allowed, f"The density integrates to one (found {mass:.4f}).")


@check()
def flow_samples_what_it_scores(case: Case) -> Iterator[Measurement]:
    """For flows: the log-density returned with samples is log_prob of these samples.

    Catches a base or a log-det that is applied in one direction alone.
    """
    live = case.live(torch.float32)  # nflows' base samples in the default dtype
    if live.door.sample is None or live.door.log_prob is None:
        raise NotApplicableError("a transform has no log_prob of its own")
    context = case.context(1, torch.float32)
    with torch.no_grad():
        samples, log_prob = live.door.sample(live.obj, 64, context)
        repeated = None if context is None else context.expand(64, *context.shape[1:])
        again = live.door.log_prob(live.obj, samples, repeated)
    right = samples.shape == (64, *case.event_shape) and again.shape == (64,)
    yield Measurement(float(not right), 0.0, f"64 samples have shape {tuple(samples.shape)} and 64 log-densities.")
    if log_prob is not None and not case.varies:
        yield close(log_prob, again, 1e-3, "log_prob of samples is the log-density that came with them.")
    latent = live.call(live.door.to_noise, samples, repeated)[0] if right else None
    if latent is not None:
        yield Measurement(float(not torch.isfinite(latent).all()), 0.0, "Samples have finite noise.")


@check()
def training_lowers_the_loss(case: Case) -> Iterator[Measurement]:
    """Two small steps of gradient descent lower the negative log-likelihood of the batch they were taken on.

    Catches gradients of a wrong sign, and losses that are not connected to the parameters.
    """
    live = case.live(train=True)
    if not live.parameters():
        raise NotApplicableError("there are no parameters")
    live.disturb(0.02)
    x, context = (case.x(32) if live.door.to_noise == "forward" else case.y(32)), case.context(32)
    x = x if case.inputs is not None else 1.7 * x + 0.4

    def loss() -> Tensor:
        repeats = 20 if case.varies else 1
        return torch.stack([negative_log_likelihood(live, x, context).mean() for _ in range(repeats)]).mean()

    torch.manual_seed(case.seed)
    start = loss().item()
    for _ in range(2):
        torch.manual_seed(case.seed)  # the same draw of a random log-det, so that it cannot hide the descent
        grads = torch.autograd.grad(loss(), live.parameters(), allow_unused=True)
        size = math.sqrt(sum(g.square().sum().item() for g in grads if g is not None))
        with torch.no_grad():
            for p, g in zip(live.parameters(), grads, strict=True):
                if g is not None and size > 0:
                    p.sub_(0.003 * g / size)
    torch.manual_seed(case.seed)
    yield Measurement(loss().item() - start, -1e-9, "Two small steps down the gradient lower the loss.")


@check("D18")
def compiles_to_the_same_numbers(case: Case) -> Iterator[Measurement]:
    """torch.compile gives the same numbers, values and gradients.

    Catches Python state and data-dependent branches that tracing freezes.
    """
    live, x, context = case.live(), case.point(case.explicit), case.context()

    def run(points: Tensor) -> tuple[Tensor, Tensor]:
        return live.call(case.explicit, points, context)

    torch.compiler.reset()  # what was compiled before must not count against the limit on recompilations
    compiled = torch.compile(run, backend="aot_eager")
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # graph breaks cost speed, which is not the question
    for batch in (x, 0.5 * x):
        results = []
        for function in (run, compiled):
            torch.manual_seed(case.seed)
            points = batch.clone().requires_grad_()
            y, log_det = function(points)
            loss = y.square().sum() if case.varies else y.square().sum() + log_det.sum()
            slope = torch.autograd.grad(loss, points)[0]
            results.append(torch.cat([y.detach().flatten(), slope.flatten()]))
        yield close(results[1], results[0], 1e-8, "torch.compile gives the same outputs and gradients.")


@check("D7")
def two_processes_give_the_gradient_of_one(case: Case) -> Iterator[Measurement]:
    """Distributed training in two processes gives the gradients of one process with the whole batch.

    Catches parameters outside the graph, and buffers that differ from process to process.
    """
    live, x, context = case.live(torch.float64, train=True), case.x(), case.context()
    if not live.parameters():
        raise NotApplicableError("there are no parameters")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        raise NotApplicableError("this torch has no gloo")
    live.disturb(0.01)
    if live.door.to_noise == "inverse":
        x = case.y()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.pt"
        try:
            with copied_inverses():
                torch.save((live.obj, x, context, not case.varies), file)
        except Exception as error:
            raise NotApplicableError(f"the subject cannot be pickled for another process: {error}") from error
        command = [sys.executable, "-m", "iresflow_plugin.testing.processes", folder]
        workers = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
        if any(worker.returncode for worker in workers):
            last = next(e for w, e in zip(workers, errors, strict=True) if w.returncode).strip().splitlines()[-1]
            if "Can't get attribute" in last or "No module named" in last:
                raise NotApplicableError(f"another process cannot import the subject: {last}")
            raise RuntimeError(f"a process ended with: {last}")
        found = torch.load(Path(folder) / "gradient.pt")
    mean_loss(live, x, context, not case.varies).backward()
    yield close(found, flat_gradient(live), 1e-7, "Two gloo processes give the gradient of one process.")


def mean_loss(live: Live, x: Tensor, context: Tensor | None, with_log_det: bool) -> Tensor:
    """The mean loss; a random log-det counts for nothing, but is in the graph."""
    noise, log_det = live.call(live.door.to_noise, x, context)
    return (noise.flatten(1).square().sum(1) / 2 - (log_det if with_log_det else 0 * log_det)).mean()


def flat_gradient(live: Live) -> Tensor:
    """The gradients of all parameters in one vector."""
    return torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in live.parameters()])
