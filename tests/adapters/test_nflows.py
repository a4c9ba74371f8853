"""Our transform inside nflows, held to what nflows asks of any transform, and mixed with those it ships."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nflows import transforms
from nflows.distributions import ConditionalDiagonalNormal, StandardNormal
from nflows.flows import Flow
from nflows.nn.nets import ResidualNet
from nflows.transforms import CompositeTransform, InverseTransform, MultiscaleCompositeTransform
from torch import Tensor, nn

from iresflow_plugin import NotContractiveError, ResidualBlock, using
from iresflow_plugin.adapters.nflows import ResidualTransform
from iresflow_plugin.inverse import Newton
from iresflow_plugin.lipschitz import constrain
from iresflow_plugin.log_det import Exact
from iresflow_plugin.nets import LipschitzMLP
from tests.adapters.checks import (
    STATES,
    branch,
    dense_log_det,
    integral,
    losses,
    same_everywhere,
    scaled,
    shaken,
    two_clusters,
    two_clusters_log_prob,
    without_gradient,
)

C = 3  # size of contexts

pytestmark = pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")  # nflows' LULinear


def coupling_net(context_features):
    return lambda inputs, outputs: ResidualNet(
        inputs, outputs, hidden_features=8, context_features=context_features, num_blocks=1
    )


def mask(features: int) -> list[int]:
    return [i % 2 for i in range(features)]


KINDS = {
    "residual": lambda d, c: ResidualTransform(branch(d, c)),
    "inverse residual": lambda d, c: InverseTransform(ResidualTransform(branch(d, c))),
    "affine coupling": lambda d, c: transforms.AffineCouplingTransform(mask(d), coupling_net(c)),
    "spline coupling": lambda d, c: transforms.PiecewiseRationalQuadraticCouplingTransform(
        mask(d), coupling_net(c), num_bins=4, tails="linear", tail_bound=3.0
    ),
    "autoregressive": lambda d, c: transforms.MaskedAffineAutoregressiveTransform(d, 8, c, num_blocks=1),
    "spline autoregressive": lambda d, c: transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        d, 8, c, num_bins=4, tails="linear", tail_bound=3.0, num_blocks=1
    ),
    "reverse": lambda d, c: transforms.ReversePermutation(d),
    "permutation": lambda d, c: transforms.RandomPermutation(d),
    "LU": lambda d, c: transforms.LULinear(d),
    "QR": lambda d, c: transforms.QRLinear(d, num_householder=2),
    "ActNorm": lambda d, c: transforms.ActNorm(d),
}
OURS = ("residual", "inverse residual")

stacks = st.lists(st.sampled_from(sorted(KINDS)), max_size=3).flatmap(
    lambda kinds: st.tuples(st.sampled_from(OURS), st.integers(0, len(kinds))).map(
        lambda ours: [*kinds[: ours[1]], ours[0], *kinds[ours[1] :]]
    )
)


def composite(kinds: list[str], features: int, context_features: int | None = None) -> CompositeTransform:
    """A stack as it is after some training: bounds reached, nothing at its identity, ActNorm initialised."""
    stack = shaken(CompositeTransform([KINDS[kind](features, context_features) for kind in kinds]))
    with torch.no_grad():
        stack(torch.randn(64, features), None if context_features is None else torch.randn(64, context_features))
    return stack


def contexts(n: int, context_features: int | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    return None if context_features is None else torch.randn(n, context_features, dtype=dtype)


def assert_consistent(transform: nn.Module, inputs: Tensor, context: Tensor | None, eps: float = 1e-6) -> None:
    """What nflows' TransformTest asserts: inverse, then forward, is the identity, with log-det zero."""
    identity = CompositeTransform([InverseTransform(transform), transform])
    outputs, log_det = identity(inputs, context)
    assert outputs.shape == inputs.shape and log_det.shape == inputs.shape[:1]
    assert torch.isfinite(outputs).all() and torch.isfinite(log_det).all()
    assert (outputs - inputs).abs().max() < eps
    assert log_det.abs().max() < eps


# what nflows' own suite asks --------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("context_features", [None, C])
@pytest.mark.parametrize("features", [1, 2, 6])
def test_the_hosts_transform_test(features, context_features, state) -> None:
    transform = ResidualTransform(branch(features, context_features, state))
    context = contexts(10, context_features)
    assert_consistent(transform, torch.randn(10, features), context)
    # The other way round, the rounding of x + g(x) alone may cost 1 / (1 - L) times as much.
    assert_consistent(InverseTransform(transform), torch.randn(10, features), context, eps=1e-5)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("features", [20, 40])
