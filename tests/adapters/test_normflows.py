"""Our flow inside normflows, held to what normflows asks of any flow, and mixed with those it ships."""

from __future__ import annotations

import copy
import io
import pickle

import normflows as nf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from normflows.flows import flow_test
from torch import Tensor, nn

from iresflow_plugin import NotContractiveError, ResidualBlock, using
from iresflow_plugin.adapters.normflows import ResidualFlow
from iresflow_plugin.inverse import Newton
from iresflow_plugin.lipschitz import constrain, lipschitz_bound
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

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated")  # normflows' InvertibleAffine


def masked_affine(features: int) -> nn.Module:
    mask = (torch.arange(features) % 2).float()
    return nf.flows.MaskedAffineFlow(mask, *(nf.nets.MLP([features, 8, features]) for _ in range(2)))


def coupling(features: int) -> nn.Module:
    kept = (features + 1) // 2
    return nf.flows.AffineCouplingBlock(nf.nets.MLP([kept, 8, 2 * (features - kept)]), scale_map="sigmoid")


OURS = {
    "residual": lambda d, c: ResidualFlow(branch(d, c)),
    "residual forward": lambda d, c: ResidualFlow(branch(d, c), reverse=False),
}
CONDITIONAL = {
    **OURS,
    "autoregressive": lambda d, c: nf.flows.MaskedAffineAutoregressive(d, 8, c, num_blocks=1),
    "spline coupling": lambda d, c: nf.flows.CoupledRationalQuadraticSpline(d, 1, 8, c),
    "spline autoregressive": lambda d, c: nf.flows.AutoregressiveRationalQuadraticSpline(d, 1, 8, c),
    "shuffle": lambda d, c: nf.flows.Permute(d, "shuffle"),
    "swap": lambda d, c: nf.flows.Permute(d, "swap"),
    "affine": lambda d, c: nf.flows.InvertibleAffine(d),
    "LU": lambda d, c: nf.flows.LULinearPermute(d),
}
KINDS = {
    **CONDITIONAL,
    "coupling": lambda d, c: coupling(d),
    "masked affine": lambda d, c: masked_affine(d),
    "ActNorm": lambda d, c: nf.flows.ActNorm(d),
    "constant": lambda d, c: nf.flows.AffineConstFlow(d),
    "reverse": lambda d, c: nf.flows.Reverse(ResidualFlow(branch(d))),
    "composite": lambda d, c: nf.flows.Composite([ResidualFlow(branch(d)), nf.flows.ActNorm(d), coupling(d)]),
}


def stacks(kinds):
    """Any layers with one of ours among them."""
    return st.lists(st.sampled_from(sorted(kinds)), max_size=3).flatmap(
        lambda names: st.tuples(st.sampled_from(sorted(OURS)), st.integers(0, len(names))).map(
            lambda ours: [*names[: ours[1]], ours[0], *names[ours[1] :]]
        )
    )


class Clusters(nn.Module):
    """A target for reverse KL."""

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return two_clusters_log_prob(z if context is None else z - context)


def model(names: list[str], features: int) -> nf.NormalizingFlow:
    """A model as it is after some training: bounds reached, nothing at its identity, ActNorm initialised."""
    base = nf.distributions.DiagGaussian(features)
    result = shaken(nf.NormalizingFlow(base, [KINDS[name](features, None) for name in names], Clusters()))
    with torch.no_grad():
        result.log_prob(torch.randn(64, features))
    return result


def conditional_model(names: list[str], features: int, context_features: int = C) -> nf.ConditionalNormalizingFlow:
    base = nf.distributions.base.ConditionalDiagGaussian(features, nn.Linear(context_features, 2 * features))
    flows = [CONDITIONAL[name](features, context_features) for name in names]
    return shaken(nf.ConditionalNormalizingFlow(base, flows, Clusters()))


# what normflows' own suite asks -----------------------------------------------------------------------


