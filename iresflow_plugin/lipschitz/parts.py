"""Parts to build branches from, beside torch's own layers: chains, sums, concatenations, the entry of a context."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from iresflow_plugin import maps
from iresflow_plugin.lipschitz.part import Part
from iresflow_plugin.lipschitz.rules import check_deterministic, map_of


class Chain(Part, nn.Sequential):  # pyright: ignore[reportIncompatibleMethodOverride]
    """`nn.Sequential` that hands the context to its parts."""

    def as_map(self, context: Tensor | None = None) -> maps.Map:
        return maps.Composition(tuple(map_of(part, context) for part in self))


class Parallel(Part):
    """Several branches side by side on the same input."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        if not branches:
            raise ValueError(f"{type(self).__name__} needs at least one branch.")
        self.branches = nn.ModuleList(branches)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.branches)


class Sum(Parallel):
    """x -> f_1(x) + ... + f_n(x); Lipschitz bounds add."""

    def as_map(self, context: Tensor | None = None) -> maps.Map:
        return maps.Sum(tuple(map_of(branch, context) for branch in self))


class Concatenate(Parallel):
    """x -> [f_1(x); ...; f_n(x)] along `dim` (negative); the bound is the root of the sum of squares."""

    def __init__(self, *branches: nn.Module, dim: int = -1) -> None:
        super().__init__(*branches)
        if dim >= 0:
            raise ValueError(f"dim counts from the end and must be negative, got {dim}.")
        self.dim = dim

    def as_map(self, context: Tensor | None = None) -> maps.Map:
        return maps.Concatenation(tuple(map_of(branch, context) for branch in self), self.dim)


class LearnableConcatenate(Concatenate):
    """x -> [eta_1 f_1(x); ...; eta_n f_n(x)] with learnable eta_i >= 0, sum eta_i^2 = 1.

    The learnable concatenation of Perugachi-Diaz et al. 2021 (arXiv 2102.02694). Its bound is the root of the sum of
    (eta_i Lip f_i)^2, at most the largest Lip f_i. It starts with equal eta_i.
    """

    def __init__(self, *branches: nn.Module, dim: int = -1) -> None:
        super().__init__(*branches, dim=dim)
        self.log_shares = nn.Parameter(torch.zeros(len(branches)))

    @property
    def eta(self) -> Tensor:
        """The factors, shape (n,): their squares are a softmax, less what rounding could add to their sum."""
        dtype = self.log_shares.dtype
        log_squares = torch.log_softmax(self.log_shares, 0, dtype=torch.promote_types(dtype, torch.float32))
        eta = (log_squares / 2).exp()  # the root of the softmax would have an infinite slope at zero
        return (eta * (1 - (len(self.branches) + 2) * torch.finfo(dtype).eps)).to(dtype)

    def as_map(self, context: Tensor | None = None) -> maps.Map:
        return maps.Shares.of([map_of(branch, context) for branch in self], self.eta, self.dim)


class Scale(Part):
    """x -> factor * x with a fixed number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = float(factor)

    def as_map(self, context: Tensor | None = None) -> maps.Map:
        return maps.Scaling(self.factor, abs(self.factor))

    def extra_repr(self) -> str:
        return f"factor={self.factor:.4g}"


class AddContext(Part):
    """x -> x + network(context): any network, unconstrained, since Lipschitz bounds are with respect to x alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def as_map(self, context: Tensor | None = None) -> maps.Map:
        check_deterministic(self.network)
        return maps.Shift(None if context is None else self._shift(context))

    def _shift(self, context: Tensor) -> Tensor:
        """One row per sample."""
        network = self.network
        if isinstance(network, nn.Conv2d) and (context.ndim != 4 or context.shape[1] != network.in_channels):
            raise ValueError(
                f"context must be a feature map of shape (batch, {network.in_channels}, height, width), got "
                f"{tuple(context.shape)}."
            )
        if isinstance(network, nn.Linear) and context.shape[-1] != network.in_features:
            raise ValueError(f"context must have {network.in_features} features, got shape {tuple(context.shape)}.")
        return network(context)
