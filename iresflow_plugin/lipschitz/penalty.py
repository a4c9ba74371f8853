"""The soft alternative to a constraint."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from iresflow_plugin.lipschitz import convolution, matrix
from iresflow_plugin.lipschitz.activations import Activation
from iresflow_plugin.lipschitz.constraints import spec_of
from iresflow_plugin.lipschitz.parts import AddContext
from iresflow_plugin.maps import ConvSpec


def spectral_penalty(module: nn.Module, strength: float = 1e-3) -> Tensor:
    """strength * sum_W |W|_2^2 over the raw weights of all layers of the branch, to be added to a loss.

    The soft alternative to a constraint, or its companion: it keeps raw weights from growing where the constraint
    binds. It proves nothing by itself.
    """
    weights = list(_raw_weights(module))
    if not weights:
        raise ValueError(f"{type(module).__name__} holds no weight matrix to penalise.")
    return strength * torch.stack([_norm(w, spec) ** 2 for w, spec in weights]).sum()


def _raw_weights(module: nn.Module) -> Iterator[tuple[Tensor, ConvSpec | None]]:
    """Every raw weight once, with its operator; networks of the context and activations are free."""
    parts = list(module.modules())
    seen = {id(p) for part in parts if isinstance(part, (AddContext, Activation)) for p in part.parameters()}
    for part in parts:
        constrained = parametrize.is_parametrized(part, "weight")
        owner = part.get_submodule("parametrizations.weight") if constrained else part
        for p in owner.parameters(recurse=owner is not part):
            if p.ndim >= 2 and id(p) not in seen:
                seen.add(id(p))
                yield p, spec_of(part)


def _norm(weight: Tensor, spec: ConvSpec | None) -> Tensor:
    return matrix.schatten_norm(weight.flatten(1)) if spec is None else convolution.operator_norm(weight, spec)
