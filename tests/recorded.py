"""Small blocks, and what revision a69b261 with torch 2.13.0 computed for them on 2026-11-25: tests/recorded.pt.

To make that file again, run `python -m tests.recorded tests/recorded.pt` in the root of a checkout of that revision
that holds a copy of this file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import iresflow_plugin
from iresflow_plugin import ResidualBlock, using
from iresflow_plugin.lipschitz import (
    AddContext,
    AlmostOrthogonal,
    Bjorck,
    Chain,
    CLipSwish,
    Concatenate,
    Constraint,
    CPila,
    Frobenius,
    LearnableConcatenate,
    LipSwish,
    MaxMin,
    Scale,
    SinCos,
    Sine,
    Spectral,
    Sum,
    constrain,
)
from iresflow_plugin.log_det import Exact, Orthogonal, PowerSeries
from iresflow_plugin.nets import LipschitzConvNet, LipschitzDenseNet, LipschitzMLP

Numbers = dict[str, Any]  # tensors, and a float for the certificate
Inputs = dict[str, Tensor]  # x or y first, then the context if there is one
Call = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """A block as it is built, the shapes of its inputs, and how far its raw weights are scaled before recording."""

    branch: Callable[[], nn.Module]
    x: tuple[int, ...]
    context: tuple[int, ...] | None = None
    factor: float = 5.0
    dtype: torch.dtype = torch.float64


# ------------------------------------------------------------------------------------------ branches


def smooth_activations() -> nn.Module:
    kinds = [nn.Tanh, nn.ELU, nn.Softplus, nn.GELU, nn.SiLU, nn.Mish, nn.Softsign, nn.LogSigmoid, nn.Sigmoid]
    parts = [nn.Sequential(nn.Linear(3, 2), kind(), nn.Identity()) for kind in kinds]
    return constrain(nn.Sequential(Concatenate(*parts), nn.Linear(2 * len(kinds), 3)), 0.97)


def kinked_activations() -> nn.Module:
    parts = [nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 4), nn.LeakyReLU(0.2), nn.Linear(4, 4), nn.Hardtanh()]
    return constrain(nn.Sequential(*parts, nn.Linear(4, 2)), 0.95)


def tree() -> nn.Module:
    """Every module that joins others; the context enters twice, and one part stands in two places."""
    wide = Chain(nn.Linear(3, 4), AddContext(nn.Linear(2, 4)), Sine(4, low=0.5, high=3.0))
    narrow = Chain(Scale(-0.5), nn.Linear(3, 2), nn.Tanh())
    joined = Chain(Concatenate(wide, narrow), nn.Linear(6, 3))
    shares = Chain(LearnableConcatenate(Chain(), nn.Linear(3, 2), narrow), nn.Linear(7, 4), SinCos(4, low=0.5, high=3))
    context_again = Chain(shares, AddContext(nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 8))))
    return constrain(Sum(joined, Chain(context_again, nn.Tanh(), nn.Linear(8, 3)), Scale(0.25)), 0.97)


def tree_of_images() -> nn.Module:
    first = Chain(nn.Conv2d(2, 3, 3, padding=1), Sine(3, 2, low=0.5, high=4.0))
    second = Chain(nn.Conv2d(2, 2, 1), CLipSwish(2, 2))
    joined = LearnableConcatenate(first, second, Scale(0.5), dim=-3)
    return constrain(Chain(joined, nn.Conv2d(9, 2, 3, padding=1, padding_mode="circular")), 0.9)


def strides_and_groups(constraint: type[Constraint]) -> nn.Module:
    first = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
    parts = [first, nn.Softplus(), nn.Conv2d(4, 4, 2, groups=4, padding="same"), nn.Tanh()]
    return constrain(
        nn.Sequential(*parts, nn.Flatten(), nn.Linear(16, 32), nn.Unflatten(1, (2, 4, 4))), 0.9, constraint
    )


def signals() -> nn.Module:
    """One-dimensional convolutions, dilated, circular, and with padding wider than the kernel."""
    first = nn.Conv1d(2, 4, 3, padding=2, dilation=2, padding_mode="circular")
    last = nn.Conv1d(4, 2, 3, padding=1)
    wide = nn.Conv1d(2, 4, 1, padding=1, padding_mode="circular")
    return constrain(Sum(Chain(first, nn.Tanh(), last), Chain(wide, nn.ELU(), nn.Conv1d(4, 2, 3))), 0.9)


def volumes() -> nn.Module:
    return constrain(nn.Sequential(nn.Conv3d(1, 2, 2, padding="same"), nn.SiLU(), nn.Conv3d(2, 1, 1)), 0.9)


CASES: dict[str, Case] = {
    "mlp_sincos_1": Case(lambda: LipschitzMLP([1, 8, 8, 1]), (4, 1)),
    "mlp_sine_context_2": Case(lambda: LipschitzMLP([2, 8, 8, 2], 3, Sine), (4, 2), (4, 3), factor=10.0),
    "mlp_clipswish_almost_orthogonal_3": Case(
        lambda: LipschitzMLP([3, 8, 6, 3], activation=CLipSwish, constraint=AlmostOrthogonal), (4, 3)
    ),
    "mlp_cpila_bjorck_6": Case(lambda: LipschitzMLP([6, 8, 6], activation=CPila, constraint=Bjorck), (4, 6)),
    "mlp_lipswish_frobenius_2": Case(
        lambda: LipschitzMLP([2, 8, 8, 2], 2, LipSwish, 0.9, Frobenius), (4, 2), (1, 2), factor=3.0
    ),
    "mlp_maxmin_6": Case(lambda: LipschitzMLP([6, 8, 8, 6], activation=MaxMin), (4, 6)),
    "mlp_within_bounds_3": Case(lambda: LipschitzMLP([3, 8, 8, 3]), (4, 3), factor=1.0),
    "dense_context_3": Case(lambda: LipschitzDenseNet(3, [6, 4], context_features=2), (4, 3), (4, 2)),
    "dense_bjorck_1": Case(lambda: LipschitzDenseNet(1, [4, 4], activation=LipSwish, constraint=Bjorck), (4, 1)),
    "smooth_activations_3": Case(smooth_activations, (4, 3), factor=10.0),
    "kinked_activations_2": Case(kinked_activations, (4, 2)),
    "tree_context_3": Case(tree, (4, 3), (4, 2)),
    "conv_sincos_image": Case(lambda: LipschitzConvNet([3, 6, 6, 3]), (2, 3, 5, 5)),
    "conv_context_image_circular": Case(
        lambda: LipschitzConvNet([2, 4, 2], context_channels=1, activation=Sine, padding_mode="circular"),
        (2, 2, 4, 4),
        (2, 1, 4, 4),
        factor=10.0,
    ),
    "conv_context_almost_orthogonal": Case(
        lambda: LipschitzConvNet([2, 4, 2], [3, 1], 3, activation=CPila, constraint=AlmostOrthogonal),
        (2, 2, 4, 4),
        (1, 3),
    ),
    "dense_image_frobenius": Case(
        lambda: LipschitzDenseNet(3, [4, 2], 3, activation=CLipSwish, constraint=Frobenius), (2, 3, 5, 5), factor=3.0
    ),
    "tree_of_images": Case(tree_of_images, (2, 2, 4, 4)),
    "strides_and_groups": Case(lambda: strides_and_groups(Spectral), (2, 2, 4, 4)),
    "strides_and_groups_almost_orthogonal": Case(lambda: strides_and_groups(AlmostOrthogonal), (2, 2, 4, 4)),
    "signals": Case(signals, (2, 2, 6)),
    "volumes": Case(volumes, (2, 1, 3, 3, 3)),
    "mlp_float32": Case(
        lambda: LipschitzMLP([3, 8, 3], 2, LipSwish, lipschitz=0.7), (4, 3), (4, 2), dtype=torch.float32
    ),
    "conv_float32": Case(
        lambda: LipschitzConvNet([2, 4, 2], activation=CLipSwish, lipschitz=0.7), (2, 2, 4, 4), dtype=torch.float32
    ),
}


def build(name: str) -> ResidualBlock:
    case = CASES[name]
    return ResidualBlock(case.branch(), log_det=Exact()).to(case.dtype)


# ------------------------------------------------------------------------------------------- numbers


def forward(block: ResidualBlock, inputs: Inputs) -> Numbers:
    with torch.no_grad():
        y, log_det = block(*inputs.values())
    return {"y": y, "log_det": log_det}


def certificate(block: ResidualBlock) -> Numbers:
    return {"bound": float(block.certificate().value)}


def inverse(block: ResidualBlock, outputs: Inputs) -> Numbers:
    with torch.no_grad():
        x, log_det = block.inverse(*outputs.values())
        return {"x": x, "log_det": log_det, "preimage": block.preimage(*outputs.values())}


def gradients(call: Call, block: ResidualBlock, inputs: Inputs) -> Numbers:
    """A weighted sum of what the call returns, and its gradients, by name of the input or the parameter."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    total = torch.stack([weighted_sum(output) for output in call(*leaves.values())]).sum()
    wanted = {**leaves, **dict(block.named_parameters())}
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return {"total": total.detach(), **dict(zip(wanted, found, strict=True))}


