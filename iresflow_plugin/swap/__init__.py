"""Replace transforms inside an existing flow of nflows or normflows by residual blocks."""

from iresflow_plugin.swap.swapping import Swap, SwapReport, swap_transforms

__all__ = ["Swap", "SwapReport", "swap_transforms"]