def test_the_hosts_transform_test_at_the_size_of_its_own_cases(features, state) -> None:
    transform = ResidualTransform(branch(features, C, state), Exact())
    assert_consistent(transform, torch.randn(10, features), torch.randn(10, C))


@pytest.mark.parametrize("shape", [(2, 4, 4), (3, 2, 2)])
def test_the_hosts_transform_test_on_images(shape) -> None:
    assert_consistent(ResidualTransform(image_branch(*shape), Exact()), torch.randn(5, *shape), None)


@pytest.mark.parametrize("context_features", [None, C])
def test_a_pass_changes_neither_inputs_nor_context_and_gives_a_log_det_per_sample(context_features) -> None:
    transform = ResidualTransform(branch(3, context_features))
    inputs, context = torch.randn(5, 3), contexts(5, context_features)
    before = inputs.clone(), None if context is None else context.clone()
    for one_pass in (transform.forward, transform.inverse):
        outputs, log_det = one_pass(inputs, context)
        assert outputs.shape == (5, 3) and log_det.shape == (5,) and log_det.dtype == inputs.dtype
        outputs.data.add_(1)
        log_det.data.add_(1)
        assert torch.equal(inputs, before[0]) and not inputs.requires_grad
        assert context is None or (torch.equal(context, before[1]) and not context.requires_grad)


# mixed with the transforms of nflows -----------------------------------------------------------------


@given(kinds=stacks, features=st.integers(2, 4), context_features=st.sampled_from([None, C]), seed=st.integers(0, 999))
def test_any_stack_has_the_log_det_of_its_jacobian_and_is_inverted(kinds, features, context_features, seed) -> None:
    torch.manual_seed(seed)
    stack = composite(kinds, features, context_features).double()
    x = torch.randn(3, features, dtype=torch.float64)
    context = None if context_features is None else torch.randn(1, C, dtype=torch.float64).expand(3, C)

    def forward(rows: Tensor) -> tuple[Tensor, Tensor]:
        return stack(rows, None if context is None else context[: len(rows)])

    def inverse(rows: Tensor) -> tuple[Tensor, Tensor]:
        return stack.inverse(rows, None if context is None else context[: len(rows)])

    y, log_det = forward(x)
    back, log_det_back = inverse(y)
    torch.testing.assert_close(back, x, atol=1e-9, rtol=0)
    torch.testing.assert_close(log_det_back, -log_det, atol=1e-8, rtol=0)
    torch.testing.assert_close(log_det, dense_log_det(forward, x), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(log_det_back, dense_log_det(inverse, y), atol=1e-8, rtol=1e-8)


@settings(max_examples=settings.default.max_examples // 2)
@given(kinds=stacks, seed=st.integers(0, 999))
def test_the_density_of_any_flow_integrates_to_one(kinds, seed) -> None:
    torch.manual_seed(seed)
    flow = Flow(composite(kinds, 2), StandardNormal([2])).eval()
    with torch.no_grad():
        reach = 1.2 * flow.sample(2000).abs().max().item()
    assert integral(flow.log_prob, reach) == pytest.approx(1, abs=3e-3)


@given(kinds=stacks, context_features=st.sampled_from([None, C]), seed=st.integers(0, 999))
def test_any_flow_samples_what_it_scores(kinds, context_features, seed) -> None:
    torch.manual_seed(seed)
    flow = Flow(composite(kinds, 3, context_features), StandardNormal([3])).eval()
    context = contexts(2, context_features)
    with torch.no_grad():
        samples, log_prob = flow.sample_and_log_prob(6, context)
        rows = samples.reshape(-1, 3)
        again = flow.log_prob(rows, None if context is None else context.repeat_interleave(6, 0))
    assert samples.shape == ((6, 3) if context is None else (2, 6, 3))
    assert torch.isfinite(samples).all()
    torch.testing.assert_close(again, log_prob.reshape(-1), atol=2e-3, rtol=1e-3)


def image_branch(channels: int, height: int, width: int) -> nn.Module:
    size = channels * height * width
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(size, 16), nn.Tanh(), nn.Linear(16, size), nn.Unflatten(1, (channels, height, width))
    )
    return scaled(constrain(net))


def multiscale(shape: tuple[int, ...]) -> MultiscaleCompositeTransform:
    """Two scales; for images the second sees non-contiguous halves."""
    make = image_branch if len(shape) == 3 else branch
    result = MultiscaleCompositeTransform(num_transforms=2)
    hidden = result.add_transform(ResidualTransform(make(*shape)), shape)
    result.add_transform(ResidualTransform(make(*hidden)), hidden)
    return result


@pytest.mark.parametrize("shape", [(4,), (5,), (4, 2, 1), (4, 1, 2)])
def test_multiscale(shape) -> None:
    transform = multiscale(shape).double()
    x = torch.randn(3, *shape, dtype=torch.float64)

    def flat(rows: Tensor) -> tuple[Tensor, Tensor]:
        return transform(rows.view(-1, *shape))

    y, log_det = transform(x)
    back, log_det_back = transform.inverse(y)
    assert y.shape == (3, x[0].numel())
    torch.testing.assert_close(back, x, atol=1e-10, rtol=0)
    torch.testing.assert_close(log_det_back, -log_det, atol=1e-10, rtol=0)
    torch.testing.assert_close(log_det, dense_log_det(flat, x.flatten(1)), atol=1e-10, rtol=1e-10)


def test_an_image_flow_of_squeezes_and_one_by_one_convolutions() -> None:
    inner = CompositeTransform(
        [
            transforms.SqueezeTransform(),
            transforms.ActNorm(4),
            transforms.OneByOneConvolution(4),
            ResidualTransform(image_branch(4, 2, 2)),
        ]
    )
    scales = MultiscaleCompositeTransform(num_transforms=2)
    hidden = scales.add_transform(inner, (4, 2, 2))
    scales.add_transform(InverseTransform(ResidualTransform(image_branch(*hidden))), hidden)
    flow = Flow(scales, StandardNormal([16]))
    x = torch.randn(6, 1, 4, 4)
    assert flow.log_prob(x).shape == (6,)
    (-flow.log_prob(x).mean()).backward()
    assert not without_gradient(flow)
    flow.eval()
    with torch.no_grad(), using(flow, log_det=Exact()):
        noise, log_det = scales(x)
        back, log_det_back = scales.inverse(noise)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=0)
    torch.testing.assert_close(log_det_back, -log_det, atol=1e-4, rtol=0)
    assert flow.sample(3).shape == (3, 1, 4, 4)