# Where x + g(x) is rounded before it is solved for x, that alone may cost 1 / (1 - L) times as much as rounding does.
# 1e-4 is also what normflows asks of its own residual flow.
LOOSE = dict(atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("context_features", [None, C])
@pytest.mark.parametrize("features", [1, 2, 6])
@pytest.mark.parametrize("reverse", [True, False])
def test_the_hosts_flow_test(features, context_features, reverse, state) -> None:
    flow = ResidualFlow(branch(features, context_features, state), reverse)
    context = None if context_features is None else torch.randn(10, C)
    flow_test.FlowTest().checkForwardInverse(flow, torch.randn(10, features), context, **({} if reverse else LOOSE))
    if context is None:
        flow_test.FlowTest().checkForwardInverse(nf.flows.Reverse(flow), torch.randn(10, features), **LOOSE)
        flow_test.FlowTest().checkForwardInverse(nf.flows.Composite([flow, flow]), torch.randn(10, features), **LOOSE)


@pytest.mark.parametrize("reverse", [True, False])
def test_the_hosts_flow_test_at_the_size_of_its_residual_cases(reverse) -> None:
    for features in (2, 4, 5, 32):
        flow = ResidualFlow(branch(features, width=64), reverse, Exact())
        flow_test.FlowTest().checkForwardInverse(flow, torch.randn(3, features), **LOOSE)


@pytest.mark.parametrize("reverse", [True, False])
def test_x_plus_g_is_the_pass_that_reverse_says(reverse) -> None:
    net = branch(2)
    x = torch.randn(4, 2)
    flow = ResidualFlow(net, reverse)
    explicit, solved = (flow.inverse, flow.forward) if reverse else (flow.forward, flow.inverse)
    expected, log_det = ResidualBlock(net)(x)
    assert same_everywhere(explicit(x), (expected, log_det))
    back, log_det_back = solved(expected)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=0)
    torch.testing.assert_close(log_det_back, -log_det, atol=1e-4, rtol=0)


# mixed with the flows of normflows -------------------------------------------------------------------


