"""FrEIA: the block as an `InvertibleModule`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from iresflow_plugin.block import ResidualBlock, as_block, using
from iresflow_plugin.inverse import Solver
from iresflow_plugin.log_det import LogDet, Omitted


class ResidualModule(InvertibleModule):
    """y = x + g(x; c) with `rev=False`, the solution x with `rev=True`; in place of FrEIA's `IResNetLayer`.

    Args:
        dims_in: [shape] of the one input, without the batch; FrEIA's graphs fill it in.
        dims_c: shapes of the conditions; they are flattened and joined into one context.
        branch_or_block: a certified branch such as `LipschitzMLP([d, h, h, d])`, or a `ResidualBlock`.
        log_det, inverse: as for `ResidualBlock`, when a branch is given.

    With `jac=False` the log-det is not computed: NaN stands in its place, so that nobody takes it for one.

    >>> import torch, FrEIA.framework as ff
    >>> from iresflow_plugin.nets import LipschitzMLP
    >>> inn = ff.SequenceINN(2)
    >>> inn.append(ResidualModule, branch_or_block=LipschitzMLP([2, 16, 2]))
    >>> z, log_jac = inn(torch.randn(5, 2))
    >>> z.shape, log_jac.shape
    (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(
        self,
        dims_in: Iterable[tuple[int, ...]],
        dims_c: Iterable[tuple[int, ...]] | None = None,
        *,
        branch_or_block: nn.Module | ResidualBlock,
        log_det: LogDet | None = None,
        inverse: Solver | None = None,
    ) -> None:
        super().__init__(dims_in, dims_c)
        if len(self.dims_in) != 1:
            raise ValueError(f"dims_in must hold the shape of one input, got {self.dims_in}; join inputs before.")
        self.block = as_block(branch_or_block, log_det, inverse)

    def forward(
        self, x_or_z: Sequence[Tensor], c: Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        if isinstance(x_or_z, Tensor) or len(x_or_z) != 1:
            raise ValueError("x_or_z must be a list or tuple of one tensor, as in every FrEIA module.")
        context = torch.cat([part.flatten(1) for part in c], 1) if c else None
        one_pass = self.block.inverse if rev else self.block
        with nullcontext() if jac else using(self.block, log_det=Omitted()):
            out, log_det = one_pass(x_or_z[0], context)
        return (out,), log_det

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return input_dims
