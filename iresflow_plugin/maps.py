"""Maps g with a certified Lipschitz bound, and their derivatives as two products.

A `Map` is a branch made ready for one call: its weights are computed and its context is taken in, once, however many
times the call evaluates it. The log-det estimators and the solvers see a branch only through this interface:

    g(x)                    the value, shape (B, *event)
    g.bound                 a certified bound of Lip(g) in the 2-norm, for the weights of this very call
    g.ceiling               the bound that holds for every value the weights can take (inf if there is none)
    g.linearise(x)          value, J t and J^T v at x, evaluating g once
    g.rows(index)           the same map for some rows of the batch
    g.magnitude(x)          the value, and how large the numbers are that are rounded on the way to it

Maps are plain differentiable torch, so gradients flow to inputs, parameters and context, and torch.func works. How
often one may differentiate is up to what is built on them: of weights under `Spectral`, and of log-dets other than
`Exact` and of inverses, there are first derivatives only.
Tangents and cotangents may carry extra leading dimensions, (K, B, *event), and a batch dimension of 1 broadcasts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Linearised:
    """g at one point: `value` = g(x), `jvp(t)` = J t, `vjp(v)` = J^T v."""

    value: Tensor
    jvp: Product
    vjp: Product


class Map:
    """Base class. A leaf whose constant depends on no weight gives `ceiling` alone.

    `uses_functorch` says that `linearise` calls torch.func.vjp, here or in a map inside, where no checkpoint may stand.
    """

    ceiling: float = math.inf
    uses_functorch: bool = False

    @property
    def bound(self) -> float:
        """Certified Lipschitz bound at this call; computed when asked for, since the number may lie on a GPU."""
        return self.ceiling

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def linearise(self, x: Tensor) -> Linearised:
        raise NotImplementedError

    def rows(self, index: Tensor) -> Map:
        """The map restricted to rows of the batch; most maps treat all rows alike."""
        return self

    def magnitude(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """g(x) and, per sample, the size of the numbers inside g: what rounding errors of the value are relative to."""
        value = self(x)
        return value, torch.maximum(norms(x), norms(value))


class Composition(Map):
    """x -> f_n(... f_1(x)): bounds multiply, derivatives follow the chain rule."""

    def __init__(self, maps: Sequence[Map]) -> None:
        self.maps = list(maps)
        self.ceiling = math.prod(m.ceiling for m in self.maps)
        self.uses_functorch = any(m.uses_functorch for m in self.maps)

    @property
    def bound(self) -> float:
        return math.prod(m.bound for m in self.maps)

    def __call__(self, x: Tensor) -> Tensor:
        for m in self.maps:
            x = m(x)
        return x

    def magnitude(self, x: Tensor) -> tuple[Tensor, Tensor]:
        largest = norms(x)
        for m in self.maps:
            x, here = m.magnitude(x)
            largest = torch.maximum(largest, here)
        return x, largest

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

    def rows(self, index: Tensor) -> Map:
        return Composition([m.rows(index) for m in self.maps])


class Sum(Map):
    """x -> f_1(x) + ... + f_n(x): bounds add."""

    def __init__(self, maps: Sequence[Map]) -> None:
        self.maps = list(maps)
        self.ceiling = math.fsum(m.ceiling for m in self.maps)
        self.uses_functorch = any(m.uses_functorch for m in self.maps)

    @property
    def bound(self) -> float:
        return math.fsum(m.bound for m in self.maps)

    def __call__(self, x: Tensor) -> Tensor:
        return self._add([m(x) for m in self.maps])

    def magnitude(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, sizes = zip(*[m.magnitude(x) for m in self.maps], strict=True)  # large values may cancel
        value = self._add(values)
        return value, torch.maximum(norms(value), reduce(torch.maximum, sizes))

    def linearise(self, x: Tensor) -> Linearised:
        parts = [m.linearise(x) for m in self.maps]
        return Linearised(
            self._add([p.value for p in parts]),
            lambda tangent: reduce(torch.add, [p.jvp(tangent) for p in parts]),
            lambda cotangent: reduce(torch.add, [p.vjp(cotangent) for p in parts]),
        )

    def rows(self, index: Tensor) -> Map:
        return Sum([m.rows(index) for m in self.maps])

    @staticmethod
    def _add(values: Sequence[Tensor]) -> Tensor:
        events = [tuple(v.shape[1:]) for v in values]
        if any(event != events[0] for event in events):
            raise ValueError(
                f"The terms of a sum give events of shapes {', '.join(map(str, events))}; broadcasting would copy "
                "entries, which no bound covers: give all terms the same number of features."
            )
        return reduce(torch.add, values)


class Concatenation(Map):
    """x -> [f_1(x); ...; f_n(x)] along `dim` (negative): bounds add in squares, unless a `constant` is known."""

    def __init__(self, maps: Sequence[Map], dim: int, constant: float | None = None) -> None:
        self.maps, self.dim, self.constant = list(maps), dim, constant
        self.ceiling = math.hypot(*[m.ceiling for m in self.maps]) if constant is None else constant
        self.uses_functorch = any(m.uses_functorch for m in self.maps)

    @property
    def bound(self) -> float:
        return math.hypot(*[m.bound for m in self.maps]) if self.constant is None else self.constant

    def __call__(self, x: Tensor) -> Tensor:
        return self._join([m(x) for m in self.maps])

    def magnitude(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, sizes = zip(*[m.magnitude(x) for m in self.maps], strict=True)
        value = self._join(values)
        return value, torch.maximum(norms(value), reduce(torch.maximum, sizes))

    def linearise(self, x: Tensor) -> Linearised:
        parts = [m.linearise(x) for m in self.maps]
        sizes = [p.value.shape[self.dim] for p in parts]

        def vjp(cotangent: Tensor) -> Tensor:
            pieces = cotangent.split(sizes, self.dim)
            return reduce(torch.add, [p.vjp(piece) for p, piece in zip(parts, pieces, strict=True)])

        return Linearised(
            self._join([p.value for p in parts]),
            lambda tangent: _cat([p.jvp(tangent) for p in parts], self.dim),
            vjp,
        )

    def rows(self, index: Tensor) -> Map:
        return Concatenation([m.rows(index) for m in self.maps], self.dim, self.constant)

    def _join(self, values: Sequence[Tensor]) -> Tensor:
        events = [tuple(v.shape[1:]) for v in values]
        if any(len(event) != len(events[0]) or event[: self.dim] != events[0][: self.dim] for event in events):
            raise ValueError(
                f"The parts of a concatenation along dimension {self.dim} give events of shapes "
                f"{', '.join(map(str, events))}; in front of that dimension they have to agree."
            )
        return _cat(values, self.dim)


class Affine(Map):
    """x -> W x + b on the last dimension."""

    def __init__(self, weight: Tensor, bias: Tensor | None, bound: Tensor | float, ceiling: float) -> None:
        self.weight, self.bias, self._bound, self.ceiling = weight, bias, bound, ceiling

    @property
    def bound(self) -> float:
        return _least(self._bound, self.ceiling)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"A linear layer of the branch takes {self.weight.shape[1]} features, and its inputs have "
                f"{x.shape[-1]}: shape {tuple(x.shape)}."
            )
        return F.linear(x, self.weight, self.bias)

    def linearise(self, x: Tensor) -> Linearised:
        return Linearised(self(x), lambda t: F.linear(t, self.weight), lambda v: v @ self.weight)


class WeightedConcatenation(Concatenation):
    """x -> [eta_1 f_1(x); ...; eta_n f_n(x)] with |eta| <= 1, so never steeper than the steepest f_i."""

    def __init__(self, maps: Sequence[Map], eta: Tensor, dim: int) -> None:
        super().__init__([Composition([m, Scaling(e, 1.0)]) for m, e in zip(maps, eta, strict=True)], dim)
        self.plain, self.eta = list(maps), eta
        self.ceiling = max(m.ceiling for m in self.plain)

    @property
    def bound(self) -> float:
        parts = [e * m.bound for e, m in zip(self.eta.detach().tolist(), self.plain, strict=True)]
        return min(math.hypot(*parts), self.ceiling)

    def rows(self, index: Tensor) -> Map:
        return WeightedConcatenation([m.rows(index) for m in self.plain], self.eta, self.dim)


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over images: per axis stride, dilation and padding in front and behind; groups; mode."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: tuple[tuple[int, int], ...]
    mode: str  # "zeros" or "circular"


class Convolution(Map):
    """x -> K * x + b on the last 1 + d dimensions (channels, *sizes), d = 1, 2 or 3."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, geometry: Geometry, bound: Tensor | float, ceiling: float
    ) -> None:
        self.weight, self.bias, self.geometry, self._bound, self.ceiling = weight, bias, geometry, bound, ceiling
        d = weight.ndim - 2
        self._convolve = (F.conv1d, F.conv2d, F.conv3d)[d - 1]
        self._transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[d - 1]
        plain = geometry.mode == "zeros" and all(front == behind for front, behind in geometry.padding)
        self._inside = [front for front, _ in geometry.padding] if plain else [0] * d  # padding that torch does itself
        self._outside = [(0, 0)] * d if plain else list(geometry.padding)

    @property
    def bound(self) -> float:
        return _least(self._bound, self.ceiling)

    def __call__(self, x: Tensor) -> Tensor:
        channels, d = self.weight.shape[1] * self.geometry.groups, len(self._inside)
        if x.ndim < d + 2 or x.shape[-1 - d] != channels:
            raise ValueError(
                f"A {d}-d convolution of the branch takes {channels} channels in front of {d} sizes, and its inputs "
                f"have shape {tuple(x.shape)}."
            )
        return self._forward(x, self.bias)

    def linearise(self, x: Tensor) -> Linearised:
        sizes = x.shape[x.ndim - len(self._inside) :]
        return Linearised(self(x), lambda t: self._forward(t, None), lambda v: self._backward(v, sizes))

    def _forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        g, leading = self.geometry, x.shape[: x.ndim - self.weight.ndim + 1]
        x = x.reshape(-1, *x.shape[len(leading) :])
        if any(map(any, self._outside)):
            sides = [side for pair in reversed(self._outside) for side in pair]
            x = F.pad(x, sides, mode="circular" if g.mode == "circular" else "constant")
        y = self._convolve(x, self.weight, bias, g.stride, self._inside, g.dilation, g.groups)
        return y.view(*leading, *y.shape[1:])

    def _backward(self, v: Tensor, sizes: Sequence[int]) -> Tensor:
        """K^T v, an event of these sizes."""
        g, leading = self.geometry, v.shape[: v.ndim - self.weight.ndim + 1]
        v = v.reshape(-1, *v.shape[len(leading) :])
        padded = [n + sum(sides) for n, sides in zip(sizes, self._outside, strict=True)]
        unseen = [
            (n + 2 * p - d * (k - 1) - 1) % s
            for n, p, d, k, s in zip(padded, self._inside, g.dilation, self.weight.shape[2:], g.stride, strict=True)
        ]
        u = self._transpose(v, self.weight, None, g.stride, self._inside, unseen, g.groups, g.dilation)
        for axis, (sides, n) in enumerate(zip(self._outside, sizes, strict=True), start=2):
            u = _unpad(u, axis, sides, n, g.mode == "circular")
        return u.view(*leading, *u.shape[1:])


