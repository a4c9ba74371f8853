"""The maps of single layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iresflow_plugin.errors import NotContractiveError
from iresflow_plugin.maps.map import Around, Linearised, Map, Product
from iresflow_plugin.maps.rounding import Products, Rounded, elementwise, one_operation
from iresflow_plugin.torch_state import is_readable, per_sample


@dataclass(eq=False)
class Weighted(Map):
    """Base class of layers with a weight: `norm` bounds it as it is, `most` for whatever value it can take."""

    weight: Tensor
    bias: Tensor | None
    norm: Tensor | float
    most: float

    @property
    def ceiling(self) -> float:
        return self.most

    @property
    def bound(self) -> float:
        if isinstance(self.norm, Tensor) and not is_readable(self.norm):
            return self.most  # that of all members of an ensemble
        tiny = torch.finfo(torch.promote_types(self.weight.dtype, torch.float32)).tiny
        norm, least = float(self.norm), self.weight.numel() * tiny  # what its products may lose
        return min(norm + least, self.most) if norm == norm else norm  # NaN stays

    def plus_bias(self, product: Rounded, products: Products) -> Rounded:
        """The layer's value from that of its product."""
        if self.bias is None:
            return product
        value = product.value + self.bias.view(-1, *[1] * (self.weight.ndim - 2))
        return one_operation(value, product.error, products)


@dataclass(eq=False)
class Affine(Weighted):
    """x -> W x + b on the last dimension."""

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"A linear layer of the branch takes {self.weight.shape[1]} features, and its inputs have "
                f"{x.shape[-1]}: shape {tuple(x.shape)}."
            )
        return F.linear(x, self.weight, self.bias)

    def linearise(self, x: Tensor) -> Linearised:
        return Linearised(self(x), lambda t: F.linear(t, self.weight), lambda v: v @ self.weight)

    def rounded(self, x: Rounded, products: Products) -> Rounded:
        # | |W| |x| | <= |W|_F |x|
        product = products.multiply(F.linear, x, self.weight, self.weight.shape[1], torch.linalg.vector_norm)
        return self.plus_bias(product.plus(self.bound * x.error), products)


@dataclass(eq=False)
class Scaling(Map):
    """x -> s x with a number, or with a tensor s whose entries are at most `most` in absolute value."""

    factor: Tensor | float
    most: float

    @property
    def ceiling(self) -> float:
        return self.most

    @property
    def bound(self) -> float:
        readable = isinstance(self.factor, Tensor) and is_readable(self.factor)
        return min(float(self.factor.detach().abs().max()), self.most) if readable else self.most  # pyright: ignore

    def __call__(self, x: Tensor) -> Tensor:
        return x * (self.factor if isinstance(self.factor, Tensor) else truncated(self.factor, x.dtype))

    def linearise(self, x: Tensor) -> Linearised:
        return Linearised(self(x), self, self)

    def rounded(self, x: Rounded, products: Products) -> Rounded:
        if isinstance(self.factor, Tensor):
            return one_operation(x.value * self.factor, self.most * x.error, products)
        factor = truncated(self.factor, products.judged)
        error = self.most * x.error + abs(self.factor - factor) * x.size  # of what was left of the number, too
        return one_operation(x.value * factor, error, products)


def truncated(number: float, dtype: torch.dtype) -> float:
    """The number as far as the dtype holds its digits, never further from zero: .9999999999 must not become 1.

    >>> truncated(0.999, torch.bfloat16), truncated(-0.75, torch.float16)
    (0.99609375, -0.75)
    """
    mantissa, exponent = math.frexp(number)
    digits = 1 - round(math.log2(torch.finfo(dtype).eps))
    return math.ldexp(math.trunc(math.ldexp(mantissa, digits)), exponent - digits)


@dataclass(eq=False)
class Shift(Map):
    """x -> x + s with one row s per sample: how a context enters. None stands for one that was not given."""

    shift: Tensor | None

    @property
    def ceiling(self) -> float:
        return 1.0

    def __call__(self, x: Tensor) -> Tensor:
        if self.shift is None:
            raise ValueError("This branch is conditional and needs a context, but context is None.")
        value = x + per_sample(self.shift, x)
        if value.shape[1:] != x.shape[1:]:  # a batch of one row may meet many contexts
            raise ValueError(
                f"A context that enters with shape {tuple(self.shift.shape[1:])} does not fit into events of shape "
                f"{tuple(x.shape[1:])}: broadcasting would copy entries, which no bound covers. Let the network of "
                "AddContext give as many features as there are where it enters."
            )
        return value

    def linearise(self, x: Tensor) -> Linearised:
        return Linearised(self(x), lambda t: t, lambda v: v)

    def rows(self, index: Tensor) -> Shift:
        return self if self.shift is None or len(self.shift) == 1 else Shift(self.shift[index])

    def rounded(self, x: Rounded, products: Products) -> Rounded:
        return one_operation(self(x.value), x.error, products)


