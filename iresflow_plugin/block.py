"""The residual block: the one place where contraction, log-det and inverse meet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from iresflow_plugin.inverse import Anderson, Solution, Solver, differentiable_solution
from iresflow_plugin.lipschitz import Bound, contraction, lipschitz_bound
from iresflow_plugin.log_det import BySize, Estimate, LogDet
from iresflow_plugin.maps import Endomap, Map
from iresflow_plugin.settings import chosen, overriding
from iresflow_plugin.torch_state import autocast_dtype, full_precision

DEFAULT_LOG_DET = BySize()
DEFAULT_INVERSE = Anderson()


class ResidualBlock(nn.Module):
    """y = x + g(x; context) with Lip(g) < 1 in x, hence invertible (Behrmann et al. 2019, arXiv 1811.00995).

    Both directions are differentiable in inputs, parameters and context. train() and eval() change nothing.

    Args:
        branch: g, a network certified by construction: one of `iresflow_plugin.nets`, or your own through `constrain`.
        log_det: an estimator; None is `BySize()`: exact for small events, unbiased beyond.
        inverse: a solver; None is `Anderson()`, to what the dtype can hold.

    Raises:
        NotContractiveError: if the branch is not certified to stay below 1, naming the module that is not.

    >>> from iresflow_plugin.nets import LipschitzMLP
    >>> block = ResidualBlock(LipschitzMLP([3, 16, 3]))
    >>> x = torch.randn(5, 3)
    >>> y, log_det = block(x)
    >>> log_det.shape, torch.allclose(block.inverse(y)[0], x, atol=1e-5)
    (torch.Size([5]), True)
    """

    def __init__(self, branch: nn.Module, log_det: LogDet | None = None, inverse: Solver | None = None) -> None:
        super().__init__()
        _check_kind("branch", branch, nn.Module)
        with torch.no_grad():
            contraction(branch)
        self.branch = branch
        self.estimator = DEFAULT_LOG_DET if log_det is None else log_det
        self.solver = DEFAULT_INVERSE if inverse is None else inverse

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "estimator":
            object.__setattr__(self, name, value)  # an estimator that is a module would pass the property by
        else:
            super().__setattr__(name, value)

    @property
    def estimator(self) -> LogDet:
        """The log-det estimator, or the one of `using` around this call."""
        return chosen(self, "log_det", self._log_det)

    @estimator.setter
    def estimator(self, value: LogDet) -> None:
        self._modules.pop("_log_det", None)  # an estimator may be a module itself
        self.__dict__.pop("_log_det", None)
        self._log_det = _check_callable("log_det", value)

    @property
    def solver(self) -> Solver:
        """The solver of the inverse, or the one of `using` around this call."""
        return chosen(self, "inverse", self._inverse)

    @solver.setter
    def solver(self, value: Solver) -> None:
        self._inverse = _check_kind("inverse", value, Solver)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y = x + g(x) and log |det dy/dx|.

        Args:
            x: shape (B, *event).
            context: shape (B, C), or (1, C) for the whole batch; for images perhaps (B, C, height, width), as the
                branch takes it; ignored by an unconditional branch.

        Returns:
            y, shape (B, *event), and the log-det, shape (B,), in nats.
        """
        estimate = self.estimate(x, context)
        return x + estimate.value, estimate.log_det

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x with x + g(x) = y and log |det dx/dy|, minus the estimator's value at x.

        Under autocast it runs in full precision all the same, and gives tensors of the branch's dtype.

        Raises:
            NotConvergedError: if a sample could not be solved to the tolerance; says which, how far off, what to do.
        """
        g, y = self._ready_to_solve(y, context)
        with full_precision(y):
            x = differentiable_solution(self.solver, g, y)
            return x.clone(), -self.estimator(g, x).log_det  # a clone: the caller may change it in place

    def preimage(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """x with x + g(x) = y, differentiable as in `inverse`, without the log-det that mere samples do not need."""
        g, y = self._ready_to_solve(y, context)
        with full_precision(y):
            return differentiable_solution(self.solver, g, y).clone()

    def estimate(self, x: Tensor, context: Tensor | None = None) -> Estimate:
        """g(x) and the log-det at x with its standard error, remainder bound and number of terms."""
        return self.estimator(self._ready(x, context), x)

    def solve(self, y: Tensor, context: Tensor | None = None) -> Solution:
        """The solution for y with its certified error bound and evaluations, without gradients."""
        with torch.no_grad():
            g, y = self._ready_to_solve(y, context)
            with full_precision(y):
                return self.solver.solve(g, y)

    def certificate(self) -> Bound:
        """The certified bound of Lip(g) for the present weights."""
        return lipschitz_bound(self.branch)

    def extra_repr(self) -> str:
        return f"log_det={self.estimator}, inverse={self.solver}"

    def _ready(self, x: Tensor, context: Tensor | None) -> Map:
        """Check the inputs; compute weights and certificate, once for the whole call."""
        _check_kind("inputs", x, Tensor)
        parameter = next(self.branch.parameters(), None)
        _check_inputs(x, context, parameter.dtype if parameter is not None and autocast_dtype(x) is None else None)
        return Endomap(contraction(self.branch, context))

    def _ready_to_solve(self, y: Tensor, context: Tensor | None) -> tuple[Map, Tensor]:
        """As `_ready`, for a solve: under autocast it runs in full precision, in the dtype of the branch.

        The weights are still those of the forward pass under autocast, whose certificate leaves room for rounding
        them: others would make another function, and its inverse would be none of that pass.
        """
        g = self._ready(y, context)
        if autocast_dtype(y) is None:
            return g, y
        parameter = next(self.branch.parameters(), None)  # a replica on another device has none
        dtype = (g.dtype() or y.dtype) if parameter is None else parameter.dtype
        return g.to(dtype), y.to(dtype)


def _check_inputs(x: Tensor, context: Tensor | None, dtype: torch.dtype | None) -> None:
    """Tensors of this dtype, None if it may be any, whose shapes fit."""
    _check_floating("inputs", x, dtype)
    if x.ndim < 2:
        raise ValueError(f"inputs must have shape (batch, *event), got {tuple(x.shape)}.")
    if context is None:
        return
    _check_floating("context", context, dtype)
    if context.ndim < 2:
        raise ValueError(f"context must have shape (batch, features), got {tuple(context.shape)}.")
    if context.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"context must have one row, or as many rows as inputs ({x.shape[0]}), got {context.shape[0]}."
        )


def _check_floating(name: str, x: Tensor, dtype: torch.dtype | None) -> None:
    _check_kind(name, x, Tensor)
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {x.dtype}.")
    if dtype is not None and dtype != x.dtype:
        raise TypeError(
            f"{name} has dtype {x.dtype} and the branch {dtype}; convert one of them, for example {name}.to({dtype})."
        )


def as_block(
    branch_or_block: nn.Module | ResidualBlock, log_det: LogDet | None = None, inverse: Solver | None = None
) -> ResidualBlock:
    """A block as it is, or a branch made into one; the adapters take either."""
    if not isinstance(branch_or_block, ResidualBlock):
        return ResidualBlock(branch_or_block, log_det, inverse)
    if log_det is not None or inverse is not None:
        raise ValueError("log_det and inverse belong to the ResidualBlock that was given; set them there.")
    return branch_or_block


@contextmanager
def using(model: nn.Module, log_det: LogDet | None = None, inverse: Solver | None = None) -> Iterator[None]:
    """Within the context, in this thread or task, every residual block in `model` uses this estimator and this solver.

    >>> from iresflow_plugin.log_det import PowerSeries
    >>> from iresflow_plugin.nets import LipschitzMLP
    >>> block = ResidualBlock(LipschitzMLP([3, 16, 3]))
    >>> with using(block, log_det=PowerSeries(tolerance=1e-4)):
    ...     y, log_det = block(torch.randn(5, 3))
    """
    blocks: list[nn.Module] = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} holds no ResidualBlock, so there is nothing to change.")
    settings: dict[str, Any] = {}
    if log_det is not None:
        settings["log_det"] = _check_callable("log_det", log_det)
    if inverse is not None:
        settings["inverse"] = _check_kind("inverse", inverse, Solver)
    with overriding(blocks, settings):
        yield


def _check_kind(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {value!r} of type {type(value).__name__}.")
    return value


def _check_callable(name: str, value: LogDet) -> LogDet:
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"{name} must be an estimator such as Exact() or PowerSeries(terms=10), got {value!r}.")
    return value
