"""From a module to its map: parts say it themselves, torch's own layers have a rule each, others state a bound.

Blocks evaluate nothing but such maps: what cannot be certified cannot be evaluated. To bring a module of your own,
subclass `Part` and write `as_map`, or give it a method `lipschitz_bound() -> float`, to be trusted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from iresflow_plugin import maps
from iresflow_plugin.errors import NotContractiveError
from iresflow_plugin.lipschitz import convolution, matrix
from iresflow_plugin.lipschitz.constraints import Constraint, constraint_of, raw_parametrizations
from iresflow_plugin.lipschitz.part import Part
from iresflow_plugin.lipschitz.torch_activations import TORCH_ACTIVATIONS
from iresflow_plugin.torch_state import autocast_dtype

Rule = Callable[[Any, Tensor | None], maps.Map]


def map_of(module: nn.Module, context: Tensor | None = None) -> maps.Map:
    """The module as a map of the tensors it has now."""
    kind = _known_kind(module)
    as_known = kind is not None and type(module).forward is kind.forward and "forward" not in vars(module)
    if not as_known and states_its_bound(module):
        g: maps.Map = _stated_map(module, context)
    elif kind is None:
        raise NotContractiveError(_why_unknown(module), module)
    elif not as_known:
        raise NotContractiveError(
            f"{type(module).__name__} has a forward of its own and not that of {kind.__name__}, so its bound is not "
            "known; give it a method lipschitz_bound(), or subclass Part and write as_map.",
            module,
        )
    else:
        g = module.as_map(context) if isinstance(module, Part) else RULES[kind](module, context)
    return _watched(g, module)


def states_its_bound(module: nn.Module) -> bool:
    """Whether it has a method lipschitz_bound, which is its word and not our proof."""
    return callable(getattr(module, "lipschitz_bound", None))


def check_deterministic(network: nn.Module) -> None:
    """Refuses what would make the inverse another function than the forward pass."""
    for module in network.modules():
        random = _draws(module)
        if module.training and (random or isinstance(module, _NormBase)):
            why = "redraws its mask at every call" if random else "ties the rows of a batch together"
            raise NotContractiveError(
                f"{type(module).__name__} in training mode {why}, so the block would have no inverse; remove it, or "
                "put the network that holds it into eval() for good.",
                module,
            )


def _draws(module: nn.Module) -> bool:
    """Whether it drops entries at random, as recurrent and attention layers may as well."""
    rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0)
    return isinstance(module, nn.RReLU) or (isinstance(rate, (int, float)) and rate > 0)


def linear_map(layer: nn.Linear, context: Tensor | None = None) -> maps.Map:
    """W x + b."""
    weight, bound, most = _weight_and_bounds(layer, matrix.schatten_norm)
    return maps.Affine(weight, layer.bias, bound, most)


def convolution_map(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, context: Tensor | None = None) -> maps.Map:
    """K * x + b."""
    kind = next(kind for kind in maps.CONVOLUTIONS if isinstance(layer, kind))
    if type(layer)._conv_forward is not kind._conv_forward or "_conv_forward" in vars(layer):
        raise NotContractiveError(f"{type(layer).__name__} replaces _conv_forward, so its bound is not known.", layer)
    spec, constraint = maps.ConvSpec.of(layer), constraint_of(layer)
    if constraint is not None:
        constraint.spec = spec  # the layer's attributes may have been edited since
        constraint.check(layer)  # and it may have been registered by hand
    weight, bound, most = _weight_and_bounds(layer, lambda w: convolution.operator_norm(w, spec))
    return maps.Convolution(weight, layer.bias, bound, most, spec)


def sequential_map(module: nn.Sequential, context: Tensor | None = None) -> maps.Map:
    """f_n(... f_1(x))."""
    return maps.Composition(tuple(map_of(part, context) for part in module))


def flatten_map(module: nn.Flatten, context: Tensor | None = None) -> maps.Map:
    """The entries as they are; the batch stays apart."""
    if module.start_dim == 0:
        raise NotContractiveError("Flatten(start_dim=0) mixes the rows of a batch; start at dimension 1.", module)
    return maps.Reshape(module.start_dim, module.end_dim, ())


def unflatten_map(module: nn.Unflatten, context: Tensor | None = None) -> maps.Map:
    """The entries as they are."""
    if not isinstance(module.dim, int) or module.dim == 0:
        raise NotContractiveError(f"Unflatten needs a dimension behind the batch, got dim={module.dim!r}.", module)
    return maps.Reshape(module.dim, module.dim, tuple(cast(tuple[int, ...], module.unflattened_size)))


def activation_map(module: nn.Module, context: Tensor | None = None) -> maps.Map:
    """f(x), entry by entry."""
    return TORCH_ACTIVATIONS[type(module)].as_map(module)


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear_map,
    nn.Conv1d: convolution_map,
    nn.Conv2d: convolution_map,
    nn.Conv3d: convolution_map,
    nn.Sequential: sequential_map,
    nn.Flatten: flatten_map,
    nn.Unflatten: unflatten_map,
    **dict.fromkeys(TORCH_ACTIVATIONS, activation_map),
}

_DROPOUT = "it redraws its mask at every evaluation, so the block would have no inverse; remove it"
_NORMALISATION = "it ties the rows of a batch together and its scale is not bounded; put an ActNorm between blocks"
REFUSED: dict[type[nn.Module], str] = {
    nn.SELU: "its Lipschitz constant is 1.758; use ELU, or Sine",
    _DropoutNd: _DROPOUT,
    _NormBase: _NORMALISATION,
    nn.LayerNorm: "it divides by the size of its input, which is not Lipschitz; put an ActNorm between blocks",
}


def _known_kind(module: nn.Module) -> type[nn.Module] | None:
    """The class whose rule holds for the module, if its forward is that class's."""
    if isinstance(module, LazyModuleMixin) and any(map(is_lazy, module.parameters(recurse=False))):
        raise NotContractiveError(
            f"{type(module).__name__} has no weights yet; run a batch through the network first, or use the layer that "
            "names its input size.",
            module,
        )
    if isinstance(module, Part):
        return Part
    if type(module) in TORCH_ACTIVATIONS:
        return type(module)
    return next((k for k in type(module).__mro__ if k in RULES and k not in TORCH_ACTIVATIONS), None)


