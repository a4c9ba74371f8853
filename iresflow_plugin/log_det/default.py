"""The estimator a block uses when none is named."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from iresflow_plugin.log_det.estimate import Estimate, LogDet
from iresflow_plugin.log_det.exact import Exact
from iresflow_plugin.log_det.roulette import RussianRoulette
from iresflow_plugin.maps import Map
from iresflow_plugin.torch_state import inside_functorch


@dataclass(frozen=True)
class BySize:
    """`Exact` for events of few dimensions, `RussianRoulette` beyond: exact where it pays, unbiased where not.

    Training is when gradients are recorded for what a branch holds, its weights or context; there noise costs little.
    Anywhere else a density should be a number: the first one that is not warns, with its error, told by eight probes.

    Args:
        with_gradients: largest D for `Exact` in training.
        without_gradients: largest D for `Exact` elsewhere, also where only the inputs want a gradient.
    """

    with_gradients: int = 12
    without_gradients: int = 128

    def choose(self, g: Map, x: Tensor) -> LogDet:
        """The estimator for events as large as those of `x`."""
        limit = self.with_gradients if _trains(g) else self.without_gradients
        return Exact() if x.shape[1:].numel() <= limit else RussianRoulette()

    def __call__(self, g: Map, x: Tensor) -> Estimate:
        estimator = self.choose(g, x)
        if isinstance(estimator, RussianRoulette) and len(x) and not _trains(g) and _is_first():
            _warn(g, x)
        return estimator(g, x)


_told: list[str] = []  # what has been said in this process, and is not said again


def _is_first() -> bool:
    return not torch.compiler.is_compiling() and not inside_functorch() and "random" not in _told


def _warn(g: Map, x: Tensor) -> None:
    """Tells the error of one probe, from eight that nobody else's random numbers depend on."""
    _told.append("random")
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []), torch.no_grad():
        error = RussianRoulette(probes=8)(g, x).standard_error.square().mean().sqrt() * 8**0.5
    warnings.warn(
        f"With {x.shape[1:].numel()} dimensions the log-det of a block is estimated by a random probe, here with a "
        f"standard error of about {float(error):.2g} nats for each sample. For an exact one use log_det=Exact(), for a "
        "known error PowerSeries(tolerance=1e-3, probes=...), as in `with using(model, log_det=Exact()): ...`; for "
        "samples alone Omitted(). This is said once.",
        RuntimeWarning,
        stacklevel=_level_of_the_user(),
    )


def _level_of_the_user() -> int:
    """How far above the caller the first line stands that is neither ours nor torch's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "iresflow_plugin"):
        frame, level = frame.f_back, level + 1
    return level


def _trains(g: Map) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in g.tensors())
