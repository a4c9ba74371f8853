"""normflows: the block as a `normflows.flows.Flow`."""

from __future__ import annotations

from normflows.flows import Flow
from torch import Tensor, nn

from iresflow_plugin.block import ResidualBlock, as_block
from iresflow_plugin.inverse import Solver
from iresflow_plugin.log_det import LogDet


class ResidualFlow(Flow):
    """x + g(x; context) in place of `nf.flows.Residual`, from data to noise in `inverse` as there.

    Args:
        branch_or_block: a certified branch such as `LipschitzMLP([d, h, h, d])`, or a `ResidualBlock`.
        reverse: True evaluates x + g(x) in `inverse` (cheap densities), False in `forward` (cheap samples).
        log_det, inverse: as for `ResidualBlock`, when a branch is given.

    >>> import torch, normflows as nf
    >>> from iresflow_plugin.nets import LipschitzMLP
    >>> flows = [ResidualFlow(LipschitzMLP([2, 16, 2])), nf.flows.ActNorm(2)]
    >>> model = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), flows)
    >>> model.log_prob(torch.randn(5, 2)).shape
    torch.Size([5])
    """

    def __init__(
        self,
        branch_or_block: nn.Module | ResidualBlock,
        reverse: bool = True,
        log_det: LogDet | None = None,
        inverse: Solver | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(reverse, bool):
            raise TypeError(f"reverse must be True or False, got {reverse!r}.")
        self.reverse = reverse
        self.block = as_block(branch_or_block, log_det, inverse)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From noise to data."""
        return self.block.inverse(z, context) if self.reverse else self.block(z, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From data to noise."""
        return self.block(z, context) if self.reverse else self.block.inverse(z, context)
