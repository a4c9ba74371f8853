"""The certificate of a module tree: one rule per module type, from modules to `Map`s.

`certify(module, context)` computes every weight and takes the context in, once, and returns the branch as a `Map` that
carries its bound. Blocks evaluate nothing but such maps: what cannot be certified cannot be evaluated. To teach the
certificate a module of your own, register a rule,

    @certify.register
    def _(module: MyLayer, context=None) -> Map: ...

or give the module a method `lipschitz_bound() -> float`, to be trusted, and let torch.func differentiate it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from iresflow_plugin import maps
from iresflow_plugin.errors import NotContractiveError, path_of
from iresflow_plugin.lipschitz import convolution, matrix
from iresflow_plugin.lipschitz.activations import CONSTANTS, Activation, elementwise_map
from iresflow_plugin.lipschitz.constraint import Constraint, Spectral, install
from iresflow_plugin.lipschitz.convolution import CONVOLUTIONS, Convolution, padding_of
from iresflow_plugin.lipschitz.modules import (
    AddContext,
    Chain,
    Concatenate,
    LearnableConcatenate,
    Scale,
    Sum,
    takes_context,
)

REFUSED: dict[type[nn.Module], str] = {
    nn.SELU: "its Lipschitz constant is 1.758; use ELU, or Sine",
    nn.Dropout: "it redraws its mask at every evaluation, so the block would have no inverse; remove it",
    nn.AlphaDropout: "it redraws its mask at every evaluation, so the block would have no inverse; remove it",
    nn.BatchNorm1d: "it ties the rows of a batch together and its scale is not bounded; put an ActNorm between blocks",
    nn.BatchNorm2d: "it ties the rows of a batch together and its scale is not bounded; put an ActNorm between blocks",
    nn.BatchNorm3d: "it ties the rows of a batch together and its scale is not bounded; put an ActNorm between blocks",
    nn.LayerNorm: "it divides by the size of its input, which is not Lipschitz; put an ActNorm between blocks",
}


@dataclass(frozen=True)
class Bound:
    """A Lipschitz bound in the 2-norm; `certified` says whether it is proven or an estimate from below."""

    value: float
    certified: bool


def lipschitz_bound(module: nn.Module) -> Bound:
    """Lip(module) <= value, composed over the module tree, for its present weights, with respect to x alone.

    Raises:
        NotContractiveError: names the module for which no bound is known.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> layer.weight.data = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> lipschitz_bound(nn.Sequential(layer, nn.Tanh()))
    Bound(value=3.00..., certified=True)
    """
    with torch.no_grad():
        value = certified_map(module).bound
    return Bound(value, certified=not _trusts_a_method(module))


@torch.no_grad()
def lipschitz_estimate(module: nn.Module, x: Tensor, context: Tensor | None = None, steps: int = 30) -> Bound:
    """max over rows of |dg/dx|_2 at `x`, by power iteration: what the branch does there, from below. No certificate."""
    g = certified_map(module, context).linearise(x)
    v = torch.randn_like(x)
    norm = x.new_zeros(())
    for _ in range(steps):
        v = g.vjp(g.jvp(v / _row_norms(v).clamp_min(torch.finfo(x.dtype).tiny)))
        norm = _row_norms(v).sqrt().max()
    return Bound(float(norm), certified=False)


def certified_map(module: nn.Module, context: Tensor | None = None) -> maps.Map:
    """`certify`, with errors that name the offending module by its path in `module`."""
    try:
        return rule_of(module)(module, context)
    except NotContractiveError as error:
        where = "" if error.module is None else f"{type(error.module).__name__} at '{path_of(error.module, module)}': "
        raise NotContractiveError(f"{where}{error}", error.module) from None


def rule_of(module: nn.Module) -> Callable[..., maps.Map]:
    """The rule of `certify` for this module.

    Looked up in the registry: singledispatch itself keeps a cache by class, and every constrained layer has a class of
    its own, so that the cache changes under the eyes of torch.compile, which guards on it.
    """
    kind = next(kind for kind in type(module).__mro__ if kind in certify.registry)
    if _states_its_bound(module) and _replaces_forward(module, kind):
        kind = object  # what the rule of its base knows does not hold, and it has said what does
    return certify.registry[kind]


def contraction(branch: nn.Module, context: Tensor | None = None) -> maps.Map:
    """The branch as a `Map` whose bound is below one for every value its weights can take.

    Raises:
        NotContractiveError: if a layer is free to grow, or the bounds of the layers multiply to one or more.
    """
    g = certified_map(branch, context)
    if g.ceiling < 1:
        return g
    free = next((m for m in weighted_layers(branch) if math.isinf(_ceiling(m))), None)
    if free is not None:
        raise NotContractiveError(
            f"{type(free).__name__} at '{path_of(free, branch)}': its weight is free to grow, so nothing keeps "
            "x + g(x) invertible; pass the branch through iresflow_plugin.lipschitz.constrain(branch) first.",
            free,
        )
    raise NotContractiveError(
        f"The branch is certified only up to Lip(g) <= {g.ceiling:.6g}, and x + g(x) needs a bound below 1; "
        "pass it through iresflow_plugin.lipschitz.constrain(branch, lipschitz=0.97)."
    )


def constrain(net: nn.Module, lipschitz: float = 0.97, constraint: type[Constraint] = Spectral) -> nn.Module:
    """Turn a plain network into a certified branch with Lip(net) <= `lipschitz`, in place, and return it.

    Every linear layer and convolution gets the same bound, the largest for which the certificate of the whole is
    `lipschitz` (for a chain of m layers with 1-Lipschitz activations, its m-th root).

    Args:
        net: Sequential, Sum, Concatenate, nested as you like, of Linear layers, convolutions (zero or circular
            padding) and known activations.
        lipschitz: bound of the whole network, in (0, 1).
        constraint: `Spectral`, `AlmostOrthogonal`, `Bjorck` (not for convolutions) or `Frobenius`.

    Raises:
        NotContractiveError: names the module that cannot be certified.

    >>> net = constrain(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)), lipschitz=0.9)
    >>> lipschitz_bound(net).value <= 0.9
    True
    """
    check_lipschitz(lipschitz)
    certified_map(net)  # raises before anything is changed
    layers = list(weighted_layers(net))
    for layer in layers:
        constraint.check(layer)
    installed = [_install(layer, constraint) for layer in layers]

    def ceiling(c: float) -> float:
        for item in installed:
            item.lipschitz = c
        with torch.no_grad():
            return certified_map(net).ceiling

    if not installed:
        if ceiling(1.0) > lipschitz:
            raise NotContractiveError(
                f"The network has no weights to constrain and is certified only up to Lip(g) <= {ceiling(1.0):.6g}, "
                f"above the {lipschitz} asked for; put a Scale in front of it."
            )
        return net
    if ceiling(0.0) > lipschitz:
        least = ceiling(0.0)
        ceiling(1.0)
        raise NotContractiveError(
            f"Even with all weights at zero the network is certified only up to Lip(g) <= {least:.6g}, above the "
            f"{lipschitz} asked for: a part without weights, such as an Identity in a Sum, needs a Scale."
        )
    low, high = 0.0, 1.0
    while ceiling(high) < lipschitz and high < 2.0**100:  # it may depend on no weight at all
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ceiling(middle) <= lipschitz else (low, middle)
    ceiling(low)
    return net


def check_lipschitz(lipschitz: float) -> None:
    """A contraction needs a bound in (0, 1)."""
    if not 0 < lipschitz < 1:
        raise ValueError(f"lipschitz must lie in (0, 1) for x + g(x) to be invertible, got {lipschitz}.")


def weighted_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a branch whose weights its bound depends on; networks of the context are free."""
    seen: set[int] = set()
    stack = [module]
    while stack:
        part = stack.pop(0)
        if id(part) in seen or isinstance(part, (AddContext, Activation)) or _states_its_bound(part):
            continue
        seen.add(id(part))
        if isinstance(part, (nn.Linear, *CONVOLUTIONS)):
            yield part
        else:
            stack = list(part.children()) + stack


