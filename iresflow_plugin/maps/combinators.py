"""Maps made of maps: one behind the other, added, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from iresflow_plugin.maps.layers import Scaling
from iresflow_plugin.maps.map import Linearised, Map, events_of
from iresflow_plugin.maps.rounding import Products, Rounded


@dataclass(eq=False)
class Several(Map):
    """Base class of maps made of maps."""

    maps: tuple[Map, ...]

    @property
    def certified(self) -> bool:
        return all(m.certified for m in self.maps)

    def rows(self, index: Tensor) -> Several:
        return replace(self, maps=tuple(m.rows(index) for m in self.maps))


@dataclass(eq=False)
class Composition(Several):
    """x -> f_n(... f_1(x)): bounds multiply, derivatives follow the chain rule."""

    @property
    def ceiling(self) -> float:
        return math.prod(m.ceiling for m in self.maps)

    @property
    def bound(self) -> float:
        return math.prod(m.bound for m in self.maps)

    def __call__(self, x: Tensor) -> Tensor:
        for m in self.maps:
            x = m(x)
        return x

    def rounded(self, x: Rounded, products: Products) -> Rounded:
        for m in self.maps:
            x = m.rounded(x, products)
        return x

    def linearise(self, x: Tensor) -> Linearised:
        parts: list[Linearised] = []
        for m in self.maps:
            parts.append(m.linearise(x))
            x = parts[-1].value

        def jvp(tangent: Tensor) -> Tensor:
            for part in parts:
                tangent = part.jvp(tangent)
            return tangent

        def vjp(cotangent: Tensor) -> Tensor:
            for part in reversed(parts):
                cotangent = part.vjp(cotangent)
            return cotangent

        return Linearised(x, jvp, vjp)


@dataclass(eq=False)
class Sum(Several):
    """x -> f_1(x) + ... + f_n(x): bounds add."""

    @property
    def ceiling(self) -> float:
        return math.fsum(m.ceiling for m in self.maps)

    @property
    def bound(self) -> float:
        return math.fsum(m.bound for m in self.maps)

    def __call__(self, x: Tensor) -> Tensor:
        return reduce(torch.add, self._alike([m(x) for m in self.maps]))

    def rounded(self, x: Rounded, products: Products) -> Rounded:
        terms = [m.rounded(x, products) for m in self.maps]
        self._alike([term.value for term in terms])
        return products.add(terms)

    def linearise(self, x: Tensor) -> Linearised:
        parts = [m.linearise(x) for m in self.maps]
        return Linearised(
            reduce(torch.add, self._alike([p.value for p in parts])),
            lambda tangent: reduce(torch.add, [p.jvp(tangent) for p in parts]),
            lambda cotangent: reduce(torch.add, [p.vjp(cotangent) for p in parts]),
        )

    @staticmethod
    def _alike(values: Sequence[Tensor]) -> Sequence[Tensor]:
        if any(v.shape[1:] != values[0].shape[1:] for v in values):
            raise ValueError(
                f"The terms of a sum give events of shapes {events_of(values)}; broadcasting would copy "
                "entries, which no bound covers: give all terms the same number of features."
            )
        return values


@dataclass(eq=False)
class Concatenation(Several):
    """x -> [f_1(x); ...; f_n(x)] along `dim` (negative): bounds add in squares, or less where `most` is known."""

    dim: int
    most: float = math.inf

    @property
    def ceiling(self) -> float:
        return min(math.hypot(*[m.ceiling for m in self.maps]), self.most)

    @property
    def bound(self) -> float:
        return min(math.hypot(*[m.bound for m in self.maps]), self.most)

    def __call__(self, x: Tensor) -> Tensor:
        return self._join([m(x) for m in self.maps])

    def rounded(self, x: Rounded, products: Products) -> Rounded:
        values, errors, sizes = zip(*[m.rounded(x, products) for m in self.maps], strict=True)
        return Rounded(self._join(values), reduce(torch.hypot, errors), reduce(torch.hypot, sizes))

    def linearise(self, x: Tensor) -> Linearised:
        parts = [m.linearise(x) for m in self.maps]
        sizes = [p.value.shape[self.dim] for p in parts]

        def vjp(cotangent: Tensor) -> Tensor:
            pieces = cotangent.split(sizes, self.dim)
            return reduce(torch.add, [p.vjp(piece) for p, piece in zip(parts, pieces, strict=True)])

        value = self._join([p.value for p in parts])
        return Linearised(value, lambda tangent: _cat([p.jvp(tangent) for p in parts], self.dim), vjp)

    def _join(self, values: Sequence[Tensor]) -> Tensor:
        events = [v.shape[1:] for v in values]
        if any(len(event) != len(events[0]) or event[: self.dim] != events[0][: self.dim] for event in events):
            raise ValueError(
                f"The parts of a concatenation along dimension {self.dim} give events of shapes "
                f"{events_of(values)}; in front of that dimension they have to agree."
            )
        return _cat(values, self.dim)


@dataclass(eq=False)
class Shares(Concatenation):
    """x -> [eta_1 f_1(x); ...; eta_n f_n(x)] with sum eta_i^2 <= 1, so never steeper than the steepest f_i."""

    @staticmethod
    def of(maps: Sequence[Map], eta: Tensor, dim: int) -> Shares:
        return Shares(tuple(Composition((m, Scaling(e, 1.0))) for m, e in zip(maps, eta, strict=True)), dim)

    @property
    def ceiling(self) -> float:
        return max(m.maps[0].ceiling for m in self.maps if isinstance(m, Composition))

    @property
    def bound(self) -> float:
        return min(super().bound, max(m.maps[0].bound for m in self.maps if isinstance(m, Composition)))


def _cat(pieces: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate along a negative dimension, broadcasting the dimensions in front of it."""
    leading = torch.broadcast_shapes(*[p.shape[:dim] for p in pieces])
    return torch.cat([p.expand(*leading, *p.shape[dim:]) for p in pieces], dim)
