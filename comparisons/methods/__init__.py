"""The methods: densities as people write them in their own library, and the same flows with residual blocks swapped in.

One file a family; each ends in the rows that it adds to the table here. What they build for images is in `images.py`.
"""

from __future__ import annotations

from dataclasses import replace

import normflows
from nflows.transforms import AffineCouplingTransform, MaskedAffineAutoregressiveTransform
from torch import nn

from comparisons.methods import autoregressive, continuous, coupling, elementary, floors, residual
from comparisons.methods.density import BLOCKS, Density, Event, Fit, Images, Method, build, parameter_count, widest
from comparisons.methods.hosts import NormflowsDensity, normflows_flow

__all__ = [
    "BLOCKS",
    "METHODS",
    "TWINS",
    "Density",
    "Event",
    "Fit",
    "Images",
    "Method",
    "NormflowsDensity",
    "build",
    "normflows_flow",
    "parameter_count",
    "widest",
]

FAMILIES = (coupling, autoregressive, elementary, continuous, residual, floors)

# Learning rates: where runs decided, the best by validation in short ones on checkerboard, digits and gas turbine.
ORIGINALS = {method.name: method for family in FAMILIES for method in family.METHODS}


def twin(name: str, swapped: type[nn.Module]) -> Method:
    """The same stack with its transforms replaced, at equal parameters, and trained like our own blocks."""
    original = ORIGINALS[name]
    return replace(
        original,
        name=f"{name}-swapped",
        about=f"{original.about}, its {swapped.__name__}s swapped for residual blocks",
        learning_rate=ORIGINALS["ours"].learning_rate,
        grid=ORIGINALS["ours"].grid,
        swapped=swapped,
    )


SWAPPED = (
    twin("nflows-realnvp", AffineCouplingTransform),
    twin("nflows-glow", AffineCouplingTransform),
    twin("nflows-maf", MaskedAffineAutoregressiveTransform),
    twin("normflows-realnvp", normflows.flows.AffineCouplingBlock),
    twin("normflows-glow", normflows.flows.AffineCouplingBlock),
)

METHODS = ORIGINALS | {method.name: method for method in SWAPPED}
TWINS = {method.name.removesuffix("-swapped"): method.name for method in SWAPPED}  # original -> swapped
