"""Derivatives of maps beyond the two products: the dense Jacobian, and what a backward pass computes anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from iresflow_plugin.maps.map import Linearised, Map
from iresflow_plugin.torch_state import apply, autocast_as_now


def jacobian_columns(at_x: Linearised, x: Tensor, which: range) -> Tensor:
    """J e_i for these i, shape (n, *x.shape)."""
    event = x.shape[1:]
    basis = torch.eye(event.numel(), dtype=x.dtype, device=x.device).view(-1, 1, *event)
    if len(which) < len(basis):
        basis = basis[which.start : which.stop]
    return at_x.jvp(basis).expand(len(which), *x.shape)


def transposed_jacobian(columns: Tensor) -> Tensor:
    """J^T of every sample, shape (B, D, D), from all of its columns."""
    return columns.reshape(*columns.shape[:2], columns.shape[2:].numel()).transpose(0, 1)


def pull_back(g: Map, x: Tensor, cotangent: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """(dg/dt)^T cotangent at x for the wanted ones of the tensors t that g holds, differentiable again."""
    return _pulled(lambda *tensors: g.holding(tensors)(x), g.tensors(), wanted, cotangent)


def _pulled(
    function: Callable[..., Any], tensors: Sequence[Tensor], wanted: Sequence[bool], cotangent: Any
) -> list[Tensor | None]:
    """The gradients of function(*tensors) for the wanted tensors, None for the others."""
    chosen = [t for t, wants in zip(tensors, wanted, strict=True) if wants]
    if not chosen:
        return [None] * len(tensors)

    def of_chosen(*new: Tensor) -> Any:
        source = iter(new)
        return function(*[next(source) if wants else t for t, wants in zip(tensors, wanted, strict=True)])

    pulled = iter(torch.func.vjp(of_chosen, *chosen)[1](cotangent))
    return [next(pulled) if wants else None for wants in wanted]


def push_forward(g: Map, x: Tensor, tangents: Sequence[Tensor | None]) -> Tensor:
    """dg/dt dt at x, summed over the tensors t that g holds: the transpose of `pull_back`, which is linear."""
    wanted = [t is not None for t in tangents]
    given = [t for t in tangents if t is not None]
    if not given:
        return torch.zeros_like(x)

    def pulled(cotangent: Tensor) -> tuple[Tensor, ...]:
        return tuple(p for p in pull_back(g, x, cotangent, wanted) if p is not None)

    transpose = torch.func.vjp(pulled, torch.zeros_like(x))[1]
    return cast(tuple[Tensor, ...], transpose(tuple(given)))[0]


def recomputed(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """function(*tensors), of which only the tensors are kept: the backward pass evaluates it anew, to any order.

    What it computes from are the tensors of the call. torch refuses if they were edited in between.
    """
    return apply(_Recomputed, function, autocast_as_now(tensors[0]), *tensors)


class _Recomputed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., Any], settings: Callable[[], Any], *tensors: Tensor) -> Any:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.function, ctx.settings, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cotangent = cotangents[0] if len(cotangents) == 1 else cotangents
        with ctx.settings():
            return None, None, *_pulled(ctx.function, ctx.saved_tensors, ctx.needs_input_grad[2:], cotangent)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        given = [torch.zeros_like(t) if d is None else d for t, d in zip(tensors, tangents[2:], strict=True)]
        with ctx.settings():
            return _pushed(ctx.function, tensors, tuple(given))


def _pushed(function: Callable[..., Any], tensors: Sequence[Tensor], tangents: tuple[Tensor, ...]) -> Any:
    """The transpose of the gradient, which is linear: torch's forward mode cannot stand inside itself."""
    values, pull = torch.func.vjp(function, *tensors)[:2]
    return torch.func.vjp(pull, tree_map(torch.zeros_like, values))[1](tangents)[0]
