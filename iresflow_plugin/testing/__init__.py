"""The property kit, for every flow transform: `check_transform`, `parametrize_with_checks`; needs torch alone.

`iresflow_plugin.testing.strategies` holds hypothesis strategies, and needs hypothesis.
"""

from iresflow_plugin.testing.case import Case, Measurement
from iresflow_plugin.testing.checks import CHECKS, Check
from iresflow_plugin.testing.kit import check_transform, parametrize_with_checks
from iresflow_plugin.testing.report import Outcome, Report
from iresflow_plugin.testing.weights import scale_weights

__all__ = [
    "CHECKS",
    "Case",
    "Check",
    "Measurement",
    "Outcome",
    "Report",
    "check_transform",
    "parametrize_with_checks",
    "scale_weights",
]
