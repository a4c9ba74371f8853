"""The swap itself, and its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn

from iresflow_plugin.nets import LipschitzConvNet, LipschitzMLP
from iresflow_plugin.swap.selection import Select, host_of, selected_transforms, transforms_in
from iresflow_plugin.swap.sizes import (
    Context,
    Shown,
    as_event,
    closest_width,
    context_of,
    features_of,
    parameter_counter,
    shown_by,
    trainable,
)

Replace = Callable[[Any, int, int | None], nn.Module]

DEFAULT_WIDTH = 64
NETS: dict[int, Callable[..., nn.Module]] = {1: LipschitzMLP, 3: LipschitzConvNet}  # by axes of an event


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

    >>> import torch
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
    count = parameter_counter(make)
    chosen = selected_transforms(flow, select)
    seen = {} if example is None else shown_by(example, flow, [paths[0] for paths, _ in chosen], event_shape)
    rows, places = [], {}
    for paths, old in chosen:
        shown = seen.get(paths[0], Shown(event_shape))
        features = features_of(flow, paths[0], old, shown.event)
        context = context_of(paths[0], old, context_features, shown.context)
        width = hidden_features or DEFAULT_WIDTH
        if match_parameters:
            width = closest_width(partial(count, features, context), trainable(old))
        new = _like(old, flow, _as_transform(make(features, width, context), host_of(old)))
        rows.append(_row(paths, old, new, width, context))
        places |= dict.fromkeys(paths, new)
    for path, new in places.items():
        parent, _, name = path.rpartition(".")
        setattr(flow.get_submodule(parent), name, new)
    return SwapReport(tuple(rows))


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


# the new transform -----------------------------------------------------------------------------------


def _branch(features: Any, hidden_features: int, context: Context) -> nn.Module:
    event = as_event(features)
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
    made = replace(features, hidden_features, None if context is None else context[1])
    if not isinstance(made, nn.Module):
        raise TypeError(f"replace must return a branch, a ResidualBlock or a transform, got {made!r}.")
    return made


def _as_transform(made: nn.Module, host: str | None) -> nn.Module:
    """In the host's form; a host is imported here, and only when a transform of its was found."""
    if host_of(made) == host:
        return made
    if host == "nflows":
        from iresflow_plugin.adapters.nflows import ResidualTransform

        return ResidualTransform(made)
    from iresflow_plugin.adapters.normflows import ResidualFlow

    return ResidualFlow(made)


def _like(old: nn.Module, flow: nn.Module, new: nn.Module) -> nn.Module:
    """On the device, in the dtype and in the mode of the old one; one without numbers follows the other transforms."""
    others = (module.parameters() for _, module in transforms_in(flow))
    tensors = chain(old.parameters(), old.buffers(), chain.from_iterable(others))
    model = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if model is not None:
        new.to(model.device, model.dtype)
    return new.train(old.training)


# the report ------------------------------------------------------------------------------------------


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


def _row(paths: tuple[str, ...], old: nn.Module, new: nn.Module, width: int, context: Context) -> Swap:
    block = getattr(new, "block", None)
    branch = "" if block is None else f"({type(block.branch).__name__})"
    return Swap(
        path=", ".join(paths),
        old=type(old).__name__,
        new=type(new).__name__ + branch,
        parameters_before=trainable(old),
        parameters_after=trainable(new),
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
