"""Flows of the user: an nflows `Flow` or a normflows `NormalizingFlow` that a function in a module of theirs makes."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from dataclasses import dataclass
from typing import Any

import normflows
from nflows.flows import Flow
from torch import nn

from comparisons.methods.density import Density, Method
from comparisons.methods.hosts import NflowsDensity, NormflowsDensity

SWAPPED_BY_DEFAULT = ("Coupling", "Autoregressive")  # parts of the names of the hosts' classes


@dataclass(frozen=True)
class Made:
    """A stack whose size is what it is: a fresh copy of the user's flow."""

    where: str

    def __call__(self, features: int, width: int, context_features: int | None) -> nn.Module:
        flow = flow_at(self.where)
        own = features_of(flow)
        if own is not None and own != features:
            raise ValueError(f"{self.where} is a flow of {own} features, and the task has {features}.")
        return flow


@dataclass(frozen=True)
class Named:
    """Selects transforms by their class: one of these names, or by default every coupling and autoregressive one."""

    names: tuple[str, ...]

    def __call__(self, path: str, transform: nn.Module) -> bool:
        name = type(transform).__name__
        return name in self.names if self.names else any(part in name for part in SWAPPED_BY_DEFAULT)

    @property
    def __name__(self) -> str:
        return " and ".join(self.names) or "coupling and autoregressive transform"


def users_methods(where: str, replaced: tuple[str, ...], rate: float, swapped_rate: float) -> tuple[Method, Method]:
    """The user's flow and its swapped twin; both keep their own size, whatever the task says."""
    host = host_of(flow_at(where))
    original = Method(
        where,
        f"{where}, as it is",
        "yours",
        "your own",
        Made(where),
        host,
        learning_rate=rate,
        own_size=True,
    )
    about = f"{where}, every {Named(replaced).__name__} swapped for a residual block"
    twin = Method(
        f"{where}-swapped",
        about,
        "yours",
        "your own",
        Made(where),
        host,
        learning_rate=swapped_rate,
        own_size=True,
        swapped=Named(replaced),
    )
    return original, twin


def flow_at(where: str) -> Any:
    """What `module:attribute` names: a flow, copied, or a function that makes one."""
    module_name, separator, attribute = where.partition(":")
    if not separator:
        raise ValueError(f"{where!r} names no flow; write MODULE:FLOW, such as my_models:make_flow.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, also in the workers
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"there is no module {module_name!r} ({error}); run from the folder that holds it.") from error
    if not hasattr(module, attribute):
        raise ValueError(f"{module_name} has no {attribute!r}.")
    found = getattr(module, attribute)
    return copy.deepcopy(found) if isinstance(found, nn.Module) or not callable(found) else found()


def host_of(flow: Any) -> type[Density]:
    if isinstance(flow, Flow):
        return NflowsDensity
    if isinstance(flow, normflows.NormalizingFlow):
        return NormflowsDensity
    raise ValueError(
        f"got a {type(flow).__module__}.{type(flow).__name__}, and can take an nflows.flows.Flow or a "
        "normflows.NormalizingFlow, or a function without arguments that makes one."
    )


def features_of(flow: Any) -> int | None:
    """The dimension of the base distribution, where the host keeps it."""
    base = flow._distribution if isinstance(flow, Flow) else flow.q0
    shape = getattr(base, "_shape", None) or getattr(base, "shape", None)
    if shape is None:
        return None
    size = 1
    for number in shape:
        size *= int(number)
    return size
