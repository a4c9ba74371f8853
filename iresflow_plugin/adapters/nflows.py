"""nflows: the block as an `nflows.transforms.Transform`."""

from __future__ import annotations

from nflows.transforms.base import Transform
from torch import Tensor, nn

from iresflow_plugin.block import ResidualBlock, as_block
from iresflow_plugin.inverse import Solver
from iresflow_plugin.log_det import LogDet


class ResidualTransform(Transform):
    """y = x + g(x; context), from data (`forward`) to noise; `inverse` solves for x.

    For cheap sampling and expensive densities, wrap it in `nflows.transforms.InverseTransform`.

    Args:
        branch_or_block: a certified branch such as `LipschitzMLP([d, h, h, d])`, or a `ResidualBlock`.
        log_det, inverse: as for `ResidualBlock`, when a branch is given.

    >>> from iresflow_plugin.nets import LipschitzMLP
    >>> from nflows.distributions import StandardNormal
    >>> from nflows.flows import Flow
    >>> flow = Flow(ResidualTransform(LipschitzMLP([2, 16, 2])), StandardNormal([2]))
    >>> flow.log_prob(flow.sample(5)).shape
    torch.Size([5])
    """

    def __init__(
        self, branch_or_block: nn.Module | ResidualBlock, log_det: LogDet | None = None, inverse: Solver | None = None
    ) -> None:
        super().__init__()
        self.block = as_block(branch_or_block, log_det, inverse)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.block(inputs, context)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.block.inverse(inputs, context)
