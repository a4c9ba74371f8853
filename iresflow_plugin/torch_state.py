"""What the package has to know of torch beside tensors: precision, autocast, torch.func, compiling."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

HALF = (torch.float16, torch.bfloat16)
_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def single(x: Tensor) -> Tensor:
    """`x` in at least single precision: half precision carries no certificate, no factorisation and no solve."""
    return x.float() if x.dtype in HALF else x


def most_precise(device: torch.device) -> torch.dtype:
    """The widest numbers that a device computes with; Apple's GPUs have no double precision."""
    return torch.float32 if device.type == "mps" else torch.float64


def norms(x: Tensor) -> Tensor:
    """2-norm of every sample, shape (B,), in the widest precision: squares neither overflow nor underflow."""
    flat, wide = x.flatten(1), most_precise(x.device)
    if x.dtype != wide or not flat.shape[1]:  # squares of narrower numbers fit into wider ones
        return torch.linalg.vector_norm(flat, dim=1, dtype=wide)
    limits = torch.finfo(wide)
    size = torch.linalg.vector_norm(flat, math.inf, dim=1, keepdim=True).clamp(limits.tiny, limits.max)
    return torch.linalg.vector_norm(flat / size, dim=1) * size[:, 0]


def per_sample(numbers: Tensor, x: Tensor) -> Tensor:
    """(B, ...) with dimensions of one entry put behind the batch, so that it meets the samples of `x`."""
    return numbers.view(len(numbers), *[1] * (x.ndim - numbers.ndim), *numbers.shape[1:])


def unit_roundoff(dtype: torch.dtype) -> float:
    """u, the largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast rounds the operands of products to where `x` lies; None if it is off."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def full_precision(x: Tensor) -> AbstractContextManager:
    """Switches autocast off where `x` lies: products in half precision carry no certificate, and no solve."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def autocast_as_now(x: Tensor) -> Callable[[], AbstractContextManager]:
    """Makes contexts in which autocast is as it is now, for what a backward pass computes anew."""
    device, dtype = x.device.type, autocast_dtype(x)
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    return partial(torch.autocast, device, dtype=dtype, enabled=dtype is not None)


def uses_tf32(x: Tensor) -> bool:
    """Whether products with this matrix are taken in TF32, as a GPU does when it was told that it may."""
    if x.device.type != "cuda" or x.dtype != torch.float32:
        return False
    flags = torch.backends.cuda.matmul
    if torch.compiler.is_compiling() or not hasattr(flags, "fp32_precision"):
        return bool(flags.allow_tf32)
    return flags.fp32_precision == "tf32"  # the older flag cannot be read once this has been set


def is_plain(x: Tensor) -> bool:
    """Whether the tensor is its entries and no more; inside torch.func transforms and forward mode it is not."""
    return not _functorch.is_functorch_wrapped_tensor(x) and forward_ad.unpack_dual(x).tangent is None


def is_readable(x: Tensor) -> bool:
    """Whether a number of `x` can be read now: in torch.func.grad it can, in vmap it is many numbers."""
    if torch.compiler.is_compiling() or x.device.type == "meta":
        return x.device.type != "meta"
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return False
        x = _functorch.get_unwrapped(x)
    return True


def inside_functorch() -> bool:
    """Whether a torch.func transform is running; what is computed then may not be carried out of it."""
    return not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack() is not None


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, without torch's look at its signature, which costs more than a small function itself."""
    if inside_functorch():
        _check_forward_mode(args)
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # pyright: ignore[reportAttributeAccessIssue]


def _check_forward_mode(args: tuple[Any, ...]) -> None:
    """Refuses forward mode in forward mode: torch loses the inner tangent in every autograd.Function."""
    stack = _functorch.get_interpreter_stack() or []
    levels = {level.level() for level in stack if level.key() == _functorch.TransformType.Jvp}
    if len(levels) > 1 and any(len(levels & _levels_of(t)) > 1 for t in args if isinstance(t, Tensor)):
        raise RuntimeError(
            "Forward mode inside forward mode is not supported by torch's autograd.Function; take the inner derivative "
            "in reverse mode, as torch.func.hessian does."
        )


def _levels_of(x: Tensor) -> set[int]:
    """Of the torch.func transforms that follow the tensor."""
    levels = set()
    while _functorch.is_functorch_wrapped_tensor(x):
        levels.add(_functorch.maybe_get_level(x))
        x = _functorch.get_unwrapped(x)
    return levels


def draw_number(draw: Callable[[], Tensor]) -> float:
    """A random number for the whole call: under torch.func.vmap, too, it is one, which all members share."""
    if not inside_functorch():
        return draw().item()
    with temporarily_clear_interpreter_stack():
        return draw().item()


def draw_options(generator: torch.Generator | None) -> dict[str, Any]:
    """The keyword for a generator, if there is one: compiled code with dynamic shapes takes no `generator=None`."""
    return {} if generator is None else {"generator": generator}