def check_volume_and_round_trip(flow: nf.NormalizingFlow, features: int, context: dict[str, Tensor]) -> None:
    """In double precision; normflows itself sums the log-dets in single precision everywhere but in `log_prob`."""
    x = torch.randn(3, features, dtype=torch.float64)

    def rows(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(flow, name)(x, **{key: value[: len(x)] for key, value in context.items()})

    z, log_det = rows("inverse_and_log_det", x)
    back, log_det_back = rows("forward_and_log_det", z)
    torch.testing.assert_close(back, x, atol=1e-9, rtol=0)
    torch.testing.assert_close(log_det_back, -log_det, atol=1e-4, rtol=0, check_dtype=False)
    exact = rows("log_prob", x) - flow.q0.log_prob(z, **context)
    torch.testing.assert_close(log_det, exact, atol=1e-4, rtol=0, check_dtype=False)
    torch.testing.assert_close(exact, dense_log_det(lambda r: rows("inverse_and_log_det", r), x), atol=1e-6, rtol=1e-6)
    forward = dense_log_det(lambda r: rows("forward_and_log_det", r), z)
    torch.testing.assert_close(log_det_back, forward, atol=1e-4, rtol=0, check_dtype=False)


@given(names=stacks(KINDS), features=st.integers(2, 4), seed=st.integers(0, 999))
def test_any_model_has_the_log_det_of_its_jacobian_and_is_inverted(names, features, seed) -> None:
    torch.manual_seed(seed)
    check_volume_and_round_trip(model(names, features).double(), features, {})


@given(names=stacks(CONDITIONAL), features=st.integers(2, 4), seed=st.integers(0, 999))
def test_any_conditional_model_has_the_log_det_of_its_jacobian_and_is_inverted(names, features, seed) -> None:
    torch.manual_seed(seed)
    context = torch.randn(1, C, dtype=torch.float64).expand(3, C)
    check_volume_and_round_trip(conditional_model(names, features).double(), features, {"context": context})


@settings(max_examples=settings.default.max_examples // 2)
@given(names=stacks(KINDS), seed=st.integers(0, 999))
def test_the_density_of_any_model_integrates_to_one(names, seed) -> None:
    torch.manual_seed(seed)
    flow = model(names, 2)
    with torch.no_grad():
        reach = 1.2 * flow.sample(2000)[0].abs().max().item()
    assert integral(flow.log_prob, reach) == pytest.approx(1, abs=3e-3)


@given(names=stacks(KINDS), seed=st.integers(0, 999))
def test_any_model_samples_what_it_scores(names, seed) -> None:
    torch.manual_seed(seed)
    flow = model(names, 3)
    with torch.no_grad():
        samples, log_prob = flow.sample(8)
        again = flow.log_prob(samples)
    assert torch.isfinite(samples).all()
    torch.testing.assert_close(again, log_prob, atol=2e-3, rtol=1e-3)


@given(names=stacks(CONDITIONAL), seed=st.integers(0, 999))
def test_any_conditional_model_samples_what_it_scores(names, seed) -> None:
    torch.manual_seed(seed)
    flow = conditional_model(names, 3)
    context = torch.randn(8, C)
    with torch.no_grad():
        samples, log_prob = flow.sample(8, context=context)
        again = flow.log_prob(samples, context=context)
    assert torch.isfinite(samples).all()
    torch.testing.assert_close(again, log_prob, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("reverse", [True, False])
def test_multiscale_on_images(reverse) -> None:
    """The adapter under `MultiscaleFlow`, which adds log-dets in place, with merges and squeezes of normflows."""

    def block(channels: int, side: int) -> ResidualFlow:
        size = channels * side * side
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(size, 16), nn.Tanh(), nn.Linear(16, size), nn.Unflatten(1, (channels, side, side))
        )
        return ResidualFlow(scaled(constrain(net)), reverse, Exact())

    bases = [nf.distributions.DiagGaussian((2, 2, 2), trainable=False) for _ in range(2)]
    flows = [[block(2, 2)], [block(4, 2), nf.flows.Squeeze()]]
    flow = nf.MultiscaleFlow(bases, flows, [nf.flows.Merge()], class_cond=False)
    x = torch.randn(5, 1, 4, 4)
    (-flow.log_prob(x, None).mean()).backward()
    assert not without_gradient(flow)
    samples, log_prob = flow.sample(6)
    assert samples.shape == (6, 1, 4, 4) and log_prob.shape == (6,)
    torch.testing.assert_close(flow.log_prob(samples, None), log_prob, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("reverse", [True, False])
def test_shift_changes_our_outputs_in_place(reverse) -> None:
    """`nf.transforms.Shift` writes into the tensor that it is given."""
    ours = ResidualFlow(branch(2), reverse)
    shift = nf.transforms.Shift(torch.tensor([0.5, -1.0]))
    behind = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), [ours, shift], Clusters())
    behind.reverse_kld(16).backward()
    assert not without_gradient(behind)
    before = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), [shift, ours])
    x = torch.randn(16, 2)
    kept = x.clone()
    before.zero_grad()
    loss = before.forward_kld(x)
    loss.backward()
    assert torch.equal(x, kept) and not without_gradient(before)
    z, log_det = ours.inverse(x)
    torch.testing.assert_close(loss, -(before.q0.log_prob(z + shift.shift) + log_det).mean())


# training --------------------------------------------------------------------------------------------

MIXES = (["residual", "ActNorm", "residual"], ["residual forward", "coupling"], ["residual", "LU", "residual forward"])
CONDITIONAL_MIXES = (["residual", "shuffle", "residual"], ["residual forward", "LU"])


@pytest.mark.parametrize("names", MIXES, ids=" ".join)
def test_training_on_data(names) -> None:
    flow = model(names, 2)
    values = losses(lambda: flow.forward_kld(two_clusters(64)), flow.parameters())
    assert not without_gradient(flow)
    assert sum(values[-5:]) < sum(values[:5]) - 0.5


