"""Weights on which bugs show."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def scale_weights(module: M, factor: float = 5.0) -> M:
    """Multiply every weight matrix, in place: a fresh net's Jacobian is near zero, where wrong log-dets pass for right.

    A branch that is constrained stays within its bound, and is pushed against it, as by adversarial training.
    """
    for parameter in module.parameters():
        if parameter.ndim == 2:
            parameter.mul_(factor)
    return module