@dataclass(eq=False)
class Elementwise(Map):
    """x -> f(x; p), entry by entry, from pure functions for f and for (f, f'), with tensors p; slack, of rounding."""

    function: Callable[..., Tensor]
    with_slope: Callable[..., tuple[Tensor, Tensor]]
    constant: float
    parameters: tuple[Tensor, ...] = ()
    slack: float = 1.0

    @property
    def ceiling(self) -> float:
        return self.constant

    def __call__(self, x: Tensor) -> Tensor:
        return self._same(self.function(x, *self.parameters), x)

    def linearise(self, x: Tensor) -> Linearised:
        value, slope = self.with_slope(x, *self.parameters)
        return Linearised(self._same(value, x), slope.mul, slope.mul)

    def rounded(self, x: Rounded, products: Products) -> Rounded:
        return elementwise(x, self(x.value), self.constant, products, self.slack)

    @staticmethod
    def _same(value: Tensor, x: Tensor) -> Tensor:
        if value.shape != x.shape:
            raise ValueError(
                f"An elementwise function of the branch made shape {tuple(value.shape)} of {tuple(x.shape)}; copied "
                "entries are covered by no bound: build it with the features and spatial_dims of its inputs."
            )
        return value


@dataclass(eq=False)
class Reshape(Map):
    """The dimensions from `start` to `end` joined, or one of them split into `sizes`: entries and norms stay."""

    start: int
    end: int
    sizes: tuple[int, ...]

    @property
    def ceiling(self) -> float:
        return 1.0

    def __call__(self, x: Tensor) -> Tensor:
        start, behind = self.start % x.ndim, self.end % x.ndim + 1
        return x.reshape(*x.shape[:start], *(self.sizes or (x.shape[start:behind].numel(),)), *x.shape[behind:])

    def linearise(self, x: Tensor) -> Linearised:
        value = self(x)
        before, after = x.shape[1:], value.shape[1:]
        return Linearised(
            value,
            lambda t: t.reshape(*t.shape[: t.ndim - len(before)], *after),
            lambda v: v.reshape(*v.shape[: v.ndim - len(after)], *before),
        )

    def rounded(self, x: Rounded, products: Products) -> Rounded:
        return x._replace(value=self(x.value))


@dataclass(eq=False)
class Stated(Map):
    """A module of (x) or (x, context) that states its own bound, with the tensors it has at the call.

    Only its code is read later. torch.func differentiates it. The bound is its word.
    """

    module: nn.Module
    constant: float
    names: tuple[str, ...]
    state: tuple[Tensor, ...]
    conditional: bool
    context: Tensor | None

    @property
    def ceiling(self) -> float:
        return self.constant

    @property
    def certified(self) -> bool:
        return False

    def __call__(self, x: Tensor) -> Tensor:
        if self.conditional and self.context is None:
            raise ValueError(f"{type(self.module).__name__} needs a context, but context is None.")
        inputs: tuple[Any, ...] = (x, self.context) if self.conditional else (x,)
        return torch.func.functional_call(self.module, dict(zip(self.names, self.state, strict=True)), inputs)

    def linearise(self, x: Tensor) -> Linearised:
        value, pull = torch.func.vjp(self.__call__, x)[:2]

        def jvp(tangent: Tensor) -> Tensor:
            return torch.func.jvp(self.__call__, (x,), (tangent.expand_as(x).contiguous(),))[1]

        def vjp(cotangent: Tensor) -> Tensor:
            return pull(cotangent.expand_as(value))[0]

        return Linearised(value, _over_leading(jvp, x.ndim), _over_leading(vjp, value.ndim))

    def rows(self, index: Tensor) -> Stated:
        shared = self.context is None or len(self.context) == 1
        return self if shared else replace(self, context=self.context[index])  # pyright: ignore[reportOptionalSubscript]


def _over_leading(product: Product, ndim: int) -> Product:
    """Let a product for (B, *event) accept (K, B, *event)."""

    def batched(vector: Tensor) -> Tensor:
        return torch.func.vmap(product)(vector) if vector.ndim > ndim else product(vector)

    return batched


@dataclass(eq=False)
class Watched(Around):
    """A map whose module carries forward hooks. They may read what goes in and comes out, and change nothing."""

    module: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        return self._show(x, self.g(x))

    def linearise(self, x: Tensor) -> Linearised:
        at_x = self.g.linearise(x)
        self._show(x, at_x.value)
        return at_x

    def _show(self, x: Tensor, value: Tensor) -> Tensor:
        show_inputs(self.module, x)
        show_output(self.module, value, x)
        return value


def show_inputs(module: nn.Module, *inputs: Tensor) -> None:
    """Call the hooks that stand before the forward of a module, as it would."""
    if not module._forward_pre_hooks:
        return
    for key, hook in list(module._forward_pre_hooks.items()):
        keywords = ({},) if key in module._forward_pre_hooks_with_kwargs else ()
        _check_silent(module, hook(module, _copies(inputs), *keywords))  # pyright: ignore[reportCallIssue]


def show_output(module: nn.Module, value: Tensor, *inputs: Tensor) -> None:
    """Call the hooks that stand behind it."""
    if not module._forward_hooks:
        return
    for key, hook in list(module._forward_hooks.items()):
        keywords = ({},) if key in module._forward_hooks_with_kwargs else ()
        _check_silent(module, hook(module, _copies(inputs), *keywords, value.clone()))  # pyright: ignore[reportCallIssue]


def _copies(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """To look at: what a hook writes into them changes nothing."""
    return tuple(t.clone() for t in tensors)


def _check_silent(module: nn.Module, returned: object) -> None:
    if returned is not None:
        raise NotContractiveError(
            f"A forward hook of {type(module).__name__} returns something in place of what it was shown, "
            "which no bound covers; let it return None, or remove it.",
            module,
        )
