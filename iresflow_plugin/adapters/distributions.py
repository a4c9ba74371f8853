"""torch.distributions: the block as a `torch.distributions.Transform`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from iresflow_plugin.block import ResidualBlock, as_block
from iresflow_plugin.inverse import Solver
from iresflow_plugin.log_det import LogDet


class ResidualTransform(Transform):
    """y = x + g(x; context) as a bijection of R^D; `.inv` solves for x.

    A `TransformedDistribution` applies its transforms from noise to data. For cheap densities give it `transform.inv`,
    so that x + g(x) runs from data to noise; for cheap samples (variational inference) the transform itself.

    Args:
        branch_or_block: a certified branch such as `LipschitzMLP([d, h, h, d])`, or a `ResidualBlock`.
        log_det, inverse: as for `ResidualBlock`, when a branch is given.
        context: shape (C,) for all samples, or (..., C), which broadcasts with the batch of the inputs.
        event_dim: how many of the last dimensions of inputs are one sample: 1 for vectors, 3 for images.
        cache_size: 1 keeps the latest pair (x, y) and its log-det, as in every torch transform: then `rsample` followed
            by `log_prob` solves once. It knows nothing of weights: a tensor whose density was asked for before they
            changed gets the same density again, and torch has no way to clear a cache; take 0 there, which forgets a
            log-det as soon as it has been handed out.

    Any number of batch dimensions, also none. The parameters are those of `transform.block`, an `nn.Module`.

    >>> from torch.distributions import Independent, Normal, TransformedDistribution
    >>> from iresflow_plugin.nets import LipschitzMLP
    >>> transform = ResidualTransform(LipschitzMLP([2, 16, 2]))
    >>> base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    >>> flow = TransformedDistribution(base, [transform.inv])
    >>> flow.log_prob(flow.sample((4, 5))).shape
    torch.Size([4, 5])
    """

    bijective = True

    def __init__(
        self,
        branch_or_block: nn.Module | ResidualBlock,
        log_det: LogDet | None = None,
        inverse: Solver | None = None,
        context: Tensor | None = None,
        event_dim: int = 1,
        cache_size: int = 0,
    ) -> None:
        if not isinstance(event_dim, int) or event_dim < 1:
            raise ValueError(f"event_dim must be 1 for vectors, 3 for images, got {event_dim!r}.")
        super().__init__(cache_size=cache_size)
        self.block = as_block(branch_or_block, log_det, inverse)
        self.context = context
        real = constraints.real_vector if event_dim == 1 else constraints.independent(constraints.real, event_dim)
        self.domain = self.codomain = real
        self._latest: tuple[Tensor, Tensor, Tensor] | None = None  # x, y and the log-det of the pass that joined them

    def with_cache(self, cache_size: int = 1) -> ResidualTransform:
        if cache_size == self._cache_size:
            return self
        return type(self)(self.block, context=self.context, event_dim=self.event_dim, cache_size=cache_size)

    def condition(self, context: Tensor) -> ResidualTransform:
        """The same transform, with the same parameters, under another context."""
        return type(self)(self.block, context=context, event_dim=self.event_dim, cache_size=self._cache_size)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and its log-det in one pass: zuko asks for it by this name."""
        rows, context, batch = self._rows(x)
        y, log_det = self.block(rows, context)
        return y.view(*batch, *y.shape[1:]), log_det.view(batch)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log |det dy/dx|, shape (batch): that of the call which made y from x, where these are its very tensors."""
        known, wanted = self._latest, torch.is_grad_enabled()
        if known is not None and x is known[0] and y is known[1] and (known[2].requires_grad or not wanted):
            log_det = known[2]
        else:
            rows, context, batch = self._rows(x)
            rows = rows.clone()  # x may be our own output, which hosts change in place
            log_det = self.block.estimate(rows, context).log_det.view(batch)
        self._latest = (x, y, log_det) if self._cache_size else None
        return log_det.clone()  # hosts add to it in place

    def _call(self, x: Tensor) -> Tensor:
        y, log_det = self.call_and_ladj(x)
        self._latest = (x, y, log_det)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        self._latest = None
        rows, context, batch = self._rows(y)
        x = self.block.preimage(rows, context)
        return x.view(*batch, *x.shape[1:])

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor | None, torch.Size]:
        """Inputs and context with one batch dimension, which is what a block takes, and the batch that they had."""
        if x.ndim < self.event_dim:
            raise ValueError(
                f"inputs must have {self.event_dim} dimensions (event_dim) or more, got shape {tuple(x.shape)}."
            )
        batch, event = x.shape[: x.ndim - self.event_dim], x.shape[x.ndim - self.event_dim :]
        context = self.context
        if context is None or context.ndim == 1:
            return x.reshape(-1, *event), context if context is None else context[None], batch
        try:
            batch = torch.broadcast_shapes(batch, context.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"context of shape {tuple(context.shape)} does not broadcast with inputs of batch {tuple(batch)}; "
                "give one row, or one for each sample."
            ) from None
        rows = x.expand(*batch, *event).reshape(-1, *event)
        return rows, context.expand(*batch, -1).reshape(len(rows), context.shape[-1]), batch

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.block}, event_dim={self.event_dim}, cache_size={self._cache_size})"

    def __getstate__(self) -> dict[str, Any]:
        state = {**super().__getstate__(), "_latest": None}  # what belongs to one call is neither copied nor saved
        return {**state, "_cached_x_y": (None, None)} if self._cache_size else state