def weighted_sum(output: Tensor) -> Tensor:
    """With a weight of its own for every entry, so that no two may be exchanged."""
    weights = torch.arange(1, output.numel() + 1, dtype=output.dtype).cos()
    return (weights * output.flatten()).sum()


def series(block: ResidualBlock, inputs: Inputs) -> Numbers:
    with torch.no_grad(), using(block, log_det=all_probes(inputs["x"])):
        return {"log_det": block(*inputs.values())[1]}


def series_gradients(block: ResidualBlock, inputs: Inputs) -> Numbers:
    with using(block, log_det=all_probes(inputs["x"])):
        return gradients(lambda *args: block(*args)[1:], block, inputs)


def all_probes(x: Tensor) -> PowerSeries:
    """As many orthogonal probes as dimensions: the trace is exact, so the result does not depend on the seed."""
    return PowerSeries(terms=30, probes=Orthogonal(x[0].numel()))


# ----------------------------------------------------------------------------------------- recording


def record(name: str) -> dict[str, Numbers]:
    case = CASES[name]
    torch.manual_seed(list(CASES).index(name))
    block = build(name)
    stretch(block, case.factor)
    inputs = {"x": torch.randn(case.x, dtype=case.dtype)}
    if case.context is not None:
        inputs["context"] = torch.randn(case.context, dtype=case.dtype)
    values = forward(block, inputs)
    outputs = {**inputs, "x": values["y"]}
    return {
        "state": dict(block.state_dict()),
        "inputs": inputs,
        "forward": values,
        "certificate": certificate(block),
        "inverse": inverse(block, outputs),
        "gradients": gradients(block, block, inputs),
        "inverse_gradients": gradients(block.inverse, block, outputs),
        "series": series(block, inputs),
        "series_gradients": series_gradients(block, inputs),
    }


@torch.no_grad()
def stretch(block: nn.Module, factor: float) -> None:
    """Raw weights against their bounds, where a fresh block's are not, and every parameter off its special start."""
    for name, parameter in block.named_parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
        if name.endswith("weight.original"):
            parameter.mul_(factor)


def packed(kinds: dict[str, Numbers]) -> dict[str, Numbers]:
    """The same tensors as views of one: a file spends 300 bytes on every tensor that has a storage of its own."""
    values = [value for numbers in kinds.values() for value in numbers.values()]
    flat = torch.cat([value.flatten() for value in values if isinstance(value, Tensor)])
    start = 0

    def view(value: Any) -> Any:
        nonlocal start
        if not isinstance(value, Tensor):
            return value
        start += value.numel()
        return flat[start - value.numel() : start].view(value.shape)

    return {kind: {key: view(value) for key, value in numbers.items()} for kind, numbers in kinds.items()}


def main(path: str) -> None:
    torch.set_num_threads(1)
    torch.save({name: packed(record(name)) for name in CASES}, path)
    print(f"{len(CASES)} blocks of {iresflow_plugin.__file__} in {path}")


if __name__ == "__main__":
    main(sys.argv[1])
