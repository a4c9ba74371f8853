"""Why is g a contraction? Bounds of matrices, constraints of weights, activations, the certificate of a module tree."""

from iresflow_plugin.lipschitz.activations import (
    ACTIVATIONS,
    Activation,
    CLipSwish,
    CPila,
    LipSwish,
    MaxMin,
    SinCos,
    Sine,
    build_activation,
)
from iresflow_plugin.lipschitz.certificate import (
    Bound,
    certified_map,
    check_finite,
    check_lipschitz,
    constrain,
    contraction,
    lipschitz_bound,
    lipschitz_estimate,
)
from iresflow_plugin.lipschitz.constraints import AlmostOrthogonal, Bjorck, Constraint, Frobenius, Spectral
from iresflow_plugin.lipschitz.convolution import operator_norm
from iresflow_plugin.lipschitz.matrix import (
    frobenius_norm,
    power_iteration,
    row_column_norm,
    schatten_norm,
    spectral_norm,
)
from iresflow_plugin.lipschitz.part import Part
from iresflow_plugin.lipschitz.parts import AddContext, Chain, Concatenate, LearnableConcatenate, Scale, Sum
from iresflow_plugin.lipschitz.penalty import spectral_penalty
from iresflow_plugin.maps import ConvSpec

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "AddContext",
    "AlmostOrthogonal",
    "Bjorck",
    "Bound",
    "CLipSwish",
    "CPila",
    "Chain",
    "Concatenate",
    "Constraint",
    "ConvSpec",
    "Frobenius",
    "LearnableConcatenate",
    "LipSwish",
    "MaxMin",
    "Part",
    "Scale",
    "SinCos",
    "Sine",
    "Spectral",
    "Sum",
    "build_activation",
    "certified_map",
    "check_finite",
    "check_lipschitz",
    "constrain",
    "contraction",
    "frobenius_norm",
    "lipschitz_bound",
    "lipschitz_estimate",
    "operator_norm",
    "power_iteration",
    "row_column_norm",
    "schatten_norm",
    "spectral_norm",
    "spectral_penalty",
]
