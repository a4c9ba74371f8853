"""The certificate of a module tree: how steep a branch is, and how to keep it below one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from iresflow_plugin import maps
from iresflow_plugin.errors import NotContractiveError, path_of
from iresflow_plugin.lipschitz.activations import Activation
from iresflow_plugin.lipschitz.constraints import Constraint, Spectral, constraint_of, install
from iresflow_plugin.lipschitz.parts import AddContext
from iresflow_plugin.lipschitz.rules import map_of, states_its_bound
from iresflow_plugin.maps.layers import Weighted
from iresflow_plugin.torch_state import norms, per_sample


@dataclass(frozen=True)
class Bound:
    """A Lipschitz bound in the 2-norm; `certified` says whether it is proven, or somebody's word or an estimate."""

    value: float
    certified: bool


def certified_map(module: nn.Module, context: Tensor | None = None) -> maps.Map:
    """The module as a `Map` of this moment: every weight computed and the context taken in, once, with its bound.

    Raises:
        NotContractiveError: names the module, by its path, for which no bound is known.
    """
    try:
        return map_of(module, context)
    except NotContractiveError as error:
        where = "" if error.module is None else f"{type(error.module).__name__} at '{path_of(error.module, module)}': "
        raise NotContractiveError(f"{where}{error}", error.module) from None


def contraction(branch: nn.Module, context: Tensor | None = None) -> maps.Map:
    """`certified_map` whose bound is below one for every value its weights can take.

    Raises:
        NotContractiveError: if a layer is free to grow, or the bounds of the layers multiply to one or more.
    """
    g = certified_map(branch, context)
    if g.ceiling < 1:
        return g
    free = next((layer for layer in weighted_layers(branch) if constraint_of(layer) is None), None)
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


def lipschitz_bound(module: nn.Module) -> Bound:
    """Lip(module) <= value, composed over the module tree, for its present weights, with respect to x alone.

    Raises:
        NotContractiveError: names the module for which no bound is known, or the weight that is not finite.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> layer.weight.data = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> lipschitz_bound(nn.Sequential(layer, nn.Tanh()))
    Bound(value=3.00..., certified=True)
    """
    with torch.no_grad():
        g = certified_map(module)
        check_finite(module)
        return Bound(g.bound, g.certified)


def check_finite(module: nn.Module) -> None:
    """Raises NotContractiveError naming the first weight that is NaN or infinite."""
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NotContractiveError(
                f"The weights are not finite: '{name}' holds NaN or infinity. Load a checkpoint from before it "
                "happened, and train on with a smaller learning rate or clipped gradients."
            )


@torch.no_grad()
def lipschitz_estimate(module: nn.Module, x: Tensor, context: Tensor | None = None, steps: int = 30) -> Bound:
    """max over rows of |dg/dx|_2 at `x`, by power iteration: what the branch does there, from below. No certificate."""
    g = certified_map(module, context).linearise(x)
    v = torch.randn_like(x)
    norm = x.new_zeros(())
    for _ in range(steps):
        unit = v / per_sample(norms(v).to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny), x)
        v = g.vjp(g.jvp(unit))
        norm = norms(v).sqrt().max()
    return Bound(float(norm), certified=False)


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
        NotContractiveError: names the module that cannot be certified; nothing has been changed then.

    >>> net = constrain(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)), lipschitz=0.9)
    >>> lipschitz_bound(net).value <= 0.9
    True
    """
    check_lipschitz(lipschitz)
    g, layers = certified_map(net), list(weighted_layers(net))
    for layer in layers:
        constraint.check(layer)
    share = _share(g, lipschitz, has_weights=bool(layers))
    undo: list[Callable[[], None]] = []
    try:
        for layer in layers:
            undo.append(install(layer, constraint, share))
    except Exception:
        for step in undo:
            step()
        raise
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
        if id(part) in seen or isinstance(part, (AddContext, Activation)) or states_its_bound(part):
            continue
        seen.add(id(part))
        if isinstance(part, (nn.Linear, *maps.CONVOLUTIONS)):
            yield part
        else:
            stack = list(part.children()) + stack


def _share(g: maps.Map, lipschitz: float, has_weights: bool) -> float:
    """The largest bound of every layer for which that of the whole is `lipschitz`, by bisection."""

    def ceiling(c: float) -> float:
        return g.replacing(Weighted, lambda layer: replace(layer, most=c)).ceiling

    if ceiling(0.0) > lipschitz:
        what = "Even with all weights at zero the network" if has_weights else "The network has no weights and"
        raise NotContractiveError(
            f"{what} is certified only up to Lip(g) <= {ceiling(0.0):.6g}, above the {lipschitz} asked for: "
            "a part without weights, such as an Identity, needs a Scale."
        )
    low, high = 0.0, 1.0
    while ceiling(high) < lipschitz and high < 2.0**100:  # it may depend on no weight at all
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ceiling(middle) <= lipschitz else (low, middle)
    return low