@pytest.mark.parametrize("names", CONDITIONAL_MIXES, ids=" ".join)
def test_training_on_data_with_a_context(names) -> None:
    flow = conditional_model(names, 2, 2)

    def loss() -> Tensor:
        context = torch.randn(64, 2)
        return flow.forward_kld(two_clusters(64) + context, context)

    values = losses(loss, flow.parameters())
    assert not without_gradient(flow)
    assert sum(values[-5:]) < sum(values[:5]) - 0.5


LOSSES = {
    "reverse KL": lambda flow: flow.reverse_kld(64),
    "reverse KL, path gradient": lambda flow: flow.reverse_kld(64, score_fn=False),
    "alpha divergence": lambda flow: flow.reverse_alpha_div(64, alpha=0.5),
    "alpha divergence, dreg": lambda flow: flow.reverse_alpha_div(64, alpha=0.5, dreg=True),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("names", MIXES[1:], ids=" ".join)
def test_training_on_a_density(names, loss) -> None:
    """The losses without score function freeze every parameter, run the inverse, and unfreeze.

    In double precision: normflows' dreg takes the logarithm of importance weights, which underflow in single precision.
    """
    flow = model(names, 2).double()

    def divergence() -> float:
        torch.manual_seed(7)
        with torch.no_grad():
            return flow.reverse_kld(500).item()

    before = divergence()
    losses(lambda: loss(flow), flow.parameters(), steps=20)
    assert not without_gradient(flow)
    assert divergence() < before - 0.1


@pytest.mark.parametrize("score_fn", [True, False])
@pytest.mark.parametrize("names", CONDITIONAL_MIXES, ids=" ".join)
def test_training_on_a_density_with_a_context(names, score_fn) -> None:
    flow = conditional_model(names, 2, 2)
    context = torch.randn(64, 2)
    values = losses(lambda: flow.reverse_kld(64, context, score_fn=score_fn), flow.parameters())
    assert not without_gradient(flow)
    assert sum(values[-5:]) < sum(values[:5]) - 0.5


@pytest.mark.parametrize("reverse", [True, False])
def test_the_path_gradient_is_the_gradient_up_to_the_score(reverse) -> None:
    """E[score] = 0, and for one sample the two differ by the score exactly: the frozen inverse pass is right."""
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), [ResidualFlow(branch(2), reverse)], Clusters()).double()
    gradients = {}
    for score_fn in (True, False):
        torch.manual_seed(3)
        flow.zero_grad()
        flow.reverse_kld(5, score_fn=score_fn).backward()
        gradients[score_fn] = [p.grad.clone() for p in flow.parameters()]
    torch.manual_seed(3)
    with torch.no_grad():
        samples, _ = flow.sample(5)
    flow.zero_grad()
    flow.log_prob(samples).mean().backward()
    for total, path, parameter in zip(gradients[True], gradients[False], flow.parameters(), strict=True):
        torch.testing.assert_close(total - path, parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("turn", [lambda flow: flow, nf.flows.Reverse], ids=["forward", "inverse"])
@pytest.mark.parametrize("reverse", [True, False])
def test_gradients_are_those_of_finite_differences(reverse, turn) -> None:
    """Of outputs and log-det, per sample, with respect to inputs and every parameter."""
    flow = turn(ResidualFlow(branch(2, width=4), reverse)).double()
    names, parameters = zip(*flow.named_parameters(), strict=True)
    z = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def both(z: Tensor, *values: Tensor) -> Tensor:
        outputs, log_det = torch.func.functional_call(flow, dict(zip(names, values, strict=True)), (z,))
        return torch.cat([outputs, log_det[:, None]], 1)

    assert torch.autograd.gradcheck(both, (z, *parameters))


def test_update_lipschitz_is_harmless() -> None:
    """Old user code calls it after every step."""
    flow = model(["residual", "ActNorm", "residual forward"], 2)
    x = torch.randn(5, 2)
    state, expected = copy.deepcopy(flow.state_dict()), flow.log_prob(x)
    nf.utils.update_lipschitz(flow, 5)
    assert same_everywhere(state.values(), flow.state_dict().values())
    assert torch.equal(flow.log_prob(x), expected)


def test_the_contraction_needs_no_call_after_a_step() -> None:
    flow = model(["residual", "residual forward"], 2)
    losses(lambda: -flow.log_prob(torch.randn(32, 2)).mean(), flow.parameters(), steps=5)
    scaled(flow, 100.0)
    for part in flow.flows:
        bound = lipschitz_bound(part.block.branch)
        assert bound.certified and bound.value <= 0.97 * (1 + 1e-6)


# batches, contexts, modes, dtypes --------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch) -> None:
    flow = conditional_model(["residual", "shuffle", "residual forward"], 2)
    x, context = torch.randn(batch, 2), torch.randn(batch, C)
    log_prob = flow.log_prob(x, context=context)
    assert log_prob.shape == (batch,)
    log_prob.sum().backward()
    z, log_det = flow.inverse_and_log_det(x, context=context)
    back, log_det_back = flow.forward_and_log_det(z, context=context)
    (back.sum() + log_det_back.sum()).backward()
    assert back.shape == (batch, 2) and log_det.shape == log_det_back.shape == (batch,)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=0)


