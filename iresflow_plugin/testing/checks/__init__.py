"""The properties, by name: one function, one property, one sentence, and the bug it would catch."""

from iresflow_plugin.testing.checks import passes  # isort: skip  # the order of the imports is that of the table
from iresflow_plugin.testing.checks import gradients  # isort: skip
from iresflow_plugin.testing.checks import calls  # isort: skip
from iresflow_plugin.testing.checks import copies  # isort: skip
from iresflow_plugin.testing.checks import certificate  # isort: skip
from iresflow_plugin.testing.checks import flows  # isort: skip
from iresflow_plugin.testing.checks.registry import CHECKS, Check

__all__ = ["CHECKS", "Check", "calls", "certificate", "copies", "flows", "gradients", "passes"]
