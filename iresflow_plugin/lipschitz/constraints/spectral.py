"""Scaling by a bound of the spectral norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from iresflow_plugin.lipschitz import convolution, matrix
from iresflow_plugin.lipschitz.constraints.constraint import Constraint, as_matrix, scaled, shrink
from iresflow_plugin.lipschitz.constraints.memo import Memo
from iresflow_plugin.torch_state import apply, autocast_dtype, is_plain, single


@dataclass
class _Found:
    """What was found out about a weight, without graph."""

    weight: Tensor
    lipschitz: float
    gradient: Tensor  # of the bound of its norm, raised by the rounding margin
    norm: float

    @cached_property
    def constrained(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return self.weight if self.norm <= self.lipschitz else self.scale(self.weight)

    def scale(self, weight: Tensor) -> Tensor:
        return scaled(weight, self.lipschitz / self.norm)


class _Scaled(torch.autograd.Function):
    """c W / N(W) with a norm that was computed before, and its gradient D: the cotangent C becomes

        c / N (C - <C, W> / N D),

    where further derivatives compute N and D anew, with their graph.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, found: _Found, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        return found.scale(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        weight, ctx.found, ctx.gradient = inputs
        ctx.save_for_backward(weight)
        ctx.save_for_forward(weight)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        weight, norm, direction = _Scaled._again(ctx)
        share = (cotangent * weight).sum() / norm
        return ((cotangent - share * direction) * (ctx.found.lipschitz / norm)).to(cotangent.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        weight, norm, direction = _Scaled._again(ctx)
        tangent = single(grad_inputs[0])
        change = tangent - (direction * tangent).sum() / norm * weight
        return (change * (ctx.found.lipschitz / norm)).to(grad_inputs[0].dtype)

    @staticmethod
    def _again(ctx: Any) -> tuple[Tensor, Tensor | float, Tensor]:
        """W, N and D, with a graph if one is asked for."""
        weight = single(ctx.saved_tensors[0])
        if not torch.is_grad_enabled():
            return weight, ctx.found.norm, ctx.found.gradient
        direction = ctx.gradient(ctx.saved_tensors[0])
        return weight, (direction * weight).sum(), direction


class Spectral(Constraint):
    """W min(1, c / |W|_p) with the certified Schatten bound |W|_2 <= |W|_p <= 1.04 |W|_2 (arXiv 2305.16173).

    On the CPU the result is kept with a copy of the weight it was computed from and reused only while the weight
    equals that copy entry by entry, and autocast is as it was, so it cannot be stale; on a GPU the comparison would
    stall the queue, and it is recomputed.

    Of a convolution the bound is that of `iresflow_plugin.lipschitz.convolution`: looser by at most `looseness`,
    from 1 % for few channels to 20 % for many, and its gradient is that at the frequency where the norm is largest.
    """

    def __init__(self, lipschitz: float = 1.0) -> None:
        super().__init__(lipschitz)
        self._memo: Memo[_Found] = Memo()

    def certify(self, weight: Tensor) -> tuple[Tensor, Tensor | float]:
        if weight.device.type != "cpu" or torch.compiler.is_compiling() or not is_plain(weight):
            norm = self._norm(weight, self._gradient(weight.detach()))
            return scaled(weight, shrink(norm, self.lipschitz)), norm.detach()
        settings = self.lipschitz, self.spec, autocast_dtype(weight)
        found = self._memo.recall(weight.detach(), settings, self._find)
        if not torch.is_grad_enabled():
            return found.constrained, found.norm
        if found.norm <= self.lipschitz:
            return weight, found.norm
        return apply(_Scaled, weight, found, self._gradient), found.norm

    def _find(self, weight: Tensor) -> _Found:
        gradient = self._gradient(weight)
        return _Found(weight, self.lipschitz, gradient, (gradient * single(weight)).sum().item())

    def _norm(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return matrix.norm_of(single(weight), gradient, self._gradient)

    def _gradient(self, weight: Tensor) -> Tensor:
        """Of the bound of the norm, in the shape of the weight."""
        if self.spec is not None:
            return convolution.schatten_gradient(single(weight), self.spec, stored=weight.dtype)
        w = as_matrix(weight)
        gradient = matrix.schatten_gradient(w, margin=matrix.rounding_margin(w, stored=weight.dtype))
        return gradient.view(weight.shape)
