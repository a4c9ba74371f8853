"""Methods: every one builds within its budget, and means the same by its five names."""

from __future__ import annotations

import pytest
import torch

from comparisons.methods import METHODS, TWINS, build, parameter_count
from iresflow_plugin import ResidualBlock

BUDGET = 6_000


@pytest.mark.parametrize("features", [2, 5])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_fills_its_budget_and_inverts(name: str, features: int) -> None:
    torch.manual_seed(0)
    density = build(METHODS[name], features, BUDGET)
    size = parameter_count(density)
    assert 0.75 * BUDGET < size < 1.05 * BUDGET  # a twin comes as close as whole widths allow, from either side
    x = torch.randn(64, features)
    loss = density(x)
    assert loss.shape == () and torch.isfinite(loss)
    loss.backward()
    density.eval()
    with torch.no_grad():
        assert density.log_prob(x).shape == (64,)
        assert density.sample(10).shape == (10, features)
        tolerance = 2e-2 if name == "normflows-residual" else 1e-4  # its solver stops early: PEERS.md, D4
        torch.testing.assert_close(density.to_data(density.to_noise(x)), x, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("original", "twin"), TWINS.items())
def test_a_twin_has_residual_blocks_in_place_of_the_swapped_transforms_only(original: str, twin: str) -> None:
    swapped = METHODS[twin].swapped
    assert swapped is not None
    old, new = build(METHODS[original], 4, BUDGET), build(METHODS[twin], 4, BUDGET)
    replaced = sum(isinstance(module, swapped) for module in old.modules())
    assert replaced == sum(isinstance(module, ResidualBlock) for module in new.modules()) == 8
    assert not any(isinstance(module, swapped) for module in new.modules())
    assert old.swap == "" and new.swap


def test_a_budget_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="no width"):
        build(METHODS["nflows-maf"], 4, 10)
