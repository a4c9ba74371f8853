"""The ways in: reports, items, the command line, the doors, the strategies; and the kit on our own transforms."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial

import nflows.transforms
import normflows as nf
import pytest
import torch
from hypothesis import given
from planted import D, SignError, Sound
from torch.distributions import ComposeTransform, SigmoidTransform
from torch.distributions.transforms import ExpTransform

from iresflow_plugin import ResidualBlock
from iresflow_plugin.adapters.nflows import ResidualTransform
from iresflow_plugin.adapters.normflows import ResidualFlow
from iresflow_plugin.log_det import RussianRoulette
from iresflow_plugin.nets import LipschitzMLP
from iresflow_plugin.testing import CHECKS, check_transform, parametrize_with_checks, scale_weights
from iresflow_plugin.testing.strategies import blocks, contexts, events


def scaled(wrap, context_features=None, size=4, **options):
    return wrap(scale_weights(LipschitzMLP([size, 16, 16, size], context_features), 3), **options)


OURS = {
    "block": partial(scaled, ResidualBlock),
    "nflows": (partial(scaled, ResidualTransform, 3), {"context_shape": [3]}),
    "normflows": partial(scaled, ResidualFlow),
    "two-dimensions": (partial(scaled, ResidualFlow, size=2), {"event_shape": [2]}),
    "roulette": partial(scaled, ResidualBlock, log_det=RussianRoulette()),
}


@parametrize_with_checks(OURS, event_shape=[4])
def test_our_transforms(transform_check):
    transform_check()


@parametrize_with_checks(
    {"sign-error": SignError},
    expected_failures={
        "sign-error": {
            "log_det_is_that_of_the_jacobian": "the sign is wrong",
            "gradients_of_the_log_det": "and so is its gradient",
            "per_sample_weights_are_honoured": "and so is its gradient",
        }
    },
    event_shape=[D],
)
def test_expected_failures_are_strict(transform_check):
    transform_check()


def test_one_error_lists_all_failures_with_their_numbers():
    with pytest.raises(AssertionError) as caught:
        check_transform(SignError, [D], checks=["log_det_is_that_of_the_jacobian", "gradients_of_the_log_det"])
    message = str(caught.value)
    assert "fails 2 of 2 checks" in message
    assert "log_det_is_that_of_the_jacobian: The log-det equals that of the dense" in message
    assert "Measured " in message and "allowed 1e-06" in message


def test_the_table():
    report = check_transform(Sound, [D], checks=["inverse_undoes_forward", "context_matters"])
    assert "1 of 1 checks passed, 1 not applicable" in str(report)


def test_the_users_object_is_left_alone():
    flow = nf.flows.ActNorm(D)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    check_transform(flow, [D], checks=["inverse_undoes_forward", "contraction_survives_everything"])
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())


def test_the_random_state_is_left_alone():
    torch.manual_seed(3)
    wanted = torch.randn(2)
    torch.manual_seed(3)
    transform = Sound()
    torch.manual_seed(3)
    check_transform(transform, [D], checks=["inverse_undoes_forward"])
    assert torch.equal(torch.randn(2), wanted)


def doubling():
    shift = D * math.log(2)
    return lambda x: (2 * x, x.new_full(x.shape[:1], shift)), lambda y: (y / 2, y.new_full(y.shape[:1], -shift))


@pytest.mark.parametrize(
    ("subject", "options"),
    [
        (doubling, {}),
        (lambda: ComposeTransform([ExpTransform()]), {"outputs": lambda n: torch.rand(n, D) + 0.1}),
        (SigmoidTransform, {"outputs": lambda n: 0.1 + 0.8 * torch.rand(n, D)}),
        (lambda: nflows.transforms.RandomPermutation(D), {}),
        (lambda: nf.flows.LULinearPermute(D), {}),
        (lambda: nf.NormalizingFlow(nf.distributions.DiagGaussian(D), [nf.flows.LULinearPermute(D)]), {}),
    ],
    ids=["pair", "torch-compose", "torch-sigmoid", "nflows", "normflows", "normflows-model"],
)
def test_doors(subject, options):
    values = ["inverse_undoes_forward", "log_det_is_that_of_the_jacobian", "inverse_log_det_belongs_to_the_solution"]
    report = check_transform(subject(), [D], checks=values, **options)
    assert [o.status for o in report.outcomes] == ["passed"] * 3


def test_normflows_residual_fails_what_it_is_known_for():
    def trained():
        torch.manual_seed(0)
        net = nf.nets.LipschitzMLP([D, 16, 16, D], lipschitz_const=0.97, init_zeros=False)
        flow = nf.flows.Residual(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(100):
            optimizer.zero_grad()
            (net(x := torch.randn(64, D)) + x).square().mean().backward()
            optimizer.step()
            nf.utils.update_lipschitz(flow, 20)
        return flow

    known = [
        "inverse_undoes_forward",  # D4
        "random_log_det_reports_its_error",  # D17
        "per_sample_weights_are_honoured",  # D2
        "every_parameter_learns",  # D7
        "inputs_are_left_alone",  # D9
        "a_torch_seed_suffices",  # D10
        "contraction_survives_everything",  # D3
        "failure_is_loud",  # D5
    ]
    report = check_transform(trained, [D], checks=known, raise_failures=False)
    assert {o.check for o in report.failures} == set(known), report


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: check_transform(Sound, []), "event_shape"),
        (lambda: check_transform(Sound, [0]), "event_shape"),
        (lambda: check_transform(Sound, [D], [-1]), "context_shape"),
        (lambda: check_transform(Sound, [D], checks=["no_such"]), "no_such"),
        (lambda: check_transform(Sound, [D], skip=["no_such"]), "no_such"),
        (lambda: parametrize_with_checks({"a": Sound}, {"b": ["inverse_undoes_forward"]}), "'b'"),
        (lambda: parametrize_with_checks({"a": Sound}, {"a": ["no_such"]}), "no_such"),
    ],
)
def test_bad_arguments_are_named(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_what_is_no_transform_is_refused():
    with pytest.raises(TypeError, match="knows"):
        check_transform(torch.nn.Linear(2, 2), [2])


@pytest.mark.parametrize(
    ("target", "code", "words"), [("planted:Sound", 0, "passed"), ("planted:SignError", 1, "FAILED")]
)
def test_the_command_line(target, code, words, importable):
    command = [sys.executable, "-m", "iresflow_plugin.testing", target, "--event", str(D)]
    command += ["--check", "log_det_is_that_of_the_jacobian", "--check", "inverse_undoes_forward"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert words in result.stdout


def test_every_check_says_its_property_and_its_bug():
    for check in CHECKS.values():
        assert check.sentence.endswith("."), check.name
        assert "Catches" in (check.body.__doc__ or ""), check.name


def test_all_defects_are_covered():
    """D1 to D18 of the list of known defects."""
    covered = {defect for check in CHECKS.values() for defect in check.defects}
    assert covered == {f"D{n}" for n in range(1, 19)}


@given(blocks(3), events((3,)))
def test_blocks_invert_at_every_scale(block, x):
    y, log_det = block(x)
    back, log_det_back = block.inverse(y)
    scale = 1 + x.abs().amax(1, keepdim=True)
    assert bool(((back - x).abs() <= 1e-10 * scale).all())
    assert torch.allclose(log_det, -log_det_back, atol=1e-6)


@given(blocks(3, 2), events((3,), extreme=False), contexts(2))
def test_conditional_blocks_invert(block, x, context):
    with torch.no_grad():
        assert torch.allclose(block.inverse(block(x, context)[0], context)[0], x, atol=1e-10)
