"""The sizes of what comes in: its events and context as the old transform has them, its width by a parameter count.

Events and contexts are read off attributes that the hosts keep, or seen where a copy of the flow runs on an example.
The flow itself is never run for this: an ActNorm initialises itself on whatever it sees first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from iresflow_plugin.lipschitz import AddContext
from iresflow_plugin.swap.selection import host_of, is_a

Event = tuple[int, ...]
Context = tuple[str, int] | None  # ("context_features", size of a vector) or ("context_channels", those of an image)


@dataclass(frozen=True)
class Shown:
    """What a transform is handed: the shape of its events and, if there is one, that of its context."""

    event: int | Sequence[int] | None
    context: Event | None = None


# seen on an example ----------------------------------------------------------------------------------


def shown_by(example: Any, flow: nn.Module, paths: Sequence[str], event_shape: Any) -> dict[str, Shown]:
    """What arrives at `paths`, where a copy of the flow takes the example from data to noise."""
    if event_shape is not None:
        raise ValueError(f"event_shape={event_shape!r} and example= both tell the shape of events; pass one of them.")
    copied, seen = copy.deepcopy(flow).eval(), {}
    for path in paths:
        module = copied.get_submodule(path)
        for name in ("forward", "inverse"):
            setattr(module, name, _noting(getattr(module, name), seen, path))
    _run(copied, example if isinstance(example, tuple) else (example,))
    missed = [path for path in paths if path not in seen]
    if missed:
        raise ValueError(f"The example passes by {', '.join(map(repr, missed))}. Pass event_shape= for what is there.")
    return seen


def _noting(method: Callable[..., Any], seen: dict[str, Shown], path: str) -> Callable[..., Any]:
    """The same method, which notes what it is handed first."""

    def noted(x: Tensor, *rest: Any, **named: Any) -> Any:
        context = named.get("context", rest[0] if rest else None)
        seen.setdefault(path, Shown(tuple(x.shape[1:]), None if context is None else tuple(context.shape[1:])))
        return method(x, *rest, **named)

    return noted


def _run(flow: nn.Module, example: tuple[Any, ...]) -> None:
    try:
        with torch.no_grad(), _seed_left_alone():
            _to_noise(flow)(*example)
    except Exception as error:
        sizes = ", ".join(str(tuple(one.shape)) if isinstance(one, Tensor) else repr(one) for one in example)
        raise ValueError(
            f"The example ({sizes}) does not pass through this {type(flow).__name__}; pass what you pass to its "
            f"log_prob, several as a tuple. It failed with: {error}"
        ) from error


def _to_noise(flow: Any) -> Callable[..., Any]:
    """What takes points from data to noise, whatever their density: in normflows `log_prob` insists on a class."""
    if host_of(flow) == "normflows":
        return flow.inverse
    return getattr(flow, "forward_kld", None) or getattr(flow, "log_prob", None) or flow


def _seed_left_alone() -> AbstractContextManager[None]:
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


# events ----------------------------------------------------------------------------------------------


def features_of(flow: nn.Module, path: str, old: nn.Module, given: int | Sequence[int] | None) -> int | Event:
    """The number of features of a vector, or the event shape."""
    where = f"'{path}' ({type(old).__name__})"
    event = _found_event(flow, path, old) if given is None else as_event(given)
    if event is None:
        raise ValueError(f"The shape of the events at {where} is not known; pass event_shape= or example=.")
    if len(event) == 1:
        return event[0]
    if given is None:
        raise ValueError(
            f"The events at {where} seem to be of shape {event}. Images change shape on their way through a flow: pass "
            "example= with some of them, or event_shape=."
        )
    return event


def as_event(given: int | Sequence[int]) -> Event:
    """A number of features or a shape, as a shape."""
    event = tuple(given) if isinstance(given, Sequence) else (given,)
    if not event or any(not isinstance(size, int) or size < 1 for size in event):
        raise ValueError(f"event_shape must be a positive integer or several, without the batch, got {given!r}.")
    return event


def _found_event(flow: nn.Module, path: str, old: nn.Module) -> Event | None:
    """From the transform's own number of features (channels, if it is convolutional), or from what is around it."""
    event = _event_around(flow, path)
    if event is not None and len(event) > 1:
        return event
    if any(isinstance(part, _ConvNd) for part in old.modules()):
        return None
    features = getattr(old, "features", None)
    return (features,) if isinstance(features, int) else event


