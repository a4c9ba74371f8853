"""Which transforms of a model can be replaced, and which of them are selected.

Hosts are known by the names of their classes, so none is imported here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

Select = type | tuple[type, ...] | str | Sequence[str] | Callable[[str, nn.Module], bool]

# Per host: the base class of its transforms; the modules that call what they hold as transforms (what lies inside any
# other module of a host is that module's affair); and the transforms of lists of tensors, where no block can stand.
TRANSFORM = {"nflows": "Transform", "normflows": "Flow"}
CONTAINERS = {
    "nflows": ("Flow", "CompositeTransform", "MultiscaleCompositeTransform", "InverseTransform"),
    "normflows": (
        "NormalizingFlow",
        "ClassCondFlow",
        "MultiscaleFlow",
        "NormalizingFlowVAE",
        "Composite",
        "Reverse",
        "GlowBlock",
    ),
}
OF_LISTS = {"nflows": (), "normflows": ("Split", "AffineCoupling")}


def selected_transforms(flow: nn.Module, select: Select) -> list[tuple[tuple[str, ...], nn.Module]]:
    """The selected transforms, each with all its places, without those inside another selected one."""
    if not isinstance(flow, nn.Module):
        raise TypeError(f"flow must be a module of nflows or normflows, or one that holds such, got {flow!r}.")
    places = list(transforms_in(flow))
    if not places:
        raise ValueError(f"{type(flow).__name__} holds no transform of nflows or normflows that can be replaced.")
    matches = _matcher(flow, select, dict(places))
    found: dict[nn.Module, list[str]] = {}
    inside: tuple[str, ...] = ()
    for path, module in places:
        if not path.startswith(inside) and matches(path, module):
            found.setdefault(module, []).append(path)
            inside += (f"{path}.",)
    if not found:
        counts = Counter(type(module).__name__ for _, module in places)
        present = ", ".join(f"{number} {name}" for name, number in counts.items())
        raise ValueError(f"select={select!r} selects nothing. The transforms in this {type(flow).__name__}: {present}.")
    return [(tuple(paths), module) for module, paths in found.items()]


def transforms_in(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every transform that is called as one, with its path, outer before inner; a shared one once for every place."""
    for name, child in module._modules.items():
        if child is None:
            continue
        here = f"{path}.{name}" if path else name
        host = host_of(child)
        if host is not None and not is_a(child, host, *OF_LISTS[host]):
            yield here, child
        if _may_be_entered(child):
            yield from transforms_in(child, here)


def host_of(module: object) -> str | None:
    """The host whose transform this is."""
    return next((host for host, name in TRANSFORM.items() if is_a(module, host, name)), None)


def is_a(module: object, host: str, *names: str) -> bool:
    """isinstance without importing the host."""
    return any(_package(kind) == host and kind.__name__ in names for kind in type(module).__mro__)


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _may_be_entered(module: nn.Module) -> bool:
    """Whether what hangs in `module` may be replaced: in containers of the hosts, and in all that is not a host's."""
    kinds = [(_package(kind), kind.__name__) for kind in type(module).__mro__ if _package(kind) in CONTAINERS]
    if not kinds:
        return True
    nearest, name = kinds[0]  # a host's bare base class here: the transform itself is the user's
    return name == TRANSFORM[nearest] or any(name in CONTAINERS[host] for host, name in kinds)


def _matcher(flow: nn.Module, select: Any, places: dict[str, nn.Module]) -> Callable[[str, nn.Module], bool]:
    """Any way to select, as a predicate."""
    items = tuple(select) if isinstance(select, (tuple, list)) else (select,)
    if items and all(isinstance(item, type) for item in items):
        return lambda path, module: isinstance(module, items)
    if all(isinstance(item, str) for item in items):
        for path in items:
            if path not in places:
                raise ValueError(f"{_why_not(flow, path)} Paths that can be selected: {', '.join(places)}.")
        return lambda path, module: path in items
    if callable(select):
        return lambda path, module: bool(select(path, module))
    raise TypeError(
        f"select must be a type, a path, several of one kind, or a predicate (path, module), got {select!r}."
    )


def _why_not(flow: nn.Module, path: str) -> str:
    modules = dict(flow.named_modules(remove_duplicate=False))
    if path == "":
        return "The model itself ('') cannot be replaced in place."
    if path in modules:
        return f"'{path}' is a {type(modules[path]).__name__}, which is no transform that can be replaced on its own."
    return f"There is no module '{path}' in this {type(flow).__name__}."