# training --------------------------------------------------------------------------------------------


def conditional_flow(*kinds: str) -> Flow:
    """Two features, a raw context of 2, embedded in 3, which moves the base as well."""
    base = ConditionalDiagonalNormal([2], context_encoder=nn.Linear(C, 4))
    return Flow(composite(list(kinds), 2, C), base, embedding_net=nn.Sequential(nn.Linear(2, C), nn.Tanh()))


@pytest.mark.parametrize("kind", OURS)
def test_training_on_data(kind) -> None:
    flow = Flow(composite([kind, "LU", "residual", "ActNorm"], 2), StandardNormal([2]))
    values = losses(lambda: -flow.log_prob(two_clusters(64)).mean(), flow.parameters())
    assert not without_gradient(flow)
    assert sum(values[-5:]) < sum(values[:5]) - 0.5


@pytest.mark.parametrize("kind", OURS)
def test_training_with_a_context(kind) -> None:
    flow = conditional_flow(kind, "reverse", kind)

    def loss() -> Tensor:
        context = torch.randn(64, 2)
        return -flow.log_prob(two_clusters(64) + context, context).mean()

    values = losses(loss, flow.parameters())
    assert not without_gradient(flow)
    assert sum(values[-5:]) < sum(values[:5]) - 0.5


@pytest.mark.parametrize("kind", OURS)
def test_training_on_a_density(kind) -> None:
    """Reverse KL: samples carry the gradient."""
    flow = Flow(composite([kind, "affine coupling", "residual"], 2), StandardNormal([2]))

    def loss() -> Tensor:
        x, log_prob = flow.sample_and_log_prob(64)
        return (log_prob - two_clusters_log_prob(x)).mean()

    values = losses(loss, flow.parameters())
    assert not without_gradient(flow)
    assert sum(values[-5:]) < sum(values[:5]) - 0.5


