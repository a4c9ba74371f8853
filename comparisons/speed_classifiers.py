"""Speed of i-ResNet classifiers: a training step beside that of the vanilla twin, by itself and by torch.compile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from comparisons.classification.model import SIZES, Classifier, InvertibleClassifier
from comparisons.methods import Density
from comparisons.speed import SCALE, CertificateCost, ClassifierSize, Settings, interleaved, training_step
from comparisons.training import compiled
from iresflow_plugin.testing import scale_weights

CLASSES, BOUND = 10, 0.9


@dataclass(frozen=True)
class CompiledStep:
    """Seconds of a training step, as it is and by torch.compile."""

    size: str
    network: str
    eager: float
    compiled: float

    @property
    def ratio(self) -> float:
        return self.compiled / self.eager


def classifier(size: ClassifierSize, c: float | None) -> Classifier:
    """With a bound, its weights are scaled until that binds; the vanilla twin would overflow."""
    net = InvertibleClassifier(size.shape, CLASSES, SIZES[size.name], c)
    if c is not None:
        for block in net.blocks:
            scale_weights(block.branch, SCALE)
    return Classifier(net, 1)


def points(size: ClassifierSize, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(settings.classifier_batch, *size.shape, device=settings.device) - 0.5
    return x, torch.randint(CLASSES, (len(x), 1), device=settings.device)


def certificate_cost(size: ClassifierSize, settings: Settings) -> list[CertificateCost]:
    """The constraint is all that the twins differ by."""
    x, y = points(size, settings)
    steps = [training_step(classifier(size, c).to(x), x, context=y) for c in (BOUND, None)]
    return [CertificateCost(str(size), *interleaved(steps, repeats=settings.repeats, device=settings.device))]


def compiled_steps(size: ClassifierSize, settings: Settings) -> list[CompiledStep]:
    """None for sizes that take too long to compile."""
    if not size.compiled:
        return []
    x, y = points(size, settings)
    rows = []
    for name, c in {"vanilla": None, f"c = {BOUND}": BOUND}.items():
        eager, graph = classifier(size, c).to(x), cast(Density, compiled(classifier(size, c).to(x)))
        steps = [training_step(density, x, context=y) for density in (eager, graph)]
        times = interleaved(steps, repeats=settings.repeats, device=settings.device)
        rows.append(CompiledStep(str(size), name, *times))
    return rows
