"""Constraints on layers: put there, found again, saved with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize

from iresflow_plugin.lipschitz.constraints.constraint import Constraint
from iresflow_plugin.maps import CONVOLUTIONS, ConvSpec


def spec_of(layer: nn.Module) -> ConvSpec | None:
    """What makes an operator of the layer's weight; None if the weight is the matrix itself."""
    return ConvSpec.of(layer) if isinstance(layer, CONVOLUTIONS) else None


def raw_parametrizations(layer: nn.Module) -> Sequence[nn.Module]:
    """What stands between a layer's raw weight and the weight in use."""
    if not parametrize.is_parametrized(layer, "weight"):
        return ()
    return cast(Sequence[nn.Module], cast(nn.ModuleDict, layer.parametrizations)["weight"])


def constraint_of(layer: nn.Module) -> Constraint | None:
    """The one that has the last word on the layer's weight."""
    stack = raw_parametrizations(layer)
    return stack[-1] if len(stack) and isinstance(stack[-1], Constraint) else None


def install(layer: nn.Module, kind: type[Constraint], lipschitz: float) -> Callable[[], None]:
    """Bound a layer by a constraint of this kind, behind whatever parametrizes its weight already; returns the undo."""
    present, others = constraint_of(layer), len(raw_parametrizations(layer))
    if present is not None and type(present) is kind:
        before, present.lipschitz = present.lipschitz, lipschitz
        return lambda: setattr(present, "lipschitz", before)
    register(layer, kind(lipschitz))
    if others:
        return lambda: cast(nn.ModuleList, raw_parametrizations(layer)).__delitem__(others)
    return lambda: cast(None, parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False))


def register(layer: nn.Module, constraint: Constraint) -> None:
    """Put a constraint on the weight of a layer, which stays picklable: torch refuses that to parametrized modules."""
    constraint.spec = spec_of(layer)
    parametrize.register_parametrization(layer, "weight", constraint)
    cast(Any, type(layer)).__reduce_ex__ = _reduce  # that class is this layer's own, torch has just made it


def _reduce(layer: Any, protocol: int) -> str | tuple:
    """As the plain layer with its raw weight, and the constraints of that.

    A parametrization of another kind keeps its raw weight in its own way, and may hold a part of the weight itself.
    """
    alone = set(layer.parametrizations) == {"weight"}
    if not alone or not all(isinstance(part, Constraint) for part in layer.parametrizations["weight"]):
        return object.__reduce_ex__(layer, protocol)  # torch's refusal
    stack = layer.parametrizations["weight"]
    modules = {name: module for name, module in layer._modules.items() if name != "parametrizations"}
    parameters = {**layer._parameters, "weight": stack.original}
    state = {**layer.__dict__, "_modules": modules, "_parameters": parameters}
    return _restore, (type(layer).__base__, state, list(stack))


def _restore(kind: type[nn.Module], state: dict, constraints: list[Constraint]) -> nn.Module:
    layer = kind.__new__(kind)
    layer.__setstate__(state)
    for constraint in constraints:
        register(layer, constraint)
    return layer
