"""How often a network is wrong, and how well its features give the image back."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from comparisons.classification.hybrid import Hybrid
from comparisons.classification.model import Classifier, Reconstruction, Vanilla, labels
from comparisons.tasks import Points
from comparisons.training import EVALUATION_BATCH, evaluating, ready
from iresflow_plugin import ResidualBlock, using
from iresflow_plugin.inverse import FixedPoint
from iresflow_plugin.lipschitz import lipschitz_bound, lipschitz_estimate
from iresflow_plugin.log_det import Omitted
from iresflow_plugin.torch_state import norms

INVERTED = 100  # test images that are reconstructed
GREY_LEVEL = 1 / 255  # of an image of unit grey range: an image that is off by more, root mean square, is lost


@dataclass(frozen=True)
class Inversion:
    """From images to features and back, in units of the grey range; distances in the 2-norm of an image.

    Attributes:
        largest, median: of |x - x'| over images; infinite where nothing finite came back.
        lost: share of images that are off by more than a grey level, root mean square.
        bound: the largest certified |x - x'| of the way back alone; None where the network keeps no account.
        solve: the largest certified error of a single block's solve.
        evaluations: of branches, the mean over images and blocks; None as for the bound.
    """

    largest: float
    median: float
    lost: float
    bound: float | None
    solve: float | None
    evaluations: float | None


@dataclass(frozen=True)
class Slopes:
    """Of all branches: the largest certified Lipschitz bound, and the largest slope seen at test images."""

    bound: float
    seen: float


def wrong(density: Classifier | Hybrid, points: Points, fabric: Fabric) -> Tensor:
    """Which test images get a wrong class."""
    found = []
    with evaluating(density, points.x[0].numel(), Omitted()):
        for part in points.split(EVALUATION_BATCH):
            rows = ready(part, density, fabric)
            logits = density.flow.head(features(density, rows.x))
            found.append((logits.argmax(1) != labels(rows.context)).cpu())
    return torch.cat(found)


def features(density: Classifier | Hybrid, x: Tensor) -> Tensor:
    """Of the last layer before the head."""
    return density.flow.features(x) if isinstance(density, Classifier) else density.to_noise(x)


def there_and_back(density: Classifier | Hybrid, x: Tensor) -> tuple[Tensor, Reconstruction | None]:
    """The images from their features, and how certain they are."""
    with evaluating(density, x[0].numel(), Omitted()):
        if isinstance(density, Classifier):
            found = density.flow.reconstruct(density.flow.features(x))
            return found.x, found
        with using(density, inverse=FixedPoint(on_failure="return")):
            return density.to_data(density.to_noise(x)), None


def inversion(density: Classifier | Hybrid, points: Points, fabric: Fabric, dtype: torch.dtype) -> Inversion:
    """On a copy in this precision."""
    density = copy.deepcopy(density).to(dtype)
    x = ready(points.spread(INVERTED), density, fabric).x
    back, found = there_and_back(density, x)
    errors = norms(back - x).double().nan_to_num(math.inf, posinf=math.inf)
    lost = errors > GREY_LEVEL * math.sqrt(x[0].numel())
    return Inversion(
        largest=errors.max().item(),
        median=errors.median().item(),
        lost=lost.double().mean().item(),
        bound=None if found is None else found.error_bound.max().item(),
        solve=None if found is None else found.block_errors.max().item(),
        evaluations=None if found is None else found.evaluations.double().mean().item() / len(found.block_errors),
    )


@torch.no_grad()
def slopes(density: Classifier | Hybrid, points: Points, fabric: Fabric) -> Slopes:
    """By power iteration from below, at the points that reach each branch."""
    x, seen, bounds = ready(points.spread(INVERTED), density, fabric).x, [], []
    inputs: dict[nn.Module, Tensor] = {}
    hooks = [owner.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0]})) for owner in owners(density)]
    with evaluating(density, x[0].numel(), Omitted()):
        features(density, x)
    for hook in hooks:
        hook.remove()
    for owner, at in inputs.items():
        branch = owner.get_submodule("branch")
        bounds.append(lipschitz_bound(branch).value)
        seen.append(lipschitz_estimate(branch, at).value)
    return Slopes(max(bounds), max(seen))


def owners(density: Classifier | Hybrid) -> Iterator[nn.Module]:
    """The modules that add a branch to their input."""
    return (module for module in density.modules() if isinstance(module, (ResidualBlock, Vanilla)))
