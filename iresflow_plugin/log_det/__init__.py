"""How much volume? log det(I + J): exact, truncated series, Russian roulette, and probes for the trace."""

from iresflow_plugin.log_det.default import BySize
from iresflow_plugin.log_det.estimate import Estimate, LogDet
from iresflow_plugin.log_det.exact import Exact
from iresflow_plugin.log_det.omitted import Omitted
from iresflow_plugin.log_det.probes import Gaussian, Orthogonal, Rademacher
from iresflow_plugin.log_det.roulette import Decay, Geometric, Poisson, RussianRoulette
from iresflow_plugin.log_det.series import PowerSeries

__all__ = [
    "BySize",
    "Decay",
    "Estimate",
    "Exact",
    "Gaussian",
    "Geometric",
    "LogDet",
    "Omitted",
    "Orthogonal",
    "Poisson",
    "PowerSeries",
    "Rademacher",
    "RussianRoulette",
]
