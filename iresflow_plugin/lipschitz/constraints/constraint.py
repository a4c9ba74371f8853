"""What all constraints share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iresflow_plugin.maps import ConvSpec
from iresflow_plugin.torch_state import is_plain, single


class Constraint(nn.Module):
    """Parametrization of a weight, seen as an (out, in) matrix, that keeps |W|_2 <= `lipschitz`.

    A subclass has `certify(weight)`: the weight in use, and a certified bound of its norm, or of the raw one's, if that
    is smaller than `lipschitz`. `spec` is None for a dense layer; `install` sets it to the layer's own.
    """

    spec: ConvSpec | None = None

    def __init__(self, lipschitz: float = 1.0) -> None:
        super().__init__()
        self._shown: tuple[Tensor, int] | None = None
        self.lipschitz = lipschitz

    @property
    def lipschitz(self) -> float:
        """The largest norm of a weight in use."""
        return self._lipschitz

    @lipschitz.setter
    def lipschitz(self, value: float) -> None:
        if not 0 < value < float("inf"):
            raise ValueError(f"lipschitz must be a positive number, got {value}.")
        self._lipschitz = float(value)

    @staticmethod
    def check(layer: nn.Module) -> None:
        """Raises NotContractiveError if this constraint cannot hold the layer."""

    def certify(self, weight: Tensor) -> tuple[Tensor, Tensor | float]:
        raise NotImplementedError

    def in_use(self, weight: Tensor) -> tuple[Tensor, Tensor | float]:
        """As `certify`; complains if the weight that a user was shown has been edited, which its raw weight missed."""
        shown, self._shown = self._shown, None
        if shown is not None and shown[0]._version != shown[1]:
            raise RuntimeError(
                "A constrained weight was changed in place, but it is computed from a raw weight, which did not "
                "change: assign it, layer.weight = new_weight, or edit layer.parametrizations.weight.original."
            )
        return self.certify(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """What `layer.weight` shows."""
        in_use = self.in_use(weight)[0]
        if in_use is weight or torch.compiler.is_compiling() or not is_plain(in_use):
            return in_use
        in_use = in_use if in_use.requires_grad else in_use.clone()  # nobody may edit what is kept
        self._shown = None if in_use.is_inference() else (in_use.detach(), in_use._version)
        return in_use

    def right_inverse(self, weight: Tensor) -> Tensor:
        """A weight within the bound stands as it is; a larger one will be scaled when used."""
        return weight

    def extra_repr(self) -> str:
        return f"lipschitz={self.lipschitz:.4g}"

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_shown": None}


def as_matrix(weight: Tensor) -> Tensor:
    """The weight as (out, in), in at least single precision: half precision cannot carry a certificate."""
    return single(weight.flatten(1))


def shrink(norm: Tensor, lipschitz: float) -> Tensor:
    """min(1, c / norm), whose gradient is finite where the norm is zero."""
    return torch.where(norm <= lipschitz, 1.0, lipschitz / norm.clamp_min(lipschitz))


def scaled(weight: Tensor, factor: Tensor | float) -> Tensor:
    """Rounded to the weight's dtype once, at the end: in half precision a small factor has few digits, or none."""
    return (single(weight) * factor).to(weight.dtype)
