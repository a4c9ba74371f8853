"""Replace transforms inside an existing flow by residual blocks.

No module of yours is ever run for this: an ActNorm initialises itself on whatever it sees first. The sizes of events
and contexts are read off attributes that the hosts keep, and asked for where there are none; or a copy of the flow is
run on an example, to see them.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from iresflow_plugin.lipschitz import AddContext
from iresflow_plugin.nets import LipschitzConvNet, LipschitzMLP

Select = type | tuple[type, ...] | str | Sequence[str] | Callable[[str, nn.Module], bool]
Event = tuple[int, ...]
Context = tuple[str, int] | None  # ("context_features", size of a vector) or ("context_channels", those of an image)
Replace = Callable[[Any, int, int | None], nn.Module]

DEFAULT_WIDTH = 64
NETS: dict[int, Callable[..., nn.Module]] = {1: LipschitzMLP, 3: LipschitzConvNet}  # by axes of an event

# Per host: the base class of its transforms; the modules that call what they hold as transforms (what lies inside any
# other module of a host is that module's affair); and the transforms of lists of tensors, where no block can stand.
TRANSFORM = {"nflows": "Transform", "normflows": "Flow"}
CONTAINERS = {
    "nflows": ("Flow", "CompositeTransform", "MultiscaleCompositeTransform", "InverseTransform"),
    "normflows": (
        "NormalizingFlow",
        "ClassCondFlow",
        "MultiscaleFlow",
        "NormalizingFlowVAE",
        "Composite",
        "Reverse",
        "GlowBlock",
    ),
}
OF_LISTS = {"nflows": (), "normflows": ("Split", "AffineCoupling")}


@dataclass(frozen=True)
class Swap:
    """One replaced transform. Parameters are the trainable ones; a transform in several places has all their paths."""

    path: str
    old: str
    new: str
    parameters_before: int
    parameters_after: int
    hidden_features: int
    context_features: int | None


@dataclass(frozen=True)
class SwapReport:
    """What was swapped, a row per transform; `str(report)` is a table."""

    rows: tuple[Swap, ...]

    @property
    def parameters_before(self) -> int:
        return sum(row.parameters_before for row in self.rows)

    @property
    def parameters_after(self) -> int:
        return sum(row.parameters_after for row in self.rows)

    def __str__(self) -> str:
        head = ("path", "old", "new", "before", "after", "width", "context")
        total = ("total", "", "", f"{self.parameters_before:,}", f"{self.parameters_after:,}", "", "")
        return _table([head, *[_cells(row) for row in self.rows], total])


def swap_transforms(
    flow: nn.Module,
    select: Select,
    replace: Replace | None = None,
    match_parameters: bool = True,
    *,
    hidden_features: int | None = None,
    event_shape: int | Sequence[int] | None = None,
    context_features: int | None = None,
    example: Tensor | tuple[Any, ...] | None = None,
) -> SwapReport:
    """Replace the selected transforms of an nflows or normflows model by residual blocks, in place.

    A block stands there as `ResidualTransform`, or as `ResidualFlow(reverse=True)`: x + g(x) runs from data to noise,
    the solve from noise to data. Inside an nflows `InverseTransform` or a normflows `Reverse` it is turned round, like
    everything there. It takes over device, dtype and mode of what it replaces. After an error, nothing has changed.
    Make the optimiser after the swap: an older one holds the old parameters.

    Args:
        flow: a `Flow`, a `NormalizingFlow`, a composite or multiscale transform, or a module that holds one of them.
        select: a type or a tuple of types, a path as `named_modules` spells it or a list of paths, or a predicate
            (path, transform) -> bool. Of nested transforms the outermost is replaced; parts of a coupling cannot be.
        replace: a function (features, hidden_features, context_features) -> branch, `ResidualBlock`, or ready transform
            of the host. `features` is an integer for vectors, and the event shape otherwise. None is
            `LipschitzMLP([features, hidden_features, hidden_features, features], context_features)`, or for images
            `LipschitzConvNet` with their channels in place of the features. For a context image, `context_features`
            are its channels.
        match_parameters: choose the width with which the number of trainable parameters comes closest to the old one.
        hidden_features: the width if `match_parameters` is False; None is 64.
        event_shape: of the selected transforms. None reads it off the transform's attribute `features`, or off the
            multiscale model or base distribution around it. Images change shape on the way: for them pass this, or an
            example.
        example: a batch of points, or what else `log_prob` takes, such as (images, context): a copy of the flow scores
            it, and each selected transform is replaced by one for events of the shape that it was handed.
        context_features: size of the context vector of the selected transforms, 0 for none. None looks for the size of
            a vector or the channels of an image in the nets of the old transform, and in the example's context: what
            took no context is replaced by what takes none.

    Returns:
        A report with the path, types, trainable parameters and width of every swap.

    Raises:
        ValueError: nothing is selected, a size can neither be found nor was given, or the example does not fit.

    >>> from nflows.flows import SimpleRealNVP
    >>> from nflows.transforms import AffineCouplingTransform
    >>> flow = SimpleRealNVP(features=2, hidden_features=32, num_layers=1, num_blocks_per_layer=2)
    >>> print(swap_transforms(flow, AffineCouplingTransform))
    path                      old                      new                              before  after  width  context
    -----------------------------------------------------------------------------------------------------------------
    _transform._transforms.0  AffineCouplingTransform  ResidualTransform(LipschitzMLP)   4,354  4,3...
    -----------------------------------------------------------------------------------------------------------------
    total                                                                                4,354  4,3...
    >>> flow.log_prob(torch.randn(5, 2)).shape
    torch.Size([5])
    """
    _check_width(hidden_features, match_parameters)
    make = _branch if replace is None else partial(_made_by, replace)
    count = _counter(make)
    swaps = []
    chosen = _chosen(flow, select)
    seen = {} if example is None else _seen(flow, [paths[0] for paths, _ in chosen], event_shape, example)
    for paths, old in chosen:
        shown = seen.get(paths[0], Shown(event_shape))
        features = _features(flow, paths[0], old, shown.event)
        context = _context(paths[0], old, context_features, shown.context)
        width = hidden_features or DEFAULT_WIDTH
        if match_parameters:
            width = _closest_width(partial(count, features, context), _trainable(old))
        new = _like(old, flow, _as_transform(make(features, width, context), _host(old)))
        swaps.append((paths, old, new, width, context))
    for paths, _, new, *_ in swaps:
        for path in paths:
            parent, _, name = path.rpartition(".")
            setattr(flow.get_submodule(parent), name, new)
    return SwapReport(tuple(_row(*swap) for swap in swaps))


# which transforms ------------------------------------------------------------------------------------


def _chosen(flow: nn.Module, select: Select) -> list[tuple[tuple[str, ...], nn.Module]]:
    """The selected transforms, each with all its places, without those inside another selected one."""
    if not isinstance(flow, nn.Module):
        raise TypeError(f"flow must be a module of nflows or normflows, or one that holds such, got {flow!r}.")
    places = list(_places(flow))
    if not places:
        raise ValueError(f"{type(flow).__name__} holds no transform of nflows or normflows that can be replaced.")
    matches = _matcher(flow, select, dict(places))
    found: dict[nn.Module, list[str]] = {}
    inside: tuple[str, ...] = ()
    for path, module in places:
        if not path.startswith(inside) and matches(path, module):
            found.setdefault(module, []).append(path)
            inside += (f"{path}.",)
    if not found:
        counts = Counter(type(module).__name__ for _, module in places)
        present = ", ".join(f"{number} {name}" for name, number in counts.items())
        raise ValueError(f"select={select!r} selects nothing. The transforms in this {type(flow).__name__}: {present}.")
    return [(tuple(paths), module) for module, paths in found.items()]


def _places(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every transform that is called as one, with its path, outer before inner; a shared one once for every place."""
    for name, child in module._modules.items():
        if child is None:
            continue
        here = f"{path}.{name}" if path else name
        host = _host(child)
        if host is not None and not _is(child, host, *OF_LISTS[host]):
            yield here, child
        if _may_be_entered(child):
            yield from _places(child, here)


