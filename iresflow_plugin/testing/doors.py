"""How each library's transforms are called: one door a host, found by the names of an object's classes.

No host is imported: whoever has such an object has the host. Through its door every transform looks the same,
`forward(obj, x, context) -> (y, log_det)` and `inverse`; flows add `log_prob` and `sample`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, TransformedDistribution
from torch.distributions.transforms import _InverseTransform

Pass = Callable[[Any, Tensor, "Tensor | None"], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Door:
    """How one kind of object is called.

    Attributes:
        name: of the kind of object.
        classes: full names of the classes it is for.
        forward, inverse: the two passes, each with the log-det of the call just made.
        log_prob: of data under a flow; None for what is no flow.
        sample: (obj, n, context row) -> samples and their log-density where the host returns it, or None.
        to_noise: which of the two passes runs from data to noise.
    """

    name: str
    classes: tuple[str, ...]
    forward: Pass
    inverse: Pass
    log_prob: Callable[[Any, Tensor, Tensor | None], Tensor] | None = None
    sample: Callable[[Any, int, Tensor | None], tuple[Tensor, Tensor | None]] | None = None
    to_noise: str = "forward"

    def fits(self, obj: Any) -> bool:
        return _is_one_of(obj, self.classes)


def door_of(obj: Any) -> Door:
    """The door for an object.

    Raises:
        TypeError: if it is of no kind known here.
    """
    if isinstance(obj, tuple) and len(obj) == 2 and all(callable(part) for part in obj):
        return PAIR
    for door in DOORS:
        if door.fits(obj):
            return door
    if callable(getattr(obj, "forward", None)) and callable(getattr(obj, "inverse", None)):
        return MODULE
    known = ", ".join([*(door.name for door in DOORS), MODULE.name, PAIR.name])
    raise TypeError(f"subject of type {type(obj).__name__} is no transform that the kit knows; it knows: {known}.")


def explicit_pass(obj: Any) -> str:
    """The pass that is computed and not solved for: autograd's Jacobian of it is the reference."""
    turned = _is_normflows(obj) and getattr(obj, "reverse", None) is True
    return "inverse" if turned or _is_one_of(obj, INVERSES) else "forward"


def modules_of(obj: Any) -> list[nn.Module]:
    """The modules in the object: itself, or those among its parts, such as the block in a torch transform."""
    return list({id(module): module for module in _modules_in(obj)}.values())


def _modules_in(part: Any) -> Iterator[nn.Module]:
    if isinstance(part, nn.Module):
        yield part
    elif isinstance(part, (tuple, list)):
        for item in part:
            yield from _modules_in(item)
    elif isinstance(part, (Transform, TransformedDistribution)):
        inner = part.inv if isinstance(part, _InverseTransform) else part
        yield from _modules_in([value for name, value in vars(inner).items() if name != "_inv"])
    elif isinstance(getattr(part, "__self__", None), nn.Module):  # a method of a module
        yield part.__self__


# calls -----------------------------------------------------------------------------------------------


def _by_keyword(context: Tensor | None) -> dict[str, Tensor]:
    return {} if context is None else {"context": context}


def _pair(index: int) -> Pass:
    return lambda obj, x, context: obj[index](x) if context is None else obj[index](x, context)