def test_the_log_det_has_one_entry_per_sample_and_inputs_stay() -> None:
    z, context = torch.randn(5, 3), torch.randn(5, C)
    kept = z.clone(), context.clone()
    for make in OURS.values():
        flow = make(3, C)
        for one_pass in (flow.forward, flow.inverse):
            outputs, log_det = one_pass(z, context)
            assert outputs.shape == (5, 3) and log_det.shape == (5,) and log_det.dtype == z.dtype
            outputs.data.add_(1)
            log_det.data.add_(1)
            assert same_everywhere((z, context), kept) and not z.requires_grad


def test_context_by_position_by_keyword_and_none() -> None:
    z, context = torch.randn(4, 3), torch.randn(4, C)
    for make in OURS.values():
        conditional, plain = make(3, C), make(3, None)
        for name in ("forward", "inverse"):
            given_context, ignored = getattr(conditional, name), getattr(plain, name)
            by_position = given_context(z, context)
            assert same_everywhere(by_position, given_context(z, context=context))
            assert not torch.equal(by_position[0], given_context(z, -context)[0])
            assert same_everywhere(ignored(z), ignored(z, context=None))
            assert same_everywhere(ignored(z), ignored(z, context=context))
            with pytest.raises(ValueError, match="context"):
                given_context(z)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_and_back_to_training(mode) -> None:
    flow = conditional_model(["residual", "residual forward"], 2)
    x, context = torch.randn(5, 2), torch.randn(5, C)
    expected = flow.log_prob(x, context=context).detach()
    with mode():
        torch.testing.assert_close(flow.log_prob(x, context=context), expected)
        assert torch.isfinite(flow.sample(5, context=context)[0]).all()
    flow.log_prob(x, context=context).sum().backward()
    assert not without_gradient(flow)


def test_train_and_eval_agree() -> None:
    flow = model(["residual", "ActNorm", "residual forward"], 2)
    x = torch.randn(5, 2)
    assert torch.equal(flow.train().log_prob(x), flow.eval().log_prob(x))


def test_float64_is_kept_and_is_more_exact() -> None:
    flow = model(["residual", "coupling", "residual forward"], 3).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    assert flow.log_prob(x).dtype == torch.float64
    torch.testing.assert_close(flow.forward(flow.inverse(x)), x, atol=1e-12, rtol=0)


def test_using_reaches_every_block() -> None:
    flow = model(["residual", "composite", "reverse"], 2)
    x = torch.randn(5, 2)
    expected = flow.log_prob(x)
    with using(flow, log_det=Exact(chunk=1), inverse=Newton()):
        torch.testing.assert_close(flow.log_prob(x), expected, atol=1e-4, rtol=1e-4)


