"""Modules to build branches from, beside torch's own: sums, concatenations, scalings and the entry of a context."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from iresflow_plugin.maps import Shift


class Chain(nn.Sequential):
    """`nn.Sequential` that hands the context to the parts that take one."""

    def forward(self, input: Tensor, context: Tensor | None = None) -> Tensor:  # named as in nn.Sequential
        x = input
        for part in self:
            x = part(x, context) if takes_context(part) else part(x)
        return x


class Parallel(nn.Module):
    """Several branches side by side on the same input."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        if not branches:
            raise ValueError(f"{type(self).__name__} needs at least one branch.")
        self.branches = nn.ModuleList(branches)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.branches)

    def values(self, x: Tensor, context: Tensor | None) -> list[Tensor]:
        return [b(x, context) if takes_context(b) else b(x) for b in self]


class Sum(Parallel):
    """x -> f_1(x) + ... + f_n(x); Lipschitz bounds add."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.stack(self.values(x, context)).sum(0)


class Concatenate(Parallel):
    """x -> [f_1(x); ...; f_n(x)] along `dim` (negative); the bound is the root of the sum of squares."""

    def __init__(self, *branches: nn.Module, dim: int = -1) -> None:
        super().__init__(*branches)
        if dim >= 0:
            raise ValueError(f"dim counts from the end and must be negative, got {dim}.")
        self.dim = dim

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.cat(self.values(x, context), self.dim)


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
        eta = torch.softmax(self.log_shares, 0, dtype=torch.promote_types(dtype, torch.float32)).sqrt()
        return (eta * (1 - (len(self.branches) + 2) * torch.finfo(dtype).eps)).to(dtype)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.cat([eta * v for eta, v in zip(self.eta, self.values(x, context), strict=True)], self.dim)


class Scale(nn.Module):
    """x -> factor * x with a fixed number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = float(factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x

    def extra_repr(self) -> str:
        return f"factor={self.factor:.4g}"


class AddContext(nn.Module):
    """x -> x + network(context): any network, unconstrained, since Lipschitz bounds are with respect to x alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return Shift(self.shift(context))(x)

    def shift(self, context: Tensor | None) -> Tensor:
        """One row per sample."""
        if context is None:
            raise ValueError("This branch is conditional and needs a context, but context is None.")
        if isinstance(self.network, nn.Conv2d) and (context.ndim != 4 or context.shape[1] != self.network.in_channels):
            raise ValueError(
                f"context must be a feature map of shape (batch, {self.network.in_channels}, height, width), got "
                f"{tuple(context.shape)}."
            )
        if isinstance(self.network, nn.Linear) and context.shape[-1] != self.network.in_features:
            raise ValueError(
                f"context must have {self.network.in_features} features, got shape {tuple(context.shape)}."
            )
        return self.network(context)


def takes_context(module: nn.Module) -> bool:
    """Whether `module` is called as module(x, context)."""
    if isinstance(module, (Chain, Parallel)):
        return any(takes_context(part) for part in module)
    return isinstance(module, AddContext) or bool(getattr(module, "takes_context", False))