def _module_forward(obj: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    return (obj if isinstance(obj, nn.Module) else obj.forward)(x, **_by_keyword(context))


def _module_inverse(obj: Any, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    return obj.inverse(y, **_by_keyword(context))


def _nflows_embedded(obj: Any, context: Tensor | None) -> dict[str, Tensor]:
    return {} if context is None else {"context": obj._embedding_net(context)}


def _nflows_sample(obj: Any, n: int, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    samples, log_prob = obj.sample_and_log_prob(n, **_by_keyword(context))
    return (samples, log_prob) if context is None else (samples[0], log_prob[0])


def _normflows_model(method: str) -> Pass:
    return lambda obj, x, context: getattr(obj, method)(x, **_by_keyword(context))


def _normflows_sample(obj: Any, n: int, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return obj.sample(n, **_by_keyword(None if context is None else context.expand(n, -1)))


def _conditioned(obj: Any, context: Tensor | None) -> Any:
    return obj if context is None else obj.condition(context)


# A cache goes by the identity of tensors, and its owner clears it after a step of training; a view is a new identity.


def _torch_forward(obj: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    transform, x = _conditioned(obj, context), x.view_as(x)
    y = transform(x)
    return y, _per_sample(transform.log_abs_det_jacobian(x, y))


def _torch_inverse(obj: Any, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    transform, y = _conditioned(obj, context), y.view_as(y)
    x = transform.inv(y)
    return x, -_per_sample(transform.log_abs_det_jacobian(x, y))


def _composed(obj: TransformedDistribution) -> Transform:
    return torch.distributions.ComposeTransform(obj.transforms)


def _per_sample(log_det: Tensor) -> Tensor:
    """torch's elementwise transforms give the log-det of every entry."""
    return log_det.flatten(1).sum(1) if log_det.ndim > 1 else log_det


def _given(obj: Any, context: Tensor | None) -> Any:
    return obj() if context is None else obj(context)


def _zuko_transform(obj: Any, context: Tensor | None) -> Any:
    made = _given(obj, context)
    return made.transform if hasattr(made, "transform") else made


def _zuko_sample(obj: Any, n: int, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    distribution = _given(obj, None if context is None else context[0])
    return distribution.rsample_and_log_prob((n,))


def _freia(rev: bool) -> Pass:
    def call(obj: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        condition = None if context is None else [context]
        whole = _is_of(obj, "FrEIA.framework")
        out, log_det = obj(x if whole else (x,), c=condition, rev=rev)
        return (out if isinstance(out, Tensor) else out[0]), log_det

    return call


def _torchflows(method: str) -> Pass:
    return lambda obj, x, context: getattr(obj, method)(x) if context is None else getattr(obj, method)(x, context)


def _is_one_of(obj: Any, classes: tuple[str, ...]) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" in classes for kind in type(obj).__mro__)


def _is_of(obj: Any, package: str) -> bool:
    return any(kind.__module__.startswith(package) for kind in type(obj).__mro__)


def _is_normflows(obj: Any) -> bool:
    return _is_of(obj, "normflows")


# table -----------------------------------------------------------------------------------------------

MODULE = Door("an object with forward and inverse", (), _module_forward, _module_inverse)
PAIR = Door("a pair (forward, inverse) of functions", (), _pair(0), _pair(1))
INVERSES = (  # they call the other pass of what they hold
    "torch.distributions.transforms._InverseTransform",
    "nflows.transforms.base.InverseTransform",
    "normflows.flows.reshape.Reverse",
    "zuko.lazy.LazyInverse",
    "pyro.distributions.conditional._ConditionalInverseTransformModule",
)
DOORS = (
    Door(
        "nflows Flow",
        ("nflows.flows.base.Flow",),
        lambda obj, x, c: obj._transform(x, **_nflows_embedded(obj, c)),
        lambda obj, y, c: obj._transform.inverse(y, **_nflows_embedded(obj, c)),
        lambda obj, x, c: obj.log_prob(x, **_by_keyword(c)),
        _nflows_sample,
    ),
    Door("nflows Transform", ("nflows.transforms.base.Transform",), _module_forward, _module_inverse),
    Door(
        "normflows NormalizingFlow",
        ("normflows.core.NormalizingFlow", "normflows.core.ConditionalNormalizingFlow"),
        _normflows_model("forward_and_log_det"),
        _normflows_model("inverse_and_log_det"),
        lambda obj, x, c: obj.log_prob(x, **_by_keyword(c)),
        _normflows_sample,
        to_noise="inverse",
    ),
    Door("normflows Flow", ("normflows.flows.base.Flow",), _module_forward, _module_inverse, to_noise="inverse"),
    Door(
        "zuko Flow",
        ("zuko.lazy.Flow", "zuko.lazy.LazyDistribution"),
        lambda obj, x, c: _zuko_transform(obj, c).call_and_ladj(x),
        lambda obj, y, c: _zuko_transform(obj, c).inv.call_and_ladj(y),
        lambda obj, x, c: _given(obj, c).log_prob(x),
        _zuko_sample,
    ),
    Door(
        "zuko LazyTransform",
        ("zuko.lazy.LazyTransform",),
        lambda obj, x, c: _zuko_transform(obj, c).call_and_ladj(x),
        lambda obj, y, c: _zuko_transform(obj, c).inv.call_and_ladj(y),
    ),
    Door(
        "torch TransformedDistribution",
        ("torch.distributions.transformed_distribution.TransformedDistribution",),
        lambda obj, x, c: _torch_inverse(_composed(obj), x, None),
        lambda obj, y, c: _torch_forward(_composed(obj), y, None),
        lambda obj, x, c: obj.log_prob(x),
        lambda obj, n, c: (obj.rsample((n,)), None),
    ),
    Door(
        "torch.distributions or Pyro Transform",
        ("torch.distributions.transforms.Transform", "pyro.distributions.conditional.ConditionalTransform"),
        _torch_forward,
        _torch_inverse,
        to_noise="inverse",
    ),
    Door(
        "FrEIA module",
        ("FrEIA.modules.base.InvertibleModule", "FrEIA.framework.graph_inn.GraphINN"),
        _freia(rev=False),
        _freia(rev=True),
    ),
    Door(
        "torchflows bijection",
        ("torchflows.bijections.base.Bijection",),
        _torchflows("forward"),
        _torchflows("inverse"),
    ),
)