# copies ----------------------------------------------------------------------------------------------


def loaded(flow: nf.NormalizingFlow) -> nf.NormalizingFlow:
    buffer = io.BytesIO()
    torch.save(flow.state_dict(), buffer)
    buffer.seek(0)
    fresh = model(["residual", "ActNorm", "residual forward"], 2)
    fresh.load_state_dict(torch.load(buffer))
    return fresh


def saved_whole(flow: nf.NormalizingFlow) -> nf.NormalizingFlow:
    buffer = io.BytesIO()
    torch.save(flow, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [loaded, saved_whole, copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))])
def test_copies_agree_and_are_independent(copied) -> None:
    flow = model(["residual", "ActNorm", "residual forward"], 2)
    x = torch.randn(5, 2)
    losses(lambda: flow.forward_kld(x), flow.parameters(), steps=2)
    twin = copied(flow)
    expected = flow.log_prob(x)
    assert torch.equal(twin.log_prob(x), expected)
    losses(lambda: twin.forward_kld(x), twin.parameters(), steps=2)
    assert not without_gradient(twin)
    assert torch.equal(flow.log_prob(x), expected)
    assert not torch.equal(twin.log_prob(x), expected)
    scaled(twin, 100.0)
    assert torch.isfinite(twin.sample(5)[0]).all()


def test_the_hosts_own_save_and_load(tmp_path) -> None:
    flow, fresh = (model(["residual", "residual forward"], 2) for _ in range(2))
    flow.save(tmp_path / "flow.pt")
    fresh.load(tmp_path / "flow.pt")
    x = torch.randn(5, 2)
    assert torch.equal(fresh.log_prob(x), flow.log_prob(x))


# construction ----------------------------------------------------------------------------------------


def test_two_names_change() -> None:
    """nf.flows.Residual(nf.nets.LipschitzMLP([...])) -> ResidualFlow(LipschitzMLP([...])): the same orientation."""
    ours, theirs = ResidualFlow(LipschitzMLP([2, 8, 8, 2])), nf.flows.Residual(nf.nets.LipschitzMLP([2, 8, 8, 2]))
    assert isinstance(ours, nf.flows.Flow) and ours.reverse is theirs.reverse is True


def test_a_block_is_taken_as_it_is() -> None:
    block = ResidualBlock(branch(2), Exact(), Newton())
    assert ResidualFlow(block, reverse=False).block is block
    for given_too in ({"log_det": Exact()}, {"inverse": Newton()}):
        with pytest.raises(ValueError, match="belong to the ResidualBlock"):
            ResidualFlow(block, **given_too)


@pytest.mark.parametrize("misspelt", ["logdet", "reduce_memory", "geom_p", "n_dist", "brute_force", "coef"])
def test_an_unknown_keyword_is_refused_by_name(misspelt) -> None:
    with pytest.raises(TypeError, match=misspelt):
        ResidualFlow(branch(2), **{misspelt: 1})


@pytest.mark.parametrize("reverse", [None, 1, "True", Exact()])
def test_a_reverse_that_is_no_bool_is_refused(reverse) -> None:
    with pytest.raises(TypeError, match="reverse"):
        ResidualFlow(branch(2), reverse)


@pytest.mark.parametrize(
    ("net", "culprit"),
    [
        (nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)), "Linear"),
        (nn.Sequential(nn.Linear(2, 4), nn.SELU(), nn.Linear(4, 2)), "SELU"),
        (nf.nets.LipschitzMLP([2, 4, 2]), "LipschitzMLP"),
        (nf.nets.MLP([2, 4, 2]), "MLP"),
    ],
)
def test_an_uncertified_branch_is_refused_by_name(net, culprit) -> None:
    with pytest.raises(NotContractiveError, match=culprit):
        ResidualFlow(net)
