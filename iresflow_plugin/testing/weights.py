"""Weights on which bugs show."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def scale_weights(module: M, factor: float = 5.0) -> M:
    """Multiply every weight matrix and kernel, in place: a fresh net's Jacobian is near zero, where errors pass.

    A branch that is constrained stays within its bound, and is pushed against it, as by adversarial training.
    """
    kernels = {id(_raw_weight(part)) for part in module.modules() if isinstance(part, _ConvNd)}
    for parameter in module.parameters():
        if parameter.ndim == 2 or id(parameter) in kernels:
            parameter.mul_(factor)
    return module


def _raw_weight(layer: Any) -> Any:
    return layer.parametrizations.weight.original if parametrize.is_parametrized(layer, "weight") else layer.weight