def _may_be_entered(module: nn.Module) -> bool:
    """Whether what hangs in `module` may be replaced: in containers of the hosts, and in all that is not a host's."""
    kinds = [(_package(kind), kind.__name__) for kind in type(module).__mro__ if _package(kind) in CONTAINERS]
    if not kinds:
        return True
    host, name = kinds[0]
    return name == TRANSFORM[host] or any(name in CONTAINERS[host] for host, name in kinds)


def _matcher(flow: nn.Module, select: Any, places: dict[str, nn.Module]) -> Callable[[str, nn.Module], bool]:
    """Any way to select, as a predicate."""
    items = tuple(select) if isinstance(select, (tuple, list)) else (select,)
    if items and all(isinstance(item, type) for item in items):
        return lambda path, module: isinstance(module, items)
    if all(isinstance(item, str) for item in items):
        for path in items:
            if path not in places:
                raise ValueError(f"{_why_not(flow, path)} Paths that can be selected: {', '.join(places)}.")
        return lambda path, module: path in items
    if callable(select):
        return lambda path, module: bool(select(path, module))
    raise TypeError(
        f"select must be a type, a path, several of one kind, or a predicate (path, module), got {select!r}."
    )


def _why_not(flow: nn.Module, path: str) -> str:
    modules = dict(flow.named_modules(remove_duplicate=False))
    if path == "":
        return "The model itself ('') cannot be replaced in place."
    if path in modules:
        return f"'{path}' is a {type(modules[path]).__name__}, which is no transform that can be replaced on its own."
    return f"There is no module '{path}' in this {type(flow).__name__}."


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _is(module: object, host: str, *names: str) -> bool:
    """isinstance without importing the host."""
    return any(_package(kind) == host and kind.__name__ in names for kind in type(module).__mro__)


