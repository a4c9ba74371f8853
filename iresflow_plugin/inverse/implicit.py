"""The derivatives of x = F^-1(y) without unrolling the solver, to any order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from iresflow_plugin.inverse.solve import Solver
from iresflow_plugin.maps import Around, Linearised, Map, Products, Rounded, pull_back, push_forward
from iresflow_plugin.torch_state import apply, full_precision, norms, per_sample


def differentiable_solution(solver: Solver, g: Map, y: Tensor) -> Tensor:
    """x with x + g(x) = y, with derivatives to y and to the tensors of g by the implicit function theorem.

    In reverse, for an upstream gradient v: (I + J)^T u = v, then u for y and -(dg/dt)^T u for a tensor t of g. In
    forward mode (I + J) dx = dy - dg/dt dt. Both are again the solution of u + h(u) = v with a contraction h of the
    same bound, so they are found by this very function and may be differentiated in their turn.
    """
    return apply(_Solution, y, solver, g, *g.tensors())


class _Solution(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, solver: Solver, g: Map, *tensors: Tensor) -> Tensor:
        with full_precision(y):
            return solver.solve(g.holding(tensors), y).x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.solver, ctx.g, *tensors = inputs
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *tensors = ctx.saved_tensors
        g = ctx.g.holding(tensors)
        with full_precision(x):
            u = _linear_solution(ctx.solver, Transposed(g, x), v)
            return u, None, None, *pull_back(g, x, -u, ctx.needs_input_grad[3:])

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        dy, _, _, *tangents = grad_inputs
        x, *tensors = ctx.saved_tensors
        g = ctx.g.holding(tensors)
        with full_precision(x):
            pushed = push_forward(g, x, tangents)
            return _linear_solution(ctx.solver, Derivative(g, x), -pushed if dy is None else dy - pushed)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
        """One solve after the other: each has its own rows, weights and context."""
        y, solver, g, *tensors = args

        def member(i: int) -> Tensor:
            chosen = [t if d is None else t.select(d, i) for t, d in zip((y, *tensors), dims, strict=True)]
            return _Solution.apply(chosen[0], solver, g, *chosen[1:])

        dims = (in_dims[0], *in_dims[3:])
        return torch.stack([member(i) for i in range(info.batch_size)]), 0


def _linear_solution(solver: Solver, h: Map, v: Tensor) -> Tensor:
    """u + h(u) = v for a linear h, solved for unit vectors: a tolerance must not depend on the scale of the loss."""
    size = per_sample(norms(v.detach()).to(v.dtype), v)
    solvable = torch.isfinite(size) & (size > 0)
    unit = torch.where(solvable, v / torch.where(solvable, size, 1), 0)
    return differentiable_solution(solver, h, unit) * size  # 0 times infinity: what is not finite becomes NaN


@dataclass(eq=False)
class Derivative(Around):
    """u -> J u at x: linear in u, with the bound of g."""

    x: Tensor

    @property
    def needs_proof(self) -> bool:
        return False

    @cached_property
    def at_x(self) -> Linearised:
        return self.g.linearise(self.x)

    def __call__(self, u: Tensor) -> Tensor:
        return self.at_x.jvp(u)

    def linearise(self, x: Tensor) -> Linearised:
        return Linearised(self(x), self.at_x.jvp, self.at_x.vjp)

    def rounded(self, x: Rounded, products: Products) -> Rounded:
        return Map.rounded(self, x, products)

    def rows(self, index: Tensor) -> Derivative:
        return type(self)(self.g.rows(index), self.x[index])


class Transposed(Derivative):
    """u -> J^T u at x."""

    def __call__(self, u: Tensor) -> Tensor:
        return self.at_x.vjp(u)

    def linearise(self, x: Tensor) -> Linearised:
        return Linearised(self(x), self.at_x.vjp, self.at_x.jvp)
