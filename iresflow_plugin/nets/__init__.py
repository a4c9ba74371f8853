"""Branches g, ready made."""

from iresflow_plugin.nets.conv import LipschitzConvNet
from iresflow_plugin.nets.dense import LipschitzDenseNet
from iresflow_plugin.nets.mlp import LipschitzMLP

__all__ = ["LipschitzConvNet", "LipschitzDenseNet", "LipschitzMLP"]
