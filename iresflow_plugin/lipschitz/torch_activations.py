"""torch's own elementwise activations as maps: f, f' and the largest slope, which `constrain` divides out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iresflow_plugin.errors import NotContractiveError
from iresflow_plugin.maps import Elementwise


@dataclass(frozen=True)
class TorchActivation:
    """f(x, **settings), f'(x, **settings) and the largest |f'|; `settings` are attributes of the module.

    `smooth` says whether there is a second derivative, without which the log-det has no gradient in biases and inputs;
    `slack` how much more than others it loses to rounding.
    """

    constant: float
    value: Callable[..., Tensor]
    slope: Callable[..., Tensor]
    settings: tuple[str, ...] = ()
    smooth: bool = True
    slack: float = 1.0

    def as_map(self, module: Any) -> Elementwise:
        if isinstance(module, nn.Softplus) and module.threshold < 20:
            raise NotContractiveError(
                f"torch's Softplus jumps to the identity at its threshold, here {module.threshold}, and no constant "
                "bounds a jump; leave the threshold at 20.",
                module,
            )
        settings = {name: getattr(module, name) for name in self.settings}
        value, slope = partial(self.value, **settings), partial(self.slope, **settings)
        steepest = [abs(float(settings[name])) for name in ("alpha", "negative_slope") if name in settings]
        constant = max([self.constant, *steepest])
        return Elementwise(value, lambda x: (value(x), slope(x)), constant, slack=self.slack)


def _softplus(x: Tensor, beta: float) -> Tensor:
    """log(1 + exp(beta x)) / beta, without the jump that torch's makes at its threshold."""
    return torch.logaddexp(beta * x, torch.zeros_like(x)) / beta


def _gelu_slope(x: Tensor, approximate: str) -> Tensor:
    if approximate == "none":
        return torch.erfc(-x / math.sqrt(2)) / 2 + x * (-x * x / 2).exp() / math.sqrt(2 * math.pi)
    scale = math.sqrt(2 / math.pi)
    gate = torch.tanh(scale * (x + 0.044715 * x**3))
    return (1 + gate) / 2 + x * (1 - gate * gate) / 2 * scale * (1 + 0.134145 * x * x)


def _mish_slope(x: Tensor) -> Tensor:
    gate = torch.tanh(_softplus(x, 1.0))
    return gate + x * (1 - gate * gate) * torch.sigmoid(x)


def _inside(x: Tensor, min_val: float, max_val: float) -> Tensor:
    return ((x > min_val) & (x < max_val)).to(x.dtype)


def _above_zero(x: Tensor, negative_slope: float = 0.0) -> Tensor:
    return torch.where(x > 0, torch.ones_like(x), negative_slope)


TORCH_ACTIVATIONS: dict[type[nn.Module], TorchActivation] = {
    nn.Identity: TorchActivation(1.0, torch.positive, torch.ones_like),
    nn.ELU: TorchActivation(
        1.0, F.elu, lambda x, alpha: torch.where(x > 0, 1.0, alpha * x.clamp(max=0).exp()), ("alpha",)
    ),
    nn.Softplus: TorchActivation(1.0, _softplus, lambda x, beta: torch.sigmoid(beta * x), ("beta",)),
    nn.Tanh: TorchActivation(1.0, torch.tanh, lambda x: 1 - torch.tanh(x).square()),
    nn.Sigmoid: TorchActivation(0.25, torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x)),
    nn.Softsign: TorchActivation(1.0, F.softsign, lambda x: (1 + x.abs()).square().reciprocal()),
    nn.LogSigmoid: TorchActivation(1.0, F.logsigmoid, lambda x: torch.sigmoid(-x)),
    nn.SiLU: TorchActivation(1.09984, F.silu, lambda x: torch.sigmoid(x) * (1 + x * torch.sigmoid(-x))),
    nn.GELU: TorchActivation(1.12905, F.gelu, _gelu_slope, ("approximate",), slack=4.0),
    nn.Mish: TorchActivation(1.0885, F.mish, _mish_slope),
    nn.ReLU: TorchActivation(1.0, F.relu, _above_zero, smooth=False),
    nn.LeakyReLU: TorchActivation(1.0, F.leaky_relu, _above_zero, ("negative_slope",), smooth=False),
    nn.Hardtanh: TorchActivation(1.0, F.hardtanh, _inside, ("min_val", "max_val"), smooth=False),
}