def _event_around(flow: nn.Module, path: str) -> Event | None:
    """What the models on the way to `path` say; the innermost knows best."""
    event, module, names = None, flow, path.split(".")
    for depth, name in enumerate(names):
        inside = _event_inside(module, names[depth:])
        event = event if inside is None else inside
        module = module.get_submodule(name)
    return event


def _event_inside(module: Any, names: list[str]) -> Event | None:
    """The events that a model hands to what hangs in it under `names`."""
    if is_a(module, "nflows", "Flow"):
        return _base_event(module._distribution)
    if is_a(module, "nflows", "MultiscaleCompositeTransform"):
        return _nflows_scale(module, int(names[1]))
    if is_a(module, "normflows", "NormalizingFlow", "ClassCondFlow", "NormalizingFlowVAE"):
        return _base_event(module.q0)
    if is_a(module, "normflows", "MultiscaleFlow"):
        return _normflows_scale(module, int(names[1]) if names[0] == "flows" else len(module.q0) - 1)
    return None


def _base_event(base: object) -> Event | None:
    """The event shape of a base distribution, under the name it has there."""
    for name in ("_shape", "shape", "event_shape", "dim", "ndim"):
        value = getattr(base, name, None)
        if isinstance(value, int):
            return (value,)
        if isinstance(value, (tuple, list)):
            return tuple(value)
    return None


def _nflows_scale(multiscale: Any, scale: int) -> Event:
    """The shape before the split: as many entries as leave here or later, in the shape of those that leave here."""
    shapes, split = multiscale._output_shapes, multiscale._split_dim - 1
    entries = sum(math.prod(shape) for shape in shapes[scale:])
    others = math.prod(shapes[scale]) // shapes[scale][split]
    return (*shapes[scale][:split], entries // others, *shapes[scale][split + 1 :])


def _normflows_scale(multiscale: Any, scale: int) -> Event | None:
    """Vectors of all bases so far, merged; for images the shape of this base, which is that of some part only."""
    events = [_base_event(base) for base in multiscale.q0[: scale + 1]]
    vectors = [event[0] for event in events if event is not None and len(event) == 1]
    return (sum(vectors),) if len(vectors) == len(events) else events[-1]


# contexts --------------------------------------------------------------------------------------------


def context_of(path: str, old: nn.Module, given: int | None, shown: Event | None) -> Context:
    """The kind and size of the context: the user's word, or what arrives, if the nets take any, or what they say."""
    if given is not None:
        if not isinstance(given, int) or given < 0:
            raise ValueError(f"context_features must be a number of features, or 0 for no context, got {given!r}.")
        return ("context_features", given) if given else None
    found = {mark for part in old.modules() for mark in _context_marks(part)}
    if found and shown:
        return ("context_features" if len(shown) == 1 else "context_channels", shown[0])
    if len(found) > 1:
        sizes = sorted(size for _, size in found)
        raise ValueError(
            f"'{path}' ({type(old).__name__}) takes contexts of several sizes, {sizes}; pass context_features=."
        )
    return next(iter(found), None)


def _context_marks(part: Any) -> Iterator[tuple[str, int]]:
    """The marks that a context leaves on the nets of both hosts, and on ours."""
    for name in ("context_features", "context_channels"):
        size = getattr(part, name, None)
        if isinstance(size, int):
            yield name, size
    layer = part.network if isinstance(part, AddContext) else getattr(part, "context_layer", None)
    if isinstance(layer, nn.Linear):
        yield "context_features", layer.in_features
    if isinstance(layer, _ConvNd):
        yield "context_channels", layer.in_channels


# widths ----------------------------------------------------------------------------------------------


def parameter_counter(make: Callable[[Any, int, Context], nn.Module]) -> Callable[[int | Event, Context, int], int]:
    """Trainable parameters by size, from nets that are built, counted and dropped."""

    @cache
    def count(features: int | Event, context: Context, width: int) -> int:
        with _seed_left_alone():
            return trainable(make(features, width, context))

    return count


def trainable(module: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def closest_width(count: Callable[[int], int], target: int) -> int:
    """The width with the count closest to `target`, where counts grow with the width.

    As a rule they grow no faster than its square. Steps by the square root then come from below, and no net is built
    that is much larger than the one wanted; bisection does the rest.
    """
    low, high = 0, 1
    while count(high) < target:
        if high > target:
            raise ValueError(f"replace seems to ignore hidden_features: {count(high)} parameters at {high}.")
        low, high = high, max(high + 1, int(high * (target / max(1, count(high))) ** 0.5))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return min([low, high] if low else [high], key=lambda width: abs(count(width) - target))
