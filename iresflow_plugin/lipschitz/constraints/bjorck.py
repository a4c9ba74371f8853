"""Orthogonalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iresflow_plugin.errors import NotContractiveError
from iresflow_plugin.lipschitz import matrix
from iresflow_plugin.lipschitz.constraints.constraint import Constraint, as_matrix
from iresflow_plugin.maps import CONVOLUTIONS
from iresflow_plugin.torch_state import full_precision


class Bjorck(Constraint):
    """c times W <- W (3 I - W'W) / 2, repeated, from W / |W|_p (Anil, Lucas and Grosse 2019, arXiv 1811.05381).

    The map s -> s (3 - s^2) / 2 keeps singular values in [0, 1] and pulls them towards 1, so any number of steps is
    certified. Not soft: a small weight grows to norm c, and a zero weight is mapped to zero. For dense layers alone.
    """

    def __init__(self, lipschitz: float = 1.0, steps: int = 12) -> None:
        super().__init__(lipschitz)
        self.steps = steps

    @staticmethod
    def check(layer: nn.Module) -> None:
        if isinstance(layer, CONVOLUTIONS):
            raise NotContractiveError(
                f"Bjorck cannot constrain {type(layer).__name__}: products of convolutions have ever larger kernels; "
                "use constraint=Spectral or AlmostOrthogonal.",
                layer,
            )

    def certify(self, weight: Tensor) -> tuple[Tensor, float]:
        w = as_matrix(weight)
        size = w.detach().abs().amax()
        w = w / torch.where(size > 0, size.clamp_min(1e-20), 1.0)  # gradients at much smaller weights have no number
        w = w / matrix.schatten_norm(w).clamp_min(1e-12)  # keeps the gradient at zero finite
        with full_precision(w):
            for _ in range(self.steps):
                w = 1.5 * w - 0.5 * (w @ w.mT @ w if w.shape[0] < w.shape[1] else w @ (w.mT @ w))
        in_use = w * (self.lipschitz / matrix.rounding_margin(w, stored=weight.dtype))
        return in_use.to(weight.dtype).view_as(weight), self.lipschitz