def _unpad(u: Tensor, axis: int, sides: tuple[int, int], size: int, circular: bool) -> Tensor:
    """The transpose of padding one axis: cut the borders off, and add them to where they were copied from."""
    front, behind = sides
    middle = u.narrow(axis, front, size)
    if not circular or not any(sides):
        return middle

    def borders(first: Tensor, last: Tensor, gap: int) -> Tensor:
        shape = [gap if i == axis else n for i, n in enumerate(u.shape)]
        return torch.cat([first, u.new_zeros(shape), last], axis)

    head, tail = u.narrow(axis, front + size, behind), u.narrow(axis, 0, front)
    nothing = u.narrow(axis, 0, 0)
    return middle + borders(head, nothing, size - behind) + borders(nothing, tail, size - front)


class Scaling(Map):
    """x -> s x with a number or a tensor s whose entries are at most `ceiling` in absolute value."""

    def __init__(self, factor: Tensor | float, ceiling: float) -> None:
        self.factor, self.ceiling = factor, ceiling

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor

    def linearise(self, x: Tensor) -> Linearised:
        return Linearised(self(x), self, self)


class Shift(Map):
    """x -> x + s with one row s per sample: how a context enters. Its derivative is the identity."""

    ceiling = 1.0

    def __init__(self, shift: Tensor) -> None:
        self.shift = shift

    def __call__(self, x: Tensor) -> Tensor:
        value = x + per_sample(self.shift, x.ndim)
        if value.shape[1:] != x.shape[1:]:  # a batch of one row may meet many contexts
            raise ValueError(
                f"A context that enters with shape {tuple(self.shift.shape[1:])} does not fit into events of shape "
                f"{tuple(x.shape[1:])}: broadcasting would copy entries, which no bound covers. Let the network of "
                "AddContext give as many features as there are where it enters."
            )
        return value

    def linearise(self, x: Tensor) -> Linearised:
        return Linearised(self(x), lambda t: t, lambda v: v)

    def rows(self, index: Tensor) -> Map:
        return Shift(self.shift[index]) if self.shift.shape[0] > 1 else self