def _why_unknown(module: nn.Module) -> str:
    name, package = type(module).__name__, type(module).__module__.split(".")[0]
    for kind, reason in REFUSED.items():
        if isinstance(module, kind):
            return f"{name} cannot stand inside a branch: {reason}."
    if package in ("normflows", "nflows", "zuko", "FrEIA"):
        return (
            f"no Lipschitz bound is known for {package}'s {name}; use the one of ours in its place: LipschitzMLP, "
            "LipschitzDenseNet or LipschitzConvNet of iresflow_plugin.nets."
        )
    return (
        f"no Lipschitz bound is known for {name}; build the branch from Sequential, Sum, Concatenate, "
        "Scale, Linear, Conv1d, Conv2d, Conv3d and the activations of iresflow_plugin.lipschitz, subclass Part and "
        "write as_map, or give the module a method lipschitz_bound()."
    )


def _stated_map(module: nn.Module, context: Tensor | None) -> maps.Map:
    check_deterministic(module)
    stated = cast(Any, module).lipschitz_bound()
    value = float(getattr(stated, "value", stated))
    if not value >= 0:
        raise NotContractiveError(f"lipschitz_bound() must not be negative or NaN, got {value}.", module)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    conditional = bool(getattr(module, "takes_context", False))
    return maps.Stated(
        module, value, tuple(state), tuple(state.values()), conditional, context if conditional else None
    )


def _watched(g: maps.Map, module: nn.Module) -> maps.Map:
    """With the module's forward hooks, which may look on."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if any(type(hook).__module__.startswith("torch.nn.utils") for hook in hooks):
        raise NotContractiveError(
            f"{type(module).__name__} carries a forward hook that computes its weight (torch.nn.utils.spectral_norm, "
            "weight_norm and prune work so); remove it, or use torch.nn.utils.parametrizations.",
            module,
        )
    return maps.Watched(g, module) if hooks else g


def _weight_and_bounds(layer: nn.Module, norm: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | float, float]:
    """The weight in use, a bound of its norm or of a norm that is larger, and the largest norm it can ever have."""
    stack = raw_parametrizations(layer)
    last = stack[-1] if len(stack) and isinstance(stack[-1], Constraint) else None
    most = math.inf if last is None else last.lipschitz
    if last is not None and len(stack) == 1:
        return *_constrained(cast(nn.Module, stack), last), most
    if len(stack) and (cast(nn.Module, stack)._forward_hooks or stack[-1]._forward_hooks):
        raise NotContractiveError(
            f"A forward hook stands behind the constraint of {type(layer).__name__}; remove it.", layer
        )
    weight = cast(Tensor, layer.weight)
    if len(stack) and autocast_dtype(weight) is not None:  # a parametrization may have multiplied in half precision
        weight = weight.to(next(cast(nn.Module, stack).parameters(), weight).dtype)
    return weight, norm(weight).detach(), most


def _constrained(stack: nn.Module, constraint: Constraint) -> tuple[Tensor, Tensor | float]:
    """As the parametrization would do it, hooks included: pruning computes the raw weight in one."""
    if "forward" in vars(stack) or "forward" in vars(constraint):
        raise NotContractiveError(f"The forward of {type(constraint).__name__} was replaced.", constraint)
    maps.show_inputs(stack)
    raw = cast(Tensor, stack.original)
    maps.show_inputs(constraint, raw)
    weight, bound = constraint.in_use(raw)
    maps.show_output(constraint, weight, raw)
    maps.show_output(stack, weight)
    return weight, bound
