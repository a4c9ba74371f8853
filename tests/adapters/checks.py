"""What the tests of both hosts share: nets that are not fresh, and truth to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from iresflow_plugin import ResidualBlock
from iresflow_plugin.nets import LipschitzMLP

Pass = Callable[[Tensor], tuple[Tensor, Tensor]]

STATES = ("fresh", "scaled", "trained")


def scaled(module: nn.Module, factor: float = 5.0) -> nn.Module:
    """Every weight of a residual block times `factor`, so that its constraint binds: fresh nets hide wrong values."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("parametrizations.weight.original"):
                parameter.mul_(factor)
    return module


def trained(branch: nn.Module, features: int, context_features: int | None) -> nn.Module:
    """By maximum likelihood, on data that are too narrow in every other direction and too wide in the rest."""
    block = ResidualBlock(branch)
    spread = torch.tensor([0.3, 3.0]).repeat(features)[:features]
    optimiser = torch.optim.Adam(block.parameters(), lr=3e-2)
    for _ in range(60):
        context = None if context_features is None else torch.randn(64, context_features)
        noise, log_det = block(spread * torch.randn(64, features), context)
        optimiser.zero_grad()
        (noise.square().sum(1) / 2 - log_det).mean().backward()
        optimiser.step()
    return branch


def branch(features: int, context_features: int | None = None, state: str = "scaled", width: int = 16) -> nn.Module:
    net = LipschitzMLP([features, width, width, features], context_features)
    if state == "trained":
        return trained(net, features, context_features)
    return scaled(net) if state == "scaled" else net


def shaken(module: nn.Module, size: float = 0.2) -> nn.Module:
    """Noise on what is not a residual block: many layers of the hosts start as the identity."""
    ours = {id(p) for part in module.modules() if isinstance(part, ResidualBlock) for p in part.parameters()}
    with torch.no_grad():
        for parameter in module.parameters():
            if id(parameter) not in ours:
                parameter.add_(size * torch.randn_like(parameter))
    return module


def dense_log_det(one_pass: Pass, x: Tensor) -> Tensor:
    """log |det| of autograd's Jacobian, row by row."""
    rows = []
    for row in x:
        jacobian = torch.autograd.functional.jacobian(lambda r: one_pass(r[None])[0][0], row)
        rows.append(torch.linalg.slogdet(jacobian)[1])
    return torch.stack(rows)


def integral(log_prob: Callable[[Tensor], Tensor], reach: float, points: int = 250) -> float:
    """Of the density over [-reach, reach]^2."""
    axis = torch.linspace(-reach, reach, points)
    with torch.no_grad():
        return log_prob(torch.cartesian_prod(axis, axis)).exp().sum().item() * (2 * reach / (points - 1)) ** 2


def without_gradient(module: nn.Module) -> list[str]:
    """Names of the trainable parameters that got no gradient, or one that is zero or not finite."""
    return [
        name
        for name, p in module.named_parameters()
        if p.requires_grad and (p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any())
    ]


def losses(loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter], steps: int = 25) -> list[float]:
    """What a few steps of Adam do to a loss."""
    optimiser = torch.optim.Adam(parameters, lr=5e-3)
    values = []
    for _ in range(steps):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        values.append(value.item())
    return values


SPREAD = 0.7


def two_clusters(n: int) -> Tensor:
    """A target that no Gaussian fits."""
    side = torch.randint(0, 2, (n, 1)) * 2.0 - 1.0
    return torch.cat([2 * side, side], 1) + SPREAD * torch.randn(n, 2)


def two_clusters_log_prob(x: Tensor) -> Tensor:
    """Up to a constant."""
    centres = torch.tensor([[2.0, 1.0], [-2.0, -1.0]], dtype=x.dtype)
    return torch.logsumexp(-(((x[:, None] - centres) / SPREAD) ** 2).sum(2) / 2, 1)


def same_everywhere(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def jacobian_of_one(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The dense Jacobian at one point without a batch."""
    return torch.autograd.functional.jacobian(function, x)  # pyright: ignore


class Counted(nn.Module):
    """A branch that counts its evaluations: certified by its own word, so that they run through `forward`."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.inner, self.evaluations = branch(features), 0

    def lipschitz_bound(self) -> float:
        return 0.97

    def forward(self, x: Tensor) -> Tensor:
        self.evaluations += 1
        return self.inner(x)