@pytest.mark.parametrize("turn", [lambda transform: transform, InverseTransform], ids=["forward", "inverse"])
def test_gradients_are_those_of_finite_differences(turn) -> None:
    """Of outputs and log-det, per sample, with respect to inputs, context and every parameter."""
    transform = turn(ResidualTransform(branch(2, C, width=4))).double()
    names, parameters = zip(*transform.named_parameters(), strict=True)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    context = torch.randn(3, C, dtype=torch.float64, requires_grad=True)

    def both(x: Tensor, context: Tensor, *values: Tensor) -> Tensor:
        outputs, log_det = torch.func.functional_call(transform, dict(zip(names, values, strict=True)), (x, context))
        return torch.cat([outputs, log_det[:, None]], 1)

    assert torch.autograd.gradcheck(both, (x, context, *parameters))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_outputs_changed_in_place_do_not_spoil_the_gradient(direction) -> None:
    transform = ResidualTransform(branch(3, C))
    x, context = torch.randn(5, 3), torch.randn(5, C)
    gradients = []
    for in_place in (False, True):
        transform.zero_grad()
        y, log_det = getattr(transform, direction)(x, context)
        y, log_det = (y.sub_(1), log_det.add_(1)) if in_place else (y - 1, log_det + 1)
        (y.square().sum() + log_det.sum()).backward()
        gradients.append([p.grad.clone() for p in transform.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_frozen_parameters_let_the_gradient_of_the_inputs_through(direction) -> None:
    transform = ResidualTransform(branch(3))
    x = torch.randn(4, 3, requires_grad=True)
    one_pass = getattr(transform, direction)
    (free,) = torch.autograd.grad(sum(part.sum() for part in one_pass(x)), x)
    for parameter in transform.parameters():
        parameter.requires_grad_(False)
    y, log_det = one_pass(x)
    for parameter in transform.parameters():
        parameter.requires_grad_(True)
    (frozen,) = torch.autograd.grad(y.sum() + log_det.sum(), x)
    torch.testing.assert_close(frozen, free)


# batches, contexts, modes, dtypes --------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("kind", OURS)
def test_small_batches(kind, batch) -> None:
    flow = conditional_flow(kind, "affine coupling")
    x, context = torch.randn(batch, 2), torch.randn(batch, 2)
    log_prob = flow.log_prob(x, context)
    assert log_prob.shape == (batch,)
    log_prob.sum().backward()
    noise = flow.transform_to_noise(x, context)
    back, log_det = flow._transform.inverse(noise, flow._embedding_net(context))
    (back.sum() + log_det.sum()).backward()
    assert back.shape == (batch, 2) and log_det.shape == (batch,)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=0)


def test_context_by_position_by_keyword_and_none() -> None:
    x, context = torch.randn(4, 3), torch.randn(4, C)
    conditional, plain = ResidualTransform(branch(3, C)), ResidualTransform(branch(3))
    for name in ("forward", "inverse"):
        given_context, ignored = getattr(conditional, name), getattr(plain, name)
        by_position = given_context(x, context)
        assert same_everywhere(by_position, given_context(x, context=context))
        assert same_everywhere(by_position, given_context(inputs=x, context=context))
        assert not torch.equal(by_position[0], given_context(x, -context)[0])
        assert same_everywhere(ignored(x), ignored(x, None))
        assert same_everywhere(ignored(x), ignored(x, context=context))
        with pytest.raises(ValueError, match="context"):
            given_context(x)


def test_rows_do_not_see_each_other() -> None:
    transform = ResidualTransform(branch(3, C))
    x, context = torch.randn(6, 3), torch.randn(6, C)
    for one_pass in (transform.forward, transform.inverse):
        whole = one_pass(x, context)
        alone = one_pass(x[2:3], context[2:3])
        torch.testing.assert_close(alone[0], whole[0][2:3], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone[1], whole[1][2:3], atol=1e-4, rtol=0)


def test_samples_repeat_each_row_of_the_context() -> None:
    """`Flow.sample(n, context)` hands C n rows to the transform."""
    flow = Flow(ResidualTransform(branch(2, 1)), StandardNormal([2]))
    with torch.no_grad():
        torch.manual_seed(1)
        samples = flow.sample(500, torch.tensor([[-5.0], [5.0]]))
        torch.manual_seed(1)
        noise = torch.randn(1000, 2).view(2, 500, 2)
        expected = flow._transform.inverse(noise[1], torch.full((500, 1), 5.0))[0]
    assert samples.shape == (2, 500, 2)
    torch.testing.assert_close(samples[1], expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_and_back_to_training(mode) -> None:
    flow = conditional_flow("residual", "inverse residual")
    x, context = torch.randn(5, 2), torch.randn(5, 2)
    expected = flow.log_prob(x, context).detach()
    with mode():
        torch.testing.assert_close(flow.log_prob(x, context), expected)
        assert torch.isfinite(flow.sample(4, context)).all()
    flow.log_prob(x, context).sum().backward()
    assert not without_gradient(flow)


def test_train_and_eval_agree() -> None:
    flow = conditional_flow("residual", "inverse residual")
    x, context = torch.randn(5, 2), torch.randn(5, 2)
    assert torch.equal(flow.train().log_prob(x, context), flow.eval().log_prob(x, context))


def test_float64_is_kept_and_is_more_exact() -> None:
    stack = composite(["residual", "affine coupling", "inverse residual"], 3).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    y, log_det = stack(x)
    back, log_det_back = stack.inverse(y)
    assert {t.dtype for t in (y, log_det, back, log_det_back)} == {torch.float64}
    torch.testing.assert_close(back, x, atol=1e-12, rtol=0)
    torch.testing.assert_close(log_det_back, -log_det, atol=1e-11, rtol=0)


# copies ----------------------------------------------------------------------------------------------


def loaded(flow: Flow) -> Flow:
    buffer = io.BytesIO()
    torch.save(flow.state_dict(), buffer)
    buffer.seek(0)
    fresh = conditional_flow("residual", "inverse residual", "ActNorm")
    fresh.load_state_dict(torch.load(buffer))
    return fresh


def saved_whole(flow: Flow) -> Flow:
    buffer = io.BytesIO()
    torch.save(flow, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [loaded, saved_whole, copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))])
