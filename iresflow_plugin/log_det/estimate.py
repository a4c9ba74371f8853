"""What every log-det estimator takes and returns, and how an estimate gets its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from iresflow_plugin.maps import Map
from iresflow_plugin.torch_state import apply


@dataclass(frozen=True)
class Estimate:
    """log det(I + J) of one call, with what is known about its error.

    Attributes:
        value: g(x), shape (B, *event).
        log_det: per sample, shape (B,), in nats; its gradient is right as well.
        standard_error: per sample, shape (B,); 0 if exact, NaN if a single probe leaves it unknown.
        remainder: per sample, shape (B,); a bound on the terms a truncated series left out, for the probes drawn.
        terms: number of terms of the power series that were used; 0 if exact.
    """

    value: Tensor
    log_det: Tensor
    standard_error: Tensor
    remainder: Tensor
    terms: int


class LogDet(Protocol):
    """An estimator: evaluates g once and returns its value with log det(I + J)."""

    def __call__(self, g: Map, x: Tensor) -> Estimate: ...


def with_gradient_of(surrogate: Tensor, value: Tensor, g: Map, x: Tensor) -> Tensor:
    """`value` with the first derivatives of `surrogate`, in reverse and in forward mode. Second ones are refused."""
    if torch.compiler.is_compiling():  # compiled code has first derivatives alone
        return value + (surrogate - surrogate.detach())
    return apply(_Attached, value, surrogate, x, *g.tensors())


def held_still(x: Tensor) -> Tensor:
    """A constant of these numbers, also in forward mode, which no_grad does not stop."""
    return x.detach() if torch.compiler.is_compiling() else apply(_Constant, x)


class _Constant(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        return None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        return torch.zeros_like(grad_inputs[0])


class _Attached(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, surrogate: Tensor, *sources: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return None, _once(cotangent, ctx.saved_tensors), *[None] * len(ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        return _once(grad_inputs[1], ctx.saved_tensors)


def _once(derivative: Tensor, sources: tuple[Tensor, ...]) -> Tensor:
    """The derivative, and a refusal for who differentiates it again with regard to what it was taken at."""
    if not torch.is_grad_enabled():
        return derivative
    return derivative * apply(_Refusal, torch.ones_like(derivative), *sources)


class _Refusal(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(ones: Tensor, *sources: Tensor) -> Tensor:
        return ones.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise RuntimeError(
            "A random log-det has first derivatives only: its probes meet a Jacobian that is held still. For second "
            "derivatives use log_det=Exact(), as in `with using(model, log_det=Exact()): ...`."
        )

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> None:
        _Refusal.backward(ctx)
