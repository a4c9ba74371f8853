"""Invertible residual blocks y = x + g(x) with a certified Lip(g) < 1, for the flow libraries people use."""

from iresflow_plugin.block import ResidualBlock, using
from iresflow_plugin.errors import NotContractiveError, NotConvergedError

__version__ = "0.1.0"
__all__ = ["NotContractiveError", "NotConvergedError", "ResidualBlock", "using"]
