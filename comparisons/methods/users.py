"""Flows of the user, of vectors or images: one of the hosts' models that a function in a module of theirs makes."""

from __future__ import annotations

import copy
import importlib
import math
import os
import sys
from dataclasses import dataclass, replace
from typing import Any

import normflows
import torch
from nflows.flows import Flow
from torch import Tensor, nn

from comparisons.methods.density import Density, Event, Images, Method, example
from comparisons.methods.hosts import NflowsDensity, NormflowsDensity
from comparisons.methods.multiscale import MultiscaleDensity

SWAPPED_BY_DEFAULT = ("Coupling", "Autoregressive")  # parts of the names of the hosts' classes


@dataclass(frozen=True)
class Made:
    """A stack whose size is what it is: a fresh copy of the user's flow."""

    where: str

    def __call__(self, event: Event, width: int, context_features: int | None) -> nn.Module:
        flow = flow_at(self.where)
        own, features = features_of(flow), math.prod(event) if isinstance(event, tuple) else event
        if own is not None and own != features:
            raise ValueError(f"{self.where} is a flow of {own} features, and the task has {features}.")
        images = example(event, context_features)
        if images is not None:
            try:
                score(flow, images, context_features)
            except Exception as error:
                raise ValueError(f"{self.where} cannot score images of shape {event}: {error}") from error
        return flow


@torch.no_grad()
def score(flow: nn.Module, images: tuple[Tensor, ...], context_features: int | None) -> Tensor:
    """By a copy: an ActNorm initialises itself on whatever it sees first."""
    return host_of(flow)(copy.deepcopy(flow).eval(), context_features).log_prob(*images)


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
    images = Images(Made(where), host, conditional=host is not MultiscaleDensity)
    original = Method(
        where,
        f"{where}, as it is",
        "yours",
        "your own",
        Made(where),
        host,
        learning_rate=rate,
        conditional=images.conditional,
        own_size=True,
        images=images,
    )
    twin = replace(
        original,
        name=f"{where}-swapped",
        about=f"{where}, every {Named(replaced).__name__} swapped for a residual block",
        learning_rate=swapped_rate,
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
    if isinstance(flow, normflows.MultiscaleFlow):
        if flow.class_cond:
            raise ValueError("got a normflows.MultiscaleFlow of classes; make it with class_cond=False.")
        return MultiscaleDensity
    raise ValueError(
        f"got a {type(flow).__module__}.{type(flow).__name__}, and can take an nflows.flows.Flow, a "
        "normflows.NormalizingFlow or a normflows.MultiscaleFlow, or a function without arguments that makes one."
    )


def features_of(flow: Any) -> int | None:
    """The dimension of the base distribution, where the host keeps it; of several all together."""
    base = flow._distribution if isinstance(flow, Flow) else flow.q0
    total = 0
    for part in base if isinstance(base, nn.ModuleList) else [base]:
        shape = getattr(part, "_shape", None) or getattr(part, "shape", None)
        if shape is None:
            return None
        total += math.prod(int(size) for size in shape)
    return total
