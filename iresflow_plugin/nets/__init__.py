"""Branches g, ready made."""

from iresflow_plugin.nets.mlp import LipschitzMLP

__all__ = ["LipschitzMLP"]