def per_sample(shift: Tensor, ndim: int) -> Tensor:
    """(B, F) as (B, 1, ..., 1, F), so that its rows meet the samples and not a dimension of the event."""
    return shift.view(shift.shape[0], *[1] * (ndim - shift.ndim), *shift.shape[1:])


class NeedsContext(Map):
    """Stands where a context would enter when none was given: it has a bound, but no values."""

    ceiling = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        raise ValueError("This branch is conditional and needs a context, but context is None.")

    def linearise(self, x: Tensor) -> Linearised:
        return Linearised(self(x), lambda t: t, lambda v: v)


class Elementwise(Map):
    """x -> f(x), entry by entry, from a function that returns (f(x), f'(x))."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        with_slope: Callable[[Tensor], tuple[Tensor, Tensor]],
        ceiling: float,
    ) -> None:
        self.function, self.with_slope, self.ceiling = function, with_slope, ceiling

    def __call__(self, x: Tensor) -> Tensor:
        return self._same(self.function(x), x)

    def linearise(self, x: Tensor) -> Linearised:
        value, slope = self.with_slope(x)
        return Linearised(self._same(value, x), slope.mul, slope.mul)

    @staticmethod
    def _same(value: Tensor, x: Tensor) -> Tensor:
        if value.shape != x.shape:
            raise ValueError(
                f"An elementwise function of the branch made shape {tuple(value.shape)} of {tuple(x.shape)}; copied "
                "entries are covered by no bound: give it as many features as its inputs have."
            )
        return value


class Reshape(Map):
    """Flatten, Unflatten and their kin: the entries stay, so all norms stay."""

    ceiling = 1.0

    def __init__(self, module: Callable[[Tensor], Tensor]) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)

    def linearise(self, x: Tensor) -> Linearised:
        value = self(x)
        before, after = x.shape[1:], value.shape[1:]
        return Linearised(
            value,
            lambda t: t.reshape(*t.shape[: t.ndim - len(before)], *after),
            lambda v: v.reshape(*v.shape[: v.ndim - len(after)], *before),
        )


class Generic(Map):
    """Any torch function of (x) or (x, context), differentiated by torch.func: for modules that state a bound."""

    uses_functorch = True

    def __init__(self, function: Callable[..., Tensor], bound: float, context: Tensor | None = None) -> None:
        self.function, self.ceiling, self.context = function, bound, context

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x) if self.context is None else self.function(x, self.context)

    def linearise(self, x: Tensor) -> Linearised:
        value, pull = torch.func.vjp(self.__call__, x)[:2]

        def jvp(tangent: Tensor) -> Tensor:
            return torch.func.jvp(self.__call__, (x,), (tangent.expand_as(x).contiguous(),))[1]

        def vjp(cotangent: Tensor) -> Tensor:
            return pull(cotangent.expand_as(value))[0]

        return Linearised(value, _over_leading(jvp, x.ndim), _over_leading(vjp, value.ndim))

    def rows(self, index: Tensor) -> Map:
        if self.context is None or self.context.shape[0] == 1:
            return self
        return Generic(self.function, self.ceiling, self.context[index])


class Endomap(Map):
    """g, checked to map events to events of the same shape, as x + g(x) needs."""

    def __init__(self, g: Map) -> None:
        self.g, self.ceiling, self.uses_functorch = g, g.ceiling, g.uses_functorch

    @property
    def bound(self) -> float:
        return self.g.bound

    def __call__(self, x: Tensor) -> Tensor:
        return self._same(self.g(x), x)

    def magnitude(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, size = self.g.magnitude(x)
        return self._same(value, x), size

    def linearise(self, x: Tensor) -> Linearised:
        at_x = self.g.linearise(x)
        self._same(at_x.value, x)
        return at_x

    def rows(self, index: Tensor) -> Map:
        return Endomap(self.g.rows(index))

    @staticmethod
    def _same(value: Tensor, x: Tensor) -> Tensor:
        if value.shape != x.shape:
            raise ValueError(
                f"The branch maps events of shape {tuple(x.shape[1:])} to {tuple(value.shape[1:])}; "
                "x + g(x) needs them equal."
            )
        return value


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast rounds the operands of products to where `x` lies; None if it is off."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def full_precision(x: Tensor) -> AbstractContextManager:
    """Switches autocast off where `x` lies: products in half precision carry no certificate, and no solve."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def is_plain(x: Tensor) -> bool:
    """Whether the entries can be read now; inside torch.func transforms they cannot."""
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore[reportAttributeAccessIssue]


