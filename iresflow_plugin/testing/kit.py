"""The ways to run the checks: one call with a report, or one pytest item per transform and check."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from iresflow_plugin.testing.case import Case
from iresflow_plugin.testing.checks import CHECKS, Check
from iresflow_plugin.testing.report import Report


def check_transform(
    subject: Any,
    event_shape: Iterable[int],
    context_shape: Iterable[int] | None = None,
    *,
    checks: Collection[str] | None = None,
    skip: Collection[str] = (),
    raise_failures: bool = True,
    **options: Any,
) -> Report:
    """Run every check on a transform or flow of any library.

    Args:
        subject: a transform, a flow, a pair of functions (forward, inverse), or a function without arguments that
            makes one; then "a fresh model" in the checks is really fresh. Never called itself: copies are.
        event_shape: of one sample, without the batch: (8,) or (3, 16, 16).
        context_shape: of one sample's context; None if there is none.
        checks: names of the checks to run; None runs all of `CHECKS`.
        skip: names of checks to leave out.
        raise_failures: raise one AssertionError that lists all failures; False returns the report alone.
        options: deterministic, contraction, inputs, outputs, batch, draws, seed: see `Case`.

    Raises:
        AssertionError: names every failed property with the measured and the allowed number.
        TypeError, ValueError: the subject is of no known kind, or a check or an option does not exist.

    >>> report = check_transform((lambda x: (2 * x, x.new_full(x.shape[:1], 3 * 0.6931472)),
    ...                           lambda y: (y / 2, y.new_full(y.shape[:1], -3 * 0.6931472))), [3])
    >>> report["log_det_is_that_of_the_jacobian"].status
    'passed'
    """
    chosen = [name for name in (CHECKS if checks is None else checks) if name not in skip]
    for name in [*chosen, *skip]:
        _known(name)
    event, context = _shape("event_shape", event_shape), None
    if context_shape is not None:
        context = _shape("context_shape", context_shape)
    with torch.random.fork_rng(devices=[]):
        case = Case(subject, event, context, **options)
    title = f"{type(case.subject).__name__} ({case.door.name})"
    report = Report(title, tuple(CHECKS[name].run(case) for name in chosen))
    if raise_failures:
        report.raise_failures()
    return report


def parametrize_with_checks(
    factories: Mapping[str, Callable[[], Any] | tuple[Callable[[], Any], Mapping[str, Any]]],
    expected_failures: Mapping[str, Mapping[str, str] | Collection[str]] | None = None,
    event_shape: Iterable[int] = (8,),
    context_shape: Iterable[int] | None = None,
    **options: Any,
) -> Any:
    """A pytest decorator: the test gets `transform_check`, a function to call, once for every transform and check.

    Args:
        factories: by name, a function that makes the transform, or a pair of it and options of `check_transform`
            that are its own, among them `skip`, names of checks to leave out.
        expected_failures: by name of the transform, the checks that fail and why; they are strict xfails.
        event_shape, context_shape, options: as for `check_transform`, for all that do not have their own.

    >>> @parametrize_with_checks({"mine": make_my_transform}, event_shape=[8])  # doctest: +SKIP
    ... def test_my_transform(transform_check):
    ...     transform_check()
    """
    import pytest

    expected_failures = expected_failures or {}
    for name, failures in expected_failures.items():
        if name not in factories:
            raise ValueError(f"expected_failures names {name!r}; the factories are {', '.join(factories)}.")
        for check in failures:
            _known(check)
    items = []
    for name, entry in factories.items():
        factory, own = entry if isinstance(entry, tuple) else (entry, {})
        settings = {"event_shape": event_shape, "context_shape": context_shape, **options, **own}
        failures, skipped = expected_failures.get(name, {}), settings.pop("skip", ())
        for check in [check for check in CHECKS.values() if check.name not in skipped]:
            reason = failures.get(check.name, "") if isinstance(failures, Mapping) else ""
            marks = [pytest.mark.xfail(strict=True, reason=reason)] if check.name in failures else []
            items.append(pytest.param(_Item(check, factory, settings), marks=marks, id=f"{name}-{check.name}"))
    return pytest.mark.parametrize("transform_check", items)


class _Item:
    """One check of one transform, to be called by a test."""

    def __init__(self, check: Check, factory: Callable[[], Any], settings: Mapping[str, Any]) -> None:
        self.check, self.factory, self.settings = check, factory, settings

    def __call__(self) -> None:
        report = check_transform(self.factory, checks=[self.check.name], raise_failures=True, **self.settings)
        outcome = report.outcomes[0]
        if outcome.status == "not applicable":
            import pytest

            pytest.skip(outcome.sentence)


def _known(name: str) -> None:
    if name not in CHECKS:
        raise ValueError(f"there is no check {name!r}; there are: {', '.join(CHECKS)}.")


def _shape(name: str, shape: Iterable[int]) -> tuple[int, ...]:
    numbers = tuple(int(n) for n in shape)
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{name} must hold positive sizes, such as (8,) or (3, 16, 16), got {numbers}.")
    return numbers
