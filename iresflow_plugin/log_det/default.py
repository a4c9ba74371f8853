"""The estimator a block uses when none is named."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iresflow_plugin.log_det.estimate import Estimate, LogDet
from iresflow_plugin.log_det.exact import Exact
from iresflow_plugin.log_det.roulette import RussianRoulette
from iresflow_plugin.maps import Map


@dataclass(frozen=True)
class BySize:
    """`Exact` for events of few dimensions, `RussianRoulette` beyond: exact where it pays, unbiased where not.

    Args:
        with_gradients: largest D for `Exact` while gradients are recorded.
        without_gradients: largest D for `Exact` under `no_grad` or `inference_mode`.
    """

    with_gradients: int = 12
    without_gradients: int = 32

    def choose(self, x: Tensor) -> LogDet:
        """The estimator for events as large as those of `x`."""
        limit = self.with_gradients if torch.is_grad_enabled() else self.without_gradients
        return Exact() if x.shape[1:].numel() <= limit else RussianRoulette()

    def __call__(self, g: Map, x: Tensor) -> Estimate:
        return self.choose(x)(g, x)
