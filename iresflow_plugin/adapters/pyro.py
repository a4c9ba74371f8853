"""Pyro: the block as a `TransformModule`, and as a `ConditionalTransformModule`."""

from __future__ import annotations

from pyro.distributions import ConditionalTransformModule, TransformModule
from torch import Tensor, nn

from iresflow_plugin.adapters import distributions
from iresflow_plugin.block import ResidualBlock, as_block
from iresflow_plugin.inverse import Solver
from iresflow_plugin.log_det import LogDet


class ResidualTransform(distributions.ResidualTransform, TransformModule):
    """y = x + g(x), with parameters that `pyro.module` sees; arguments as for torch.distributions.

    >>> import torch, pyro.distributions as dist
    >>> from iresflow_plugin.nets import LipschitzMLP
    >>> transform = ResidualTransform(LipschitzMLP([2, 16, 2]))
    >>> flow = dist.TransformedDistribution(dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1), [transform.inv])
    >>> flow.log_prob(flow.sample((5,))).shape, len(list(transform.parameters())) > 0
    (torch.Size([5]), True)
    """

    __hash__ = TransformModule.__hash__  # torch's transforms have none, and modules need one


class ConditionalResidualTransform(ConditionalTransformModule):
    """y = x + g(x; context): `condition(context)` gives the transform for a context of shape (..., C).

    For cheap densities use `transform.inv` in a `ConditionalTransformedDistribution`, or condition and take `.inv`.

    Args:
        branch_or_block: a certified branch with `context_features`, or a `ResidualBlock` around one.
        log_det, inverse: as for `ResidualBlock`, when a branch is given.
        event_dim, cache_size: of the conditioned transform, as for torch.distributions.

    >>> import torch, pyro.distributions as dist
    >>> from iresflow_plugin.nets import LipschitzMLP
    >>> transform = ConditionalResidualTransform(LipschitzMLP([2, 16, 2], context_features=3))
    >>> base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    >>> flow = dist.ConditionalTransformedDistribution(base, [transform.inv])
    >>> flow.condition(torch.randn(5, 3)).log_prob(torch.randn(5, 2)).shape
    torch.Size([5])
    """

    def __init__(
        self,
        branch_or_block: nn.Module | ResidualBlock,
        log_det: LogDet | None = None,
        inverse: Solver | None = None,
        event_dim: int = 1,
        cache_size: int = 0,
    ) -> None:
        super().__init__()
        self.block = as_block(branch_or_block, log_det, inverse)
        self.event_dim, self.cache_size = event_dim, cache_size

    def condition(self, context: Tensor) -> ResidualTransform:
        return ResidualTransform(self.block, context=context, event_dim=self.event_dim, cache_size=self.cache_size)
