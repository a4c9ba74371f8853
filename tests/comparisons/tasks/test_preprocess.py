"""Preprocessing: what goes, what is filled with noise, and the units of densities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from comparisons.tasks.preprocess import (
    Dequantise,
    DropColumn,
    DropDegenerate,
    Patches,
    Standardise,
    fit,
    lattice_step,
)

NORMAL = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def described(*columns: Tensor) -> tuple[str, ...]:
    names = tuple("abcdefg"[: len(columns)])
    return fit([DropDegenerate(), Dequantise()], torch.stack(columns, dim=1), names).describe()


def test_standardised_data_has_mean_0_and_deviation_1_by_the_train_rows_alone() -> None:
    train, test = 3 * NORMAL[:1000] + 7, 100 * NORMAL[1000:]
    fitted = fit([Standardise()], train, tuple("abcde"))
    x = fitted.apply(train, generator())
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean(0), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(5))
    torch.testing.assert_close(fitted.apply(test, generator()).double(), (test - train.mean(0)) / train.std(0))
    torch.testing.assert_close(fitted.restore(x), train.float())
    assert fitted.describe() == ("standardised by the 1000 train rows",)


def test_log_volume_turns_densities_into_those_of_the_raw_data() -> None:
    """A Gaussian known in raw units, and the same one in standardised units."""
    mean, factor = torch.tensor([5.0, -3.0]).double(), torch.tensor([[2.0, 0.0], [1.0, 0.1]]).double()
    raw = mean + NORMAL[:, :2] @ factor.T
    fitted = fit([Standardise()], raw, ("a", "b"))
    scale = torch.diag(1 / raw.std(0))
    inner = MultivariateNormal(scale @ (mean - raw.mean(0)), scale_tril=scale @ factor)
    outer = MultivariateNormal(mean, scale_tril=factor)
    log_p = inner.log_prob(fitted.apply(raw, generator()).double())
    torch.testing.assert_close(log_p + fitted.log_volume, outer.log_prob(raw), atol=1e-4, rtol=0)


def test_columns_that_make_a_likelihood_unbounded_are_dropped() -> None:
    a, b, c = NORMAL[:, 0], NORMAL[:, 1], NORMAL[:, 2]
    atom = torch.where(torch.arange(2000) % 8 == 0, 0.0, c)
    assert described(a, torch.full_like(a, 3.5)) == ("dropped b (always 3.5)",)
    assert described(a, torch.where(b > 0, 0.3, 0.1 + 0.2).double()) == ("dropped b (always 0.3)",)
    assert described(a, b, a) == ("dropped c (correlation 1.000 with a)",)
    assert described(a, b, 0.1 * c - a) == ("dropped c (correlation -0.995 with a)",)
    assert described(a, b, a + b)[0].startswith("dropped c (a linear function of the columns before it, R² = 1.0000")
    (sentence,) = described(a, b, atom)
    assert sentence.startswith("dropped c (12% of the rows are 0, ")
    assert described(a, b, c, 0.5 * a + 0.5 * b + 0.2 * c) == (
        "dropped d (a linear function of the columns before it, R² = 1.00000)",
    )


def test_sound_columns_stay() -> None:
    a, b = NORMAL[:, 0], NORMAL[:, 1]
    assert described(a, b, a + 0.5 * NORMAL[:, 2]) == ()


def test_repeated_values_get_noise_of_their_step() -> None:
    a = NORMAL[:, 0]
    counts, prices = (3 * a).round(), (a * 4).round() / 4
    assert described(a + NORMAL[:, 1], counts, 100 + prices + NORMAL[:, 2].round()) == (
        "dequantised b by noise on [0, 1)",
        "dequantised c by noise on [0, 0.25)",
    )


def test_noise_fills_the_cell_and_is_new_at_every_call() -> None:
    x = (3 * NORMAL).round()
    fitted = fit([Dequantise(1.0)], x, tuple("abcde"))
    noisy = fitted.apply(x, generator())
    noise = noisy - x.float()
    assert noise.min() >= 0 and noise.max() <= 1 and noise.mean().item() == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(noisy, fitted.apply(x, torch.Generator().manual_seed(2)))
    assert torch.equal(noisy, fitted.apply(x, generator()))
    assert fitted.log_volume == 0


@pytest.mark.parametrize(
    ("values", "step"),
    [
        (np.arange(50) % 7, 1.0),
        (np.float32([1000.1, 1000.2, 1000.3, 1000.5]), 0.1),
        (np.array([0.1 + 0.2, 0.3, 0.4]), 0.1),
        (np.array([0, 1e-5, 100.0]), None),
        (np.array([0, 0.123, 0.2345, 1e9]), None),
        (np.array([2.0, 2.0]), None),
    ],
)
def test_the_step_of_a_lattice(values: np.ndarray, step: float | None) -> None:
    assert lattice_step(values.astype(np.float64)) == step


def test_patches_as_in_the_maf_paper() -> None:
    x = torch.randint(0, 256, (100, 64), generator=generator()).to(torch.uint8)
    fitted = fit([Patches()], x, tuple(str(number) for number in range(64)))
    y = fitted.apply(x, generator()).double()
    pixels = torch.cat([y, -y.sum(1, keepdim=True)], dim=1)  # the last one, since the patch sums to 0
    centred = x.double() / 256 - (x.double() / 256).mean(1, keepdim=True)
    assert y.shape == (100, 63) and len(fitted.columns) == 63 and fitted.log_volume == 0
    assert (pixels - centred).abs().max() <= 1 / 256


def test_a_constant_column_cannot_be_standardised() -> None:
    with pytest.raises(ValueError, match="'a' is constant in the train rows"):
        fit([Standardise()], torch.ones(10, 1), ("a",))


def test_a_column_to_drop_must_be_there() -> None:
    with pytest.raises(ValueError, match="no column 'z' to drop; there are: a, b"):
        fit([DropColumn("z", "")], NORMAL[:, :2], ("a", "b"))


def test_a_chain_adds_up() -> None:
    fitted = fit([DropColumn("a", "not wanted"), Standardise()], 4 * NORMAL, tuple("abcde"))
    assert fitted.columns == tuple("bcde")
    assert fitted.log_volume == pytest.approx(-4 * math.log(4), abs=0.2)
    assert fitted.describe()[0] == "dropped a (not wanted)"
