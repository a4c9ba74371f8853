"""Methods on images: within the budget, densities, there and back, the same in both hosts by all their names."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from lightning.fabric import Fabric
from nflows.transforms import CompositeTransform
from torch import Tensor
from torch.autograd.functional import jacobian

from comparisons import diagnostics
from comparisons.methods import METHODS, TWINS, Density, Method, build, parameter_count, widest
from comparisons.methods.multiscale import MultiscaleDensity, logit, nflows_preparation, normflows_preparation, scales
from comparisons.tasks import Points
from comparisons.training import EXACT_UP_TO, evaluating
from iresflow_plugin import ResidualBlock
from iresflow_plugin.log_det import Exact

SHAPE, BUDGET, CONTEXT = (1, 8, 8), 12_000, 3
ON_IMAGES = [name for name, method in METHODS.items() if method.images is not None]
TRAINED = [name for name in ON_IMAGES if METHODS[name].fit is None]
ASKED_FOR = ["i-resnet", "residual-flow", "i-densenet", "ours", "nflows-realnvp", "nflows-glow", "normflows-glow"]


def given(name: str) -> int | None:
    images = METHODS[name].images
    return CONTEXT if images is not None and images.conditional else None


def contexts(rows: int, features: int | None) -> Tensor | None:
    return None if features is None else torch.randn(rows, features)


def made(
    method: Method, shape: tuple[int, ...] = SHAPE, context_features: int | None = None, parameters: int = BUDGET
) -> Density:
    """After two steps of training, so that it is nowhere the identity and ActNorm has seen images."""
    torch.manual_seed(0)
    density = build(method, shape, parameters, context_features)
    x, context = torch.rand(64, *shape), contexts(64, context_features)
    if method.fit is not None:
        method.fit(density, torch.rand(200, *shape), x)
        return density.eval()
    optimizer = torch.optim.Adam(density.parameters(), lr=1e-3)
    density(x, context)
    for _ in range(2):
        optimizer.zero_grad()
        loss = density(x, context)
        loss.backward()
        assert loss.isfinite()
        optimizer.step()
    return density.eval()


def test_what_was_asked_for_is_there() -> None:
    assert {*ASKED_FOR, "nflows-maf", "nice", "made", *TWINS.values()} <= set(ON_IMAGES)


@pytest.mark.parametrize(("original", "twin"), TWINS.items())
def test_a_twin_has_blocks_in_place_of_the_swapped_transforms(original: str, twin: str) -> None:
    """At all scales, of about as many parameters, and with a context where the original has one."""
    swapped = METHODS[twin].swapped
    assert isinstance(swapped, type)
    old, new = (build(METHODS[name], SHAPE, BUDGET, given(name)) for name in (original, twin))
    blocks = [module for module in new.modules() if isinstance(module, ResidualBlock)]
    assert len(blocks) == sum(isinstance(module, swapped) for module in old.modules()) == 8
    assert not any(isinstance(module, swapped) for module in new.modules())
    assert parameter_count(new) == pytest.approx(parameter_count(old), rel=0.1)


@pytest.mark.parametrize("name", [name for name in TRAINED if METHODS[name].swapped is None])
def test_an_image_method_is_the_largest_within_its_budget(name: str) -> None:
    method = METHODS[name]
    density, width = build(method, SHAPE, BUDGET), widest(method, SHAPE, BUDGET)
    assert parameter_count(density) <= BUDGET < parameter_count(method.model(SHAPE, width + 1, None))
    assert pickle.loads(pickle.dumps(method)) == method  # workers get it by pickle


@pytest.mark.parametrize("name", ON_IMAGES)
def test_samples_are_images_and_the_way_back_leads_home(name: str) -> None:
    density = made(METHODS[name], context_features=given(name))
    x, context = torch.rand(4, *SHAPE), contexts(4, given(name))
    with torch.no_grad():
        samples, noise = density.sample(4, context), density.to_noise(x, context)
        assert samples.shape == x.shape and samples.isfinite().all() and noise.shape == (4, math.prod(SHAPE))
        assert density.log_prob(x, context).shape == (4,) and density.log_prob(x, context).isfinite().all()
        torch.testing.assert_close(density.to_data(noise, context), x, atol=1e-3, rtol=0)
        density, x = density.double(), x.double()
        context = None if context is None else context.double()
        torch.testing.assert_close(density.to_data(density.to_noise(x, context), context), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name", ["ours", "nflows-glow", "normflows-glow", "normflows-realnvp", "made", "nice", "normflows-glow-swapped"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_log_prob_is_that_of_the_noise_and_the_jacobian(name: str, channels: int) -> None:
    """Preparation, squeezes and factored channels included."""
    shape = (channels, 4, 4)
    density = made(METHODS[name], shape)
    x = torch.rand(2, *shape)
    with evaluating(density, math.prod(shape)):
        slopes = jacobian(lambda x: density.to_noise(x).sum(0), x)
        assert isinstance(slopes, Tensor)
        volume = slopes.flatten(2).permute(1, 0, 2).slogdet().logabsdet
        expected = torch.distributions.Normal(0.0, 1.0).log_prob(density.to_noise(x)).sum(1) + volume
        torch.testing.assert_close(density.log_prob(x), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["ours", "alternating", "normflows-glow", "normflows-glow-swapped"])
def test_samples_have_the_density_that_they_came_with(name: str) -> None:
    """Both hosts sample with a log-density; that of the sample, taken the other way round, is the same."""
    density = made(METHODS[name])
    draw = density.flow.sample if isinstance(density, MultiscaleDensity) else density.flow.sample_and_log_prob
    with evaluating(density, math.prod(SHAPE)):
        samples, came_with = draw(3)
        torch.testing.assert_close(density.log_prob(samples), came_with, atol=5e-3, rtol=0)


def test_twelve_blocks_are_inverted_to_round_off() -> None:
    """Three scales of four blocks, with ActNorm, 1x1 convolutions and factored channels, as CIFAR-10 has them."""
    density = made(METHODS["ours"], (3, 16, 16), parameters=24_000)
    assert sum(isinstance(module, ResidualBlock) for module in density.modules()) == 12
    x = torch.rand(8, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(density.to_data(density.to_noise(x)), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_the_preparation_is_the_same_in_both_hosts(shape: tuple[int, ...]) -> None:
    x = torch.rand(5, *shape)
    kept = x.clone()
    theirs, log_det = normflows_preparation(shape).inverse(x)  # pyright: ignore[reportCallIssue]
    assert torch.equal(x, kept)
    ours, ours_log_det = CompositeTransform(nflows_preparation(shape))(x)
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(log_det, ours_log_det)


def test_the_logit_of_nflows_moves_along_with_its_flow() -> None:
    assert [name for name, _ in logit().named_buffers()] == ["_transform.temperature"]


def test_images_that_cannot_be_squeezed_are_refused() -> None:
    assert scales((1, 8, 8)) == [(4, 4, 4), (8, 2, 2)] and scales((3, 32, 32))[-1] == (48, 4, 4)
    with pytest.raises(ValueError, match="images of 7 x 8 pixels cannot be squeezed"):
        build(METHODS["ours"], (1, 7, 8), BUDGET)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ON_IMAGES])
def test_a_method_of_vectors_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} models vectors, and the points are images of shape \(1, 8, 8\)"):
        build(METHODS[name], SHAPE, BUDGET)


def test_a_method_that_takes_no_context_with_images_says_so() -> None:
    with pytest.raises(ValueError, match="normflows-glow takes no context with images"):
        build(METHODS["normflows-glow"], SHAPE, BUDGET, CONTEXT)


@pytest.mark.parametrize("name", [name for name in ON_IMAGES if given(name)])
def test_a_context_moves_the_density_of_images(name: str) -> None:
    density = made(METHODS[name], context_features=CONTEXT)
    noise = torch.randn(4, 64)
    with torch.no_grad():
        near, far = (density.to_data(noise, torch.full((4, CONTEXT), value)) for value in (0.0, 3.0))
    assert (near - far).abs().max() > 1e-5


def test_an_event_of_one_axis_is_a_vector() -> None:
    assert parameter_count(build(METHODS["ours"], (5,), BUDGET)) == parameter_count(build(METHODS["ours"], 5, BUDGET))


# log-dets of large events ----------------------------------------------------------------------------


def test_the_error_of_log_dets_is_known_and_covers_what_is_off(fabric: Fabric) -> None:
    """Beyond the exact ones: a truncated training recipe is evaluated by a series as long as it takes."""
    shape = (1, 8, 12)
    assert math.prod(shape) > EXACT_UP_TO
    density = made(METHODS["i-resnet"], shape)
    points = Points(torch.rand(32, *shape))
    error = diagnostics.log_det_error(density, diagnostics.visit_blocks(density, points.x), points, len(points))
    with evaluating(density, math.prod(shape)):
        found = density.log_prob(points.x).mean()
    with evaluating(density, math.prod(shape), Exact()):
        truth = density.log_prob(points.x).mean()
    assert 0 < error < 2 and abs(found - truth) < 2 * error
