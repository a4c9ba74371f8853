"""log det(I + J) from the Jacobian itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from iresflow_plugin.errors import check_whole
from iresflow_plugin.log_det.estimate import Estimate
from iresflow_plugin.maps import Linearised, Map, jacobian_columns, recomputed, transposed_jacobian
from iresflow_plugin.torch_state import single

CHUNK_ENTRIES = 2**24


@dataclass(frozen=True)
class Exact:
    """log |det(I + J)|, with J by batched forward differentiation: D products J e_i, taken `chunk` at a time.

    Memory is J itself, B D^2 entries, and the activations of one chunk; with more than one chunk the backward pass
    recomputes them. Without gradients J is taken for so many rows at a time that it has no more than 2^24 entries.
    Costs about D + 1 passes of g, and three times that with gradients.

    Args:
        chunk: columns of J at a time; None lets a chunk hold about 2^24 entries of the event.
    """

    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None:
            check_whole("chunk", self.chunk)

    def __call__(self, g: Map, x: Tensor) -> Estimate:
        rows = max(1, CHUNK_ENTRIES // max(1, x.shape[1:].numel() ** 2))
        if len(x) <= rows or torch.is_grad_enabled():
            value, log_det = self._rows(g, x)
        else:
            parts = [self._rows(g.rows(index), x[index]) for index in torch.arange(len(x), device=x.device).split(rows)]
            value, log_det = (torch.cat(part) for part in zip(*parts, strict=True))
        zeros = torch.zeros_like(log_det)
        return Estimate(value, log_det, zeros, zeros, terms=0)

    def _rows(self, g: Map, x: Tensor) -> tuple[Tensor, Tensor]:
        """g(x) and the log-det."""
        at_x = g.linearise(x)
        transposed = transposed_jacobian(self._columns(at_x, g, x))
        return at_x.value, log_det_identity_plus(transposed).to(x.dtype)

    def _columns(self, at_x: Linearised, g: Map, x: Tensor) -> Tensor:
        """All J e_i, shape (D, *x.shape); several chunks are computed anew by the backward pass."""
        size = x.shape[1:].numel()
        chunk = self.chunk or max(1, CHUNK_ENTRIES // max(1, x.numel()))
        if chunk >= size:
            return jacobian_columns(at_x, x, range(size))
        parts = [range(start, min(start + chunk, size)) for start in range(0, size, chunk)]
        if not torch.is_grad_enabled():
            return torch.cat([jacobian_columns(at_x, x, part) for part in parts])

        def columns(part: range, x: Tensor, *tensors: Tensor) -> Tensor:
            return jacobian_columns(g.holding(tensors).linearise(x), x, part)

        return torch.cat([recomputed(partial(columns, part), x, *g.tensors()) for part in parts])


def log_det_identity_plus(jacobian: Tensor) -> Tensor:
    """log det(I + J) for |J| < 1, shape (B,): the determinant is then positive."""
    jacobian = single(jacobian)
    size = jacobian.shape[-1]
    if size == 1:
        return torch.log1p(jacobian[:, 0, 0])
    if size == 2:
        a, b, c, d = jacobian.flatten(1).unbind(1)
        difference = a + d + (a * d - b * c)  # from one; far below it a and d are near -1, and 1 + a is exact
        far = ((1 + a) * (1 + d) - b * c).log()
        return torch.where(difference < -0.5, far, difference.clamp_min(-0.5).log1p())
    identity = torch.eye(size, dtype=jacobian.dtype, device=jacobian.device)
    # torch's slogdet has wrong second derivatives under vmap
    factors = torch.linalg.lu_factor(identity + jacobian)[0]
    return factors.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
