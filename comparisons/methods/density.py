"""What a method is, what it builds, and how large.

A stack is a function (features, width, context_features) -> host flow of that hidden width; one for images has their
shape in place of the features. The width is not written down: `build` takes the largest that keeps the flow within the
task's number of parameters, so that all methods are of one size.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from comparisons.settings import Optimisation
from iresflow_plugin.swap import swap_transforms

BLOCKS = 8  # transforms of a flow, where the family does not ask for another number
RATES = (1e-3, 3e-3, 1e-2)
ONE = math.log(math.e - 1)  # softplus(ONE) = 1: for maps that should start as the identity

Shape = tuple[int, ...]
Event = int | Shape  # of one point: how many features, or the shape (channels, height, width)
Stack = Callable[[int, int, int | None], nn.Module]
ImageStack = Callable[[Shape, int, int | None], nn.Module]
Fit = Callable[[Any, Tensor, Tensor], None]


class Density(nn.Module):
    """A host's flow under one set of names. Calling it gives the mean negative log-likelihood: the training loss.

    Args:
        flow: the host's model.
        context_features: size of the context, which comes as one row per row of x, or per sample; None for none.
        swap: the report of what was swapped for residual blocks; empty for an original.
    """

    flow: Any
    invertible: ClassVar[bool] = True  # whether there are `to_noise` and `to_data`
    volume: ClassVar[bool] = True  # whether log-dets enter `log_prob`

    def __init__(self, flow: nn.Module, context_features: int | None = None, swap: str = "") -> None:
        super().__init__()
        self.flow = flow
        self.context_features = context_features
        self.swap = swap

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return -self.log_prob(x, context).mean()

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no noise behind its data.")

    def to_data(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no noise behind its data.")

    def given(self, rows: int, context: Tensor | None) -> tuple[Tensor, ...]:
        """The context as the host's last argument, or nothing. Checked here: some hosts would ignore a wrong one."""
        if context is None and self.context_features is None:
            return ()
        if self.context_features is None:
            shape = tuple(torch.as_tensor(context).shape)
            raise ValueError(
                f"This density was built without a context and got one of shape {shape}; build it with "
                f"context_features={shape[-1]}."
            )
        wanted, got = (rows, self.context_features), None if context is None else tuple(context.shape)
        if context is None or got != wanted:
            raise ValueError(f"context must have shape {wanted}, one row per row of the other argument, got {got}.")
        return (context,)


@dataclass(frozen=True)
class Images:
    """How a method builds a density of images.

    Args:
        stack: (shape, width, context_features) -> the host's model of pixels in [0, 1).
        host: gives the model its names.
        conditional: whether it can take a context.
    """

    stack: ImageStack
    host: type[Density]
    conditional: bool = False


@dataclass(frozen=True)
class Method:
    """How to build one density, and how it likes to be trained.

    Args:
        name: as on the command line.
        about: one sentence, beginning with the name in the literature.
        family: coupling, autoregressive, elementary, continuous, residual, or floor.
        reference: authors, year, arXiv number.
        stack: (features, width, context_features) -> the host's model.
        host: gives the model its names.
        learning_rate: the default; 0 for a method with `fit`.
        grid: learning rates worth trying, as many for every method; empty for a method with `fit`.
        conditional: whether it can take a context.
        largest: a width that is never exceeded, whatever the budget.
        swapped: the transforms to be replaced by residual blocks.
        optimisation: how it is trained, beside the learning rate.
        after_step: what the host wants to be called after every optimiser step.
        fit: (density, train points, validation points), called once in place of an optimiser.
        own_size: whether the model is as large as it is, whatever the budget.
        images: what it builds for images; None where it has no answer to them.
    """

    name: str
    about: str
    family: str
    reference: str
    stack: Stack
    host: type[Density]
    learning_rate: float
    grid: tuple[float, ...] = RATES
    conditional: bool = True
    largest: int = sys.maxsize
    swapped: type[nn.Module] | Callable[[str, nn.Module], bool] | None = None
    optimisation: Optimisation = field(default_factory=Optimisation)
    after_step: Callable[[Density], None] | None = None
    fit: Fit | None = None
    own_size: bool = False
    images: Images | None = None

    def refusal(self, event: Event, context_features: int | None = None) -> str:
        """Why it has no answer to such events, as a sentence; empty where it has one."""
        images = self.images if is_image(event) else None
        if is_image(event) and images is None:
            return f"{self.name} models vectors, and the points are images of shape {event}."
        takes = self.conditional if images is None else images.conditional
        if context_features is None or takes:
            return ""
        where = "" if images is None else " with images"
        return f"{self.name} takes no context{where}, and context_features={context_features} was given."

    def model(self, event: Event, width: int, context_features: int | None) -> nn.Module:
        """The host's model of that width."""
        if is_image(event) and self.images is not None:
            return self.images.stack(event, width, context_features)
        return self.stack(math.prod(event) if isinstance(event, tuple) else event, width, context_features)

    def density(self, event: Event) -> type[Density]:
        """What gives the model its names."""
        return self.images.host if is_image(event) and self.images is not None else self.host


def is_image(event: Event) -> TypeGuard[Shape]:
    return isinstance(event, tuple) and len(event) > 1


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@cache
def widest(method: Method, event: Event, parameters: int, context_features: int | None = None) -> int:
    """The largest hidden width with which the method's stack has at most so many parameters."""

    def fits(width: int) -> bool:
        if width > method.largest:
            return False
        with torch.random.fork_rng(devices=[]):  # trial flows must not shift the seed of the real one
            return parameter_count(method.model(event, width, context_features)) <= parameters

    if not fits(1):
        what = f"images of shape {event}" if is_image(event) else f"{event} features"
        raise ValueError(f"no width brings {method.name} with {what} down to {parameters} parameters")
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def build(method: Method, event: Event, parameters: int, context_features: int | None = None) -> Density:
    """The method's density of so many features, or of images of that shape, as large as the parameters allow."""
    if isinstance(event, tuple) and len(event) == 1:
        event = event[0]
    refusal = method.refusal(event, context_features)
    if refusal:
        raise ValueError(refusal)
    width = 1 if method.own_size else widest(method, event, parameters, context_features)
    flow = method.model(event, width, context_features)
    swap = ""
    if method.swapped is not None:
        swap = str(swap_transforms(flow, method.swapped, example=example(event, context_features)))
    return method.density(event)(flow, context_features, swap)


def example(event: Event, context_features: int | None) -> tuple[Tensor, ...] | None:
    """Images and their contexts, on which to see the shapes inside a flow; vectors keep theirs."""
    if not is_image(event):
        return None
    images = torch.zeros(2, *event)
    return (images,) if context_features is None else (images, torch.zeros(2, context_features))
