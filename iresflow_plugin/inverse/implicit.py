"""The gradient of x = F^-1(y) without unrolling the solver."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iresflow_plugin.inverse.solve import Solution, Solver
from iresflow_plugin.maps import Linearised, Map, full_precision


def differentiable_solution(solver: Solver, g: Map, y: Tensor) -> Tensor:
    """x with x + g(x) = y, with gradients to y, parameters and context by the implicit function theorem.

    At the solution x* the expression y - g(x*) has the value x* and, with x* held fixed, the derivatives dy - dg; the
    true ones are (I + J)^-1 of these. So for an upstream gradient v the backward pass solves (I + J)^T u = v, a
    contraction with the same bound, and hands u to that expression.
    """
    solution: Solution = solver.solve(g, y)
    if not torch.is_grad_enabled():
        return solution.x
    return _Implicit.apply(y - g(solution.x), solution.x, solver, g)


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(explicit: Tensor, x: Tensor, solver: Solver, g: Map) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, x, ctx.solver, ctx.g = inputs
        ctx.save_for_backward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (x,) = ctx.saved_tensors
        with torch.no_grad(), full_precision(x):
            # Linear in v, so solved for unit vectors: a tolerance must not depend on the scale of the loss.
            v = grad_outputs[0]
            size = torch.linalg.vector_norm(v.flatten(1), dim=1).view(-1, *[1] * (v.ndim - 1))
            solvable = torch.isfinite(size) & (size > 0)
            unit = torch.where(
                solvable, v / torch.where(solvable, size, 1), 0
            )  # 0 * inf: what is not finite becomes NaN
            return ctx.solver.solve(_Transposed(ctx.g, x), unit).x * size, None, None, None


class _Transposed(Map):
    """u -> J^T u at x: linear in u, with the bound of g."""

    def __init__(self, g: Map, x: Tensor) -> None:
        self.g, self.x, self.ceiling, self.uses_functorch = g, x, g.ceiling, g.uses_functorch
        self.at_x = g.linearise(x)

    @property
    def bound(self) -> float:
        return self.g.bound

    def __call__(self, u: Tensor) -> Tensor:
        return self.at_x.vjp(u)

    def linearise(self, x: Tensor) -> Linearised:
        return Linearised(self(x), self.at_x.vjp, self.at_x.jvp)

    def rows(self, index: Tensor) -> Map:
        return _Transposed(self.g.rows(index), self.x[index])
