"""Weight constraints |W|_2 <= c as torch parametrizations: the raw weight is free, the weight in use obeys.

A constraint is computed from the raw weight whenever the layer is used, so no optimiser step, loaded checkpoint or
manual edit can break it, and nobody has to call anything. All of them leave a small enough weight as it is (soft)
but `Bjorck`, which pushes every singular value towards c. For a convolution |W|_2 is the norm of the operator on
images, of every size.

| constraint         | weight in use                            | reference                               |
|--------------------|------------------------------------------|-----------------------------------------|
| `Spectral`         | W min(1, c / bound(W))                   | Delattre et al. 2023, 2305.16173        |
| `AlmostOrthogonal` | W diag(min(1, c / sqrt(sum_j |W'W|_ij))) | Prach and Lampert 2022, 2208.03160      |
| `Bjorck`           | c times W <- W (3 I - W'W) / 2, repeated | Anil, Lucas and Grosse 2019, 1811.05381 |
| `Frobenius`        | W min(1, c / |W|_F)                      |                                         |
"""

from iresflow_plugin.lipschitz.constraints.almost_orthogonal import AlmostOrthogonal
from iresflow_plugin.lipschitz.constraints.bjorck import Bjorck
from iresflow_plugin.lipschitz.constraints.constraint import Constraint
from iresflow_plugin.lipschitz.constraints.frobenius import Frobenius
from iresflow_plugin.lipschitz.constraints.install import (
    constraint_of,
    install,
    raw_parametrizations,
    register,
    spec_of,
)
from iresflow_plugin.lipschitz.constraints.memo import Memo
from iresflow_plugin.lipschitz.constraints.spectral import Spectral

__all__ = [
    "AlmostOrthogonal",
    "Bjorck",
    "Constraint",
    "Frobenius",
    "Memo",
    "Spectral",
    "constraint_of",
    "install",
    "raw_parametrizations",
    "register",
    "spec_of",
]
