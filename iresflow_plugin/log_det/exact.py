"""log det(I + J) from the Jacobian itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from iresflow_plugin.log_det.estimate import Estimate
from iresflow_plugin.maps import Linearised, Map, inside_functorch

CHUNK_ENTRIES = 2**24


@dataclass(frozen=True)
class Exact:
    """log |det(I + J)|, with J by batched forward differentiation: D products J e_i, taken `chunk` at a time.

    Memory is J itself, B D^2 entries, and the activations of one chunk; with more than one chunk the backward pass
    recomputes them. Costs about D + 1 passes of g, and three times that with gradients.

    Args:
        chunk: columns of J at a time; None lets a chunk hold about 2^24 entries of the event.
    """

    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 column of the Jacobian, got {self.chunk}.")

    def __call__(self, g: Map, x: Tensor) -> Estimate:
        at_x = g.linearise(x)
        log_det = log_det_identity_plus(transposed_jacobian(at_x, x, self.chunk)).to(x.dtype)
        zeros = torch.zeros_like(log_det)
        return Estimate(at_x.value, log_det, zeros, zeros, terms=0)


def transposed_jacobian(at_x: Linearised, x: Tensor, chunk: int | None = None) -> Tensor:
    """J^T of every sample, shape (B, D, D): row i is J e_i."""
    event = x.shape[1:]
    size = event.numel()
    basis = torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *event)
    chunk = chunk or max(1, CHUNK_ENTRIES // max(1, x.numel()))
    if chunk >= size:
        columns = at_x.jvp(basis)
    elif torch.is_grad_enabled() and not inside_functorch():
        columns = torch.cat([checkpoint(at_x.jvp, part, use_reentrant=False) for part in basis.split(chunk)])
    else:
        columns = torch.cat([at_x.jvp(part) for part in basis.split(chunk)])
    return columns.expand(size, *x.shape).reshape(size, x.shape[0], size).transpose(0, 1)


def log_det_identity_plus(jacobian: Tensor) -> Tensor:
    """log det(I + J) for |J| < 1, shape (B,): the determinant is then positive."""
    if jacobian.dtype in (torch.float16, torch.bfloat16):
        jacobian = jacobian.float()
    size = jacobian.shape[-1]
    if size == 1:
        return torch.log1p(jacobian[:, 0, 0])
    if size == 2:
        a, b, c, d = jacobian.flatten(1).unbind(1)
        return torch.log1p(a + d + (a * d - b * c))
    identity = torch.eye(size, dtype=jacobian.dtype, device=jacobian.device)
    return torch.linalg.slogdet(identity + jacobian)[1]
