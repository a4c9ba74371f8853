"""Weight constraints |W|_2 <= c as torch parametrizations: the raw weight is free, the weight in use obeys.

A constraint is computed from the raw weight whenever the layer is used, so no optimiser step, loaded checkpoint or
manual edit can break it, and nobody has to call anything. All of them leave a small enough weight as it is (soft)
but `Bjorck`, which pushes every singular value towards c. For a convolution |W|_2 is the norm of the operator on
images, of every size.

| constraint         | weight in use                           | reference                          |
|--------------------|-----------------------------------------|------------------------------------|
| `Spectral`         | W min(1, c / bound(W))                  | Delattre et al. 2023, 2305.16173   |
| `AlmostOrthogonal` | W diag(min(1, c / sqrt(sum_j |W'W|_ij))) | Prach and Lampert 2022, 2208.03160 |
| `Bjorck`           | c times W <- W (3 I - W'W) / 2, repeated | Anil, Lucas and Grosse 2019, 1811.05381 |
| `Frobenius`        | W min(1, c / |W|_F)                     |                                    |
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from iresflow_plugin.errors import NotContractiveError
from iresflow_plugin.lipschitz import convolution, matrix
from iresflow_plugin.lipschitz.activations import Activation
from iresflow_plugin.lipschitz.convolution import CONVOLUTIONS, Convolution
from iresflow_plugin.lipschitz.modules import AddContext
from iresflow_plugin.maps import autocast_dtype, full_precision, is_plain


class Constraint(nn.Module):
    """Parametrization of a weight, seen as an (out, in) matrix, that keeps |W|_2 <= `lipschitz`.

    `forward(weight)` is the weight in use; `certify(weight)` is that weight with a certified bound of the raw one: the
    norm of the weight in use is at most the smaller of that bound and `lipschitz`. `convolution` is None for a dense
    layer; `install` sets it to the layer's own.
    """

    convolution: Convolution | None = None

    def __init__(self, lipschitz: float = 1.0) -> None:
        super().__init__()
        if not 0 < lipschitz < float("inf"):
            raise ValueError(f"lipschitz must be a positive number, got {lipschitz}.")
        self.lipschitz = float(lipschitz)

    @staticmethod
    def check(layer: nn.Module) -> None:
        """Raises NotContractiveError if this constraint cannot hold the layer."""

    def certify(self, weight: Tensor) -> tuple[Tensor, Tensor | float]:
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        return self.certify(weight)[0]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """A weight within the bound stands as it is; a larger one will be scaled when used."""
        return weight

    def extra_repr(self) -> str:
        return f"lipschitz={self.lipschitz:.4g}"


@dataclass
class _Memory:
    """What was found out about a weight, without graph."""

    weight: Tensor
    gradient: Tensor  # of the bound of its norm, raised by the rounding margin
    norm: float | None  # None if the numbers cannot be read now
    autocast: torch.dtype | None = None  # for which that margin was made
    constrained: tuple[Tensor, Tensor | float] | None = None


class Spectral(Constraint):
    """W min(1, c / |W|_p) with the certified Schatten bound |W|_2 <= |W|_p <= 1.04 |W|_2 (arXiv 2305.16173).

    On the CPU the result is kept with a copy of the weight it was computed from and reused only while the weight
    equals that copy entry by entry, and autocast is as it was, so it cannot be stale; on a GPU the comparison would
    stall the queue, and it is recomputed. First derivatives with respect to the weight only: the gradient of the norm
    holds still.

    Of a convolution the bound is that of `iresflow_plugin.lipschitz.convolution`: looser by at most `looseness`,
    from 1 % for few channels to 20 % for many, and its gradient is that at the frequency where the norm is largest.
    """

    def __init__(self, lipschitz: float = 1.0) -> None:
        super().__init__(lipschitz)
        self._memory: _Memory | None = None

    def forward(self, weight: Tensor) -> Tensor:
        return self._constrain(weight, self._recall(weight))[0]

    def certify(self, weight: Tensor) -> tuple[Tensor, Tensor | float]:
        memory = self._recall(weight)
        if torch.is_grad_enabled():
            return self._constrain(weight, memory)
        if memory.constrained is None:
            with torch.inference_mode(False), torch.no_grad():
                # from the copy: a small weight stays as it is, and the caller's may change in place
                memory.constrained = self._constrain(memory.weight, memory)
        return memory.constrained

    def _constrain(self, weight: Tensor, memory: _Memory) -> tuple[Tensor, Tensor | float]:
        if memory.norm is None:
            norm = torch.dot(memory.gradient.flatten(), _as_matrix(weight).flatten())
            return _scaled(weight, _shrink(norm, self.lipschitz)), norm
        if memory.norm <= self.lipschitz:
            return weight, memory.norm
        norm = torch.dot(memory.gradient.view(-1), _as_matrix(weight).reshape(-1))
        return _scaled(weight, self.lipschitz / norm), memory.norm

    def _recall(self, weight: Tensor) -> _Memory:
        weight = weight.detach()
        if weight.device.type != "cpu" or torch.compiler.is_compiling() or not is_plain(weight):
            return _Memory(weight, self._gradient(weight), norm=None)
        autocast = autocast_dtype(weight)
        if self._memory is None or self._memory.autocast != autocast or not _same(self._memory.weight, weight):
            # what is kept may serve a training step next, which inference tensors cannot
            with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
                gradient = self._gradient(weight)
                norm = torch.dot(gradient.flatten(), _as_matrix(weight).flatten()).item()
                self._memory = _Memory(weight.clone(), gradient, norm, autocast)
        return self._memory

    def _gradient(self, weight: Tensor) -> Tensor:
        if self.convolution is not None:
            return convolution.schatten_gradient(_single(weight), self.convolution, stored=weight.dtype)
        w = _as_matrix(weight)
        return matrix.schatten_gradient(w, margin=matrix.rounding_margin(w, stored=weight.dtype))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        memory = self.__dict__.get("_memory")
        if name == "lipschitz" and memory is not None:
            memory.constrained = None
        if name == "convolution":
            self._memory = None

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_memory": None}


class AlmostOrthogonal(Constraint):
    """W diag(min(1, c / sqrt(sum_j |W'W|_ij))), scaling columns one by one (Prach and Lampert 2022, arXiv 2208.03160).

    Rows are scaled instead when there are fewer of them. One product, hence the cheapest certificate; looser than
    `Spectral` until training has made the columns almost orthogonal. Of a convolution the sum runs over the lags of
    W'W, too, and needs no frequencies.
    """

    def certify(self, weight: Tensor) -> tuple[Tensor, float]:
        if self.convolution is not None:
            return self._certify_convolution(weight, self.convolution)
        w = _as_matrix(weight)
        wide = w.shape[0] < w.shape[1]
        with full_precision(w):
            gram = w @ w.mT if wide else w.mT @ w
        scale = self._scale(gram.abs().sum(1), matrix.rounding_margin(w, stored=weight.dtype))
        scaled = w * (scale[:, None] if wide else scale)
        return scaled.to(weight.dtype).view_as(weight), self.lipschitz

    def _certify_convolution(self, weight: Tensor, operator: Convolution) -> tuple[Tensor, float]:
        kernel, sizes = operator.split(_single(weight))
        with full_precision(kernel):
            lags = convolution.gram_lags(kernel, sizes)
        margin = matrix.rounding_margin(kernel[0, :, :, 0], stored=weight.dtype, taps=kernel.shape[-1])
        scale = self._scale(lags.abs().sum((0, -1)), margin * operator.gain)
        wide = kernel.shape[1] < kernel.shape[2]
        kernel = kernel * (scale[:, :, None, None] if wide else scale[:, None, :, None])
        return operator.join(kernel, weight.shape).to(weight.dtype), self.lipschitz

    def _scale(self, squares: Tensor, margin: float) -> Tensor:
        squares = squares * margin**2
        return _shrink(squares.clamp_min(self.lipschitz**2).sqrt(), self.lipschitz)  # a root has no slope at 0


class Bjorck(Constraint):
    """c times W <- W (3 I - W'W) / 2, repeated, from W / |W|_p (Anil, Lucas and Grosse 2019, arXiv 1811.05381).

    The map s -> s (3 - s^2) / 2 keeps singular values in [0, 1] and pulls them towards 1, so any number of steps is
    certified. Not soft: a small weight grows to norm c, and a zero weight is mapped to zero. For dense layers alone.
    """

    def __init__(self, lipschitz: float = 1.0, steps: int = 12) -> None:
        super().__init__(lipschitz)
        self.steps = steps

    @staticmethod
    def check(layer: nn.Module) -> None:
        if isinstance(layer, CONVOLUTIONS):
            raise NotContractiveError(
                f"Bjorck cannot constrain {type(layer).__name__}: products of convolutions have ever larger kernels; "
                "use constraint=Spectral or AlmostOrthogonal.",
                layer,
            )

    def certify(self, weight: Tensor) -> tuple[Tensor, float]:
        w = _as_matrix(weight)
        norm = matrix.schatten_norm(w)
        w = w / norm.clamp_min(1e-12)  # keeps the gradient at zero finite
        with full_precision(w):
            for _ in range(self.steps):
                w = 1.5 * w - 0.5 * (w @ w.mT @ w if w.shape[0] < w.shape[1] else w @ (w.mT @ w))
        return (w * (self.lipschitz / matrix.rounding_margin(w, stored=weight.dtype))).to(weight.dtype).view_as(
            weight
        ), self.lipschitz


class Frobenius(Constraint):
    """W min(1, c / |W|_F): the simplest certificate, loose by up to sqrt(rank); of a convolution, sum_j |K_j|_F."""

    def certify(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self.convolution is not None:
            kernel = self.convolution.split(_single(weight))[0].flatten(0, 1)
            taps = [matrix.frobenius_norm(tap, weight.dtype, kernel.shape[-1]) for tap in kernel.unbind(-1)]
            norm = torch.stack(taps).sum() * self.convolution.gain
        else:
            norm = matrix.frobenius_norm(_as_matrix(weight), stored=weight.dtype)
        return _scaled(weight, _shrink(norm, self.lipschitz)), norm


def spectral_penalty(module: nn.Module, strength: float = 1e-3) -> Tensor:
    """strength * sum_W |W|_2^2 over the raw weights of all layers of the branch, to be added to a loss.

    The soft alternative to a constraint, or its companion: it keeps raw weights from growing where the constraint
    binds. It proves nothing by itself.
    """
    weights = list(_raw_weights(module))
    if not weights:
        raise ValueError(f"{type(module).__name__} holds no weight matrix to penalise.")
    return strength * torch.stack([_norm(w, operator) ** 2 for w, operator in weights]).sum()


def operator_of(layer: nn.Module) -> Convolution | None:
    """What makes an operator of the layer's weight; None if the weight is the matrix itself."""
    return Convolution.of(layer) if isinstance(layer, CONVOLUTIONS) else None


def install(layer: nn.Module, constraint: Constraint) -> None:
    """Put a constraint on the weight of a layer, which stays picklable: torch refuses that to parametrized modules."""
    constraint.convolution = operator_of(layer)
    parametrize.register_parametrization(layer, "weight", constraint)
    cast(Any, type(layer)).__reduce_ex__ = _reduce  # that class is this layer's own, torch has just made it


def _reduce(layer: Any, protocol: int) -> str | tuple:
    """As the plain layer with its raw weight, and the constraints of that.

    A parametrization of another kind keeps its raw weight in its own way, and may hold a part of the weight itself.
    """
    alone = set(layer.parametrizations) == {"weight"}
    if not alone or not all(isinstance(part, Constraint) for part in layer.parametrizations["weight"]):
        return object.__reduce_ex__(layer, protocol)  # torch's refusal
    stack = layer.parametrizations["weight"]
    modules = {name: module for name, module in layer._modules.items() if name != "parametrizations"}
    parameters = {**layer._parameters, "weight": stack.original}
    state = {**layer.__dict__, "_modules": modules, "_parameters": parameters}
    return _restore, (type(layer).__base__, state, list(stack))


def _restore(kind: type[nn.Module], state: dict, constraints: list[Constraint]) -> nn.Module:
    layer = kind.__new__(kind)
    layer.__setstate__(state)
    for constraint in constraints:
        install(layer, constraint)
    return layer


def _raw_weights(module: nn.Module) -> Iterable[tuple[Tensor, Convolution | None]]:
    """Every raw weight once, with its operator; networks of the context and activations are free."""
    parts = list(module.modules())
    seen = {id(p) for part in parts if isinstance(part, (AddContext, Activation)) for p in part.parameters()}
    for part in parts:
        constrained = parametrize.is_parametrized(part, "weight")
        owner = cast(Any, part).parametrizations["weight"] if constrained else part
        for p in owner.parameters(recurse=owner is not part):
            if p.ndim >= 2 and id(p) not in seen:
                seen.add(id(p))
                yield p, operator_of(part)


def _norm(weight: Tensor, operator: Convolution | None) -> Tensor:
    return matrix.schatten_norm(_as_matrix(weight)) if operator is None else convolution.operator_norm(weight, operator)


def _shrink(norm: Tensor, lipschitz: float) -> Tensor:
    """min(1, c / norm), whose gradient is finite where the norm is zero."""
    return torch.where(norm <= lipschitz, 1.0, lipschitz / norm.clamp_min(lipschitz))


def _scaled(weight: Tensor, factor: Tensor) -> Tensor:
    """Rounded to the weight's dtype once, at the end: in half precision a small factor has few digits, or none."""
    return (_single(weight) * factor).to(weight.dtype)


def _as_matrix(weight: Tensor) -> Tensor:
    """The weight as (out, in), in at least single precision: half precision cannot carry a certificate."""
    return _single(weight.flatten(1))


def _single(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