def _host(module: object) -> str | None:
    """The host whose transform this is."""
    return next((host for host, name in TRANSFORM.items() if _is(module, host, name)), None)


# what the new transform has to take ------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What a transform is handed: the shape of its events and, if there is one, that of its context."""

    event: int | Sequence[int] | None
    context: Event | None = None


def _seen(flow: nn.Module, paths: Sequence[str], given: Any, example: Any) -> dict[str, Shown]:
    """What arrives at `paths`, where a copy of the flow takes the example from data to noise."""
    if given is not None:
        raise ValueError(f"event_shape={given!r} and example= both tell the shape of events; pass one of them.")
    copied, seen = copy.deepcopy(flow).eval(), {}
    for path in paths:
        module = copied.get_submodule(path)
        for name in ("forward", "inverse"):
            setattr(module, name, _noting(getattr(module, name), seen, path))
    arguments = example if isinstance(example, tuple) else (example,)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            _to_noise(copied)(*arguments)
    except Exception as error:
        sizes = ", ".join(str(tuple(one.shape)) if isinstance(one, Tensor) else repr(one) for one in arguments)
        raise ValueError(
            f"The example ({sizes}) does not pass through this {type(flow).__name__}; pass what you pass to its "
            f"log_prob, several as a tuple. It failed with: {error}"
        ) from error
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


def _to_noise(flow: Any) -> Callable[..., Any]:
    """What takes points from data to noise, whatever their density: in normflows `log_prob` insists on a class."""
    if _host(flow) == "normflows":
        return flow.inverse
    return getattr(flow, "forward_kld", None) or getattr(flow, "log_prob", None) or flow


def _features(flow: nn.Module, path: str, old: nn.Module, given: int | Sequence[int] | None) -> int | Event:
    """The number of features of a vector, or the event shape."""
    where = f"'{path}' ({type(old).__name__})"
    event = _found_event(flow, path, old) if given is None else _as_event(given)
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


def _as_event(given: int | Sequence[int]) -> Event:
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
    if _is(module, "nflows", "Flow"):
        return _base_event(module._distribution)
    if _is(module, "nflows", "MultiscaleCompositeTransform"):
        return _nflows_scale(module, int(names[1]))
    if _is(module, "normflows", "NormalizingFlow", "ClassCondFlow", "NormalizingFlowVAE"):
        return _base_event(module.q0)
    if _is(module, "normflows", "MultiscaleFlow"):
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