@singledispatch
def certify(module: nn.Module, context: Tensor | None = None) -> maps.Map:
    """The branch as a `Map`; rules below, one per module type."""
    for kind, reason in REFUSED.items():
        if isinstance(module, kind):
            raise NotContractiveError(f"{kind.__name__} cannot stand inside a branch: {reason}.", module)
    if type(module) in CONSTANTS:
        _check_unchanged(module)
        return elementwise_map(module)
    stated = getattr(module, "lipschitz_bound", None)
    if callable(stated):
        value = stated()
        value = value.value if isinstance(value, Bound) else float(cast(float, value))
        if not value >= 0:
            raise NotContractiveError(f"lipschitz_bound() must not be negative or NaN, got {value}.", module)
        return maps.Generic(module, value, context if takes_context(module) else None)
    raise NotContractiveError(
        f"no Lipschitz bound is known for {type(module).__name__}; build the branch from Sequential, Sum, Concatenate, "
        "Scale, Linear, Conv1d, Conv2d, Conv3d and the activations of iresflow_plugin.lipschitz, register a rule with "
        "certify.register, or give the module a method lipschitz_bound().",
        module,
    )


@certify.register(Chain)
@certify.register(nn.Sequential)
def _(module: nn.Sequential, context: Tensor | None = None) -> maps.Map:
    _check_unchanged(module, nn.Sequential, Chain)
    return maps.Composition([rule_of(part)(part, context) for part in module])


@certify.register
def _(module: Sum, context: Tensor | None = None) -> maps.Map:
    _check_unchanged(module, Sum)
    return maps.Sum([rule_of(part)(part, context) for part in module])


@certify.register
def _(module: Concatenate, context: Tensor | None = None) -> maps.Map:
    _check_unchanged(module, Concatenate)
    return maps.Concatenation([rule_of(part)(part, context) for part in module], module.dim)


@certify.register
def _(module: LearnableConcatenate, context: Tensor | None = None) -> maps.Map:
    _check_unchanged(module, LearnableConcatenate)
    parts = [rule_of(part)(part, context) for part in module]
    return maps.WeightedConcatenation(parts, module.eta, module.dim)


