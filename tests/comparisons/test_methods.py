"""Methods: every one fills its budget, is a density, means the same by all its names, uses its context, and learns."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from comparisons.methods import METHODS, TWINS, Density, build, parameter_count, widest
from comparisons.tasks.toys import TOYS
from comparisons.training import has_blocks
from iresflow_plugin import ResidualBlock, using
from iresflow_plugin.log_det import Exact

BUDGET = 3_000
CONTEXT = 3
CONDITIONAL = [name for name, method in METHODS.items() if method.conditional]
TRAINED = [name for name, method in METHODS.items() if method.fit is None]
INVERTIBLE = [name for name, method in METHODS.items() if method.host.invertible]
PUBLISHED = ["NICE", "MADE", "MAF", "Real NVP", "Glow", "FFJORD", "i-ResNet", "Residual Flow", "i-DenseNet", "ImpFlow"]

# |x - to_data(to_noise(x))| in double precision. normflows' solver stops early (PEERS.md, D4); FFJORD's stops at 1e-6.
ROUND_TRIP = dict.fromkeys(METHODS, 1e-6) | {"normflows-residual": 2e-2, "ffjord": 1e-4}
# log_prob against the Jacobian. FFJORD: zuko integrates the log-det a hundred times more coarsely.
LOG_DET = dict.fromkeys(METHODS, 1e-3) | {"ffjord": 1e-2}


def shaken(name: str, features: int = 2, context_features: int | None = None) -> Density:
    """Every weight away from its start, where many flows are the identity, and where a wrong log-det would be right."""
    torch.manual_seed(0)
    method = METHODS[name]
    density = build(method, features, BUDGET, context_features)
    x = torch.randn(256, features)
    if method.fit is not None:
        method.fit(density, x, torch.randn(256, features))
    density(x, contexts(256, context_features))  # ActNorm initialises itself
    for parameter in density.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    if method.after_step is not None:
        method.after_step(density)
    return density.eval()


@cache
def trained(name: str) -> tuple[Density, float, float]:
    """After thirty steps, with the losses before and after."""
    torch.manual_seed(0)
    method, generator = METHODS[name], torch.Generator().manual_seed(0)
    density, held_out = build(method, 2, BUDGET), banana(500, generator)
    optimizer = torch.optim.Adam(density.parameters(), lr=max(method.grid))
    density(held_out)  # ActNorm initialises itself

    def loss() -> float:
        with torch.no_grad(), exact(density.eval()):
            return density(held_out).item()

    before = loss()
    density.train()
    for _ in range(30):
        optimizer.zero_grad()
        density(banana(100, generator)).backward()
        torch.nn.utils.clip_grad_norm_(density.parameters(), 5.0)
        optimizer.step()
        if method.after_step is not None:
            method.after_step(density)
    return density, before, loss()


def banana(n: int, generator: torch.Generator) -> Tensor:
    """A banana, off the middle and of unequal width: something for ActNorm, for scales and for bends."""
    first, second = torch.randn(2, n, generator=generator)
    return torch.stack([0.5 + 0.7 * first, 1.5 * first.square() + 0.5 * second - 1], 1)


def contexts(rows: int, context_features: int | None) -> Tensor | None:
    return None if context_features is None else torch.randn(rows, context_features)


@contextmanager
def exact(density: Density) -> Iterator[None]:
    """Every log-det without chance or truncation."""
    with using(density, log_det=Exact()) if has_blocks(density) else nullcontext():
        yield


# size ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_a_method_is_the_largest_within_its_budget(name: str, features: int = 5) -> None:
    method = METHODS[name]
    size, width = parameter_count(build(method, features, BUDGET)), widest(method, features, BUDGET)
    if name in TWINS.values():  # a twin comes as close to its original as whole widths allow, from either side
        assert 0.75 * BUDGET < size < 1.05 * BUDGET
    else:
        assert size <= BUDGET
    next_size = parameter_count(method.stack(features, width + 1, None))
    assert width == method.largest or next_size > BUDGET


def test_a_budget_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="no width brings nflows-maf with 4 features down to 10"):
        build(METHODS["nflows-maf"], 4, 10)


def test_looking_for_a_width_leaves_the_seed_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    widest(METHODS["ours"], 2, BUDGET)
    assert torch.equal(torch.get_rng_state(), before)


# a density -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_the_density_integrates_to_one(name: str) -> None:
    """Or to the part of the samples that the grid holds: MAF and Glow throw some far away, and more before training."""
    density = trained(name)[0] if name in TRAINED else shaken(name)
    with torch.no_grad(), exact(density):
        samples = density.sample(5000)
        low, middle, high = samples.nanquantile(torch.tensor([0.25, 0.5, 0.75]), 0)
        t = torch.linspace(-3.5, 3.5, 161)  # x = middle + scale sinh t: fine in the middle, and out to 16 scales
        x = middle + (high - low) * t.sinh()[:, None]
        dx = (high - low) * t.cosh()[:, None] * (t[1] - t[0])
        density_at = density.log_prob(torch.cartesian_prod(*x.T)).exp().reshape(161, 161)
        mass = dx[:, 0] @ density_at.to(dx) @ dx[:, 1]
        inside = ((samples >= x[0]) & (samples <= x[-1])).all(1).float().mean()
    assert mass.item() == pytest.approx(inside.item(), abs=1e-2) and inside > 0.9


@pytest.mark.parametrize("name", INVERTIBLE)
def test_log_prob_is_that_of_the_noise_and_the_jacobian(name: str) -> None:
    context_features = CONTEXT if METHODS[name].conditional else None
    density = shaken(name, 2, context_features)
    x, context = torch.randn(50, 2), contexts(50, context_features)
    with exact(density):
        slopes = jacobian(lambda x: density.to_noise(x, context).sum(0), x)  # rows of x know nothing of each other
        assert isinstance(slopes, Tensor)
        with torch.no_grad():
            noise = torch.distributions.Normal(0.0, 1.0).log_prob(density.to_noise(x, context)).sum(1)
            expected = noise + slopes.permute(1, 0, 2).slogdet().logabsdet
            torch.testing.assert_close(density.log_prob(x, context).float(), expected, atol=LOG_DET[name], rtol=1e-4)


@pytest.mark.parametrize("features", [2, 5])
@pytest.mark.parametrize("name", METHODS)
def test_samples_are_finite_and_the_way_back_leads_home(name: str, features: int) -> None:
    context_features = CONTEXT if METHODS[name].conditional else None
    density = shaken(name, features, context_features)
    x, context = torch.randn(64, features), contexts(64, context_features)
    with torch.no_grad():
        samples = density.sample(64, context)
        assert samples.shape == (64, features) and samples.isfinite().all()
        assert density.log_prob(x, context).shape == (64,)
        if density.invertible:
            density, x, context = density.double(), x.double(), None if context is None else context.double()
            back = density.to_data(density.to_noise(x, context), context)
            torch.testing.assert_close(back, x, atol=ROUND_TRIP[name], rtol=0)
        else:
            with pytest.raises(NotImplementedError, match="no noise behind its data"):
                density.to_noise(x)


@pytest.mark.parametrize("name", ["planar", "radial"])
def test_elementary_maps_are_inverted_wherever_they_bend(name: str) -> None:
    """Away from the start, where some of them nearly fold; in double precision the bisection has to end too."""
    density = shaken(name).double()
    for parameter in density.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    for flow in density.flow.flows[:20]:
        x = 3 * torch.randn(200, 2, dtype=torch.float64)
        y, log_det = flow.inverse(x)
        back, log_det_back = flow.forward(y)
        torch.testing.assert_close(back, x, atol=1e-8, rtol=0)
        torch.testing.assert_close(log_det_back, -log_det, atol=1e-6, rtol=0)


# context ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_context_moves_the_density_of_every_feature(name: str) -> None:
    density = shaken(name, 2, CONTEXT)
    x, near, far = torch.zeros(200, 2), torch.zeros(200, CONTEXT), torch.full((200, CONTEXT), 3.0)
    with torch.no_grad():
        noise = torch.randn(200, 2)
        moved = (density.to_data(noise, near) - density.to_data(noise, far)).abs().mean(0)
        assert (moved > 1e-4).all()
        with exact(density):
            assert (density.log_prob(x[:5], near[:5]) - density.log_prob(x[:5], far[:5])).abs().min() > 1e-4


@pytest.mark.parametrize("name", [name for name in METHODS if name not in CONDITIONAL])
def test_a_method_that_knows_no_context_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} takes no context, and context_features=3"):
        build(METHODS[name], 2, BUDGET, context_features=3)


@pytest.mark.parametrize("name", ["ours", "gaussian", "made", "normflows-nsf"])
def test_a_context_that_does_not_fit_is_refused(name: str) -> None:
    density, x = shaken(name), torch.randn(5, 2)
    for call in (density.log_prob, density.to_noise, density.to_data):
        with pytest.raises(ValueError, match=r"built without a context and got one of shape \(5, 3\)"):
            call(x, torch.randn(5, 3))
    with pytest.raises(ValueError, match="built without a context"):
        density.sample(5, torch.randn(5, 3))
    if name in CONDITIONAL:
        density = shaken(name, 2, CONTEXT)
        for wrong in (None, torch.randn(4, 3), torch.randn(5, 2)):
            got = re.escape(str(None if wrong is None else tuple(wrong.shape)))
            with pytest.raises(ValueError, match=rf"must have shape \(5, 3\), .* got {got}"):
                density.log_prob(x, wrong)


# learning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_thirty_steps_lower_the_loss(name: str) -> None:
    _, before, after = trained(name)
    assert after < before - 0.02


def test_the_gaussian_floor_is_the_best_gaussian() -> None:
    factor, mean = torch.tensor([[2.0, 0.0], [1.5, 0.5]]), torch.tensor([1.0, -1.0])
    torch.manual_seed(0)
    x = torch.randn(20_000, 2) @ factor.T + mean
    density = build(METHODS["gaussian"], 2, BUDGET)
    METHODS["gaussian"].fit(density, x, x)  # pyright: ignore[reportOptionalCall]
    entropy = 1 + math.log(2 * math.pi)  # and log det factor = 0
    assert density(x).item() == pytest.approx(entropy, abs=0.02)


def test_kernels_beat_the_gaussian_and_follow_the_seed() -> None:
    generator = torch.Generator().manual_seed(0)
    train, validation, test = (TOYS["checkerboard"].sample(n, generator) for n in (2000, 500, 500))
    losses = {}
    for name in ("gaussian", "kde"):
        density = build(METHODS[name], 2, BUDGET)
        METHODS[name].fit(density, train, validation)  # pyright: ignore[reportOptionalCall]
        losses[name] = density(test).item()
    assert math.log(32) < losses["kde"] < losses["gaussian"] - 0.2
    torch.manual_seed(1)
    first = density.sample(5)
    torch.manual_seed(1)
    assert torch.equal(density.sample(5), first)


def test_kernels_without_points_say_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"call fit\(train, validation\) first"):
        build(METHODS["kde"], 2, BUDGET).sample(1)


# the table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_complete(name: str) -> None:
    method = METHODS[name]
    assert method.name == name and method.about and not method.about.endswith(".")
    if method.fit is not None:
        assert method.grid == () and method.family == "floor"
    else:
        assert len(method.grid) == 3 and method.learning_rate in method.grid
        assert re.search(r"\d{4}, arXiv \d{4}\.\d{5}|arXiv \d{4}\.\d{4}", method.reference)


@pytest.mark.parametrize("system", PUBLISHED)
def test_every_system_with_published_numbers_has_a_row(system: str) -> None:
    """Those of REFERENCES.md, section 5."""
    assert any(method.about.startswith(system) for method in METHODS.values())


@pytest.mark.parametrize(("original", "twin"), TWINS.items())
def test_a_twin_has_residual_blocks_in_place_of_the_swapped_transforms_only(original: str, twin: str) -> None:
    swapped = METHODS[twin].swapped
    assert swapped is not None
    old, new = build(METHODS[original], 4, BUDGET), build(METHODS[twin], 4, BUDGET)
    replaced = sum(isinstance(module, swapped) for module in old.modules())
    assert replaced == sum(isinstance(module, ResidualBlock) for module in new.modules()) == 8
    assert not any(isinstance(module, swapped) for module in new.modules())
    assert old.swap == "" and new.swap