def is_readable(x: Tensor) -> bool:
    """Whether a number of `x` can be read now: in torch.func.grad it can, in vmap it is many numbers."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    while not torch.compiler.is_compiling() and functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return False
        x = functorch.get_unwrapped(x)
    return True


def inside_functorch() -> bool:
    """Whether a torch.func transform is running: it knows no saved-tensor hooks, of which checkpoints are made."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def norms(x: Tensor) -> Tensor:
    """2-norm per sample, shape (B,), in at least single precision."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.promote_types(x.dtype, torch.float32))


def _least(bound: Tensor | float, ceiling: float) -> float:
    if isinstance(bound, Tensor) and not is_readable(bound):
        return ceiling  # that of all members of an ensemble
    return min(float(bound.detach() if isinstance(bound, Tensor) else bound), ceiling)


def _over_leading(product: Product, ndim: int) -> Product:
    """Let a product for (B, *event) accept (K, B, *event)."""

    def batched(vector: Tensor) -> Tensor:
        return torch.func.vmap(product)(vector) if vector.ndim > ndim else product(vector)

    return batched


def _cat(pieces: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate along a negative dimension, broadcasting the dimensions in front of it."""
    leading = torch.broadcast_shapes(*[p.shape[:dim] for p in pieces])
    return torch.cat([p.expand(*leading, *p.shape[dim:]) for p in pieces], dim)
