"""What the estimators and the solvers see of a branch: a `Map`, ready for one call.

A map holds the tensors of its call, weights in use, context, frequencies, and nothing that could change later:

    g(x)                    the value, shape (B, *event)
    g.bound                 a certified bound of Lip(g) in the 2-norm, for the weights of this very call
    g.ceiling               the bound that holds for every value the weights can take (inf if there is none)
    g.linearise(x)          value, J t and J^T v at x, evaluating g once
    g.rounded(x, products)  the value, and a bound of the rounding errors in it
    g.rows(index)           the same map for some rows of the batch

Maps are plain differentiable torch, so gradients flow to inputs, parameters and context, and torch.func works.
Tangents and cotangents may carry extra leading dimensions, (K, B, *event), and a batch dimension of 1 broadcasts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from iresflow_plugin.maps.rounding import Products, Rounded, elementwise

Product = Callable[[Tensor], Tensor]
MapType = TypeVar("MapType", bound="Map")
AroundType = TypeVar("AroundType", bound="Around")


@dataclass(frozen=True)
class Linearised:
    """g at one point: `value` = g(x), `jvp(t)` = J t, `vjp(v)` = J^T v."""

    value: Tensor
    jvp: Product
    vjp: Product


@dataclass(eq=False)
class Map:
    """Base class: a dataclass of tensors, numbers and maps. A leaf whose constant depends on no weight has a `ceiling`.

    `certified` is False where the bound is somebody's word, or where rounding errors are a guess.
    """

    @property
    def ceiling(self) -> float:
        return math.inf

    @property
    def bound(self) -> float:
        """Certified Lipschitz bound at this call; computed when asked for, since the number may lie on a GPU."""
        return self.ceiling

    @property
    def certified(self) -> bool:
        return True

    @property
    def needs_proof(self) -> bool:
        """Whether somebody is told how far off a solve with it is."""
        return True

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def linearise(self, x: Tensor) -> Linearised:
        raise NotImplementedError

    def rows(self: MapType, index: Tensor) -> MapType:
        """The map restricted to rows of the batch; most maps treat all rows alike."""
        return self

    def rounded(self, x: Rounded, products: Products) -> Rounded:
        """g(x) and how far off it may be. Where nothing better is known: as if it were one elementwise function."""
        return elementwise(x, self(x.value), self.bound, products, slack=4.0)

    def with_tensors(self: MapType, change: Callable[[Tensor], Tensor]) -> MapType:
        """The same map of other tensors."""
        return self.replacing(Tensor, change)

    def replacing(self: MapType, kind: type, change: Callable[[Any], Any]) -> MapType:
        """The same map with other tensors, or other maps of one kind, in it."""
        if isinstance(self, kind):
            return change(self)
        return type(self)(*[_replaced(getattr(self, name), kind, change) for name in self.__dataclass_fields__])

    def tensors(self) -> list[Tensor]:
        """All that it holds, in a fixed order."""
        found: list[Tensor] = []
        self.with_tensors(lambda t: found.append(t) or t)  # pyright: ignore[reportArgumentType]
        return found

    def holding(self: MapType, tensors: Iterable[Tensor]) -> MapType:
        """The same map of these tensors, in the order of `tensors()`."""
        new = iter(tensors)
        return self.with_tensors(lambda _: next(new))

    def to(self: MapType, dtype: torch.dtype) -> MapType:
        """The same map in another precision."""
        return self.with_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def dtype(self) -> torch.dtype | None:
        """The widest of its tensors, None if it has none."""
        dtypes = [t.dtype for t in self.tensors() if t.is_floating_point()]
        return reduce(torch.promote_types, dtypes) if dtypes else None


def _replaced(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_replaced(v, kind, change) for v in value)
    return value.replacing(kind, change) if isinstance(value, Map) else value


@dataclass(eq=False)
class Around(Map):
    """Base class of maps that do as another one does, but for what they override."""

    g: Map

    @property
    def ceiling(self) -> float:
        return self.g.ceiling

    @property
    def bound(self) -> float:
        return self.g.bound

    @property
    def certified(self) -> bool:
        return self.g.certified

    def __call__(self, x: Tensor) -> Tensor:
        return self.g(x)

    def linearise(self, x: Tensor) -> Linearised:
        return self.g.linearise(x)

    def rows(self: AroundType, index: Tensor) -> AroundType:
        return replace(self, g=self.g.rows(index))

    def rounded(self, x: Rounded, products: Products) -> Rounded:
        return self.g.rounded(x, products)


class Endomap(Around):
    """g, checked to map events to events of the same shape, as x + g(x) needs."""

    def __call__(self, x: Tensor) -> Tensor:
        return self._same(self.g(x), x)

    def linearise(self, x: Tensor) -> Linearised:
        at_x = self.g.linearise(x)
        self._same(at_x.value, x)
        return at_x

    @staticmethod
    def _same(value: Tensor, x: Tensor) -> Tensor:
        if value.shape != x.shape:
            raise ValueError(
                f"The branch maps events of shape {tuple(x.shape[1:])} to {tuple(value.shape[1:])}; "
                "x + g(x) needs them equal."
            )
        return value


def events_of(values: Sequence[Tensor]) -> str:
    """Their shapes without the batch, for error messages."""
    return ", ".join(str(tuple(v.shape[1:])) for v in values)