def _context(path: str, old: nn.Module, given: int | None, shown: Event | None) -> Context:
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


# the new transform -----------------------------------------------------------------------------------


def _branch(features: Any, hidden_features: int, context: Context) -> nn.Module:
    event = _as_event(features)
    if len(event) not in NETS:
        raise ValueError(f"There is no net here for events of shape {event}. Pass replace= with a branch for them.")
    if len(event) == 1 and context is not None and context[0] == "context_channels":
        raise ValueError(
            f"There is no net here for vectors of {event[0]} features with a context image of {context[1]} channels. "
            "Pass replace= with a branch for them, or context_features=."
        )
    inputs = event[0]
    return NETS[len(event)]([inputs, hidden_features, hidden_features, inputs], **dict([context] if context else []))


def _made_by(replace: Replace, features: Any, hidden_features: int, context: Context) -> nn.Module:
    return replace(features, hidden_features, None if context is None else context[1])


def _check_width(hidden_features: int | None, match_parameters: bool) -> None:
    if hidden_features is None:
        return
    if match_parameters:
        raise ValueError(
            f"hidden_features={hidden_features} was given, but with match_parameters the width follows from the number "
            "of parameters; pass match_parameters=False as well."
        )
    if not isinstance(hidden_features, int) or hidden_features < 1:
        raise ValueError(f"hidden_features must be a positive integer, got {hidden_features!r}.")


def _counter(make: Callable[[Any, int, Context], nn.Module]) -> Callable[[int | Event, Context, int], int]:
    """Trainable parameters by size, from nets that are built, counted and dropped; they leave no trace in the seed."""

    @cache
    def count(features: int | Event, context: Context, width: int) -> int:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            return _trainable(_checked(make(features, width, context)))

    return count


def _closest_width(count: Callable[[int], int], target: int) -> int:
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


def _trainable(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _checked(made: Any) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise TypeError(f"replace must return a branch, a ResidualBlock or a transform, got {made!r}.")
    return made


def _as_transform(made: Any, host: str | None) -> nn.Module:
    """In the host's form; a host is imported here, and only when a transform of its was found."""
    if _host(_checked(made)) == host:
        return made
    if host == "nflows":
        from iresflow_plugin.adapters.nflows import ResidualTransform

        return ResidualTransform(made)
    from iresflow_plugin.adapters.normflows import ResidualFlow

    return ResidualFlow(made)


def _like(old: nn.Module, flow: nn.Module, new: nn.Module) -> nn.Module:
    """On the device, in the dtype and in the mode of the old one; one without numbers follows the other transforms."""
    others = (module.parameters() for _, module in _places(flow))
    tensors = chain(old.parameters(), old.buffers(), chain.from_iterable(others))
    model = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if model is not None:
        new.to(model.device, model.dtype)
    return new.train(old.training)


# the report ------------------------------------------------------------------------------------------


def _row(paths: tuple[str, ...], old: nn.Module, new: nn.Module, width: int, context: Context) -> Swap:
    block = getattr(new, "block", None)
    branch = "" if block is None else f"({type(block.branch).__name__})"
    return Swap(
        path=", ".join(paths),
        old=type(old).__name__,
        new=type(new).__name__ + branch,
        parameters_before=_trainable(old),
        parameters_after=_trainable(new),
        hidden_features=width,
        context_features=None if context is None else context[1],
    )


def _cells(row: Swap) -> tuple[str, ...]:
    numbers = (row.parameters_before, row.parameters_after, row.hidden_features, row.context_features)
    return (row.path, row.old, row.new, *["-" if number is None else f"{number:,}" for number in numbers])


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns of text to the left, of numbers to the right, rules under the head and above the total."""
    columns = []
    for index, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append([cell.ljust(width) if index < 3 else cell.rjust(width) for cell in column])
    lines = ["  ".join(cells) for cells in zip(*columns, strict=True)]
    rule = "-" * len(lines[0])
    return "\n".join(line.rstrip() for line in (lines[0], rule, *lines[1:-1], rule, lines[-1]))
