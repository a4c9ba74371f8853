"""hypothesis strategies for properties of your own: branches and blocks at their bound, events, contexts.

>>> from hypothesis import given
>>> @given(blocks(), events((4,)))
... def test_the_inverse_returns_the_input(block, x): ...
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from iresflow_plugin.block import ResidualBlock
from iresflow_plugin.lipschitz import ACTIVATIONS
from iresflow_plugin.nets import LipschitzConvNet, LipschitzMLP
from iresflow_plugin.testing.weights import scale_weights

__all__ = ["blocks", "branches", "contexts", "events", "image_branches", "register_profiles"]

SMOOTH = [kind for kind in ACTIVATIONS.values() if kind.smooth]
M = TypeVar("M", bound=nn.Module)
EXTREMES = (0.0, 1e-6, 1e3)


def branches(
    features: int = 4, context_features: int | None = None, dtype: torch.dtype = torch.float64
) -> st.SearchStrategy[LipschitzMLP]:
    """LipschitzMLPs of any smooth activation, depth, width and bound; weights fresh, or pushed far against the bound.

    Args:
        features: D, of the event.
        context_features: of the context; None for an unconditional branch.
        dtype: of the parameters.
    """
    return st.builds(
        lambda seed, widths, kind, lipschitz, factor: _branch(
            [features, *widths, features], context_features, kind, lipschitz, factor, seed, dtype
        ),
        seed=st.integers(0, 2**31 - 1),
        widths=st.lists(st.sampled_from([4, 8]), min_size=1, max_size=2),
        kind=st.sampled_from([None, *SMOOTH]),
        lipschitz=st.sampled_from([0.3, 0.9, 0.97]),
        factor=st.sampled_from([1.0, 5.0, 100.0]),
    )


def image_branches(
    channels: int = 2, context_features: int | None = None, dtype: torch.dtype = torch.float64
) -> st.SearchStrategy[LipschitzConvNet]:
    """LipschitzConvNets of any smooth activation, kernels, padding and bound, weights fresh or against the bound.

    Args:
        channels: of the image; its height and width are free.
        context_features: of the context vector; None for an unconditional branch.
        dtype: of the parameters.
    """
    return st.builds(
        lambda seed, hidden, kernels, kind, lipschitz, mode, factor: _seeded(
            seed,
            lambda: LipschitzConvNet(
                [channels, *[hidden] * (len(kernels) - 1), channels],
                kernels,
                context_features,
                activation=kind,
                lipschitz=lipschitz,
                padding_mode=mode,
            ),
            factor,
            dtype,
        ),
        seed=st.integers(0, 2**31 - 1),
        hidden=st.sampled_from([2, 4]),
        kernels=st.sampled_from([(3, 3), (3, 1, 3), (1, 5)]),
        kind=st.sampled_from([None, *SMOOTH]),
        lipschitz=st.sampled_from([0.3, 0.9, 0.97]),
        mode=st.sampled_from(["zeros", "circular"]),
        factor=st.sampled_from([1.0, 5.0, 100.0]),
    )


def blocks(
    features: int = 4, context_features: int | None = None, dtype: torch.dtype = torch.float64
) -> st.SearchStrategy[ResidualBlock]:
    """Residual blocks around `branches`, with the default log-det and inverse."""
    return branches(features, context_features, dtype).map(ResidualBlock)


def events(
    shape: tuple[int, ...], batch: int = 5, dtype: torch.dtype = torch.float64, extreme: bool = True
) -> st.SearchStrategy[Tensor]:
    """Normal inputs of shape (batch, *shape); with `extreme`, scaled by 0, 1e-6 or 1000 in some rows."""
    return st.builds(
        lambda seed, scales: _normal(seed, (batch, *shape), dtype, scales),
        seed=st.integers(0, 2**31 - 1),
        scales=st.lists(st.sampled_from([1.0, 1.0, *EXTREMES] if extreme else [1.0]), min_size=batch, max_size=batch),
    )


def contexts(features: int, batch: int = 5, dtype: torch.dtype = torch.float64) -> st.SearchStrategy[Tensor]:
    """Contexts of shape (batch, features)."""
    return events((features,), batch, dtype, extreme=False)


def register_profiles() -> None:
    """Register the profiles dev (15 examples), ci (30), nightly (500), and load the one in HYPOTHESIS_PROFILE.

    dev and ci repeat the same examples at every run; nightly looks for new ones.
    """
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    for name, examples in {"dev": 15, "ci": 30, "nightly": 500}.items():
        settings.register_profile(
            name,
            max_examples=examples,
            deadline=None,
            derandomize=name != "nightly",
            suppress_health_check=slow,
        )
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def _branch(sizes, context_features, kind, lipschitz, factor, seed, dtype) -> LipschitzMLP:
    return _seeded(seed, lambda: LipschitzMLP(sizes, context_features, kind, lipschitz), factor, dtype)


def _seeded(seed: int, build: Callable[[], M], factor: float, dtype: torch.dtype) -> M:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build()
    return scale_weights(net, factor).to(dtype)


def _normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype, scales: list[float]) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    factors = torch.tensor(scales, dtype=torch.float64).view(-1, *[1] * (x.ndim - 1))
    return (x * factors).to(dtype)
