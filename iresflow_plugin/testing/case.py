"""A subject with all that a check needs: fresh copies, data, and the dense references."""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions.transforms import _InverseTransform

from iresflow_plugin.testing.doors import Door, door_of, explicit_pass, modules_of

Draw = Callable[[int], Tensor]


class NotApplicableError(Exception):
    """The property does not concern this subject; the message says why."""


@dataclass(frozen=True)
class Measurement:
    """One number against its limit: the property holds if measured <= allowed."""

    measured: float
    allowed: float
    sentence: str

    @property
    def passed(self) -> bool:
        return self.measured <= self.allowed  # NaN fails


class Live:
    """A copy of the subject in one dtype and one mode, to be called and changed at will."""

    def __init__(self, obj: Any, door: Door, dtype: torch.dtype, train: bool) -> None:
        self.obj, self.door, self.dtype = obj, door, dtype
        self.modules = modules_of(obj)
        for module in self.modules:
            module.to(dtype).train(train)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.door.forward(self.obj, x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.door.inverse(self.obj, y, context)

    def call(self, direction: str, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.forward(x, context) if direction == "forward" else self.inverse(x, context)

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self.modules for p in module.parameters() if p.requires_grad]

    @torch.no_grad()
    def disturb(self, size: float = 0.05) -> None:
        """Move every parameter a little, away from zeros that initialisation left."""
        for p in self.parameters():
            p.add_(size * torch.randn_like(p))


@dataclass
class Case:
    """One subject under test. The user's object itself is never called, so its ActNorm, say, stays as it is.

    Args:
        subject: a transform or flow of any host, a pair of functions, or a function without arguments that makes one.
        event_shape, context_shape: of one sample, without the batch.
        deterministic: whether the log-det is claimed to be exact; None finds out.
        contraction: whether y = x + g(x) with Lip(g) < 1 is claimed; None finds out by the classes inside.
        inputs, outputs: draw n points of the domain and the codomain; None is the standard normal.
        draws: of a random log-det, for its mean.
        seed: of everything.
    """

    subject: Any
    event_shape: tuple[int, ...]
    context_shape: tuple[int, ...] | None = None
    deterministic: bool | None = None
    contraction: bool | None = None
    inputs: Draw | None = None
    outputs: Draw | None = None
    batch: int = 6
    draws: int = 200
    seed: int = 0
    factory: Callable[..., Any] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        if _is_factory(self.subject):
            self.factory = self.subject
            self.subject = self.subject()
        self.door = door_of(self.subject)
        self.explicit = explicit_pass(self.subject)
        self.base = duplicate(self.subject)
        self._initialise()
        if self.contraction is None:
            self.contraction = any(_full_name(m) in RESIDUAL for top in modules_of(self.base) for m in top.modules())
        self.varies = self._varies()

    @property
    def size(self) -> int:
        return int(torch.Size(self.event_shape).numel())

    def live(self, dtype: torch.dtype = torch.float64, train: bool = False) -> Live:
        return Live(duplicate(self.base), self.door, dtype, train)

    def x(self, n: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
        n = self.batch if n is None else n
        return (torch.randn(n, *self.event_shape) if self.inputs is None else self.inputs(n)).to(dtype)

    def y(self, n: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
        n = self.batch if n is None else n
        return (torch.randn(n, *self.event_shape) if self.outputs is None else self.outputs(n)).to(dtype)

    def point(self, direction: str, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.x(dtype=dtype) if direction == "forward" else self.y(dtype=dtype)

    def context(self, n: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor | None:
        if self.context_shape is None:
            return None
        return torch.randn(self.batch if n is None else n, *self.context_shape).to(dtype)

    # references -----------------------------------------------------------------------------------

    def jacobian(self, live: Live, x: Tensor, context: Tensor | None) -> Tensor:
        """Dense Jacobians of the explicit pass, shape (B, D, D): rows are taken to be independent.

        By autograd, or where that fails, for whatever reason of the subject's, by central differences.
        """
        try:
            x = x.detach().clone().requires_grad_()
            with torch.enable_grad():
                y = live.call(self.explicit, x, context)[0].flatten(1)
                slopes = [torch.autograd.grad(out.sum(), x, retain_graph=True)[0].flatten(1) for out in y.unbind(1)]
            return torch.stack(slopes, 1)
        except RuntimeError:
            return self._differences(live, x.detach(), context)

    @torch.no_grad()
    def _differences(self, live: Live, x: Tensor, context: Tensor | None) -> Tensor:
        columns = []
        for unit in torch.eye(self.size, dtype=x.dtype).view(-1, *self.event_shape):
            up, down = (live.call(self.explicit, x + h * unit, context)[0].flatten(1) for h in (1e-5, -1e-5))
            columns.append((up - down) / 2e-5)
        return torch.stack(columns, 2)

    def log_det(self, live: Live, direction: str, x: Tensor, context: Tensor | None) -> Tensor:
        """The true log-det of a pass at x, from the dense Jacobian of the explicit pass."""
        if direction == self.explicit:
            return torch.linalg.slogdet(self.jacobian(live, x, context))[1]
        image = live.call(direction, x, context)[0].detach()
        return -torch.linalg.slogdet(self.jacobian(live, image, context))[1]

    # ----------------------------------------------------------------------------------------------

    def _initialise(self) -> None:
        """Layers that look at their first batch, such as ActNorm, see one now, in our copy."""
        live = Live(self.base, self.door, torch.float32, train=True)
        for direction in ("forward", "inverse"):
            try:
                with torch.no_grad():
                    live.call(direction, self._first(direction), self.context(64, torch.float32))
            except Exception:  # what is wrong here is for the checks to tell
                continue
        for module in live.modules:
            module.eval()

    def _first(self, direction: str) -> Tensor:
        return self.x(64, torch.float32) if direction == "forward" else self.y(64, torch.float32)

    def _varies(self) -> bool:
        """Whether the log-det is random, in some mode."""
        for train in (False, True):
            try:
                live, x, context = self.live(train=train), self.point(self.explicit), self.context()
                first, second = (live.call(self.explicit, x, context)[1].detach() for _ in range(2))
                if not torch.allclose(first, second, rtol=1e-9, atol=1e-9, equal_nan=True):
                    return True
            except Exception:
                continue
        return False


def duplicate(subject: Any) -> Any:
    """A deep copy, also of torch's inverses."""
    with copied_inverses():
        return copy.deepcopy(subject)


@contextmanager
def copied_inverses() -> Iterator[None]:
    """Copies and pickles torch's inverses whole: their own way forgets what they are the inverse of."""
    usual = copyreg.dispatch_table.pop(_InverseTransform, None)
    copyreg.dispatch_table[_InverseTransform] = lambda inverse: (_empty, (type(inverse),), dict(vars(inverse)))
    try:
        yield
    finally:
        del copyreg.dispatch_table[_InverseTransform]
        if usual is not None:
            copyreg.dispatch_table[_InverseTransform] = usual


def _empty(kind: type) -> Any:
    return object.__new__(kind)


RESIDUAL = (  # classes that claim to be contractions around the identity
    "iresflow_plugin.block.ResidualBlock",
    "normflows.flows.residual.Residual",
    "FrEIA.modules.invertible_resnet.IResNetLayer",
    "torchflows.bijections.finite.residual.iterative.InvertibleResNetBlock",
    "torchflows.bijections.finite.residual.iterative.ResFlowBlock",
)


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_factory(subject: Any) -> bool:
    if isinstance(subject, type):
        return True
    if isinstance(subject, (nn.Module, tuple)) or hasattr(subject, "forward"):
        return False
    try:
        door_of(subject)
    except TypeError:
        return callable(subject)
    return False
