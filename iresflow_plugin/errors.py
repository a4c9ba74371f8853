"""The sentences a user reads when something cannot be done."""

from __future__ import annotations

from torch import nn


class NotContractiveError(ValueError):
    """A branch has no certified Lipschitz bound below one, so y = x + g(x) need not be invertible."""

    def __init__(self, message: str, module: nn.Module | None = None) -> None:
        super().__init__(message)
        self.module = module


class NotConvergedError(RuntimeError):
    """A solve could not reach its certified error bound; `solution` holds what it has."""

    def __init__(self, message: str, solution: object = None) -> None:
        super().__init__(message)
        self.solution = solution


def path_of(module: nn.Module, root: nn.Module) -> str:
    """Where `module` hangs in `root`, as `state_dict` spells it, for error messages."""
    for name, child in root.named_modules():
        if child is module:
            return name or "(the network itself)"
    return "(not a submodule)"


def check_whole(name: str, value: object, least: int = 1) -> None:
    """A whole number, and not a smaller one."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
