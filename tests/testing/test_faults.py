"""Every check catches the fault it is for, and the sound control passes them all."""

from __future__ import annotations

import planted
import pytest
from planted import D

from iresflow_plugin.testing import CHECKS, check_transform

C = 2
# by check: the faulty transform, and how it is shown to the kit
FAULTS = {
    "inverse_undoes_forward": (planted.InverseOff, {}),
    "forward_undoes_inverse": (planted.InverseOff, {}),
    "log_det_is_that_of_the_jacobian": (planted.SignError, {}),
    "inverse_log_det_belongs_to_the_solution": (planted.InverseSign, {}),
    "exactness_is_as_claimed": (planted.Noisy, {"deterministic": True}),
    "random_log_det_reports_its_error": (planted.Noisy, {}),
    "gradients_of_the_outputs": (planted.DetachedSolution, {}),
    "gradients_of_the_log_det": (planted.DetachedInEval, {}),
    "gradients_of_the_inverse_log_det": (planted.DetachedInverseLogDet, {}),
    "per_sample_weights_are_honoured": (planted.FirstRowsCotangent, {}),
    "every_parameter_learns": (planted.IdleParameter, {}),
    "rows_are_independent": (planted.BatchMean, {}),
    "context_matters": (planted.IgnoresContext, {"context_shape": [C]}),
    "context_is_optional": (planted.NoContext, {}),
    "log_det_has_a_number_per_sample": (planted.LogDetColumn, {}),
    "batches_of_none_and_one": (planted.Squeezes, {}),
    "memory_layout_does_not_matter": (planted.Views, {}),
    "inputs_are_left_alone": (planted.TouchesInputs, {}),
    "outputs_may_be_changed_in_place": (planted.ReturnsWhatItSaved, {}),
    "a_torch_seed_suffices": (planted.OwnRandomness, {}),
    "train_equals_eval": (planted.ModeMatters, {}),
    "works_without_gradients": (planted.NeedsGradients, {}),
    "works_under_torch_func": (planted.UpdatesABuffer, {}),
    "state_dict_loads_into_a_fresh_model": (planted.ForgetsState, {}),
    "deepcopy_gives_the_same_function": (planted.CopiesAreOne, {}),
    "pickle_gives_the_same_function": (planted.HoldsALambda, {}),
    "contraction_survives_everything": (planted.Unconstrained, {"contraction": True}),
    "bound_covers_the_operator": (planted.Unconstrained, {}),
    "failure_is_loud": (planted.Unconstrained, {"contraction": True}),
    "bad_arguments_are_rejected": (planted.SwallowsKeywords, {}),
    "density_integrates_to_one": (planted.NotNormalised, {"event_shape": [1]}),
    "flow_samples_what_it_scores": (planted.FakeFlow, {}),
    "training_lowers_the_loss": (planted.UphillGradients, {}),
    "compiles_to_the_same_numbers": (planted.CompilesToAnother, {}),
    "two_processes_give_the_gradient_of_one": (planted.IdleParameter, {}),
}


def test_every_check_has_a_planted_fault():
    assert set(FAULTS) == set(CHECKS)


def subject(kind, settings):
    features = settings.get("event_shape", [D])[0]
    if kind is planted.FakeFlow:
        return lambda: planted.FakeFlow(0.1)
    if kind is planted.Unconstrained:
        return planted.Unconstrained
    if kind is planted.SwallowsKeywords:
        return lambda **kwargs: planted.SwallowsKeywords(features, **kwargs)
    return lambda: kind(features, *settings.get("context_shape", []))


@pytest.mark.parametrize("check", list(CHECKS))
def test_the_fault_is_caught(check, importable):
    kind, settings = FAULTS[check]
    report = check_transform(
        subject(kind, settings), **{"event_shape": [D], **settings}, checks=[check], raise_failures=False
    )
    assert report[check].status == "failed", report


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        pytest.param(lambda: planted.Sound(D), {"event_shape": [D]}, id="plain"),
        pytest.param(lambda: planted.Sound(D, C), {"event_shape": [D], "context_shape": [C]}, id="conditional"),
        pytest.param(lambda: planted.Sound(1), {"event_shape": [1]}, id="one-dimension"),
        pytest.param(lambda: planted.FakeFlow(0.0), {"event_shape": [D]}, id="flow"),
    ],
)
def test_the_sound_control_passes(make, settings, importable):
    report = check_transform(make, **settings, raise_failures=False)
    assert report.passed, report


def test_most_checks_apply_to_the_control(importable):
    """A check that finds itself not applicable everywhere would prove nothing."""
    applied = set()
    for make, settings in ((lambda: planted.FakeFlow(0.0), {}), (lambda: planted.Sound(D, C), {"context_shape": [C]})):
        report = check_transform(make, [D], **settings, raise_failures=False)
        applied |= {o.check for o in report.outcomes if o.status == "passed"}
    special = {
        "exactness_is_as_claimed",
        "random_log_det_reports_its_error",
        "context_is_optional",
        "contraction_survives_everything",
        "bound_covers_the_operator",
        "density_integrates_to_one",
    }
    assert set(CHECKS) - applied <= special
