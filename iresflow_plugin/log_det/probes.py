"""Random vectors v with E[v v^T] = I, for tr(A) = E[v^T A v] (Hutchinson 1990)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iresflow_plugin.errors import check_whole
from iresflow_plugin.torch_state import draw_options


@dataclass(frozen=True)
class Rademacher:
    """Entries +1 or -1: the lowest variance among independent entries, and |v|^2 = D exactly."""

    count: int = 1

    def __post_init__(self) -> None:
        check_whole("count, the number of probes,", self.count)

    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Probes of shape (count, *x.shape)."""
        bits = torch.randint(0, 2, (self.count, *x.shape), dtype=x.dtype, device=x.device, **draw_options(generator))
        return bits.mul_(2).sub_(1)


@dataclass(frozen=True)
class Gaussian:
    """Standard normal entries."""

    count: int = 1

    def __post_init__(self) -> None:
        check_whole("count, the number of probes,", self.count)

    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Probes of shape (count, *x.shape)."""
        return torch.randn(self.count, *x.shape, dtype=x.dtype, device=x.device, **draw_options(generator))


@dataclass(frozen=True)
class Orthogonal:
    """Probes of length sqrt(D), orthogonal to each other; with `count` = D the trace is exact.

    One random basis for the batch, with random signs per sample. The reported standard error treats probes as
    independent and is therefore too large, never too small on average.
    """

    count: int = 1

    def __post_init__(self) -> None:
        check_whole("count, the number of probes,", self.count)

    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Probes of shape (count, *x.shape)."""
        size = x.shape[1:].numel()
        if self.count > size:
            raise ValueError(f"At most {size} probes can be orthogonal in {size} dimensions, got count={self.count}.")
        dtype = torch.promote_types(x.dtype, torch.float32)
        normal = torch.randn(size, self.count, dtype=dtype, device=x.device, **draw_options(generator))
        basis = torch.linalg.qr(normal)[0].mT.to(x.dtype) * size**0.5
        return basis.reshape(self.count, 1, *x.shape[1:]) * Rademacher().draw(x, generator)


Probes = Rademacher | Gaussian | Orthogonal


def as_probes(probes: int | Probes) -> Probes:
    """A number of probes means Rademacher probes."""
    if isinstance(probes, bool) or not isinstance(probes, (int, Rademacher, Gaussian, Orthogonal)):
        raise TypeError(f"probes must be a number, Rademacher(n), Gaussian(n) or Orthogonal(n), got {probes!r}.")
    return Rademacher(probes) if isinstance(probes, int) else probes
