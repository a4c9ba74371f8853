"""Scaling of single columns, or rows."""

from __future__ import annotations

import torch
from torch import Tensor

from iresflow_plugin.lipschitz import convolution, matrix
from iresflow_plugin.lipschitz.constraints.constraint import Constraint, as_matrix, shrink
from iresflow_plugin.maps import ConvSpec
from iresflow_plugin.torch_state import full_precision, single


class AlmostOrthogonal(Constraint):
    """W diag(min(1, c / sqrt(sum_j |W'W|_ij))), scaling columns one by one (Prach and Lampert 2022, arXiv 2208.03160).

    Rows are scaled instead when there are fewer of them. One product, hence the cheapest certificate; looser than
    `Spectral` until training has made the columns almost orthogonal. Of a convolution the sum runs over the lags of
    W'W, too, and needs no frequencies.
    """

    def certify(self, weight: Tensor) -> tuple[Tensor, float]:
        if self.spec is not None:
            return self._certify_convolution(weight, self.spec)
        w = as_matrix(weight)
        wide, size = w.shape[0] < w.shape[1], matrix.largest_entry(w)
        unit = w / size  # its squares neither overflow nor underflow
        with full_precision(w):
            gram = unit @ unit.mT if wide else unit.mT @ unit
        scale = self._scale(gram.abs().sum(1), matrix.rounding_margin(w, stored=weight.dtype), size)
        in_use = w * (scale[:, None] if wide else scale)
        return in_use.to(weight.dtype).view_as(weight), self.lipschitz

    def _certify_convolution(self, weight: Tensor, spec: ConvSpec) -> tuple[Tensor, float]:
        kernel, sizes = convolution.split(spec, single(weight))
        size = matrix.largest_entry(kernel)
        with full_precision(kernel):
            lags = convolution.gram_lags(kernel / size, sizes)
        margin = matrix.rounding_margin(kernel[0, :, :, 0], stored=weight.dtype, taps=kernel.shape[-1])
        scale = self._scale(lags.abs().sum((0, -1)), margin * spec.gain, size)
        wide = kernel.shape[1] < kernel.shape[2]
        kernel = kernel * (scale[:, :, None, None] if wide else scale[:, None, :, None])
        return convolution.join(spec, kernel, weight.shape).to(weight.dtype), self.lipschitz

    def _scale(self, squares: Tensor, margin: float, size: Tensor) -> Tensor:
        """min(1, c / (size sqrt(squares))); a root has no slope at zero."""
        root = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
        return shrink(root * (margin * size), self.lipschitz)
