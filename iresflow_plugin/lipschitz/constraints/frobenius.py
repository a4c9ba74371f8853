"""Scaling by the Frobenius norm."""

from __future__ import annotations

import torch
from torch import Tensor

from iresflow_plugin.lipschitz import convolution, matrix
from iresflow_plugin.lipschitz.constraints.constraint import Constraint, as_matrix, scaled, shrink
from iresflow_plugin.torch_state import single


class Frobenius(Constraint):
    """W min(1, c / |W|_F): the simplest certificate, loose by up to sqrt(rank); of a convolution, sum_j |K_j|_F."""

    def certify(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        norm = self._norm(weight)
        return scaled(weight, shrink(norm, self.lipschitz)), norm.detach()

    def _norm(self, weight: Tensor) -> Tensor:
        if self.spec is None:
            return matrix.frobenius_norm(as_matrix(weight), stored=weight.dtype)
        kernel = convolution.split(self.spec, single(weight))[0].flatten(0, 1)
        taps = [matrix.frobenius_norm(tap, weight.dtype, kernel.shape[-1]) for tap in kernel.unbind(-1)]
        return torch.stack(taps).sum() * self.spec.gain
