"""Which x gave this y? Solvers with a certified error, and the gradient of their solution."""

from iresflow_plugin.inverse.anderson import Anderson
from iresflow_plugin.inverse.fixed_point import FixedPoint
from iresflow_plugin.inverse.implicit import differentiable_solution
from iresflow_plugin.inverse.newton import Newton
from iresflow_plugin.inverse.proof import Solution
from iresflow_plugin.inverse.solve import Solver

__all__ = ["Anderson", "FixedPoint", "Newton", "Solution", "Solver", "differentiable_solution"]