def test_copies_agree_and_are_independent(copied) -> None:
    flow = conditional_flow("residual", "inverse residual", "ActNorm")
    x, context = torch.randn(5, 2), torch.randn(5, 2)
    losses(lambda: -flow.log_prob(x, context).mean(), flow.parameters(), steps=2)
    twin = copied(flow)
    expected = flow.log_prob(x, context)
    assert torch.equal(twin.log_prob(x, context), expected)
    losses(lambda: -twin.log_prob(x, context).mean(), twin.parameters(), steps=2)
    assert not without_gradient(twin)
    assert torch.equal(flow.log_prob(x, context), expected)
    assert not torch.equal(twin.log_prob(x, context), expected)
    with torch.no_grad():
        scaled(twin, 100.0)
        x, _ = twin._transform.inverse(torch.randn(5, 2), torch.randn(5, C))
    assert torch.isfinite(x).all()


# construction ----------------------------------------------------------------------------------------


def test_a_block_is_taken_as_it_is() -> None:
    block = ResidualBlock(branch(2), Exact(), Newton())
    transform = ResidualTransform(block)
    assert transform.block is block and isinstance(transform, transforms.Transform)
    for given_too in ({"log_det": Exact()}, {"inverse": Newton()}):
        with pytest.raises(ValueError, match="belong to the ResidualBlock"):
            ResidualTransform(block, **given_too)


def test_estimator_and_solver_reach_the_block() -> None:
    transform = ResidualTransform(branch(2), log_det=Exact(chunk=1), inverse=Newton())
    assert transform.block.estimator == Exact(chunk=1) and transform.block.solver == Newton()


@pytest.mark.parametrize("misspelt", ["logdet", "context_features", "reverse", "coef"])
def test_an_unknown_keyword_is_refused_by_name(misspelt) -> None:
    with pytest.raises(TypeError, match=misspelt):
        ResidualTransform(branch(2), **{misspelt: 1})


@pytest.mark.parametrize(
    ("net", "culprit"),
    [
        (nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)), "Linear"),
        (nn.Sequential(nn.Linear(2, 4), nn.Dropout(), nn.Linear(4, 2)), "Dropout"),
        (nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), "BatchNorm1d"),
        (ResidualNet(2, 2, hidden_features=4), "ResidualNet"),
    ],
)
def test_an_uncertified_branch_is_refused_by_name(net, culprit) -> None:
    with pytest.raises(NotContractiveError, match=culprit):
        ResidualTransform(net)


def test_what_is_no_branch_is_refused() -> None:
    with pytest.raises(TypeError, match="branch"):
        ResidualTransform("net")
    with pytest.raises(TypeError, match="inverse"):
        ResidualTransform(branch(2), inverse="newton")


@pytest.mark.parametrize(
    ("inputs", "error", "word"),
    [
        (torch.randn(4, 3), ValueError, "3"),
        (torch.randn(4, 2, dtype=torch.float64), TypeError, "float64"),
        (torch.zeros(4, 2, dtype=torch.int64), TypeError, "int64"),
        (torch.randn(2), ValueError, "batch"),
    ],
)
def test_bad_inputs_are_named(inputs, error, word) -> None:
    transform = ResidualTransform(LipschitzMLP([2, 8, 2]))
    for one_pass in (transform.forward, transform.inverse):
        with pytest.raises(error, match=word):
            one_pass(inputs)


def test_a_context_of_the_wrong_length_is_named() -> None:
    transform = ResidualTransform(branch(2, C))
    for one_pass in (transform.forward, transform.inverse):
        with pytest.raises(ValueError, match="rows"):
            one_pass(torch.randn(4, 2), torch.randn(3, C))