@certify.register
def _(module: Scale, context: Tensor | None = None) -> maps.Map:
    _check_unchanged(module, Scale)
    return maps.Scaling(module.factor, abs(module.factor))


@certify.register
def _(module: Activation, context: Tensor | None = None) -> maps.Map:
    _check_unchanged(module)
    return module.as_map()


@certify.register
def _(module: AddContext, context: Tensor | None = None) -> maps.Map:
    _check_unchanged(module, AddContext)
    return maps.NeedsContext() if context is None else maps.Shift(module.shift(context))


@certify.register(nn.Flatten)
@certify.register(nn.Unflatten)
def _(module: nn.Module, context: Tensor | None = None) -> maps.Map:
    _check_unchanged(module, nn.Flatten, nn.Unflatten)
    return maps.Reshape(module)


@certify.register
def _(module: nn.Linear, context: Tensor | None = None) -> maps.Map:
    _check_unchanged(module, nn.Linear)
    stack = _parametrizations(module)
    if len(stack) != 1 or not isinstance(stack[0], Constraint):
        weight = _weight_of(module)
        return maps.Affine(weight, module.bias, matrix.schatten_norm(weight), _ceiling(module))
    weight, bound = stack[0].certify(cast(Any, stack).original)
    return maps.Affine(weight, module.bias, bound, stack[0].lipschitz)


@certify.register(nn.Conv1d)
@certify.register(nn.Conv2d)
@certify.register(nn.Conv3d)
def _(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, context: Tensor | None = None) -> maps.Map:
    kind = next(kind for kind in CONVOLUTIONS if isinstance(module, kind))
    _check_unchanged(module, kind)
    if type(module)._conv_forward is not kind._conv_forward:
        raise NotContractiveError(f"{type(module).__name__} replaces _conv_forward, so its bound is not known.", module)
    operator, constraint, stack = Convolution.of(module), _constraint_of(module), _parametrizations(module)
    if constraint is not None and constraint.convolution != operator:  # someone has edited the layer since
        constraint.convolution = operator
    if constraint is not None:
        constraint.check(module)  # it may have been registered by hand
    if len(stack) == 1 and constraint is not None:
        weight, bound = constraint.certify(cast(Any, stack).original)
    else:
        weight = _weight_of(module)
        bound = convolution.operator_norm(weight, operator)
    geometry = maps.Geometry(module.stride, module.dilation, module.groups, padding_of(module), module.padding_mode)
    return maps.Convolution(weight, module.bias, geometry, bound, _ceiling(module))


def _check_unchanged(module: nn.Module, *kinds: type[nn.Module]) -> None:
    """A subclass with a forward of its own, or a hook, may compute anything: what we know of its base says nothing."""
    if kinds and all(type(module).forward is not kind.forward for kind in kinds):
        raise NotContractiveError(
            f"{type(module).__name__} replaces the forward of {kinds[0].__name__}, so its bound is not known; "
            "give it a method lipschitz_bound(), or register a rule with certify.register.",
            module,
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise NotContractiveError(
            f"{type(module).__name__} carries a forward hook, which may change what it computes; remove the hook "
            "(torch.nn.utils.spectral_norm and weight_norm of the old kind work by hooks, too).",
            module,
        )


def _replaces_forward(module: nn.Module, kind: type) -> bool:
    """Whether its forward is not the one of the class that has a rule; activations all bring one, and their rule."""
    return kind not in (object, Activation) and type(module).forward is not getattr(kind, "forward", None)


def _parametrizations(layer: nn.Module) -> Sequence[nn.Module]:
    """What stands between a layer's raw weight and the weight in use."""
    if not parametrize.is_parametrized(layer, "weight"):
        return ()
    return cast(Sequence[nn.Module], cast(nn.ModuleDict, layer.parametrizations)["weight"])


def _weight_of(layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Tensor:
    """The weight in use, in the dtype of the raw one: under autocast a parametrization may multiply in another."""
    weight, stack = layer.weight, _parametrizations(layer)
    if not len(stack) or maps.autocast_dtype(weight) is None:
        return weight
    return weight.to(next(cast(nn.Module, stack).parameters(), weight).dtype)


def _constraint_of(layer: nn.Module) -> Constraint | None:
    stack = _parametrizations(layer)
    return stack[-1] if len(stack) and isinstance(stack[-1], Constraint) else None


def _ceiling(layer: nn.Module) -> float:
    constraint = _constraint_of(layer)
    return math.inf if constraint is None else constraint.lipschitz


def _install(layer: nn.Module, constraint: type[Constraint]) -> Constraint:
    """The layer's constraint if it is of this kind, else a new one, behind whatever parametrizes the weight already."""
    present = _constraint_of(layer)
    if present is not None and type(present) is constraint:
        return present
    item = constraint()
    install(layer, item)
    return item


def _row_norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def _trusts_a_method(module: nn.Module) -> bool:
    """Whether some part of the tree states its own bound, which is then its word and not our proof."""
    return any(_states_its_bound(part) for part in module.modules())


def _states_its_bound(module: nn.Module) -> bool:
    return callable(getattr(module, "lipschitz_bound", None))
