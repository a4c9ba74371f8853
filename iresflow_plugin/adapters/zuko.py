"""zuko: the block as a `LazyTransform`."""

from __future__ import annotations

from torch import Tensor, nn
from zuko.lazy import LazyTransform

from iresflow_plugin.adapters import distributions
from iresflow_plugin.block import ResidualBlock, as_block
from iresflow_plugin.inverse import Solver
from iresflow_plugin.log_det import LogDet


class ResidualTransform(LazyTransform):
    """y = x + g(x; c), from data to noise; `forward(c)` gives the transform for a context c of shape (..., C).

    For cheap samples and expensive densities use `.inv`.

    Args:
        branch_or_block: a certified branch such as `LipschitzMLP([d, h, h, d])`, or a `ResidualBlock`.
        log_det, inverse: as for `ResidualBlock`, when a branch is given.
        event_dim: how many of the last dimensions of inputs are one sample: 1 for vectors, 3 for images.

    >>> import torch, zuko
    >>> from iresflow_plugin.nets import LipschitzMLP
    >>> base = zuko.flows.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(2), torch.ones(2))
    >>> flow = zuko.flows.Flow([ResidualTransform(LipschitzMLP([2, 16, 2], context_features=3))], base)
    >>> flow(torch.randn(3)).log_prob(torch.randn(5, 2)).shape
    torch.Size([5])
    """

    def __init__(
        self,
        branch_or_block: nn.Module | ResidualBlock,
        log_det: LogDet | None = None,
        inverse: Solver | None = None,
        event_dim: int = 1,
    ) -> None:
        super().__init__()
        self.block = as_block(branch_or_block, log_det, inverse)
        self.event_dim = event_dim

    def forward(self, c: Tensor | None = None) -> distributions.ResidualTransform:
        return distributions.ResidualTransform(self.block, context=c, event_dim=self.event_dim)
